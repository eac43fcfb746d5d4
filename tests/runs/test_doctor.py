"""What `l2t-fast doctor` says, and why there is no GPU."""

import ast
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from l2t_fast.cli import main
from l2t_fast.errors import L2TError
from l2t_fast.kernels import launch
from l2t_fast.runs import doctor
from l2t_fast.runs.build import find_device
from l2t_fast.runs.device import why_no_gpu

OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def call(*arguments: Any, **named: Any) -> NoReturn:
        raise error

    return call


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A PyTorch that is built for CUDA, and finds none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--runs", str(tmp_path / "runs")])
    said = " ".join(capsys.readouterr().out.split())
    for word in (f"torch {torch.__version__.partition('+')[0]}", "cores for this process", "matching, bf16"):
        assert word in said
    for word in ("GiB free of", "can be made in", "OMP_NUM_THREADS", "onnxscript", "nothing is in the way"):
        assert word in said
    assert not (tmp_path / "runs").exists()
    if not torch.cuda.is_available():
        assert "ATen: Triton's are for GPUs" in said
        assert "times as fast as in fp32: use " in said


def test_a_folder_that_cannot_be_written_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", raising(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--runs", str(tmp_path)])
    assert stopped.value.code == 3
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("l2t-fast: in the way of a training: ")
    assert "cannot be written (Read-only file system), give another --runs" in error


def test_a_driver_that_is_too_old_is_in_the_way(
    tmp_path: Path, cuda_build: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda_build.setattr(torch.cuda, "init", raising(RuntimeError(OLD)))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--runs", str(tmp_path)])
    assert stopped.value.code == 3
    assert "update the driver" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(OLD), "the NVIDIA driver is too old, which is made for CUDA 11.4 at most"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check"), "there is no NVIDIA driver"),
        (RuntimeError("No CUDA GPUs are available\nmore"), "(No CUDA GPUs are available)"),
    ],
)
def test_why_there_is_no_gpu(error: RuntimeError, words: str, cuda_build: pytest.MonkeyPatch) -> None:
    cuda_build.setattr(torch.cuda, "init", raising(error))
    with pytest.raises(L2TError, match=r"there is no GPU that PyTorch can use .*leave out --device cuda") as refused:
        find_device("cuda")
    assert words in str(refused.value)
    assert find_device("auto") == torch.device("cpu")


def test_gpus_that_are_hidden_and_builds_without(cuda_build: pytest.MonkeyPatch) -> None:
    cuda_build.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_no_gpu() == "CUDA_VISIBLE_DEVICES= hides them"
    cuda_build.setattr(torch.version, "cuda", None)
    cuda_build.setattr(torch.version, "hip", None)
    assert "is built for CPUs alone" in why_no_gpu()
    cuda_build.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_gpu() == ""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_which_kernels_run_on_a_gpu() -> None:
    device = torch.device("cuda")
    assert "ATen" in doctor._matching("fp32", device)
    assert [doctor._matching(precision, device) for precision in ("tf32", "bf16")] == ["Triton"] * 2
    assert launch.TRITON


def test_the_extras_are_those_of_the_package() -> None:
    tree = ast.parse((Path(__file__).parents[2] / "setup.py").read_text())
    (value,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS")
    extras = {
        name: " ".join(requirement.partition(">")[0] for requirement in listed)
        for name, listed in ast.literal_eval(value).items()
    }
    assert {name: packages for name, (packages, _) in doctor.EXTRAS.items()} == extras


@pytest.mark.parametrize(
    ("has", "seconds", "said"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, (4.0, 1.0), "AMX, 4.0 times as fast as in fp32: use bf16"),
        ({"avx512_bf16": True}, (1.0, 2.0), "AVX512-BF16 without AMX, 0.5 times as fast as in fp32: use fp32, "),
        ({"amx_bf16": False, "avx512_bf16": True}, (2.0, 1.0), "AVX512-BF16 without AMX, 2.0 times as fast as"),
        ({"avx2": True}, (1.0, 10.0), "no instructions known, 0.1 times as fast as in fp32: use fp32, "),
    ],
    ids=["amx", "avx512", "avx512 at full rate", "none"],
)
def test_bfloat16_by_what_was_measured(
    has: dict[str, bool], seconds: tuple[float, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert doctor._bfloat16(*seconds).startswith(said)
