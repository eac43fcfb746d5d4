"""The exceptions that bad input and a machine in the way raise, and the one of who was asked to stop."""

from collections.abc import Iterator
from contextlib import contextmanager

# How PyTorch says it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory", "ALLOC_FAILED")


class L2TError(ValueError):
    """Bad input, said in one sentence: what is wrong and what to do.

    The command line prints it without a traceback and exits with `status`.
    """

    status = 2


class DamagedFileError(L2TError):
    """A file of ours is missing, or not as it was written."""


class UnfitError(L2TError):
    """The method cannot be had with these networks, though others can."""


class MachineError(L2TError):
    """The input is good, but the machine would not: a full disk, a folder that may not be written."""

    status = 3


class RankError(MachineError):
    """Another process of the same training has failed or ended."""


class ReadError(L2TError):
    """Images cannot be read: what was learned until then is good."""


class LostWorkerError(ReadError, MachineError):
    """The processes that read images do not stay alive."""


class NoMemoryError(MachineError):
    """What was asked for does not fit in memory."""


def ran_out(error: BaseException) -> bool:
    """Whether memory was what an operation lacked: Python's, PyTorch's or the GPU's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def first_line(error: BaseException | None) -> str:
    """What it says, in one line without the stop: a message may go on with advice in Python."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")


@contextmanager
def memory_watched() -> Iterator[None]:
    """Raises NoMemoryError where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        why = str(error).strip().partition("\n")[0] or "of the machine"
        raise NoMemoryError(
            f"memory ran out ({why}): give --memory recompute, fewer --jobs, or a smaller network, --batch-size or "
            "--image-size."
        ) from error


class Interrupted(Exception):
    """Raised where the user asked to stop; everything is saved."""


class OutputClosed(Interrupted):
    """Who read what is printed has left, as `head` does."""
