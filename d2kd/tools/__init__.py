"""The commands: ``d2kd COMMAND …``, or ``python -m d2kd COMMAND …``.

A command is a module of this package. Its docstring is the help text, ``add_arguments(parser)`` defines its arguments,
and ``run(args)`` executes it. Only ``run`` imports Detectron2 and torch, so the help is fast and works without them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from importlib.util import find_spec

from .. import __version__
from ..utils.errors import InputError, report_input_errors

COMMANDS = {
    "init": "write a first recipe for your data",
    "train": "train or evaluate a recipe",
    "study": "train all runs of a study, and write a table, curves, pictures and a report",
    "compare": "write a report that compares several detectors",
    "visualize": "draw the detections of teacher and student, or what a loss attends to",
    "label": "write a detector's detections as labels, to train another one with them",
    "doctor": "check a recipe, its data and its weights before training",
    "benchmark": "measure time and memory of a distillation step",
    "export": "write a trained detector as ONNX or TorchScript",
    "install-detectron2": "install Detectron2 0.6 without a compiler",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: the arguments after ``d2kd``; by default those of this process.

    Raises:
        SystemExit: with code 2 for bad input, or with the exit code of the command, if not 0.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        sys.argv[0] = "d2kd"  # results contain the command line
    parser = argparse.ArgumentParser(
        prog="d2kd", description="Knowledge distillation for Detectron2's detectors."
    )
    parser.add_argument("--version", action="version", version=f"d2kd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name, purpose in COMMANDS.items():
        modules[name] = module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        command = commands.add_parser(
            name,
            help=purpose,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a misspelt option must not be another
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        # As `python -m d2kd` does: recipes import modules of the folder in which they are used.
        sys.path.insert(0, os.getcwd())
    module = modules[args.command]
    with report_input_errors(args.debug, getattr(module, "INTERRUPTED", None)):
        if args.command != "install-detectron2" and find_spec("detectron2") is None:
            raise InputError(
                "detectron2", "not installed", "`d2kd install-detectron2`, or an official build"
            )
        module.run(args)
