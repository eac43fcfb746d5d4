"""The methods of the paper's tables by name; a new one is a file here and a line below."""

import dataclasses
import inspect
from collections.abc import Sequence

from l2t_fast.bounds import within
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
OPTIONS = ("lr", "beta", "meta_lr")  # of the engine, that a method may have its own of


def find_method(name: str, settings: Sequence[str] = ()) -> Method:
    """The method called `name`, with those of the `settings` that belong to it: of a term of its ("lwf.temperature=4"),
    or an option of the engine for this method alone ("l2t-ww.beta=0.1").

    Raises:
        L2TError: there is no such method or setting; the known ones are listed.
    """
    if name not in METHODS:
        raise L2TError(f"there is no method '{name}': use one of {', '.join(METHODS)}.")
    method, parsed = METHODS[name], [_parse(setting) for setting in settings]
    if len({key[:2] for key in parsed}) < len(parsed):
        raise L2TError(f"--settings {' '.join(settings)}: give each setting once.")
    options = {keyword: value for part, keyword, value in parsed if part == name and keyword in _options(method)}
    terms = {term.name for term in method.terms}
    mine = [(part, keyword, value) for part, keyword, value in parsed if part in terms and keyword not in OPTIONS]
    return dataclasses.replace(method, settings=tuple(mine), options=options)


def _options(method: Method) -> tuple[str, ...]:
    """Those of the engine's options that matter to a method."""
    if method.learns_weights:
        return OPTIONS
    return OPTIONS[:1] if method.pairs is None else OPTIONS[:2]


def _parse(setting: str) -> tuple[str, str, float]:
    known = {
        f"{term.name}.{keyword}": parameter.default
        for method in METHODS.values()
        for term in method.terms
        for keyword, parameter in inspect.signature(term).parameters.items()
        if parameter.default is not parameter.empty
    }
    options = [f"{name}.{option}" for name, method in METHODS.items() for option in _options(method)]
    key, _, value = setting.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    keyword = key.rpartition(".")[2]
    bound = keyword if keyword in OPTIONS else "beta"  # other numbers are weights, as β is one
    if key not in (*known, *options) or not within(bound, number) or (number == 0 and key == "lwf.temperature"):
        wanted = ", ".join(f"{name}={default:g}" for name, default in known.items())
        raise L2TError(
            f"{setting!r:.60} is no setting of a method: give a number for one of {wanted} (published values), or for "
            f"{', '.join(f'METHOD.{option}' for option in OPTIONS)} of a method that has it."
        )
    return key.rpartition(".")[0], keyword, number
