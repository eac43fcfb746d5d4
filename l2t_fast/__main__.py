"""`python -m l2t_fast` is `l2t-fast`."""

from l2t_fast.cli import main

main()
