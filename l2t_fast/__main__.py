"""`python -m l2t_fast`, which torchrun starts: the same as `l2t-fast`."""

import sys

try:
    from l2t_fast.cli import main
except KeyboardInterrupt:  # in the first moments
    sys.exit(130)

if __name__ == "__main__":
    code: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    if "torch" in sys.modules:
        from l2t_fast.ranks import leave

        leave(code)
    sys.exit(code)
