"""What may be asked, without what carries it out."""

import dataclasses
import inspect
import subprocess
import sys

from l2t_fast import Engine, choices, methods
from l2t_fast.settings.options import EngineOptions


def test_settings_need_no_torch() -> None:
    script = """
import pkgutil, sys
import l2t_fast.settings
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import TrainConfig
for module in pkgutil.iter_modules(l2t_fast.settings.__path__, "l2t_fast.settings."):
    __import__(module.name)
resolve(TrainConfig())
print(*{"torch", "torchvision", "matplotlib", "scipy"}.intersection(sys.modules))
"""
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


def test_each_engine_option_is_an_argument_of_the_engine() -> None:
    arguments = inspect.signature(Engine).parameters
    names = [field.name for field in dataclasses.fields(EngineOptions)]
    of_python = {"learner", "loss", "optimizer", "groups", "group", "say"}  # what no command says by these names
    assert len(names) == 14
    assert set(names) == arguments.keys() - of_python


def test_the_names_of_methods_are_those_there_are() -> None:
    assert tuple(methods.METHODS) == choices.METHODS
    assert {name for name, method in methods.METHODS.items() if method.learns_weights} == choices.LEARNING
