"""Run a study: train missing runs, then write a table, curves, pictures and the comparison report.

    d2kd study projects/TAR/studies/shapes.py --output output/shapes --seeds 0 1 2

If interrupted, run the same command again to continue. The table has all finished runs of these seeds in the folder,
including those of earlier commands with other --runs. See d2kd/study for the format of a study file.
"""

import argparse
from pathlib import Path

from ..utils.errors import InputError, require_packages

INTERRUPTED = "interrupted; the same command continues"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", help="a study file, such as projects/TAR/studies/shapes.py")
    parser.add_argument(
        "--output", type=Path, help="folder for the results; output/<study> by default"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[], help="by default, those of the study"
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="train only these runs, and those they depend on",
    )
    parser.add_argument(
        "--fast", action="store_true", help="a few iterations on a few images, as a test"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="train N runs in parallel, which share the cores; with --fast, runs are sequential",
    )


def run(args: argparse.Namespace) -> None:
    if args.jobs < 1:
        raise InputError("--jobs", args.jobs, "1 or more")
    require_packages("plots", "matplotlib", "jinja2")
    from ..study import (
        ParallelRunner,
        SequentialRunner,
        load_and_plan,
        run_study,
        write_tables_and_plots,
    )
    from ..study.report import study_report
    from ..utils.io import check_output_folder

    study, runs = load_and_plan(args.study, args.seeds, args.runs, args.fast)
    every_run = study.plan(args.seeds, list(study.runs), args.fast)
    name = Path(args.study).stem + ("_fast" if args.fast else "")
    output = args.output or Path("output", name)
    check_output_folder(output, "--output")
    print(f"{study.title}\n{len(runs)} runs in {output}\n", flush=True)
    # --fast registers smaller data sets in this process, so runs cannot be subprocesses.
    trainer = SequentialRunner() if args.fast else ParallelRunner(args.jobs)
    rows, failed = run_study(study, runs, output, trainer, others=every_run)
    if rows:
        print("\n" + write_tables_and_plots(output, study, every_run, rows) + "\n", flush=True)
        page = study_report(output, study, rows)
        if page is not None:
            print(f"  {page}  what distillation changed")
    if args.fast:
        print("\n--fast: a few steps on a few images. Everything runs; the figures mean nothing.")
    for error in failed.values():
        raise error
