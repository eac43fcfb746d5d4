"""Networks of others: torchvision's, timm's, and what a function of the user's returns."""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torchvision.models
from torch import nn

from l2t_fast.errors import L2TError, first_line

# Weights that a name stands for; everything else is a file.
IMAGENET, PRETRAINED, OWN = "imagenet", "pretrained", "own"
_HUB = ("hf-hub:", "local-dir:")


def split_name(name: str) -> tuple[str, str]:
    """("timm", "convnext_tiny") of "timm/convnext_tiny"; "torchvision" likewise; ("call", name) of MODULE:FUNCTION; and
    ("", name) of a bare one."""
    library, slash, rest = name.partition("/")
    if slash and library in ("timm", "torchvision"):
        return library, rest
    return ("call" if ":" in name else ""), name


def is_file(weights: str) -> bool:
    """Whether weights are a checkpoint file, FILE or FILE:PREFIX, and no word or id of a hub."""
    return weights not in (IMAGENET, PRETRAINED, OWN) and not weights.startswith(_HUB)


def unknown(name: str, known: Iterable[str]) -> L2TError:
    """That there is no such network, with the nearest names."""
    nearest = ", ".join(difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.0))
    return L2TError(f"there is no network named {name!r}; the nearest names are {nearest}.")


def torchvision_model(name: str, num_classes: int) -> nn.Module:
    """One of torchvision's, freshly initialised."""
    # With auxiliary classifiers these two return a tuple while they train.
    auxiliary = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **auxiliary)
    return model


def timm_model(name: str, **options: Any) -> nn.Module:
    """One of timm's; options: as `timm.create_model` takes them.

    Raises:
        L2TError: timm is not installed; it has no such network, or cannot make it so.
    """
    timm = _known_to_timm(name)
    try:
        model: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # whatever the library may raise
        raise L2TError(f"timm cannot make '{name}': {first_line(error)}; give another network.") from error
    return model


def _known_to_timm(name: str) -> ModuleType:
    """The package, where it is installed and has a network of that name."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise L2TError(f"timm/{name} needs timm ({first_line(error)}): run `pip install 'l2t-fast[timm]'`.") from error
    if not timm.is_model(name.partition(".")[0]):
        raise unknown(f"timm/{name}", [f"timm/{each}" for each in timm.list_models()])
    return timm


def called_model(place: str, num_classes: int | None) -> nn.Module:
    """What MODULE:FUNCTION returns, called with `num_classes` where it takes that, if it is not None.

    MODULE is imported as Python does, from the working directory, too.

    Raises:
        L2TError: there is no such module or function, it raises, or returns something else than a module.
    """
    build = _function(place)
    try:
        model = build() if num_classes is None else _with_classes(build, num_classes)
    except Exception as error:  # whatever a user's code may raise
        raise L2TError(f"{place} raised {type(error).__name__}: {first_line(error)}{_where(error)}.") from error
    if not isinstance(model, nn.Module):
        raise L2TError(f"{place} returned {type(model).__name__}, not a network: return a torch.nn.Module.")
    return model


def _with_classes(build: Callable[..., Any], num_classes: int) -> Any:
    """What it returns, told the number of classes if it takes that, also by **options."""
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):  # written in C, without a signature
        return build()
    if "num_classes" in parameters:
        return build(num_classes=num_classes)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        try:
            return build(num_classes=num_classes)
        except TypeError as error:  # what they are handed on to may not take it
            if "num_classes" not in str(error):
                raise
    return build()


def _function(place: str) -> Callable[..., Any]:
    module, _, path = place.partition(":")
    if not path or not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
        raise L2TError(
            f"{place!r} is not the name of a network: give one of torchvision's or timm's (timm/NAME), or "
            "MODULE:FUNCTION as in my_package.my_module:build."
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # console scripts do not look there
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever a user's code may raise
        raise L2TError(
            f"{module} of {place} cannot be imported ({type(error).__name__}: {first_line(error)}{_where(error)}): run "
            "in the folder that it lies in, or install it."
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [name for name in dir(found) if name[0] != "_"], n=4, cutoff=0.3)
            hint = f"; it has {', '.join(near)}" if near else ""
            raise L2TError(f"{module} has no '{path}'{hint}: give the function that returns the network.")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise L2TError(f"{place} is {type(found).__name__}, no function: give one that returns the network.")
    return found  # type: ignore[no-any-return]


def ready_made(name: str, weights: str) -> nn.Module:
    """A network with the weights that a word or an id of a hub stands for, see `is_file`.

    Raises:
        L2TError: the weights are of another library; they cannot be had.
    """
    library, rest = split_name(name)
    if weights == OWN:
        if library != "call":
            raise L2TError(f"weights '{OWN}' are those that a function of yours gives its network: {name} is none.")
        return called_model(name, None)
    if library == "call":
        raise L2TError(f"{name} has weights of its own or in a file, not '{weights}': give '{OWN}' or FILE.")
    if weights == IMAGENET:
        if library == "timm":
            raise L2TError(f"'{IMAGENET}' are torchvision's weights: for {name} give '{PRETRAINED}', timm's.")
        try:
            model: nn.Module = torchvision.models.get_model(rest, weights="DEFAULT")
        except (ValueError, OSError) as error:
            raise L2TError(
                f"torchvision's ImageNet weights of '{name}' cannot be had ({error}): give a checkpoint file."
            ) from error
        return model
    if library != "timm":
        raise L2TError(f"'{weights}' are timm's weights: {name} is none of its networks, give timm/NAME or a file.")
    timm = _known_to_timm(rest)
    return _timm_weights(timm, rest, weights)


def _timm_weights(timm: ModuleType, name: str, weights: str) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name if weights == PRETRAINED else weights, pretrained=True)
    except Exception as error:  # of the library, of the hub's, of the network
        raise L2TError(
            f"the weights '{weights}' of timm/{name} cannot be had ({first_line(error)}): without a network they must "
            "have been downloaded before; or give a checkpoint file."
        ) from error
    made = str(getattr(model, "pretrained_cfg", {}).get("architecture", name))
    if made.partition(".")[0] != name.partition(".")[0]:
        raise L2TError(f"{weights} is a {made}, not a {name}: give --source timm/{made}.")
    return model


def _where(error: BaseException) -> str:
    """The file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f" ({Path(last.filename).name}, line {last.lineno})" if last and "importlib" not in last.filename else ""
