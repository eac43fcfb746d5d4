"""Streams of random numbers, each chosen by a key of numbers alone."""

import numpy as np
import torch

from l2t_fast.errors import L2TError

# The first number of every random key keeps the streams apart.
TEST, VALIDATION, PER_CLASS, ORDER, AUGMENTATION = range(5)


def keyed_generator(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded by all numbers of `key`."""
    if min(key) < 0:
        raise L2TError(f"seeds and epochs must be at least 0, not {min(key)}.")
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
