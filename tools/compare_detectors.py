#!/usr/bin/env python3
"""See what distillation changed: one page about several detectors on one data set.

    tools/compare_detectors.py --dataset mine_val --output DIR --detector teacher=CONFIG,WEIGHTS \\
        --detector baseline=CONFIG,WEIGHTS --detector distilled=CONFIG,WEIGHTS
    tools/compare_detectors.py output/shapes        # of a study: teacher, baseline, the student it is about
    tools/compare_detectors.py output/mine          # of a run: teacher and student

CONFIG is a recipe (of one that distils, its student), a yacs YAML or a model zoo name. A third part, WEIGHTS,RESULTS,
names a COCO results file of that detector. The first detector is the reference, normally the teacher, the second the
baseline, the last is the one asked about. Detections and counts are kept in DIR/comparison; interrupted, the same
command goes on.
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="the output folder of a study or a run"
    )
    parser.add_argument("--dataset", help="one that is registered or in a recipe")
    parser.add_argument(
        "--detector",
        action="append",
        default=[],
        metavar="NAME=CONFIG,WEIGHTS[,RESULTS]",
        help="once for each",
    )
    parser.add_argument("--output", type=Path, help="folder of the report; FOLDER by default")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="a score at which precision and recall are told",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument(
        "--observe",
        type=int,
        metavar="N",
        help="regions and features of so many images, not of all",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()

    # Late, so that --help and a mistyped option answer at once.
    from d2kd.errors import reporting

    with reporting(args.debug, "interrupted; the same command continues"):
        run(args)


def run(args: argparse.Namespace) -> None:
    from d2kd.errors import InputError, need

    need("plots", "matplotlib", "jinja2")
    from d2kd.evaluation.comparison import Options
    from d2kd.evaluation.detectors import load_data
    from d2kd.study.report import compare_and_report

    for name, least in (("resamples", 1), ("observe", 1)):
        number = getattr(args, name)
        if number is not None and number < least:
            raise InputError(f"--{name}", number, f"at least {least}")
    if bool(args.folder) == bool(args.detector):
        found = "both a folder and detectors" if args.folder else "neither a folder nor a detector"
        raise InputError("what to compare", found, "FOLDER, or --detector NAME=CONFIG,WEIGHTS …")
    output = args.output or args.folder
    if output is None:
        raise InputError("--output", "nothing", "a folder for the report")
    detectors, dataset = found_in(args.folder, args.dataset) if args.folder else given(args)
    options = Options(
        threshold=args.threshold,
        resamples=args.resamples,
        observed=args.observe,
        device=args.device,
    )
    page = compare_and_report(detectors, load_data(dataset), output, options)
    print(f"\nOpen {page}")


def given(args: argparse.Namespace) -> tuple:
    """The detectors of the command line, and the data set."""
    from d2kd.config import recipe_of
    from d2kd.data.catalog import register_described
    from d2kd.errors import InputError
    from d2kd.evaluation.detectors import from_config

    if not args.dataset:
        raise InputError("--dataset", "nothing", "the name of a data set")
    detectors = []
    for text in args.detector:
        name, _, rest = text.partition("=")
        parts = rest.split(",")
        if not name or len(parts) not in (2, 3) or not all(parts):
            raise InputError("--detector", text, "NAME=CONFIG,WEIGHTS")
        detectors.append(from_config(name, *parts))
        recipe = recipe_of(parts[0])
        if recipe is not None:
            register_described(recipe, args.dataset)
    return detectors, args.dataset


def found_in(folder: Path, dataset: str | None) -> tuple:
    """The detectors of an output folder, and the data set they were measured on unless another is given."""
    from d2kd.config import load
    from d2kd.data.catalog import register_described
    from d2kd.evaluation.detectors import detectors_of_run, detectors_of_study, study_of

    study = study_of(folder)
    if study is None:
        detectors, measured_on = detectors_of_run(folder, dataset)
    else:
        detectors = detectors_of_study(folder, study["rows"], study["baseline"], study["featured"])
        measured_on = study["dataset"]
    for detector in detectors:
        register_described(load(detector.config), dataset or measured_on)
    return detectors, dataset or measured_on


if __name__ == "__main__":
    main()
