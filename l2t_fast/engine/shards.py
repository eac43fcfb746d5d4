"""An iteration in parts: micro-batches one after the other, on each of several ranks.

With ω = n/N of a part of n of the N images, L = Σ ω L_part is the loss of the joined batch. ω stands at the losses (at
the cross entropy, and in the coefficients a), so that all that follows is a sum over the parts: ∇θ of every step, the
metrics, and, since the adjoint of a sum hands the same cotangent to every part, J^T ḡ of every step and ∇φ. So it is
exact for uneven parts, and where parts share statistics (SyncBatchNorm) too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.kernels import launch
from l2t_fast.learner.attributes import Attributes, apart, read_attributes, set_attributes
from l2t_fast.learner.learner import L2T
from l2t_fast.ranks import Group, all_reduce_, broadcast_, gathered

Part = Sequence[Tensor | None]  # of a sum of several tensors; None is zero

_ALIGNED = 64  # bytes: tensors in one buffer start where kernels read in whole words
_NORMS = (nn.modules.batchnorm._NormBase,)


@dataclass(frozen=True)
class Shards:
    """`count` micro-batches on each rank of `group`; a single part, which is all of the batch, by default."""

    count: int = 1
    group: Group = None

    @property
    def whole(self) -> bool:
        """There is one part: nothing is to be summed."""
        return self.count == 1 and self.group is None

    @property
    def leads(self) -> bool:
        """Whether the first part of all is here."""
        return self.group is None or dist.get_rank(self.group) == 0

    def split(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The micro-batches of images and labels in a row."""
        if self.count == 1:
            return [list(tensors)]
        return [list(part) for part in zip(*(t.tensor_split(self.count) for t in tensors), strict=True)]

    def weights(self, parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor | None]]:
        """ω of each batch of each part here: scalars on the device; None is 1. One all-reduce."""
        sizes = [[len(labels) for labels in part[1::2]] for part in parts]
        if self.whole:
            return [[None] * len(of_part) for of_part in sizes]
        device = parts[0][1].device
        here = [torch.full((), sum(n), dtype=torch.float64, device=device) for n in zip(*sizes, strict=True)]
        totals = torch.stack(here)
        if self.group is not None:
            all_reduce_(totals, self.group)
        return [[n / total for n, total in zip(of_part, totals.unbind(), strict=True)] for of_part in sizes]

    def plus(self, total: Part | None, part: Part, like: Sequence[Tensor]) -> Part:
        """total + part, in the dtypes of `like`; what `over_ranks` takes in the end."""
        if self.count == 1:
            return part
        wide = [x if x is None else x.detach().to(p.dtype) for x, p in zip(part, like, strict=True)]
        if total is None:
            return wide
        return [x if y is None else y if x is None else x + y for x, y in zip(total, wide, strict=True)]

    def over_ranks(self, total: Part, like: Sequence[Tensor]) -> Part:
        """The sum over ranks, in the dtypes and the layout in memory of `like`: one all-reduce for each dtype."""
        if self.group is None:
            return total
        sums: list[Tensor | None] = [None] * len(like)
        for dtype in dict.fromkeys(p.dtype for p in like):
            of_dtype = [i for i, p in enumerate(like) if p.dtype == dtype]
            places = _places([like[i] for i in of_dtype])
            for i, place in zip(of_dtype, places[1:], strict=True):
                sums[i] = place
            given = [(place, total[i]) for i, place in zip(of_dtype, places[1:], strict=True)]
            filled = [(place, x) for place, x in given if x is not None]
            if filled:
                torch._foreach_copy_([place for place, _ in filled], [x for _, x in filled])
            all_reduce_(places[0], self.group)
        return sums

    def check_batch(self, x: Tensor, smallest: int) -> None:
        """Raises L2TError for a batch that does not make `count` micro-batches."""
        if self.count > 1 and len(x) < smallest:
            raise L2TError(
                f"a batch of {len(x)} images is too small for accumulate={self.count}: give {smallest} images or more."
            )

    def check_labels(self, labels: Tensor, ignored: int | None) -> None:
        """Raises L2TError for labels that do not count: parts would count for as much as others that have more.

        On a GPU it waits for them.
        """
        if not self.whole and ignored is not None and bool((labels == ignored).any()):
            raise L2TError(
                f"labels of {ignored} are ignored by the loss, which makes it no mean over the images, as accumulate= "
                "and group= need it: leave those images out."
            )

    def join(self, learner: L2T, mode: str, settings: Mapping[str, Any]) -> None:
        """Gives every rank the parameters and buffers of rank 0.

        Raises:
            L2TError: ranks have other learners or settings; SyncBatchNorm and a compiler.
        """
        if self.group is None:
            return
        if mode == "compile" and any(type(m) is nn.SyncBatchNorm for m in learner.target.modules()):
            raise L2TError("SyncBatchNorm cannot be compiled with its sums over ranks: use mode='auto'.")
        modules = [learner, *learner.sources]
        tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
        names = [(n, p.requires_grad) for n, p in learner.named_parameters()]
        described = (dict(settings), names, [(t.dtype, tuple(t.shape)) for t in tensors.values()])
        for rank, theirs in enumerate(gathered(described, self.group)):
            if theirs != described:
                here = dist.get_rank(self.group)
                raise L2TError(
                    f"rank {rank} has another learner or other settings than rank {here}: make them alike on all ranks."
                )
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.copy_(broadcast_(tensor.clone(memory_format=torch.contiguous_format), self.group))


WHOLE = Shards()


def _places(like: Sequence[Tensor]) -> list[Tensor]:
    """(a flat buffer of zeros, then a place in it for each tensor) of one dtype."""
    step = max(1, _ALIGNED // like[0].element_size())
    sizes = [-(-p.numel() // step) * step for p in like]
    flat = torch.zeros(sum(sizes), dtype=like[0].dtype, device=like[0].device)
    places = [flat]
    for p, begin in zip(like, accumulate([0, *sizes[:-1]]), strict=True):
        piece = flat[begin : begin + p.numel()]
        places.append(piece.as_strided(p.shape, p.stride()) if launch.is_dense(p) else piece.view(p.shape))
    return places


class RealBuffers:
    """A network's buffers in a real step of several parts, each of which starts from the same ones.

    Afterwards the statistics of normalisations are the mean over the parts, and every other buffer is the first part's:
    all ranks have the same. Likewise the attributes of the modules, which are those of the first part of this rank.
    """

    def __init__(self, network: nn.Module, shards: Shards) -> None:
        found: dict[int, tuple[Tensor, bool]] = {}
        for module in network.modules():
            for buffer in module._buffers.values():
                if buffer is not None:
                    mean = isinstance(module, _NORMS) and buffer.is_floating_point()
                    found.setdefault(id(buffer), (buffer, mean))
        self._shards, self._found = shards, list(found.values())
        self._network, self._tables = network, [(m._buffers, dict(m._buffers)) for m in network.modules()]
        self._attributes = read_attributes(network)
        self._left: Attributes = []
        set_attributes(apart(self._attributes))
        self._before = [buffer.clone() for buffer, _ in self._found]
        self._like = [b.to(torch.uint8) if b.dtype == torch.bool else b for b in self._before]
        self._total: Part | None = None

    @torch.no_grad()
    def take(self, weight: Tensor, first: bool) -> None:
        """What a part has left, whose weight is ω; the next one starts from what this one did.

        Raises:
            L2TError: a buffer that is no longer the same tensor.
        """
        for buffers, then in self._tables:
            if odd := [name for name, b in then.items() if b is not None and buffers.get(name) is not b]:
                raise L2TError(
                    f"buffer '{odd[0]}' changes its dtype or shape in the target's forward pass, which accumulate= and "
                    "group= do not take: keep both."
                )
        if first:
            self._left = read_attributes(self._network)
        if self._shards.count > 1:
            set_attributes(apart(self._attributes))
        first = first and self._shards.leads
        left = [b * weight if mean else b.clone() if first else None for b, mean in self._found]
        left = [x if x is None else x.to(like.dtype) for x, like in zip(left, self._like, strict=True)]
        self._total = self._shards.plus(self._total, left, self._like)
        for (buffer, _), before in zip(self._found, self._before, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def settle(self) -> None:
        """What all parts have left goes into the buffers."""
        assert self._total is not None
        set_attributes(self._left)
        for (buffer, _), x in zip(self._found, self._shards.over_ranks(self._total, self._like), strict=True):
            assert x is not None
            buffer.copy_(x)
