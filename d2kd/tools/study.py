"""Run a study: train what is missing, then one table, curves, pictures and the comparison report.

    d2kd study projects/TAR/studies/shapes.py --output output/shapes --seeds 0 1 2

Interrupted, the same command continues. The table has all runs of these seeds that are finished in the folder, so
that several commands with other --runs add up to one. See d2kd/study for what a study file says.
"""

import argparse
from pathlib import Path

from ..utils.errors import InputError, need

INTERRUPTED = "interrupted; the same command continues"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", help="a study file, such as projects/TAR/studies/shapes.py")
    parser.add_argument(
        "--output", type=Path, help="folder of the results; output/<study> by default"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[], help="instead of the study's own"
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="train only these, and what they need",
    )
    parser.add_argument(
        "--fast", action="store_true", help="a few steps on a few images, to see that it runs"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="train so many runs at a time, each with its share of the cores; --fast trains one by one",
    )


def run(args: argparse.Namespace) -> None:
    if args.jobs < 1:
        raise InputError("--jobs", args.jobs, "1 or more")
    need("plots", "matplotlib", "jinja2")
    from ..study import Commands, OneByOne, planned, run_study, show_results
    from ..study.report import study_report

    study, runs = planned(args.study, args.seeds, args.runs, args.fast)
    every_run = study.plan(args.seeds, list(study.runs), args.fast)
    name = Path(args.study).stem + ("_fast" if args.fast else "")
    output = args.output or Path("output", name)
    print(f"{study.title}\n{len(runs)} runs in {output}\n", flush=True)
    # --fast: in this process, where fewer images are registered.
    trainer = OneByOne() if args.fast else Commands(args.jobs)
    rows, failed = run_study(study, runs, output, trainer, others=every_run)
    if rows:
        print("\n" + show_results(output, study, every_run, rows) + "\n", flush=True)
        page = study_report(output, study, rows)
        if page is not None:
            print(f"  {page}  what distillation changed")
    if args.fast:
        print("\n--fast: a few steps on a few images. Everything runs; the figures mean nothing.")
    for error in failed.values():
        raise error
