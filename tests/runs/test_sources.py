"""The source networks of a run, from files."""

from pathlib import Path

import torch

from l2t_fast.networks.architectures import build_model
from l2t_fast.runs.build import build_sources
from l2t_fast.runs.folder import fingerprints
from l2t_fast.settings.options import SourceConfig, TrainConfig


def test_two_sources_from_one_file(tmp_path: Path) -> None:
    networks = [build_model("resnet8", classes, 0.25) for classes in (3, 4)]
    state = {
        f"{prefix}.{name}": value
        for prefix, network in zip(("student", "teacher"), networks, strict=True)
        for name, value in network.state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "file")
    weights = (f"{tmp_path / 'file'}:student", f"{tmp_path / 'file'}:teacher")
    source = SourceConfig(source=("resnet8", "resnet8"), source_weights=weights, source_width=(0.25, 0.25))
    config = TrainConfig(source=source, method=("finetune",))
    for built, network in zip(build_sources(config), networks, strict=True):
        torch.testing.assert_close(built.state_dict(), network.state_dict(), rtol=0, atol=0)
    assert len(set(fingerprints(config).values())) == 1
