"""A trained network for others: its weights, or itself as a graph, with nothing of ours on it."""

import copy
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from l2t_fast.choices import Export
from l2t_fast.errors import L2TError, first_line
from l2t_fast.files import save_bytes
from l2t_fast.learner.taps import unwrapped

# The file of each format; the suffix says to `export` which one is meant.
FILES: dict[Export, str] = {
    "safetensors": "target.safetensors",
    "torch-export": "target.pt2",
    "onnx": "target.onnx",
}
_SUFFIXES = {Path(name).suffix: form for form, name in FILES.items()}


def export(network: nn.Module, path: str | Path, example: Tensor) -> None:
    """Writes `network`, in evaluation mode and on the CPU, for those who have nothing of this package.

    Args:
        network: any module; it is copied, and stays as it is. Of one that is wrapped (`torch.compile`, DataParallel,
            DistributedDataParallel) the module inside counts.
        path: FILE.safetensors, its state_dict under the names it has there; FILE.pt2, a program that
            `torch.export.load` reads; FILE.onnx, a model "images" -> "logits". Graphs take batches of any size where
            the network does.
        example: images [B, C, H, W] as it takes them; shape and dtype matter.

    Raises:
        L2TError: another suffix, a network that cannot be exported so, a package that is missing.
        MachineError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(network, torch.jit.ScriptModule):  # whose weights can be had
        network = unwrapped(network, "network")
    form = _SUFFIXES.get(path.suffix)
    if form is None:
        raise L2TError(f"{path} says no format: give a name that ends in {' or '.join(_SUFFIXES)}.")
    check_formats([form])
    if not path.parent.is_dir():
        raise L2TError(f"there is no folder {path.parent}: make it, or give another path.")
    if form == "safetensors":
        from safetensors.torch import save

        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
        save_bytes(path, save(state))
        return
    save_bytes(path, _graph(network, form, example))


def check_formats(formats: Sequence[str]) -> None:
    """Raises L2TError for a format that there is not, or whose packages are missing."""
    for form in formats:
        if form not in get_args(Export):
            raise L2TError(f"there is no export format '{form}': give {' or '.join(get_args(Export))}.")
    if "onnx" in formats and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise L2TError("exporting to ONNX needs the packages onnx and onnxscript: pip install 'l2t-fast[onnx]'.")


def check_export(network: nn.Module, formats: Sequence[Export], example: Tensor) -> None:
    """Tries it: before anything is trained, not after.

    Raises:
        L2TError: as `export`.
    """
    check_formats(formats)
    with tempfile.TemporaryDirectory() as folder:
        for form in formats:
            export(network, Path(folder) / FILES[form], example)


def _graph(network: nn.Module, form: Export, example: Tensor) -> bytes:
    plain = copy.deepcopy(network).cpu().eval()
    images = torch.zeros(2, *example.shape[1:], dtype=example.dtype)  # two: a batch of one would be a constant
    any_batch = ({0: torch.export.Dim.AUTO},)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILES[form]
        try:
            if form == "onnx":
                torch.onnx.export(
                    plain,
                    (images,),
                    file,
                    input_names=["images"],
                    output_names=["logits"],
                    dynamo=True,
                    dynamic_shapes=any_batch,
                    external_data=False,
                    verbose=False,
                )
            else:
                with torch.no_grad():
                    torch.export.save(torch.export.export(plain, (images,), dynamic_shapes=any_batch), file)
        except Exception as error:  # whatever the exporters may raise
            cause: BaseException = error
            while form == "onnx" and cause.__cause__ is not None:  # its own words are how to report it
                cause = cause.__cause__
            line = first_line(cause)[:200]
            raise L2TError(
                f"{type(network).__name__} cannot be exported as {form} ({line}): leave that out; 'safetensors' has "
                "its weights."
            ) from error
        return file.read_bytes()
