"""Files are whole or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from l2t_fast.errors import L2TError
from l2t_fast.files import load_checkpoint, save_checkpoint


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
