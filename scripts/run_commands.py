"""Stage commands from standard input, a line each, one after the other in this process; the first that fails ends it.

The libraries are imported once. The tables in scripts/tables/ are made so.

    printf 'data/make_synthetic.py --num_tasks 6\\n' | python scripts/run_commands.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from src import console


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """No flags, but help."""
    return console.Parser(__doc__).parse_args(argv)


def main(_: argparse.Namespace) -> None:
    """Read, then run: a stage may not read the commands that follow it."""
    for command in sys.stdin.read().splitlines():
        console.run_command(command.removeprefix("python "))


if __name__ == "__main__":
    main(parse_args())
