"""What `l2t-fast inspect NETWORK` says: layers, pairs, and what an iteration costs, before anything is trained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from l2t_fast.engine.compile import plain_steps
from l2t_fast.engine.counts import Counts, count
from l2t_fast.engine.inner_step import parameters
from l2t_fast.engine.iteration import Iteration
from l2t_fast.engine.second_order import SecondOrder
from l2t_fast.engine.state import Trained
from l2t_fast.engine.update import make_update
from l2t_fast.errors import L2TError, first_line
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.learner.candidates import Layers, find_layers, layers_of
from l2t_fast.learner.learner import L2T
from l2t_fast.learner.pairs import PairSpec
from l2t_fast.networks.architectures import build_shapes
from l2t_fast.reports.grid import Grid, to_rich
from l2t_fast.reports.pictures.networks import Column, plot_networks
from l2t_fast.settings.defaults import check_flag, file_name

_CLASSES = 1000
_INNER_STEPS = 2  # T by default


@dataclass(frozen=True)
class Looked:
    """A network that has shapes but no numbers, and its layers."""

    name: str
    network: nn.Module
    parameters: int
    layers: Layers
    chosen: list[str]

    @property
    def column(self) -> Column:
        """For the picture."""
        return Column(self.name, [(layer, self.layers.candidates[layer].shape) for layer in self.chosen])


def inspect(name: str, target: str | None, image_size: int, batch_size: int, console: Console) -> Path:
    """Prints and draws the layers of a network; with a target, the pairs, too. Returns the picture, inspect-NAME.png.

    Nothing is computed: the networks run on tensors without numbers, so that large ones take seconds and no memory.

    Raises:
        L2TError: there is no such network, or it does not run on images of that size.
    """
    check_flag("image-size", image_size)
    check_flag("batch-size", batch_size)
    names = [name] if target is None else [name, target]
    built = [build_shapes(each, _CLASSES) for each in names]  # outside: some look at numbers while they are made
    with FakeTensorMode(allow_non_fake_inputs=True):
        example = torch.empty(2, 3, image_size, image_size)
        looked = [look(each, network, example, console) for each, network in zip(names, built, strict=True)]
        *sources, last = looked
        networks = [source.network for source in sources]
        layers = [source.chosen for source in sources]
        pairs: PairSpec = "all-to-all" if sources else []
        learner = L2T(
            networks, last.network, source_layers=layers, target_layers=last.chosen, pairs=pairs, example=example
        )
        _say_cost(learner, batch_size, image_size, console)
    path = Path(f"inspect-{'-'.join(file_name(each.name) for each in looked)}.png")
    indices = [(pair.m, pair.n) for pair in learner.pairs]
    plot_networks(path, [each.column for each in looked], indices)
    _line(console, f"{path} has the picture")
    return path


def look(name: str, network: nn.Module, example: Tensor, console: Console) -> Looked:
    """Takes the numbers from a network, inside the mode of tensors without, and says which layers it has."""
    parameters = sum(p.numel() for p in network.parameters())
    network.to_empty(device="cpu")
    layers = find_layers(network, example, role=name, output=True)
    chosen = layers_of(network, example, role=name, output=True)
    _line(console, f"{name}: {parameters / 1e6:.2f} M parameters, {_CLASSES} classes unless it has others")
    console.print(to_rich(layer_grid(layers, chosen), "layers that can be matched", _remarks(layers, chosen)))
    return Looked(name, network, parameters, layers, chosen)


def layer_grid(layers: Layers, chosen: list[str]) -> Grid:
    """A line a layer, those that are as deep inside the network as the chosen ones at most."""
    depth = max(layer.count(".") for layer in chosen)
    shown = [layer for layer in layers.candidates if layer in chosen or layer.count(".") <= depth]
    lines = []
    for layer in shown:
        candidate = layers.candidates[layer]
        c, h, w = candidate.shape
        lines.append([layer, str(c), f"{h} × {w}", candidate.layout, "chosen" if layer in chosen else ""])
    bold = {(i, j) for i, layer in enumerate(shown) if layer in chosen for j in range(5)}
    return Grid(["layer", "channels", "H × W", "layout", ""], lines, bold)


def _remarks(layers: Layers, chosen: list[str]) -> list[str]:
    hidden = len(layers.candidates) - len(layer_grid(layers, chosen).lines)
    return [f"{hidden} more lie deeper inside, by their names in named_modules()."] if hidden else []


def _say_cost(learner: L2T, batch_size: int, image_size: int, console: Console) -> None:
    matched = f"{len(learner.pairs)} pairs, T = {_INNER_STEPS}" if learner.pairs else "plain training"
    what = f"one iteration ({matched}) on {batch_size} images of {image_size} × {image_size}"
    _line(console, f"measuring {what} ...")
    try:
        found = measure(learner, batch_size)
    except Exception as error:  # whatever a network may raise on tensors without numbers
        line = first_line(error)
        _line(console, f"it cannot be measured without computing it: {line}")
        return
    kept, most = found.saved_bytes / 1e9, found.peak_bytes / 1e9
    _line(
        console,
        f"{found.flops / 1e12:.3g} TFLOP; {kept:.3g} GB kept for backward, {most:.3g} GB at most, beside parameters "
        "and momentum (float32, memory='save')",
    )


def measure(learner: L2T, batch_size: int) -> Counts:
    """What one iteration on tensors without numbers costs, inside their mode."""
    theta = parameters(learner)
    trained = Trained.of(learner, theta, make_update(SGD(), 0.1, (), None, theta), 1e-4, 1e-4)
    iteration = Iteration(learner, trained, "transfer", _INNER_STEPS, "save")
    x = torch.empty(batch_size, *learner.image_shape)
    y = torch.zeros(batch_size, dtype=torch.int64)
    with SecondOrder(replace=True).context():
        return count(lambda: iteration.run(plain_steps(learner, 0.5), [x, y], draws=False))


def inspect_anything(what: str, target: str | None, image_size: int, batch_size: int, console: Console) -> None:
    """A run or a table where `what` is a folder, a network otherwise."""
    from l2t_fast.reports import inspection

    named = what.startswith(("timm/", "torchvision/")) or ":" in what or "/" not in what
    if Path(what).is_dir() or not named:
        inspection.inspect(Path(what), console)
        return
    try:
        inspect(what, target, image_size, batch_size, console)
    except L2TError as error:
        if "no network named" not in str(error) or target is not None:
            raise
        raise L2TError(f"{what} is not the folder of a run, and {error}") from error


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
