"""Where memory runs out there is one sentence with what is needed and what would help, and nothing has changed."""

import copy
import gc
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from l2t_fast import L2TError
from l2t_fast.engine import memory
from l2t_fast.engine.counts import count
from l2t_fast.engine.iteration import Iteration
from l2t_fast.errors import ran_out
from l2t_fast.learner.learner import L2T
from tests.shared import batch, engine, everything, learner, same

ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried")
ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def call(*arguments: Any, **named: Any) -> NoReturn:
        raise error

    return call


def said(subject: Any, size: int = 24) -> str:
    with pytest.raises(L2TError) as error:
        subject.step(*batch(0, size))
    return str(error.value)


@pytest.mark.parametrize("error", [ON_CPU, ON_CUDA, MemoryError()])
def test_one_sentence_and_nothing_changed(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = engine(inner_steps=1)
    before = copy.deepcopy(everything(subject))
    drawn = torch.get_rng_state()
    monkeypatch.setattr(Iteration, "run", raising(error))
    sentence = said(subject)
    assert sentence.startswith("memory ran out in an iteration on 24 images, which needs about ")
    assert "are free: use a smaller batch or memory 'recompute' (about " in sentence
    same(everything(subject), before)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("options", [{}, {"memory": "recompute"}, {"accumulate": 3}], ids=str)
def test_the_estimate_is_what_an_iteration_takes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = engine(**options)
    taken = count(lambda: subject.step(*batch(0, 24))).peak_bytes
    monkeypatch.setattr(Iteration, "run", raising(ON_CPU))
    sentence = said(subject)
    told = int(sentence.partition("needs about ")[2].partition(" MiB")[0])
    assert told * 2**20 == pytest.approx(taken, rel=0.2)
    assert ("recompute" in sentence) is (not options)


def test_how_many_images_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Iteration, "run", raising(ON_CPU))
    monkeypatch.setattr(memory, "free_memory", lambda device: (20 * 2**20, 40 * 2**20))
    sentence = said(engine(inner_steps=1))
    assert "20 MiB of 40 MiB are free: use batches of at most " in sentence
    fits = int(sentence.partition("at most ")[2].partition(" ")[0])
    monkeypatch.undo()
    subject = engine(inner_steps=1)
    assert count(lambda: subject.step(*batch(0, fits))).peak_bytes < 22 * 2**20
    assert count(lambda: subject.step(*batch(0, 24))).peak_bytes > 20 * 2**20


def test_without_weights_to_learn_and_where_the_trials_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    target = learner().target
    plain = L2T([], target, source_layers=[], target_layers=[], pairs=[], example=batch(0, 2)[0])
    subject = engine(plain)
    before = copy.deepcopy(everything(subject))
    monkeypatch.setattr(Iteration, "run", raising(ON_CPU))
    assert "which needs about" in (sentence := said(subject))
    assert "recompute" not in sentence
    same(everything(subject), before)
    monkeypatch.setattr(Iteration, "matching", raising(ON_CPU))
    assert "needs" not in said(subject)


def test_memory_that_runs_out_in_a_forward_pass_is_no_wrong_image_size() -> None:
    subject = engine()
    handle = subject.learner.target.features[0].register_forward_hook(raising(ON_CPU))
    for call in (lambda: subject.step(*batch(0, 4)), lambda: subject.meta_gradient(*batch(0, 4))):
        with pytest.raises(L2TError, match=r"memory ran out in an iteration on 4 images"):
            call()
    handle.remove()


def test_what_is_no_lack_of_memory() -> None:
    assert not ran_out(RuntimeError("shapes do not fit"))
    assert not ran_out(ValueError("out of memory"))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_on_a_gpu(mode: str) -> None:
    """A limit on what the process may take makes it run out, and the estimate says so."""
    subject = engine(learner(torch.float32, "cuda", width=1.0), mode=mode)
    x, y = batch(0, 4, torch.float32, "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()  # by other tests of this process
    torch.cuda.set_per_process_memory_fraction((held + 2**30) / total)
    try:
        with pytest.raises(L2TError, match=r"memory ran out in an iteration on 1024 images, which needs about .*GiB"):
            subject.step(x.repeat(256, 1, 1, 1), y.repeat(256))
        subject.step(x, y)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
