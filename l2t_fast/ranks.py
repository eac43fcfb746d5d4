"""The processes of one training under torchrun (ranks): what they agree on, and how all end when one does.

Where there is one process alone nothing here does anything, and torch.distributed is not touched.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from l2t_fast.errors import Interrupted, L2TError, RankError

_c10d: Any = dist  # of which not every build of PyTorch has all
Group = Any  # a torch.distributed.ProcessGroup, a name that not every build of PyTorch has
Result = TypeVar("Result")

_TIMEOUT = timedelta(minutes=5)  # that one rank waits for another; a checkpoint is written meanwhile
_ANSWER = timedelta(seconds=2)  # in which one that is there answers
_AGAIN = 0.1  # seconds until one that is not there is looked for again
_FAILED = "l2t_fast/failed"  # where a rank that fails leaves its sentence


def all_reduce_(tensor: Tensor, group: Group, op: Any = None) -> Tensor:
    """The sum over the ranks of a group, in place.

    Raises:
        RankError: another rank is gone.
    """
    try:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if op is None else op, group=group)
    except RuntimeError as error:
        raise _gone(error) from error
    return tensor


def broadcast_(tensor: Tensor, group: Group) -> Tensor:
    """The values of the group's first rank, in place.

    Raises:
        RankError: another rank is gone.
    """
    try:
        dist.broadcast(tensor, group=group, group_src=0)
    except RuntimeError as error:
        raise _gone(error) from error
    return tensor


def gathered(value: Result, group: Group) -> list[Result]:
    """That of each rank.

    Raises:
        RankError: another rank is gone.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, value, group=group)
    except RuntimeError as error:
        raise _gone(error) from error
    return found


def _gone(error: RuntimeError) -> RankError:
    reason = (str(error).splitlines() or [""])[0][-120:].strip()
    return RankError(
        f"another rank has ended, or cannot be reached ({reason}): see what it says, and start the job again, which "
        "goes on from its last checkpoint."
    )


@contextmanager
def together(group: Group) -> Iterator[None]:
    """What one rank of a group raises inside, the others raise where they wait for it, once its process has ended."""
    if group is None:
        yield
        return
    try:
        yield
    except RankError as error:
        sentence = _heard()
        if not sentence:
            raise
        raise RankError(sentence) from error
    except Interrupted:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, L2TError) else f"{type(error).__name__}: {error}"
        with suppress(Exception):  # whoever keeps the store has ended as well
            _store().set(_FAILED, f"rank {dist.get_rank()} has failed: {said}")
        raise


def _heard() -> str:
    """What the rank that failed has left."""
    try:
        store = _store()
        return str(store.get(_FAILED).decode()) if store.check([_FAILED]) else ""
    except Exception:  # whoever keeps the store has ended as well
        return ""


def _store() -> Any:
    return _c10d.distributed_c10d._get_default_store()


@dataclass(frozen=True)
class Ranks:
    """The processes of a training: this one's number, how many there are, and their process group."""

    rank: int = 0
    count: int = 1
    group: Group = None

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and speaks to the terminal."""
        return self.rank == 0

    def first(self, function: Callable[[], Result]) -> Result:
        """What `function` gives or raises on rank 0, which alone runs it; on every rank."""
        if self.count == 1:
            return function()
        found: list[Any] = [None, None]
        if self.leads:
            try:
                found[0] = function()
            except Exception as raised:
                found[1] = raised
        try:
            dist.broadcast_object_list(found, src=0, group=self.group, device=torch.device("cpu"))
        except RuntimeError as error:
            raise _gone(error) from error
        result, failure = found
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def gathered(self, value: Result) -> list[Result]:
        """That of each rank."""
        if self.count == 1:
            return [value]
        return gathered(value, self.group)

    def total(self, number: int) -> int:
        """The sum of whole numbers over the ranks."""
        return self._agreed(number, "SUM")

    def most(self, number: int) -> int:
        """The greatest of whole numbers over the ranks."""
        return self._agreed(number, "MAX")

    def _agreed(self, number: int, op: str) -> int:
        if self.count == 1:
            return number
        return int(all_reduce_(torch.tensor(number), self.group, getattr(dist.ReduceOp, op)).item())


ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """The ranks of the training that this process is part of."""
    return _current


def launched() -> bool:
    """Whether torchrun has started this process, and sends it the signals that it gets itself."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def started_again() -> bool:
    """Whether torchrun has started this process anew, after a rank has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def leave(code: object) -> None:
    """Ends this process at once, with what is said flushed, where torchrun has started it; `code` as of SystemExit.

    Threads of PyTorch's process groups may still let go of tensors while Python is taken down, and then abort it
    ("terminate called without an active exception"): torchrun would report a job that is done as failed.
    """
    if launched() and (code is None or isinstance(code, int)):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def refuse(command: str) -> None:
    """Raises L2TError where torchrun has started several processes of a command that is one."""
    if launched() and os.environ.get("WORLD_SIZE", "1") != "1":
        raise L2TError(f"`{command}` is one process: start it without torchrun, which is for `train` and `pretrain`.")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun has started, if it has; `current` is theirs inside.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        L2TError: more processes on a machine than GPUs. RankError: another rank has failed, in the words of that rank.
    """
    global _current
    count = int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1
    if count == 1:
        yield ALONE
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        device_index = int(os.environ.get("LOCAL_RANK", "0"))
        if device_index >= torch.cuda.device_count():
            raise L2TError(
                f"torchrun has started {os.environ.get('LOCAL_WORLD_SIZE')} processes on a machine with "
                f"{torch.cuda.device_count()} GPUs: give --nproc-per-node {torch.cuda.device_count()}, or --device cpu."
            )
        torch.cuda.set_device(device_index)
    try:
        store, rank, _ = next(_c10d.rendezvous("env://", timeout=_TIMEOUT))
        alive, start = _this_start(store, rank)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        own = _c10d.PrefixStore(start, store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=_TIMEOUT)
    except RuntimeError as error:
        raise _gone(error) from error
    try:
        _current = Ranks(rank, count, dist.group.WORLD)
        with together(_current.group):
            yield _current
    finally:
        _current = ALONE
        dist.destroy_process_group()
        del alive


def _this_start(store: Any, rank: int) -> tuple[Any, str]:
    """(what is to be kept until the end, a name of this start of the job, the same on all ranks).

    torchrun's store outlives a start that failed, with all that its ranks have left there. So rank 0 opens a store of
    its own, and says where: what is read there and answers is of this start.
    """
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        server = _c10d.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        name = f"l2t_fast/{server.port}/{uuid4().hex}"
        server.set("name", name)
        store.set("l2t_fast/start", name)
        return server, name
    end = monotonic() + _TIMEOUT.total_seconds()
    while monotonic() < end:
        name = store.get("l2t_fast/start").decode()
        with suppress(RuntimeError):
            client = _c10d.TCPStore(host, int(name.split("/")[1]), is_master=False, timeout=_ANSWER)
            if client.get("name").decode() == name:
                return client, name
            sleep(_AGAIN)  # somebody else has that port now
    raise RuntimeError("rank 0 does not answer")
