"""`python -m l2t_fast`, which torchrun starts: the same as `l2t-fast`."""

from l2t_fast.cli import main

if __name__ == "__main__":
    main()
