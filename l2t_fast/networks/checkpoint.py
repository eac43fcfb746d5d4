"""What is in a checkpoint file of any maker, read without running anything that it holds."""

import argparse
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from os.path import expanduser
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from l2t_fast.errors import L2TError

# Where makers keep the state dict, the plain weights before their exponential moving average (EMA): `state_dict` the
# authors, timm and Lightning, `model` torchvision's scripts, `weights` best.pt; `state_dict_ema` timm, `model_ema`
# torchvision's scripts.
_KEYS = ("state_dict", "model", "weights", "state_dict_ema", "model_ema")

# What a pickle of tensors refers to; `args` of timm and of torchvision's scripts is a Namespace.
_HARMLESS = re.compile(
    r"argparse\.Namespace|collections\.(OrderedDict|Counter)|builtins\.(set|bytearray|complex)|_codecs\.encode"
    r"|torch\._(utils|tensor)\._rebuild\w+|torch\.storage\.(Typed|Untyped)Storage|torch\.nn\.parameter\.Parameter"
    r"|torch\.((cuda\.|sparse\.)*\w*(Storage|Tensor)|Size|device|[a-z]+\d+\w*|bool)"
)


def split_prefix(place: str | Path) -> tuple[Path, str | None]:
    """FILE and PREFIX of FILE:PREFIX; None where there is no prefix."""
    path, (file, colon, prefix) = Path(expanduser(place)), str(place).rpartition(":")
    if colon and not path.is_file() and Path(expanduser(file)).is_file():
        return Path(expanduser(file)), prefix.rstrip(".")
    return path, None


def read_checkpoint(place: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, on the CPU, with the names that it has there.

    place: FILE, or FILE:PREFIX for the entries whose names begin with PREFIX and a dot, without it. The file is one
    of torch.save or of safetensors. The state dict is bare or under `state_dict`, `model`, `weights`,
    `state_dict_ema` or `model_ema`: the first of them that is there, so the moving average (EMA) only where there are
    no plain weights, or where PREFIX names it (FILE:model_ema). Where there is none of them, the state dicts under
    other keys, at any depth, are one whose names begin with these keys. Nothing in the file is run: beside tensors and
    plain containers only argparse.Namespace is unpickled.

    Raises L2TError when the file is missing, truncated or changed, holds no tensors or none beneath the prefix, or
    holds pickled objects, which are named.
    """
    path, prefix = split_prefix(place)
    if not path.is_file():
        raise L2TError(f"there is no checkpoint file {path}; give the path of one.")
    content = _load_safetensors(path) if _is_safetensors(path) else _load_pickle(path)
    states = {"": content, **content} if isinstance(content, Mapping) else {}
    first, _, rest = (prefix or "").partition(".")
    if first in _KEYS and _is_state(states.get(first)) and not _beneath(_plain(states), first):
        state, prefix = states[first], rest or None
    else:
        state = _plain(states)
    if not state:
        kind = "" if isinstance(content, Mapping) else f" but a {type(content).__name__}"
        raise L2TError(
            f"{path} holds no weights{kind}; give a state dict of tensors, bare or under 'state_dict' or 'model'."
        )
    state = {str(name): value for name, value in state.items()}
    for name, value in state.items():
        if value.numel() * value.element_size() > path.stat().st_size:
            raise L2TError(f"'{name}' of {path} is {list(value.shape)}, more than the file holds; get it again.")
    if prefix is None:
        return state
    if not (beneath := _beneath(state, prefix)):
        firsts = ", ".join(sorted({name.partition(".")[0] for name in state}))
        raise L2TError(f"{path} has nothing beneath {prefix!r}; its names begin with {firsts}.")
    return beneath


def _plain(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """The first state dict under a known key, or the bare one, or those under others; empty where there is none."""
    found = (dict(states[key]) for key in (*_KEYS, "") if _is_state(states.get(key)))
    return next(found, None) or dict(_nested({key: value for key, value in states.items() if key != ""}))


def _nested(content: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """The entries of all state dicts inside, but for optimizers', named with the keys that lead to them."""
    for key, value in content.items():
        if isinstance(value, Mapping) and "optim" not in str(key).lower():
            inside = value.items() if _is_state(value) else _nested(value)
            yield from ((f"{key}.{name}", tensor) for name, tensor in inside)


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _beneath(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}." if prefix else ""
    return {name.removeprefix(start): value for name, value in state.items() if str(name).startswith(start)}


def _unreadable(path: Path) -> L2TError:
    return L2TError(f"{path} is not a checkpoint that PyTorch can read (truncated, or of another kind); get it again.")


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its header: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise L2TError(f"{path} is a safetensors file; run `pip install safetensors` to read it.") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path) from error


def _check_sums(path: Path) -> None:
    """Raises L2TError where a file that is an archive is not as it was written: PyTorch does not look."""
    if not zipfile.is_zipfile(path):
        return  # what torch.save wrote before it wrote archives
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
            if sum(tensors) > path.stat().st_size:  # packed, which PyTorch never does
                raise _unreadable(path)
            changed = archive.testzip()
    except Exception as error:  # on bytes of any origin, as the unpickler
        raise _unreadable(path) from error
    if changed is not None:
        raise L2TError(f"{path} is damaged (the checksum of '{changed}' in it does not fit); get it again.")


def _load_pickle(path: Path) -> Any:
    _check_sums(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript and of pickles of another protocol: the refusal says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes of any origin the unpickler may raise anything
        if what := _pickled_object(path):
            raise L2TError(
                f"{path} holds {what}, which would run code: save its state_dict() with torch.save."
            ) from error
        raise _unreadable(path) from error


def _pickled_object(path: Path) -> str | None:
    """What the pickle in a file would make beside tensors, found by reading its instructions, not by following them."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                return "a TorchScript module"
            with archive.open(next(name for name in names if name.endswith("data.pkl"))) as file:
                return _describe(file)
    except (zipfile.BadZipFile, StopIteration, OSError, RuntimeError, NotImplementedError):
        pass
    with path.open("rb") as file:  # what torch.save wrote before it wrote archives
        return _describe(file)


def _describe(file: IO[bytes]) -> str | None:
    found, is_module = None, False
    words: list[str] = []  # strings so far, the last two of which STACK_GLOBAL takes
    for opcode, value in _instructions(file):
        if opcode == "GLOBAL":
            name = value.replace(" ", ".")
        elif opcode == "STACK_GLOBAL":
            name = ".".join(words[-2:])
        else:
            if isinstance(value, str):
                words.append(value)
                is_module |= value == "_parameters"  # in the state of every nn.Module
            continue
        if found is None and not _HARMLESS.fullmatch(name):
            found = name
    if found is None:
        return None
    return f"a pickled module (class {found})" if is_module else f"a pickled object ({found})"


def _instructions(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Of the pickles at the start of a file, as far as there are any."""
    try:
        while True:
            for opcode, value, _ in pickletools.genops(file):
                yield opcode.name, value
    except Exception:  # not a pickle (any more), or cut off
        return
