"""Entry of the command line: finds the subcommand, turns errors into sentences and exit codes."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

import megatron_laep
from megatron_laep.checks import printable

# Modules of this folder with an `add_parser`, in the order of the help text.
COMMANDS = (
    "check",
    "inspect",
    "verify",
    "plan",
    "sweep",
    "stability",
    "simulate",
    "calibrate",
    "summary",
    "report",
)
_USER_ERROR = 2  # as argparse's own
_INTERRUPTED = 130  # as a shell has it


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands that this installation has."""
    parser = argparse.ArgumentParser(
        prog="laep",
        description="Look at recorded expert loads, and try a pruning plan before it costs "
        "anything. Works offline, on files of a job or on its checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"laep {megatron_laep.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = f"megatron_laep.tools.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for input that no answer can rest on, 130 for
    Ctrl-C, 1 for a pipe that was closed.
    """
    # Warnings of the package (a torn record was skipped) belong to the user, not into the product.
    logging.basicConfig(format="laep: %(levelname)s: %(message)s", stream=sys.stderr)
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        if sys.stdout is not None:  # None: the caller has closed it
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Somebody closed the pipe, for example `laep sweep ... | head`. Python would complain about
        # it once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Without a name, it was the output that failed: every file is opened by its name.
        where = error.filename or "the output cannot be written"
        print(f"laep: {printable(str(where))}: {error.strerror or error}", file=sys.stderr)
    except MemoryError:
        print("laep: the input is larger than the memory of this machine", file=sys.stderr)
    except ValueError as error:
        print(f"laep: {printable(str(error))}", file=sys.stderr)
    return _USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
