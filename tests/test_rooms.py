"""A room imports only rooms below it, no modules import each other in a circle, and no file is long."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Top to bottom; rooms of one floor do not import each other. "l2t_fast" is its __init__, the public names.
FLOORS = [
    ["__main__"],
    ["cli", "benchmarks"],
    ["l2t_fast"],
    ["runs"],
    ["reports"],
    ["settings", "training"],
    ["methods"],
    ["engine"],
    ["learner", "data"],
    ["kernels", "networks", "files", "reference"],
    ["bounds", "ranks"],
    ["choices", "environment", "errors", "signals"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
Imports = dict[str, set[str]]  # module -> the modules of the project that it imports


def sources(*tops: str) -> list[Path]:
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]


def module_of(path: Path) -> str:
    """The name a file is imported by; kernels/ is installed as l2t_fast.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(["l2t_fast", *parts] if parts[0] == "kernels" else parts)


def imported(text: str, modules: set[str]) -> set[str]:
    """What a file imports anywhere in it, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) | (set() if names <= modules else {node.module})
    return found & modules


def room_of(module: str) -> str:
    first, *rest = module.split(".")
    room = rest[0] if rest and first == "l2t_fast" else first
    return "reference" if room in ("reference_networks", "reference_steps") else room


def upward(imports: Imports) -> list[str]:
    """Imports of a room that does not stand below."""
    pairs = [(module, other) for module, others in imports.items() for other in others]
    rooms = {(module, other): (room_of(module), room_of(other)) for module, other in pairs}
    return sorted(
        f"{module} imports {other}"
        for (module, other), (above, below) in rooms.items()
        if above != below and FLOOR[above] >= FLOOR[below]
    )


@pytest.fixture(scope="module")
def imports() -> Imports:
    files = {module_of(path): path for path in sources("l2t_fast", "kernels", "benchmarks")}
    return {module: imported(path.read_text(encoding="utf-8"), set(files)) for module, path in files.items()}


def test_a_room_imports_only_rooms_below_it(imports: Imports) -> None:
    assert upward(imports) == []


def test_no_modules_import_each_other_in_a_circle(imports: Imports) -> None:
    TopologicalSorter(imports).prepare()


def test_the_reference_computes_with_nothing_of_the_fast_path(imports: Imports) -> None:
    reference = {"l2t_fast.reference", "l2t_fast.reference_networks", "l2t_fast.reference_steps"}
    assert set().union(*(imports[module] for module in reference)) <= reference | {"l2t_fast.errors"}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("l2t_fast.learner.terms", "from l2t_fast.engine import state"),
        ("l2t_fast.data.splits", "def f():\n    import l2t_fast.learner.pairs"),
        ("l2t_fast.reference", "if TYPE_CHECKING:\n    from l2t_fast.kernels.matching.ops import matching_loss"),
        ("l2t_fast.runs.cell", "from l2t_fast import L2T"),
    ],
)
def test_a_wrong_import_is_found(module: str, text: str, imports: Imports) -> None:
    (other,) = imported(text, set(imports))
    assert upward({**imports, module: imports[module] | {other}}) == [f"{module} imports {other}"]


def test_a_circle_is_found(imports: Imports) -> None:
    text = "if TYPE_CHECKING:\n    from l2t_fast.learner import learner"
    wrong = imports["l2t_fast.learner.pairs"] | imported(text, set(imports))
    with pytest.raises(CycleError):
        TopologicalSorter({**imports, "l2t_fast.learner.pairs": wrong}).prepare()


def test_no_file_is_long() -> None:
    files = sources("l2t_fast", "kernels", "benchmarks", "tests")
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
