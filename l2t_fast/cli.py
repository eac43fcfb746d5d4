"""The command line `l2t-fast`."""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from l2t_fast.config import TrainConfig
from l2t_fast.errors import L2TError
from l2t_fast.trainer import Interrupted


def train(config: tyro.conf.OmitArgPrefixes[TrainConfig]) -> None:
    """Train a target network with what a source network knows, and say what came out.

    Without arguments: digits. A small source network learns the digits 0-4, then a target learns 5-9 from ten images
    each, from scratch and with L2T-ww, three seeds; a table and pictures at the end.
    """
    from l2t_fast import experiment  # after the arguments are read, so that --help answers at once

    experiment.run(config, Console())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on bad input, 130 when interrupted."""
    try:
        tyro.extras.subcommand_cli_from_dict({"train": train}, prog="l2t-fast", args=arguments)
    except L2TError as error:
        Console(stderr=True).print(f"l2t-fast: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except Interrupted:
        Console(stderr=True).print(
            "stopped and saved: `l2t-fast train --resume` with the same --name goes on", highlight=False
        )
        sys.exit(130)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped at once: what was saved before is there", highlight=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
