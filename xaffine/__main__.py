"""The command ``xaffine``: a doctor without a subcommand, ``check`` for any implementation, ``bench`` for speed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from xaffine import __version__
from xaffine._command import bench, check, doctor

__all__ = ["main"]


class TerminatedError(KeyboardInterrupt):
    """A signal asks this process to end; as Ctrl-C, and unlike SystemExit, nothing takes it for a failed test."""


def _terminate(number: int, _: Any) -> None:
    raise TerminatedError(number)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : list of str, optional
        Those of the command line by default.

    Returns
    -------
    int
        The exit code: 0 for right, 1 for wrong, 2 where the command could not run, 3 where it did not finish, 130 where
        it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="xaffine",
        description="Verify forward and backward of the affine layer on every array library of this machine.",
        epilog="Exit code 1: an installed library computes wrong gradients, 3: the examination of one did not finish.",
    )
    parser.add_argument("--version", action="version", version=f"xaffine {__version__}")
    doctor.add_arguments(parser)
    parser.set_defaults(run=doctor.run)
    subcommands = parser.add_subparsers(title="subcommands", metavar="")
    check.add_arguments(subcommands.add_parser("check", help=check.HELP, description=check.DESCRIPTION))
    bench.add_arguments(subcommands.add_parser("bench", help=bench.HELP, description=bench.DESCRIPTION))
    options = parser.parse_args(arguments)
    with suppress(AttributeError):  # what stands in their place may lack it
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Signals as an exception: workers are ended, and what was found is kept.
    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.signal(number, _terminate) for number in ending}
    try:
        exit_code: int = options.run(options)
        sys.stdout.flush()
    except TerminatedError as error:
        return 128 + int(error.args[0])
    except KeyboardInterrupt:
        print("xaffine: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # of standard output: a broken pipe, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes the rest when it ends
        why = "nobody reads what it prints" if isinstance(error, BrokenPipeError) else error
        print(f"xaffine: not finished: {why}", file=sys.stderr)
        return 3
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return exit_code


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # the folder in which `python -m` was run: a rich.py of the user's is none of ours
    sys.exit(main())
