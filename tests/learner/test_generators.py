"""The generators' states, kept and put back."""

import torch

from l2t_fast.learner.generators import read_torch, set_torch

CPU = torch.device("cpu")


def test_what_is_drawn_after_putting_back_is_what_was_drawn() -> None:
    states = read_torch(CPU)
    drawn = torch.rand(3)
    set_torch(states, CPU)
    assert torch.equal(torch.rand(3), drawn)


def test_states_of_a_gpu_do_not_keep_from_going_on_without_one() -> None:
    states = read_torch(CPU)
    set_torch({**states, "cuda": torch.zeros(16, dtype=torch.uint8)}, CPU)
    assert torch.equal(torch.get_rng_state(), states["cpu"])
