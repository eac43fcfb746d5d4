"""What there is around, and what libraries read of it when they are loaded; torch must not be loaded yet."""

import contextlib
import os
from importlib.metadata import PackageNotFoundError, version

# On a busy CPU a thread that spins while it waits takes the core of the one it waits for: milliseconds become seconds.
PATIENT = {"OMP_WAIT_POLICY": "passive"}


def be_patient() -> None:
    """Lets the threads of this process and of its children sleep while they wait, unless the user says otherwise."""
    for name, value in PATIENT.items():
        os.environ.setdefault(name, value)


def version_of(package: str) -> str | None:
    """What is installed of a package, if anything."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def host_memory() -> tuple[int, int]:
    """(bytes of memory that may still be taken, bytes there are); (0, 0) where the system does not say."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
            found = dict(line.split()[:2] for line in lines)
            return 1024 * int(found["MemAvailable:"]), total
        return page * os.sysconf("SC_AVPHYS_PAGES"), total
    except (ValueError, OSError, KeyError, AttributeError):
        return 0, 0
