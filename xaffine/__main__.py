"""The command ``xaffine``: a doctor without a subcommand, ``check`` for any implementation, ``bench`` for speed."""

from __future__ import annotations

import argparse
import sys

from xaffine.command import bench, check, doctor
from xaffine.command.machine import own_version

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : list of str, optional
        Those of the command line by default.

    Returns
    -------
    int
        The exit code: 0 for right, 1 for wrong, 2 where the command could not run.
    """
    parser = argparse.ArgumentParser(
        prog="xaffine",
        description="Verify forward and backward of the affine layer on every array library of this machine.",
        epilog="Exit code 1: an installed library computes wrong gradients.",
    )
    parser.add_argument("--version", action="version", version=f"xaffine {own_version()}")
    doctor.add_arguments(parser)
    parser.set_defaults(run=doctor.run)
    subcommands = parser.add_subparsers(title="subcommands", metavar="")
    check.add_arguments(subcommands.add_parser("check", help=check.HELP, description=check.DESCRIPTION))
    bench.add_arguments(subcommands.add_parser("bench", help=bench.HELP, description=bench.DESCRIPTION))
    options = parser.parse_args(arguments)
    exit_code: int = options.run(options)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
