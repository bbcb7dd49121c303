"""Stage commands from standard input, a line each, one after the other in this process; the first that fails ends it.

printf 'data/make_synthetic.py --num_tasks 6\\n' | python scripts/run_commands.py
"""

from __future__ import annotations

import sys

from src import cli


def main() -> None:
    """Read, then run: a stage may not read the commands that follow it."""
    for command in sys.stdin.read().splitlines():
        cli.run_command(command)


if __name__ == "__main__":
    main()
