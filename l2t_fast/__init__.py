"""Fast exact engine for "Learning What and Where to Transfer" (L2T-ww, ICML 2019).

learner = L2T(source, target, source_layers=[...], target_layers=[...], example=x)
engine = Engine(learner, lr=0.1)
metrics = engine.step(x, y)
"""

from l2t_fast.engine.engine import Engine
from l2t_fast.errors import L2TError
from l2t_fast.learner.learner import L2T

__all__ = ["L2T", "Engine", "L2TError"]
