"""The one shape of a method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from l2t_fast.choices import PairRule, What, Where
from l2t_fast.learner.learner import L2T
from l2t_fast.learner.terms import MakeTerm, Term


@dataclass(frozen=True)
class Method:
    """What a method adds to the cross entropy of the target, and how the target starts.

    The matching loss is a point of one space: which `pairs` (None: no matching loss), which channel weights (`what`)
    and pair weights (`where`). A method without learned weights has no meta-parameters, so that its iteration is the
    real step alone. `terms` are classes of `l2t_fast.learner.terms.Term`, whose keyword arguments are the settings of
    the method, with the published values as defaults. `start` changes the fresh target before it is trained, and says
    how.
    """

    cites: str
    pairs: PairRule | None = None
    what: What = "uniform"
    where: Where = "fixed"
    terms: tuple[type[Term], ...] = ()
    start: Callable[[nn.Module, Sequence[nn.Module]], str] | None = None
    settings: tuple[tuple[str, str, float], ...] = ()
    """(name of a term, keyword, value) where another value than the published one is wanted"""
    options: Mapping[str, float] = field(default_factory=dict)
    """options of the engine that this method has another value of than its run"""

    @property
    def uses_sources(self) -> bool:
        return self.pairs is not None or bool(self.terms) or self.start is not None

    @property
    def learns_weights(self) -> bool:
        """Whether there are meta-parameters φ."""
        return self.pairs is not None and (self.what == "softmax" or self.where != "fixed")

    def learner(
        self,
        sources: Sequence[nn.Module],
        target: nn.Module,
        *,
        source_layers: Sequence[Sequence[str]] | None,
        target_layers: Sequence[str] | None,
        where: Where = "relu6",
        example: Tensor,
    ) -> L2T:
        """The learner of this method; `where` are the pair weights of a method that learns them.

        Raises:
            L2TError: see `L2T`; UnfitError where these networks do not suit the method.
        """
        return L2T(
            sources,
            target,
            source_layers=source_layers,
            target_layers=target_layers,
            pairs=self.pairs or [],
            what=self.what,
            where="fixed" if self.where == "fixed" else where,
            terms=self.make_terms(),
            example=example,
        )

    def make_terms(self) -> list[MakeTerm]:
        """What `L2T` makes the terms of."""

        def made(kind: type[Term]) -> MakeTerm:
            options = {keyword: value for name, keyword, value in self.settings if name == kind.name}
            return lambda networks: kind(networks, **options)

        return [made(kind) for kind in self.terms]
