"""Settings from a file, single ones by their names there, and what all options say of themselves."""

import ast
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import l2t_fast.data.options
import l2t_fast.settings.options
from l2t_fast.data.options import DataConfig
from l2t_fast.errors import L2TError
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.given import with_file, without_set
from l2t_fast.settings.options import OptimConfig, PretrainConfig, SourceConfig, TableConfig, TrainConfig
from l2t_fast.settings.stored import load_config, save_config

NO_SETTINGS = ("name", "runs", "resume")  # of a run


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (["optim.lr=0.05"], ["--lr", "0.05"]),
        (["seeds=0,1", "data.per_class=20"], ["--seeds", "0", "1", "--per-class", "20"]),
        (["optim.nesterov=true"], ["--nesterov"]),
        (["optim.nesterov=false", "data.split=a=b"], ["--no-nesterov", "--split", "a=b"]),
    ],
)
def test_what_is_set_is_a_flag(settings: list[str], flags: list[str]) -> None:
    assert without_set(["train", "--set", *settings, "--name", "a"]) == ["train", "--name", "a", *flags]


def test_several_are_set_one_by_one() -> None:
    given = ["table", "--set", "optim.lr=0.05", "--lr", "1", "--set", "seeds=3"]
    assert without_set(given) == ["table", "--lr", "1", "--lr", "0.05", "--seeds", "3"]
    assert without_set(["report", "--set", "optim.lr=1"]) == ["report", "--set", "optim.lr=1"]  # has no --set
    assert without_set([]) == []


def test_what_pretrain_calls_otherwise_is_set_by_its_name_in_the_file() -> None:
    given = ["pretrain", "--set", "target.target=resnet20", "target.target_width=0.5", "seeds=3", "data.classes=0,1"]
    flags = ["--network", "resnet20", "--width", "0.5", "--seed", "3", "--classes", "0", "1"]
    assert without_set(given) == ["pretrain", *flags]
    for setting, words in (
        ("network=resnet20", "such as target.target"),
        ("source.source=resnet8", "give KEY=VALUE with a KEY as the saved settings have it"),
        ("method=at", "give KEY=VALUE with a KEY as the saved settings have it"),
        ("target.target_layers=layer1", "give KEY=VALUE with a KEY as the saved settings have it"),
    ):
        with pytest.raises(L2TError, match=words):
            without_set(["pretrain", "--set", setting])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lr=0.05", "such as optim.lr"),
        ("data.perclass=5", "such as data.per_class"),
        ("optim.rate=1", "give KEY=VALUE with a KEY as the saved settings have it"),
        ("optim.lr", "give KEY=VALUE"),
        ("name=a", "give KEY=VALUE"),
        ("optim.nesterov=yes", "give true or false"),
    ],
)
def test_what_cannot_be_set(setting: str, words: str) -> None:
    with pytest.raises(L2TError, match=words):
        without_set(["train", "--set", setting])


def test_a_file_gives_what_the_command_does_not(tmp_path: Path) -> None:
    saved = resolve(TrainConfig(name="old", runs=tmp_path, seeds=(3,), optim=OptimConfig(lr=0.2, momentum=0.5)))
    save_config(saved, tmp_path / "config.json")
    again = resolve(with_file(TrainConfig(), tmp_path / "config.json", ()))
    assert again == dataclasses.replace(saved, name=None, runs=Path("runs"))
    # What is given counts, also where it is what would be so by itself; a folder is that of its settings.
    now = TrainConfig(name="new", optim=OptimConfig(lr=0.3))
    mixed = with_file(now, tmp_path, {"lr", "momentum", "name"})
    assert mixed.name == "new"
    assert mixed.seeds == (3,)
    assert (mixed.optim.lr, mixed.optim.momentum) == (0.3, 0.9)
    with pytest.raises(L2TError, match="leave out one of them"):
        with_file(TrainConfig(resume=True), tmp_path, ())
    with pytest.raises(L2TError, match=r"is not the configuration of a run: give .* \(there is no such file\)\.$"):
        with_file(TrainConfig(), tmp_path / "none.json", ())


def test_weights_take_the_place_of_a_training_of_the_source(tmp_path: Path) -> None:
    save_config(resolve(TrainConfig()), tmp_path / "config.json")
    given = TrainConfig(source=SourceConfig(source_weights=("x.pt",)))
    assert resolve(with_file(given, tmp_path, {"source_weights"})).source.source_weights == ("x.pt",)
    given = TrainConfig(source=SourceConfig(source_weights=("x.pt",), source_epochs=3))
    with pytest.raises(L2TError, match="leave out --source-classes"):
        resolve(with_file(given, tmp_path, {"source_weights", "source_epochs"}))


def test_a_table_is_repeated_from_its_file(tmp_path: Path) -> None:
    table = TableConfig(name="a", seeds=(1,), method=("at",), per_class=("5",))
    save_config(table, tmp_path / "table.json")
    again = with_file(TableConfig(), tmp_path, ())
    assert again == dataclasses.replace(table, name=None)
    assert column_configs(again) == column_configs(table)


def test_another_optimizer_has_its_own_defaults(tmp_path: Path) -> None:
    """Also where a file has those of SGD."""
    for dataset in ("digits", "cifar10", "stanford40"):
        made = resolve(TrainConfig(data=DataConfig(dataset), optim=OptimConfig(optimizer="adamw"))).optim
        assert (made.lr, made.weight_decay) == (1e-3, 1e-2)
    made = resolve(TrainConfig(optim=OptimConfig(optimizer="adamw", lr=0.5, weight_decay=0.0))).optim
    assert (made.lr, made.weight_decay) == (0.5, 0.0)

    save_config(resolve(TrainConfig(optim=OptimConfig(lr=0.2, momentum=0.5, beta=0.3))), tmp_path / "config.json")
    for given, lr in ((OptimConfig(optimizer="adamw"), 1e-3), (OptimConfig(optimizer="adamw", lr=0.01), 0.01)):
        again = resolve(with_file(TrainConfig(optim=given), tmp_path, ())).optim
        assert (again.optimizer, again.lr, again.weight_decay, again.beta) == ("adamw", lr, 1e-2, 0.3)


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (OptimConfig(optimizer="adamw", momentum=0.5), "are of SGD: leave them out with --optimizer adamw"),
        (OptimConfig(optimizer="adamw", nesterov=True), "are of SGD: leave them out with --optimizer adamw"),
        (OptimConfig(label_smoothing=1.5), "--label-smoothing 1.5 is too large: give a number from 0 to 1"),
        (OptimConfig(label_smoothing=-0.1), "--label-smoothing -0.1 is too small: give at least 0"),
        (OptimConfig(max_grad_norm=0.0), "max_grad_norm=0.0 is not to be had: give a number from"),
    ],
)
def test_numbers_of_the_optimizer_are_looked_at(optim: OptimConfig, words: str) -> None:
    with pytest.raises(L2TError, match=words):
        resolve(TrainConfig(optim=optim))


@pytest.mark.parametrize("config", [TrainConfig(), TableConfig(), PretrainConfig()])
def test_every_option_has_a_default_and_a_help_that_says_it(config: Any) -> None:
    helps = _helps()

    def check(part: Any) -> None:
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if dataclasses.is_dataclass(value):
                check(value)
                continue
            classes = [cls.__name__ for cls in type(part).__mro__[:-1]]
            texts = [helps[cls, f.name] for cls in classes if (cls, f.name) in helps]
            assert texts, f.name
            if value is None:
                assert "default" in texts[0] + (type(part).__doc__ or ""), f.name

    check(config)


def test_every_option_stands_in_the_saved_settings(tmp_path: Path) -> None:
    for config in (resolve(TrainConfig(name="a")), TableConfig(name="a")):
        save_config(config, tmp_path / "saved.json")
        saved = json.loads((tmp_path / "saved.json").read_text())
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            names = {inner.name for inner in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else None
            assert f.name in saved
            assert names is None or saved[f.name].keys() == names
    save_config(resolve(TrainConfig(name="a")), tmp_path / "config.json")
    filled = json.loads((tmp_path / "config.json").read_text())
    assert filled["optim"]["lr"] == 0.03  # what is so by itself, too
    assert load_config(tmp_path / "config.json").optim.lr == 0.03


def _helps() -> dict[tuple[str, str], str]:
    """(class, option) -> its help, a string below it."""
    found: dict[tuple[str, str], str] = {}
    for module in (l2t_fast.settings.options, l2t_fast.data.options):
        for node in ast.parse(Path(module.__file__).read_text()).body:
            body = node.body if isinstance(node, ast.ClassDef) else []
            for option, below in itertools.pairwise(body):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(option, ast.AnnAssign) and isinstance(text, ast.Constant):
                    found[node.name, option.target.id] = text.value  # type: ignore[attr-defined]
    return found
