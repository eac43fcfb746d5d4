"""Columns of a table."""

import pytest

from l2t_fast.data.options import DataOptions
from l2t_fast.errors import L2TError
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.options import TableConfig


@pytest.mark.parametrize(
    ("dataset", "size", "networks", "batch"),
    [
        ("folder", None, ("resnet34", "resnet18"), 64),
        ("folder", 32, ("resnet32", "vgg9_bn"), 128),
        ("folder", 223, ("resnet32", "vgg9_bn"), 128),
        ("folder", 224, ("resnet34", "resnet18"), 64),
        ("npz", None, ("resnet32", "vgg9_bn"), 128),
        ("npz", 64, ("resnet32", "vgg9_bn"), 128),
        ("npz", 224, ("resnet34", "resnet18"), 64),
    ],
)
def test_the_size_of_the_images_chooses_the_networks(
    dataset: str, size: int | None, networks: tuple[str, str], batch: int
) -> None:
    (config,) = column_configs(TableConfig(dataset=(dataset,), data=DataOptions(image_size=size))).values()
    assert (*(config.source.source or ()), config.target.target) == networks
    assert config.optim.batch_size == batch


def test_columns_have_the_defaults_of_their_data_sets() -> None:
    found = column_configs(TableConfig(dataset=("digits", "cifar100", "stanford40"), seeds=(3,)))
    assert list(found) == ["digits-vgg9_bn-10", "cifar100-vgg9_bn", "stanford40-resnet18"]
    assert [config.optim.batch_size for config in found.values()] == [25, 128, 64]
    assert found["stanford40-resnet18"].optim.meta_lr == 1e-3
    assert all(config.seeds == (3,) for config in found.values())
    with pytest.raises(L2TError, match="each once"):
        column_configs(TableConfig(dataset=("digits", "digits")))
