"""The columns of a table: data sets x targets x images per class."""

import dataclasses
import itertools
from collections.abc import Sequence

from l2t_fast.data.options import DataConfig
from l2t_fast.errors import L2TError
from l2t_fast.settings.defaults import check_once, file_name, resolve
from l2t_fast.settings.options import TableConfig, TargetConfig, TrainConfig


def column_configs(table: TableConfig) -> dict[str, TrainConfig]:
    """The columns of a table, each a run of its own, by name: data sets x targets x images per class.

    Raises:
        L2TError: as `resolve`; numbers per class that are none; a column given twice.
    """
    for flag, values in (("dataset", table.dataset), ("target", table.target), ("method", table.method)):
        if values is not None:
            check_once(flag, values)
    sizes = _numbers(table.per_class) if table.per_class is not None else (None,)
    found: dict[str, TrainConfig] = {}
    targets: Sequence[str | None] = table.target or (None,)
    widths: Sequence[float | None] = table.target_width or (None,)
    widths = list(widths) * len(targets) if len(widths) == 1 else widths
    if len(widths) != len(targets):
        raise L2TError(f"--target-width has {len(widths)} values for {len(targets)} targets: give one for each.")
    for dataset, (target, width), size in itertools.product(table.dataset, zip(targets, widths, strict=True), sizes):
        data = DataConfig(**vars(table.data), dataset=dataset, per_class=size)
        network = TargetConfig(target, width, table.target_layers)
        config = resolve(
            TrainConfig(
                method=table.method,
                settings=table.settings,
                seeds=table.seeds,
                device=table.device,
                export=table.export,
                log=table.log,
                data=data,
                source=table.source,
                target=network,
                optim=table.optim,
            )
        )
        limit = [] if config.data.per_class is None else [str(config.data.per_class)]
        # Always in full: a table that gets more columns keeps the names of those it has.
        name = "-".join([dataset, file_name(str(config.target.target)), *limit])
        if name in found:
            raise L2TError(f"two columns would be called {name}: give them to tables of their own.")
        found[name] = dataclasses.replace(config, name=name)
    return found


def _numbers(values: Sequence[str]) -> tuple[int, ...]:
    """Of "50,100" "250" the numbers 50, 100, 250."""
    try:
        numbers = tuple(int(part) for value in values for part in value.split(",") if part)
    except ValueError:
        raise L2TError(f"--per-class {' '.join(values)}: give numbers of images.") from None
    check_once("per-class", numbers)
    return numbers
