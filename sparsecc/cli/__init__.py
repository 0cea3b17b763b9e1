"""The ``sparsecc`` command.

Results go to standard output, progress, notes and errors to standard error.  With ``--json`` standard
output holds one JSON document and nothing else.  What is slow to import is imported when it is needed.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command that the arguments name, and leave with its exit code."""
    # Threads that spin while they wait make verification twenty times slower on a machine that has other
    # things to do; torch's OpenMP reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sparsecc.cli.command import run
    from sparsecc.cli.commands import cli

    sys.exit(run(cli, sys.argv[1:]))


__all__ = ["main"]
