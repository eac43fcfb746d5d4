"""Tables of trainings as rows: from made-up folders to a file, and what is said of it."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.report import cells
from benchmarks.rows import Row, read
from l2t_fast.data.options import DataOptions
from l2t_fast.errors import L2TError
from l2t_fast.files import make_folder
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.options import OptimConfig, SourceConfig, TableConfig
from l2t_fast.settings.stored import save_config
from tests.reports.shared import drawn

# Accuracies in %, a seed each; l2t-ww is ahead of scratch by 5 at 50 a class, and by nothing that counts at 100.
NUMBERS = {
    ("scratch", 50): (20, 21, 22),
    ("l2t-ww", 50): (25, 26.5, 26.5),
    ("scratch", 100): (30, 32, 31),
    ("l2t-ww", 100): (31, 30, 33),
}


def made(folder: Path, sources: tuple[str, ...] = ("resnet32",), more: float = 0.0) -> Path:
    """The folder of a table with NUMBERS, those of l2t-ww higher by `more`; seed 3 has not ended."""
    table = TableConfig(
        name=folder.name,
        method=("scratch", "l2t-ww"),
        settings=("l2t-ww.beta=0.1",),
        dataset=("npz",),
        target=("vgg9_bn",),
        per_class=("50,100",),
        seeds=(0, 1, 2, 3),
        device="cpu",
        data=DataOptions(data_root=Path("/somewhere/photographs.npz")),
        source=SourceConfig(source=sources, source_weights=tuple(f"/elsewhere/{name}.pt" for name in sources)),
        optim=OptimConfig(epochs=7),
    )
    for name, config in column_configs(table).items():
        for (method, size), accuracies in NUMBERS.items():
            for seed, accuracy in enumerate(accuracies) if size == config.data.per_class else ():
                cell = folder / name / method / f"seed-{seed}"
                make_folder(cell)
                best = (accuracy + (more if method == "l2t-ww" else 0)) / 100
                result = {
                    "test_accuracy_last": best - 0.01,
                    "test_accuracy_best": best,
                    "seconds": 3.0,
                    "iterations": 9,
                    "images": 20000,  # that were seen
                    "made": {"--source-weights": "/elsewhere/resnet32.pt"},  # a place, which is nobody else's business
                }
                (cell / "result.json").write_text(json.dumps(result))
                (cell / "metrics.jsonl").write_text("")
        save_config(config, folder / name / "config.json")
        (folder / name / "inputs.json").write_text('{"data-root 1": "abc"}')
    save_config(table, folder / "table.json")
    return folder


def test_folders_become_rows_that_say_how_they_were_made(tmp_path: Path) -> None:
    file = tmp_path / "claim.jsonl"
    assert (
        command.main(["cells", str(file), str(made(tmp_path / "first")), "--told", "commit=1234567", "device=H100"])
        == 0
    )
    _, rows = read(file)
    assert len(rows) == 12  # seed 3 is not done
    assert "elsewhere" not in file.read_text()
    row = next(r for r in rows if (r["method"], r["seed"], r["per_class"]) == ("l2t-ww", 1, 50))
    assert (row["test_accuracy_best"], row["iterations"], row["images"]) == (0.265, 9, "photographs")
    assert (row["commit"], row["device"], row["inputs"]) == ("1234567", "H100", {"data-root 1": "abc"})
    assert (row["settings"]["beta"], row["settings"]["epochs"]) == (0.1, 7)
    assert next(r for r in rows if r["method"] == "scratch")["settings"]["beta"] == 0.5
    assert row["command"] == (
        "l2t-fast table --name first --method scratch l2t-ww --settings l2t-ww.beta=0.1 --dataset npz --target vgg9_bn "
        "--per-class 50,100 --seeds 0 1 2 3 --data-root photographs.npz --source resnet32 --source-weights resnet32.pt "
        "--epochs 7"
    )
    text = file.with_suffix(".md").read_text()
    assert "| scratch | 21.00 ± 1.00 | −5.00 (p = 0.0033) | 31.00 ± 1.00 | −0.33 (not significant, p = 0.81) |" in text
    assert "| l2t-ww | **26.00 ± 0.87** | – | **31.33 ± 1.53** | – |" in text
    assert "50 a class (%), n = 3" in text
    assert "(not significant, p = 0.81) | −2.67 (not significant, p = 0.074) |" in text  # over both sizes
    last = text[text.index("Of the last epoch") :]
    assert "| scratch | 20.00 ± 1.00 | −5.00 (p = 0.0033) |" in last
    assert "commit 1234567" in text
    drawn(file.with_suffix(".png"), 500)


def test_a_file_goes_on_and_one_source_stands_beside_several(tmp_path: Path) -> None:
    file = tmp_path / "claim.jsonl"
    cells.gather(file, [made(tmp_path / "one")], {})
    two = made(tmp_path / "two", ("resnet32", "resnet20"), more=2.0)
    rows = cells.gather(file, [two], {})
    assert len(rows) == len(read(file)[1]) == 24
    assert len(cells.gather(file, [two], {"commit": "later"})) == 24
    result = two / "npz-vgg9_bn-50" / "scratch" / "seed-0" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": 4.0}))  # trained again
    cells.gather(file, [two], {"commit": "last"})
    told = [row.get("commit") for row in read(file)[1]]
    assert [told.count(commit) for commit in (None, "later", "last")] == [12, 11, 1]
    text = cells.markdown("claim", rows, "l2t-ww")
    assert (
        "photographs, resnet32 + resnet20 → vgg9_bn, 50 a class | resnet32 → vgg9_bn | 28.00 ± 0.87 | 26.00 ± 0.87"
        in text
    )
    assert "+2.00 (3 seeds: no p)" in text  # the same for every seed


def test_seeds_that_are_missing_and_a_method_alone_are_said(tmp_path: Path) -> None:
    rows = [row for row in cells.cell_rows(made(tmp_path / "t"), {}) if (row["method"], row["seed"]) != ("scratch", 2)]
    text = cells.markdown("t", rows, "l2t-ww")
    assert "20.50 ± 0.71 (n = 2)" in text
    alone = [row for row in rows if row["method"] == "scratch"]
    assert "| scratch | **20.50 ± 0.71** | – |" in cells.markdown("t", alone, "l2t-ww")


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "t")
    rows: list[Row] = [*cells.cell_rows(folder, {}), *cells.cell_rows(folder, {})]
    with pytest.raises(L2TError, match="two trainings of scratch with seed 0 and 100 images"):
        cells.summaries_of(rows)
    for path in folder.rglob("result.json"):
        path.unlink()
    with pytest.raises(L2TError, match=r"no training in .* is done"):
        cells.gather(tmp_path / "f.jsonl", [folder], {})
