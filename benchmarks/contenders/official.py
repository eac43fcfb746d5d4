"""The authors' own code, alinlab/L2T-ww, run as it is from a checkout of it; nothing of it is copied here.

Its `main()` trains for good and keeps everything in local variables. Here it runs in a thread of its own and is handed
one batch at a time by the data loader that it asks for, so that `Official(...)(x, y)` is one of its iterations, its
logging included. What it makes on the way is noted, to give both sides the same networks and to read its meta-gradient.

The one adjustment: gradients are zeroed, not dropped (`zero_grad(set_to_none=False)`), as was PyTorch's default when
the code was written. Without it weight decay and momentum would no longer reach the classifier in a matching step.
"""

import contextlib
import functools
import importlib
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, State
from l2t_fast.errors import L2TError

# What the official code calls the layers of ours: it lists every block of ResNet32, and the stem of the larger ones.
_LAYERS = {"resnet32": (4, 9, 14), "vgg9_bn": (0, 1, 2, 3, 4), "resnet34": (1, 2, 3, 4), "resnet18": (1, 2, 3, 4)}
_DATASETS = {"vgg9_bn": "cifar100", "resnet18": "cub200"}  # they decide which of its networks a name means
_CLASSES = ("WeightNetwork", "LossWeightNetwork", "FeatureMatching", "MetaSGD")  # whose instances are noted
_FOREVER = 10**9  # epochs of its cosine schedule: the learning rate stays where it is

_Labelled = tuple[Tensor, Tensor]


class _Recorded:
    """torch.nn.functional, whose cross entropies are noted."""

    def __init__(self, functions: Any, found: list[tuple[str, Tensor]]) -> None:
        self._functions, self._found = functions, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def cross_entropy(self, *args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = self._functions.cross_entropy(*args, **kwargs)
        self._found.append(("loss", value.detach()))
        return value


class _Stop(BaseException):
    """Ends the thread from inside its data loader."""


class Official:
    """Iterations of the official code on a case, from `state`.

    Args:
        source: the source network, the case's random one by default.
        options: of its command line, other than its defaults ("beta", "meta-lr", ...).

    Raises:
        L2TError: no checkout, or a case that the official code has no networks for.
    """

    def __init__(
        self,
        checkout: Path | None,
        case: Case,
        state: State,
        device: torch.device,
        dtype: torch.dtype,
        source: nn.Module | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if checkout is None or not (checkout / "train_l2t_ww.py").is_file():
            raise L2TError(f"{checkout} is no checkout of alinlab/L2T-ww: give one with --official.")
        if case.source not in _LAYERS or case.sources > 1:
            raise L2TError(f"the official code has no networks for the case {case.name}: leave it out.")
        if torch.cuda.is_available() and device.type != "cuda":
            raise L2TError("the official code takes a GPU where there is one: hide it to time the CPU.")
        self._case, self._device, self._options = case, device, dict(options or {})
        self._batches: Queue[_Labelled | None] = Queue()
        self._answers: Queue[BaseException | None] = Queue()  # one for each batch, and one when all is made
        self._made: dict[str, Any] = {}
        self._networks: list[nn.Module] = []  # source, target
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            module = stack.enter_context(_imported(checkout, self._loaders))
            for name in _CLASSES:
                cls = getattr(module, name)
                stack.enter_context(mock.patch.object(cls, "__init__", self._noting(name, cls.__init__)))
            stack.enter_context(mock.patch.object(module, "check_model", self._noting_network(module.check_model)))
            stack.enter_context(mock.patch.object(sys, "argv", self._arguments(folder)))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(_default_dtype(dtype))
            threading.Thread(target=self._run, args=(module.main, torch.get_num_threads()), daemon=True).start()
            self._wait()
        # Its ResNet32 has other names, in the same order, and parameters at the end that it never uses.
        source = source or case.networks(device, dtype)[0][0]
        weights = zip(self._networks[0].state_dict(), source.state_dict().values(), strict=False)
        self._networks[0].load_state_dict(dict(weights), strict=False)
        self._state = state
        self._restart()

    def step(self, x: Tensor, y: Tensor) -> None:
        """One iteration."""
        self._batches.put((x, y))
        self._wait()

    def meta_gradient(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What φ got in one iteration from the state of the start, without momentum."""
        self._restart()
        self.step(x, y)
        return {
            f"{part}.{name}": p.grad.clone()
            for part, made in (("what", "WeightNetwork"), ("where", "LossWeightNetwork"))
            for name, p in self._made[made].named_parameters()
        }

    @property
    def network(self) -> nn.Module:
        """The target; it returns (logits, features)."""
        return self._networks[1]

    def set_lr(self, lr: float) -> None:
        """Of the steps of θ, real and simulated."""
        for group in self._made["MetaSGD"].param_groups:
            group["lr"] = lr

    def record(self) -> list[tuple[str, Tensor]]:
        """A list to which every cross entropy ("loss") and matching loss that it computes is added from now on."""
        found: list[tuple[str, Tensor]] = []
        matching = self._made["FeatureMatching"]
        matching.register_forward_hook(lambda *call: found.append(("matching_loss", call[2].detach())))
        namespace = type(matching).forward.__globals__
        namespace["F"] = _Recorded(namespace["F"], found)
        return found

    def keep_statistics_of_real_steps(self) -> None:
        """BatchNorm's running statistics are no longer updated by simulated passes."""
        norms = [module for module in self.network.modules() if isinstance(module, nn.BatchNorm2d)]
        usual = [norm.momentum for norm in norms]
        real_step, next_step = self._made["MetaSGD"].step, self.step

        def step_of_sgd(objective: Any, *args: Any, **kwargs: Any) -> None:
            real_step(objective, *args, **kwargs)
            for norm in norms:
                norm.momentum = 0.0  # the passes that follow, up to the next batch

        def step(x: Tensor, y: Tensor) -> None:
            for norm, momentum in zip(norms, usual, strict=True):
                norm.momentum = momentum
            next_step(x, y)

        self._made["MetaSGD"].step = step_of_sgd
        self.step = step  # type: ignore[method-assign]

    def close(self) -> None:
        """Ends the thread."""
        self._batches.put(None)

    def _restart(self) -> None:
        modules = {
            "target": self._networks[1],
            "projections": self._made["FeatureMatching"],
            "what": self._made["WeightNetwork"],
            "where": self._made["LossWeightNetwork"],
        }
        for part, module in modules.items():
            result = module.load_state_dict(self._state[part], strict=False)  # its VGG9 has layers that it never uses
            if result.unexpected_keys:
                raise L2TError(f"the official {part} has no {result.unexpected_keys[0]}: is this the right checkout?")
        self._made["MetaSGD"].state.clear()

    def _arguments(self, folder: Path) -> list[str]:
        """The command line of its training; the source's weights are put in afterwards."""
        case = self._case
        checkpoint = folder / f"none-{case.source}" / "0" / "model_best.pth.tar"
        checkpoint.parent.mkdir(parents=True)
        torch.save({"num_classes": case.source_classes, "state_dict": {}}, checkpoint)
        # In the order of our pairs.
        pairs = [(m, n) for m in _LAYERS[case.source] for n in _LAYERS[case.target]]
        options = {
            "dataroot": folder,
            "dataset": _DATASETS[case.target],
            "source-model": case.source,
            "source-domain": "none",
            "source-path": folder,
            "target-model": case.target,
            "pairs": ",".join(f"{m}-{n}" for m, n in pairs),
            "T": case.inner_steps,
            "epochs": _FOREVER,
            "experiment": folder / "logs",
            **self._options,
        }
        return ["train_l2t_ww.py", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

    def _noting(self, name: str, initialise: Callable[..., None]) -> Callable[..., None]:
        def noted(made: Any, *args: Any, **kwargs: Any) -> None:
            initialise(made, *args, **kwargs)
            if name == "MetaSGD":
                made.zero_grad = functools.partial(made.zero_grad, set_to_none=False)
            self._made[name] = made

        return noted

    def _noting_network(self, make: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
        def noted(options: Any) -> nn.Module:
            self._networks.append(make(options))
            return self._networks[-1]

        return noted

    def _loaders(self, options: Any) -> list[Any]:
        """Stands in for its `check_dataset`: training, validation and test data."""
        options.num_classes = self._case.classes
        return [self._training_data(), [], []]

    def _training_data(self) -> Iterator[_Labelled]:
        while True:
            self._answers.put(None)  # ready, or done with the batch before
            batch = self._batches.get()
            if batch is None:
                raise _Stop
            yield batch

    def _run(self, main: Callable[[], None], threads: int) -> None:
        try:
            torch.set_num_threads(threads)
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            main()
        except BaseException as error:  # whoever waits gets it
            self._answers.put(error)

    def _wait(self) -> None:
        error = self._answers.get()
        if error is not None:
            raise error


@contextlib.contextmanager
def _imported(checkout: Path, check_dataset: Callable[[Any], Any]) -> Iterator[ModuleType]:
    """The training script, as a module that nobody else sees: its packages have names such as `models`."""
    data = ModuleType("check_dataset")
    data.check_dataset = check_dataset  # type: ignore[attr-defined]
    sys.modules["check_dataset"] = data
    try:
        with mock.patch.object(sys, "path", [str(checkout), *sys.path]):
            yield importlib.import_module("train_l2t_ww")
    finally:
        for name, module in list(sys.modules.items()):
            if module is data or str(checkout) in (getattr(module, "__file__", None) or ""):
                del sys.modules[name]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
