"""Networks, learners and engines of the settings of a run."""

from pathlib import Path

from l2t_fast.runs.build import source_folders
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.options import TableConfig


def test_where_the_sources_of_a_column_are() -> None:
    (config,) = column_configs(TableConfig(dataset=("cifar100",))).values()
    assert source_folders(config, Path("x")) == [Path("x/source")]
