"""Wheel and source archive: built, installed in a fresh environment, and used outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

SMOKE = """
import torch
import l2t_fast, l2t_fast.kernels
from l2t_fast import L2T, Engine, export
from l2t_fast.networks.architectures import build_model

for module in (l2t_fast, l2t_fast.kernels):
    assert "site-packages" in module.__file__ and module.__file__.startswith(PLACE), module.__file__
source, target = build_model("resnet8", 5, 0.25), build_model("vgg9_bn", 3, 0.06)
x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
learner = L2T(source, target, source_layers=["layer3"], target_layers=["features.6"], example=x)
metrics = Engine(learner, lr=0.1).step(x, y)
assert metrics["meta_loss"].isfinite()
export(target, "target.safetensors", x)
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has, since building leaves folders behind."""
    folder = tmp_path_factory.mktemp("tree") / "l2t-fast"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    command = ("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", *command, cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def sources(tree: Path) -> set[str]:
    """Every file of the package, by the place it is installed in."""
    files = [path for top in ("l2t_fast", "kernels") for path in (tree / top).rglob("*") if path.is_file()]
    names = {path.relative_to(tree).as_posix() for path in files if "__pycache__" not in path.parts}
    installed = {f"l2t_fast/{name}" if name.startswith("kernels/") else name for name in names}
    return {name for name in installed if not name.endswith(".md")}


def test_a_wheel_has_every_file_and_nothing_else(tree: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == sources(tree)
    assert "l2t_fast/kernels/matching/triton_kernels.py" in packed
    assert "l2t_fast/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_source_archive_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    script = "from setuptools import build_meta; print(build_meta.build_sdist('sdist'))"
    (tree / "sdist").mkdir()
    run(sys.executable, "-c", script, cwd=tree)
    (archive,) = (tree / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    command = ("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", *command, cwd=unpacked)
    (again,) = (unpacked / "dist").glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_it_is_used_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """What it depends on is that of this environment, by its path: the network is not needed."""
    place = tmp_path / "fresh"
    venv.create(place, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    run(sys.executable, "-m", "pip", "--python", place / "bin/python", "install", "--no-deps", wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    work = tmp_path / "work"
    work.mkdir()
    run(place / "bin/python", "-c", f"PLACE = {str(place)!r}{SMOKE}", cwd=work)
    assert "l2t-fast 0." in run(place / "bin/l2t-fast", "--version", cwd=work)
    assert "nothing is in the way" in run(place / "bin/l2t-fast", "doctor", cwd=work)
    tiny = ["train", "--method", "scratch", "--seeds", "0", "--epochs", "1", "--target-width", "0.0625", "--name", "a"]
    run(place / "bin/python", "-m", "l2t_fast", *tiny, cwd=work)
    assert (work / "runs/a/table.md").exists()
