"""What a number of the settings may be."""

from typing import Any

from l2t_fast.errors import L2TError

# The least and the most that a number may be: beyond it nothing is learned, or nothing ends. Whole numbers are ints.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("lr", "meta_lr", "weight_decay", "meta_weight_decay"), (0.0, 1e6)),
    "momentum": (0.0, 1.0),
    "beta": (0.0, 1e39),  # the size of a loss is anything
    "max_grad_norm": (1e-12, 1e39),
    "label_smoothing": (0.0, 1.0),
    **dict.fromkeys(("beta1", "beta2"), (0.0, 1 - 1e-9)),  # of AdamW
    "eps": (1e-30, 1e6),
    "width": (1e-6, 16.0),
    "inner_steps": (0, 1000),
    "accumulate": (1, 1000),
    "epochs": (1, 10**6),
    "batch_size": (1, 10**6),
    "seed": (0, 2**63 - 1),
    "image_size": (8, 2**14),
    "per_class": (1, 10**9),
    **dict.fromkeys(("jobs", "threads"), (1, 1024)),
    "workers": (0, 256),
    "replicas": (1, 64),
    "gpus_per_cell": (0.001, 1.0),
}


def within(name: str, value: Any) -> bool:
    """Whether a number that BOUNDS knows as `name` may be `value`, of whatever type."""
    least, most = BOUNDS[name]
    if isinstance(value, bool | str | bytes) or (isinstance(least, int) and not isinstance(value, int)):
        return False
    try:
        return bool(least <= value <= most)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return False


def allowed(name: str) -> str:
    """What `name` may be, in words."""
    least, most = BOUNDS[name]
    if isinstance(least, int):
        return f"a whole number from {least} to {most}"
    return f"a number from {least:g} to {most:g}"


def check_number(name: str, value: Any) -> None:
    """Raises L2TError where an argument is out of its bounds, or no number."""
    if not within(name, value):
        raise L2TError(f"{name}={shown(value)} is not to be had: give {allowed(name)}.")


def shown(value: Any) -> str:
    """A value in a message, not longer than a line."""
    try:
        return f"{value!r:.40}"
    except ValueError:  # Python does not write out a number of thousands of digits
        return "that many digits"
