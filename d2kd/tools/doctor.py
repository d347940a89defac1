"""Check a recipe before a long training: models, data, classes, learning rate, losses.

    d2kd doctor --config-file RECIPE [--images 200] [--iterations 20] [--json FILE] [KEY=VALUE …]

Everything is built as for training, the teacher is evaluated on some images, and the student is trained for a few
iterations; only FILE is written. Each line is ok, warning or error, with advice. Exit code: 0: everything is ok,
1: there are warnings, 2: there are errors.
"""

import argparse
import dataclasses
from pathlib import Path

from ..utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="a LazyConfig recipe")
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        help="images to decode and to evaluate the teacher on; 0: all",
    )
    parser.add_argument(
        "--iterations", type=int, default=20, help="before losses are compared; 0: do not compare"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("opts", nargs="*", help="overrides of the recipe")


def run(args: argparse.Namespace) -> None:
    from ..config import load
    from ..doctor import Finding, diagnose, exit_code, format_findings
    from ..utils.env import collect_versions
    from ..utils.io import write_json

    for name, least in (("images", 0), ("iterations", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name}", getattr(args, name), f"at least {least}")
    if args.json and args.json.is_dir():
        raise InputError("--json", f"{args.json} is a folder", "a file")
    findings = []
    try:
        for finding in diagnose(
            load(args.config_file, args.opts),
            images=args.images,
            iterations=args.iterations,
            debug=args.debug,
        ):
            findings.append(finding)
    except InputError:
        raise
    except Exception as error:  # still print the findings so far
        if args.debug:
            raise
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        findings.append(Finding("doctor", "error", found, "--debug shows the traceback"))
    print(format_findings(findings))
    if args.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        write_json(args.json, {"schema": 1, "versions": collect_versions(), "rows": rows})
    raise SystemExit(exit_code(findings))
