"""The commands: ``d2kd COMMAND …``, or ``python -m d2kd COMMAND …``.

A command is a module of this package. Its docstring is its help, ``add_arguments(parser)`` adds what it takes, and
``run(args)`` does it. Only the chosen module is imported, and what it needs of d2kd only by ``run``, so that help
answers at once, and without Detectron2.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

from .. import __version__
from ..errors import InputError, reporting

COMMANDS = {
    "train": "train or evaluate a recipe",
    "study": "train all runs of a study; a table, curves, pictures and a report of them",
    "compare": "one page on how several detectors differ",
    "visualize": "pictures of what teacher and student detect, and of where losses look",
    "doctor": "check a recipe, its data and its weights before training",
    "benchmark": "measure seconds and memory of a distilled step",
    "export": "write a trained detector as ONNX or TorchScript",
    "install-detectron2": "install Detectron2 0.6 without a compiler",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: the words after ``d2kd``; those of this process by default.

    Raises:
        SystemExit: with code 2 for bad input, else with what the command ends with, if not 0.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        sys.argv[0] = "d2kd"  # results name the command that made them: as it is typed
    parser = argparse.ArgumentParser(
        prog="d2kd",
        usage="%(prog)s COMMAND …",
        description="Knowledge distillation for Detectron2's detectors.",
        epilog="\n".join(
            ["commands:"]
            + [f"  {name:20}{purpose}" for name, purpose in COMMANDS.items()]
            + ["", "d2kd COMMAND --help says what a command takes."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"d2kd {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    with reporting():
        if name not in COMMANDS:
            raise InputError(f"d2kd {name}", "no such command", " or ".join(COMMANDS))
    command = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    parser = argparse.ArgumentParser(
        prog=f"d2kd {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(arguments[1:])
    with reporting(args.debug, getattr(command, "INTERRUPTED", None)):
        if name != "install-detectron2" and importlib.util.find_spec("detectron2") is None:
            raise InputError(
                "detectron2", "not installed", "`d2kd install-detectron2`, or an official build"
            )
        command.run(args)
