"""The methods of the paper's tables by name; a new one is a file here and a line below."""

import dataclasses
import inspect
import math
from collections.abc import Sequence

from l2t_fast.errors import L2TError
from l2t_fast.methods import attention, finetune, jacobian, lwf, matching, scratch
from l2t_fast.methods.base import Method

METHODS: dict[str, Method] = {
    "scratch": scratch.SCRATCH,
    "finetune": finetune.FINETUNE,
    "lwf": lwf.LWF,
    "at": attention.AT,
    "lwf+at": attention.LWF_AT,
    "jacobian": jacobian.JACOBIAN,
    "fm-single": matching.FM_SINGLE,
    "fm-one-to-one": matching.FM_ONE_TO_ONE,
    "l2t-w-single": matching.L2T_W_SINGLE,
    "l2t-w-one-to-one": matching.L2T_W_ONE_TO_ONE,
    "l2t-ww": matching.L2T_WW,
}


def find_method(name: str, settings: Sequence[str] = ()) -> Method:
    """The method called `name`, with those of the `settings` ("lwf.temperature=4") that belong to it.

    Raises:
        L2TError: there is no such method or setting; the known ones are listed.
    """
    if name not in METHODS:
        raise L2TError(f"there is no method '{name}': use one of {', '.join(METHODS)}.")
    method, parsed = METHODS[name], [_parse(setting) for setting in settings]
    if len({key[:2] for key in parsed}) < len(parsed):
        raise L2TError(f"--settings {' '.join(settings)}: give each setting once.")
    mine = [setting for setting in parsed if setting[0] in {term.name for term in method.terms}]
    return dataclasses.replace(method, settings=tuple(mine))


def _parse(setting: str) -> tuple[str, str, float]:
    known = {
        f"{term.name}.{keyword}": parameter.default
        for method in METHODS.values()
        for term in method.terms
        for keyword, parameter in inspect.signature(term).parameters.items()
        if parameter.default is not parameter.empty
    }
    key, _, value = setting.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if key not in known or not 0 <= number < math.inf or (number == 0 and key == "lwf.temperature"):
        wanted = ", ".join(f"{name}={default:g}" for name, default in known.items())
        raise L2TError(f"'{setting}' is no setting of a method: give a number for one of {wanted} (published values).")
    name, _, keyword = key.partition(".")
    return name, keyword, number
