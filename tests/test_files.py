"""Files are whole or refused."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from l2t_fast.errors import L2TError, MachineError
from l2t_fast.files import load_checkpoint, load_json, make_folder, save_checkpoint, save_text
from l2t_fast.networks.checkpoint import read_checkpoint


def test_checkpoints_are_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"value": torch.ones(3)})

    def fail(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"value": torch.zeros(3)})
    assert torch.equal(load_checkpoint(path)["value"], torch.ones(3))
    monkeypatch.undo()

    with pytest.raises(L2TError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")
    (tmp_path / "short.pt").write_bytes(path.read_bytes()[:100])
    with pytest.raises(L2TError, match="is damaged"):
        load_checkpoint(tmp_path / "short.pt")
    torch.save({"value": 1}, tmp_path / "foreign.pt")
    with pytest.raises(L2TError, match="is not a checkpoint of l2t_fast"):
        load_checkpoint(tmp_path / "foreign.pt")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("save", [save_text, save_checkpoint])
def test_what_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, save: Callable[[Path, Any], None]
) -> None:
    path, content = tmp_path / "x", {save_text: "text", save_checkpoint: {"value": 1}}[save]
    path.write_bytes(b"old")

    def fail(file: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MachineError, match=rf"x cannot be written \({os.strerror(code)}") as error:
        save(path, content)
    assert ("bytes needed, room for" in str(error.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_limit_on_files_is_a_full_disk(tmp_path: Path) -> None:
    """A real refusal by the system, in the middle of a checkpoint."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"value": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(MachineError, match=r"x\.pt cannot be written .*; 8,\d{3},\d{3} bytes needed, room for"):
            save_checkpoint(path, {"value": torch.zeros(2_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(load_checkpoint(path)["value"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for call in (lambda: make_folder(tmp_path / "file"), lambda: save_text(tmp_path / "file/x", "")):
        with pytest.raises(L2TError, match="give another --name or --runs") as error:
            call()
        assert error.value.status == 2


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    """In our own checkpoints, and in weights as sources are read; the last bit of a tensor changes its value alone."""
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"weights": {"w": torch.full((64,), 1.5)}})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((64,), 1.5).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert "w" in torch.load(path, weights_only=True)["weights"]  # PyTorch does not see it
    with pytest.raises(L2TError, match=r"x\.pt is damaged"):
        load_checkpoint(path)
    with pytest.raises(L2TError, match=r"x\.pt is damaged \(the checksum of 'archive/data/0' in it does not fit\)"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"seconds": "x"}', "\0\xff"])
def test_a_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(L2TError, match=r"result\.json is damaged"):
        load_json(path, ("seconds",))
