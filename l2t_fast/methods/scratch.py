"""Training on the labels alone."""

from l2t_fast.methods.base import Method

SCRATCH = Method("cross entropy, without a source")
