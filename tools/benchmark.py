#!/usr/bin/env python3
"""Measure what distillation costs: seconds and memory of a step, beside the student's and the teacher's part.

    tools/benchmark.py --config-file RECIPE [--json FILE] [--bound 1.05] [KEY=VALUE …]

RECIPE is a LazyConfig with a teacher; neither weights nor data are read. A bound is met if the lower end of the
95 % interval of distilled / (student + teacher) is not above it; otherwise the exit code is 1.
"""

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a distilled LazyConfig recipe")
    parser.add_argument("--image-size", type=int, default=320, help="sides in pixels")
    parser.add_argument("--batch-size", type=int, default=2, help="images in a batch")
    parser.add_argument("--device", help="instead of the recipe's: auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=15, help="how often each row is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--bound", type=float, help="what the ratio shall not exceed, such as 1.05")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, such as model.inherit=[]")
    args = parser.parse_args(arguments)

    # Late, so that --help and a mistyped option answer at once.
    from d2kd.errors import reporting

    with reporting(args.debug):
        run(args)


def run(args: argparse.Namespace) -> None:
    from d2kd.benchmark import HEADLINE, Setup, benchmark, table
    from d2kd.engine.run_info import write_json
    from d2kd.errors import InputError

    if args.json and args.json.is_dir():
        raise InputError("--json", f"{args.json} is a folder", "a file")
    setup = Setup(args.config_file, tuple(args.opts), args.image_size, args.batch_size, args.device)
    result = benchmark(setup, args.rounds)
    print(f"\n{table(result)}")
    if args.json:
        write_json(args.json, result)
    if args.bound is not None:
        low = result["ratios"][HEADLINE]["low"]
        met = low <= args.bound
        print(
            f"\n{HEADLINE}: at least {low:.3f}, bound {args.bound} {'met' if met else 'exceeded'}"
        )
        if not met:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
