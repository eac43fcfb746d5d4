"""Whatever is given, there is an answer or one sentence, within two seconds: never a traceback."""

import contextlib
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.choices import DATASETS, METHODS
from l2t_fast.cli import main
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import load_data
from l2t_fast.learner.pairs import resolve_pairs
from l2t_fast.methods import find_method
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import PretrainConfig, TableConfig, TrainConfig
from l2t_fast.settings.stored import load_config, load_table, save_config

SECONDS = 2.0  # of the processor, since the machine may be busy with something else
# The slow ones together are 20,000 cases.
MANY = {"command": 1000, "config": 9000, "pairs": 5000, "layers": 1500, "settings": 2500, "numbers": 1000}


def cases(kind: str, few: int) -> Any:
    return pytest.mark.parametrize("count", [few, pytest.param(MANY[kind], marks=pytest.mark.slow)])


def for_each(values: st.SearchStrategy[Any], count: int, check: Callable[[Any], object]) -> None:
    """Calls `check` with `count` values, always the same ones; an L2TError in one sentence is an answer."""

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(values)
    def run(value: Any) -> None:
        start = time.process_time()
        try:
            check(value)
        except L2TError as error:
            assert_sentence(str(error))
        assert time.process_time() - start < SECONDS

    run()


def assert_sentence(text: str) -> None:
    assert text.strip()
    assert "Traceback" not in text
    assert len(text.split()) < 150  # however long what was given


NUMBERS = st.one_of(
    st.sampled_from(
        [0, -1, 2**31, 2**63, 2**64, 10**20, -(10**20), 10**400, math.inf, -math.inf, math.nan, 1e-320, 1e9]
    ),
    st.integers(-5, 50),
    st.floats(),
)
WORDS = st.one_of(
    NUMBERS.map(str),
    st.sampled_from(
        ["9" * 5000, "", "-", "--", "..", "/", "a/b", "C:", "\0", "~", "None", "True", "[/x]", "1,2", "é λ\u202e"]
    ),
    st.sampled_from(
        [*METHODS, *DATASETS, "auto", "cpu", "eager", "bf16", "resnet8", "vgg9_bn", "imagenet", "relu", "skip"]
    ),
    st.text(max_size=12),
)
FLAGS = sorted(
    {
        "--" + (name := field.name.replace("_", "-"))
        for config in (TrainConfig(), TableConfig(), PretrainConfig())
        for part in (config, *(value for value in vars(config).values() if dataclasses.is_dataclass(value)))
        for field in dataclasses.fields(part)
        if not dataclasses.is_dataclass(getattr(part, field.name))
    }
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


class Reached(Exception):
    """The command would now look at data and networks."""


@cases("command", 20)
def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def reached(*arguments: object) -> None:
        raise Reached

    monkeypatch.setattr("l2t_fast.runs.run.preflight", reached)
    monkeypatch.setattr("l2t_fast.runs.table.preflight", reached)
    monkeypatch.chdir(tmp_path)
    options = st.lists(
        st.tuples(st.sampled_from(FLAGS) | st.text(max_size=6), st.lists(WORDS, max_size=2)).map(
            lambda o: [o[0], *o[1]]
        ),
        max_size=4,
    ).map(lambda found: [word for option in found for word in option])
    commands = st.sampled_from(["train", "table", "pretrain", "inspect"]) | st.text(max_size=4)
    lines = st.tuples(commands, options).map(lambda line: [line[0], *line[1]]).filter(lambda line: line[0] != "bench")

    def check(line: list[str]) -> None:
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                main(line)
            except Reached:
                return
            except SystemExit as stopped:
                code = stopped.code
        assert code in (0, 2), error.getvalue()
        assert code == 0 or error.getvalue().strip()
        assert "Traceback" not in error.getvalue()

    for_each(lines, count, check)
    assert not list(tmp_path.iterdir())


@cases("config", 150)
def test_stored_settings(tmp_path: Path, count: int) -> None:
    """Of a run and of a table: whatever value stands where, or whatever file."""
    run, table = tmp_path / "config.json", tmp_path / "table.json"
    save_config(resolve(TrainConfig(name="run")), run)
    save_config(TableConfig(name="table"), table)
    good = {path: json.loads(path.read_text()) for path in (run, table)}
    places = [(path, (key,)) for path in good for key in good[path]]
    places += [(p, (k, inner)) for p in good for k, v in good[p].items() if isinstance(v, dict) for inner in v]

    def check(case: tuple[tuple[Path, tuple[str, ...]], Any]) -> None:
        (path, (*outer, last)), value = case
        content = json.loads(json.dumps(good[path]))
        part = content
        for key in outer:
            part = part[key]
        part[last] = value
        path.write_text(json.dumps(content))
        if path == run:
            resolve(load_config(path))
        else:
            column_configs(load_table(path))

    for_each(st.tuples(st.sampled_from(places), JSON), count, check)

    def damaged(content: bytes) -> None:
        for path, load in ((run, load_config), (table, load_table)):
            path.write_bytes(content)
            load(path)

    whole = json.dumps(good[run]).encode()
    cut = st.integers(0, len(whole)).map(lambda n: whole[:n])
    for_each(st.binary(max_size=20) | JSON.map(lambda v: json.dumps(v).encode()) | cut, count // 5, damaged)


@cases("pairs", 150)
def test_pair_specs(count: int) -> None:
    shapes = [(4, 8, 8), (8, 4, 4)]
    index = st.integers(-2, 3) | NUMBERS | st.booleans() | st.none() | st.text(max_size=2)
    entry = st.lists(index, max_size=4) | st.lists(index, max_size=4).map(tuple) | index
    specs = st.lists(entry, max_size=4) | st.text(max_size=12) | JSON | st.sampled_from(["all-to-all", "single"])
    for_each(specs, count, lambda spec: resolve_pairs(spec, [shapes, shapes], shapes))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@cases("layers", 60)
def test_layer_names_layouts_and_logits(count: int) -> None:
    name = st.sampled_from(["0", "1", "4", "", "1_0", "0[0]", "9", "source 0:1"]) | st.text(max_size=5)
    anything = name | JSON
    names = st.lists(name | NUMBERS, max_size=2) | anything
    layouts = (
        st.none() | st.dictionaries(anything.filter(lambda v: v.__hash__ is not None), anything, max_size=2) | anything
    )

    def check(case: tuple[Any, Any, Any, Any]) -> None:
        source, target, layout, logits = case
        L2T(
            network(),
            network(),
            source_layers=source,
            target_layers=target,
            layout=layout,
            logits=logits,
            example=torch.zeros(2, 3, 6, 6),
        )

    for_each(st.tuples(names | st.just(["1"]), names | st.just(["1"]), layouts, st.none() | anything), count, check)


@cases("settings", 100)
def test_settings_of_methods(count: int) -> None:
    keys = st.sampled_from(["at.weight", "lwf.temperature", "l2t-ww.beta", "scratch.lr", "x.y", ""]) | st.text(
        max_size=6
    )
    setting = st.tuples(keys, st.sampled_from(["=", "", "=="]), WORDS).map("".join)
    names = st.sampled_from(METHODS) | st.text(max_size=5)
    for_each(st.tuples(names, st.lists(setting, max_size=3)), count, lambda case: find_method(*case))


@cases("numbers", 60)
def test_arguments_of_engines_and_of_data(count: int) -> None:
    learner = L2T(network(), network(), source_layers=["1"], target_layers=["1"], example=torch.zeros(2, 3, 6, 6))
    names = ["lr", "momentum", "weight_decay", "nesterov", "meta_lr", "meta_weight_decay", "beta", "inner_steps"]
    names += ["scheme", "mode", "precision", "memory", "loss", "optimizer", "groups", "max_grad_norm"]
    arguments = st.dictionaries(st.sampled_from(names), JSON, min_size=1, max_size=3)
    for_each(arguments, count, lambda given: Engine(learner, **given, say=lambda text: None))

    fields = ["classes", "val_fraction", "split", "image_size", "workers", "dataset", "per_class", "on_bad_image"]
    options = st.dictionaries(
        st.sampled_from(fields), JSON | st.lists(st.integers(-1, 10)).map(tuple), min_size=1, max_size=2
    )
    for_each(options, count // 2, lambda given: load_data(DataConfig(**given), 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--epochs 99999999999999999999", "--epochs 99999999999999999999 is too large: give a whole number from 1 to"),
        ("--source-epochs 99999999999999999999", "--source-epochs 99999999999999999999 is too large"),
        ("--lr inf", "lr=inf is not to be had: give a number from 0 to 1e+06"),
        ("--meta-lr inf", "meta_lr=inf is not to be had"),
        ("--meta-lr 1e9", "meta_lr=1000000000.0 is not to be had"),
        ("--beta inf", "beta=inf is not to be had"),
        ("--beta nan", "beta=nan is not to be had"),
        ("--target-width nan", "--target-width nan is not to be had: give a number from 1e-06 to 16"),
        ("--target-width 1e9", "--target-width 1000000000.0 is too large"),
        ("--source-width inf", "--source-width inf is too large"),
        ("--seeds 18446744073709551616", "--seeds 18446744073709551616 is too large"),
        ("--batch-size 99999999999", "--batch-size 99999999999 is too large"),
        ("--workers 99999", "--workers 99999 is too large"),
        ("--inner-steps 99999999", "inner_steps=99999999 is not to be had: give a whole number from 0 to 1000"),
        ("--settings scratch.lr=inf", "'scratch.lr=inf' is no setting of a method"),
    ],
)
def test_numbers_out_of_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--runs", str(tmp_path / "runs"), *options.split()])
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["inspect", "x" * 5000], 2, "File name too long: give another path, or mend that"),
        (["train", "--runs", "x" * 5000, "--resume"], 2, "File name too long"),
        (["train", "--source-weights", "x" * 5000], 2, "File name too long"),
        (["train", "--dataset", "npz", "--data-root", "~nobody-here/x"], 2, "there is no file ~nobody-here/x"),
        (["train", "--resume", "--runs", "RUNS", "--name", "null"], 2, "config.json is not the configuration of a run"),
        (["table", "--runs", "RUNS", "--name", "list"], 2, "table.json is not the configuration of a run"),
    ],
)
def test_paths_that_nobody_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], code: int, words: str
) -> None:
    for name, content in (("null/config.json", '{"runs": "a\\u0000b"}'), ("list/table.json", "[]")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path) if word == "RUNS" else word for word in command])
    assert stopped.value.code == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_layers_that_are_numbers() -> None:
    with pytest.raises(L2TError, match=r"source_layers must be names of layers, not \[0\]"):
        L2T(network(), network(), source_layers=[0], target_layers=["1"], example=torch.zeros(2, 3, 6, 6))  # type: ignore[list-item]
    with pytest.raises(L2TError, match="the layers of the target must be a list of names, not False"):
        L2T(network(), network(), target_layers=False, layout={"1": "BCHW"}, example=torch.zeros(2, 3, 6, 6))  # type: ignore[arg-type]
