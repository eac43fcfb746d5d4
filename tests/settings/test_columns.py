"""Columns of a table."""

import pytest

from l2t_fast.errors import L2TError
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.options import TableConfig


def test_columns_have_the_defaults_of_their_data_sets() -> None:
    found = column_configs(TableConfig(dataset=("digits", "cifar100", "stanford40"), seeds=(3,)))
    assert list(found) == ["digits-vgg9_bn-10", "cifar100-vgg9_bn", "stanford40-resnet18"]
    assert [config.optim.batch_size for config in found.values()] == [25, 128, 64]
    assert found["stanford40-resnet18"].optim.meta_lr == 1e-3
    assert all(config.seeds == (3,) for config in found.values())
    with pytest.raises(L2TError, match="each once"):
        column_configs(TableConfig(dataset=("digits", "digits")))
