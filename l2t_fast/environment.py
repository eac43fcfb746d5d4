"""What there is around, and what libraries read of it when they are loaded; torch must not be loaded yet."""

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
