"""The source networks of a run, from files."""

from pathlib import Path

import torch

from l2t_fast.data.options import DataConfig
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


def test_an_npz_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    config = TrainConfig(method=("scratch",), data=DataConfig("npz", data_root=tmp_path / "a.npz"))
    assert fingerprints(config) == {}  # the preflight says that it is missing
    found = []
    for content in (b"one", b"two"):
        (tmp_path / "a.npz").write_bytes(content)
        found.append(fingerprints(config))
    assert [list(names) for names in found] == [["data-root 1"]] * 2
    assert found[0] != found[1]
