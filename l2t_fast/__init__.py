"""Fast exact engine for "Learning What and Where to Transfer" (L2T-ww, ICML 2019).

learner = L2T(source, target, source_layers=[...], target_layers=[...], example=x)
engine = Engine(learner, lr=0.1)
metrics = engine.step(x, y)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2t_fast.engine.engine import Engine
    from l2t_fast.errors import L2TError
    from l2t_fast.kernels.adamw.rule import AdamW
    from l2t_fast.kernels.sgd.rule import SGD
    from l2t_fast.learner.learner import L2T
    from l2t_fast.training.export import export

__all__ = ["L2T", "SGD", "AdamW", "Engine", "L2TError", "export"]

_PLACES = {
    "L2T": "l2t_fast.learner.learner",
    "Engine": "l2t_fast.engine.engine",
    "SGD": "l2t_fast.kernels.sgd.rule",
    "AdamW": "l2t_fast.kernels.adamw.rule",
    "L2TError": "l2t_fast.errors",
    "export": "l2t_fast.training.export",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for, so that the command line answers --help without loading torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'l2t_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
