"""A network of the user's, run as it is: its own forward pass, whatever Python is in it, with its features handed back.

Nothing is traced or copied. For one pass the tensors of a simulated step stand in the places of parameters and buffers,
layers take on their twins, and forward hooks on the tapped layers keep what these return; after it the network is as it
was, of its own classes, with nothing of ours on it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from l2t_fast.errors import L2TError, ran_out
from l2t_fast.kernels.layers.autograd import cast
from l2t_fast.kernels.layers.twins import BatchNorm2d, Twins, half_parameters, twin_of
from l2t_fast.learner.direct import run_directly
from l2t_fast.learner.hooks import gated_backward_hooks
from l2t_fast.learner.pairs import Shape
from l2t_fast.learner.places import Places
from l2t_fast.learner.taps import Tap, cannot_run, check_module, find_taps, logits_of


class Outputs(NamedTuple):
    """What one forward pass of a tapped network gives."""

    features: list[Tensor]  # [B, C, H, W] of each tapped layer
    logits: Tensor | None  # [B, classes], or what else the target returns, if the output was asked for
    hidden: Tensor | None  # [B, C], what the last Linear reads, if the output comes from one


class Runs(Protocol):
    """A tapped network that can be run, as it is or traced."""

    @property
    def half(self) -> list[str]: ...

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    def run(
        self,
        x: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        buffers: dict[str, Tensor] | None = None,
        *,
        simulated: bool = False,
    ) -> Outputs:
        """See `Network.run`."""
        ...

    def in_precision(self, dtype: torch.dtype, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Network.in_precision`."""
        ...


class Network:
    """A module and the layers of it that are tapped.

    Attributes:
        module: the user's own. role: what it is called in errors. output: whether its output is wanted.
        shapes: (C, H, W) of each tapped feature. output_shape: of the output, without the batch; its
            first is `classes`, 0 without.
        hidden: channels of what the last Linear reads; 0 without the output, or where it comes from something else.
        half: names of the parameters that are computed with in bfloat16 on bfloat16 images.
        parameters: the module's own, by name, each once.
        statistics_matter: whether a pass in training mode reads BatchNorms' running statistics, or writes them past
            the BatchNorm (`learner.reach` finds out; hooks of gradients may): simulated passes then keep them like any
            other buffer.

    Raises:
        L2TError: see `find_taps`.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        example: Tensor,
        *,
        role: str,
        output: bool,
        logits: int | str | None = None,
        layout: Mapping[str, str] | None = None,
    ) -> None:
        self.module = module
        check_module(module, role)
        found = find_taps(module, layers, example, role=role, output=output, logits=logits, layout=layout or {})
        self.taps: list[Tap] = found.taps
        self.output, self._logits, self.role = output, logits, role
        self._last_linear = found.last_linear
        self.shapes: tuple[Shape, ...] = found.shapes
        self.output_shape, self.hidden = found.output_shape, found.hidden
        self.classes = self.output_shape[0] if self.output_shape else 0
        self.half = half_parameters(module)
        self.places = Places(module)
        self.parameters = self.places.parameters
        self._twins = Twins(module)
        self.statistics_matter = False

    def run(
        self,
        x: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        buffers: dict[str, Tensor] | None = None,
        *,
        simulated: bool = False,
    ) -> Outputs:
        """One forward pass on images x [B, C, H, W].

        parameters, buffers: stand in the places of the network's own of these names; `buffers` then has what the pass
        left there. In a simulated pass BatchNorms leave their running statistics alone (`leaves_alone`).

        Raises:
            L2TError: a tapped layer was not called, or its feature was overwritten in place later in the pass; the
                network cannot run on such images.
        """
        kept = _Kept(self.taps, None if self.output else len(self.taps))
        handles = [tap.module.register_forward_hook(kept.hook(i)) for i, tap in enumerate(self.taps)]
        if self._last_linear is not None:
            handles.append(self._last_linear.register_forward_hook(kept.keep_input))
        result = None
        try:
            with (
                self.places.holding(parameters or {}, {} if buffers is None else buffers),
                self._twins.taken(simulated=simulated and not self.statistics_matter),
                gated_backward_hooks(self.module),
                run_directly(),
            ):
                result = self.module(x)
        except _Enough:
            pass
        except Exception as error:  # whatever a network may raise
            if isinstance(error, L2TError) or ran_out(error):
                raise
            raise cannot_run(self.role, x, error) from error
        finally:
            for handle in handles:
                handle.remove()
        logits = None if result is None else self.logits_of(result)
        features = [_as_wide(feature, x.dtype) for feature in self.as_maps(kept.features(self.role))]
        return Outputs(features, logits, kept.read if logits is not None else None)

    def leaves_alone(self, module: nn.Module) -> bool:
        """Whether `module` leaves its buffers alone in simulated passes, and nothing reads them there."""
        return not self.statistics_matter and twin_of(module) is BatchNorm2d

    def logits_of(self, result: Any) -> Tensor:
        """The logits [B, classes] in what the module returned."""
        return logits_of(result, self._logits, self.role)

    def as_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[B, C, H, W] of each tapped layer, of what the layers returned."""
        return [tap.as_map(feature) for tap, feature in zip(self.taps, features, strict=True)]

    def in_precision(self, dtype: torch.dtype, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`given` parameters and, on bfloat16 images, all others, as the network computes with them."""
        if dtype != torch.bfloat16 or not self.half:
            return dict(given)
        wide = [given[name] if name in given else self.places.parameters[name] for name in self.half]
        return {**given, **dict(zip(self.half, cast(dtype, *wide), strict=True))}


def _as_wide(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """The feature as it is matched: one of lower precision than the images (of an autocast region) in theirs."""
    return feature.to(dtype) if feature.dtype.itemsize < dtype.itemsize else feature


class _Enough(BaseException):
    """All tapped layers have been called, and nothing else of the network is wanted."""


class _Kept:
    """What the hooks of one pass keep."""

    def __init__(self, taps: Sequence[Tap], wanted: int | None) -> None:
        self._taps, self._left = taps, wanted
        self._calls = [0] * len(taps)
        self._found: list[tuple[Tensor, int] | None] = [None] * len(taps)
        self.read: Tensor | None = None  # by the last Linear

    def hook(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        tap = self._taps[i]

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            call = self._calls[i]
            self._calls[i] += 1
            if call != tap.call:
                return
            feature = tap.pick(output)
            if feature.is_inference():
                feature = feature.clone()  # autograd takes none of these
            self._found[i] = feature, feature._version
            if self._left is not None:
                self._left -= 1
                if not self._left:
                    raise _Enough

        return keep

    def keep_input(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.read = inputs[0]

    def features(self, role: str) -> list[Tensor]:
        """What the tapped layers returned."""
        features = []
        for tap, found in zip(self._taps, self._found, strict=True):
            if found is None:
                raise L2TError(
                    f"layer '{tap.name}' of the {role} was not called in this forward pass, as it was in the first: "
                    "tap one that always is."
                )
            feature, version = found
            if feature._version != version:
                raise L2TError(
                    f"layer '{tap.name}' of the {role} is overwritten in place later in the forward pass: tap the "
                    "layer after it, or build the network with inplace=False."
                )
            features.append(feature)
        return features
