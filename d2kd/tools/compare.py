"""See what distillation changed: one page about several detectors on one data set.

    d2kd compare --dataset mine_val --output DIR --detector teacher=CONFIG,WEIGHTS \\
        --detector baseline=CONFIG,WEIGHTS --detector distilled=CONFIG,WEIGHTS
    d2kd compare output/shapes        # of a study: teacher, baseline, the student it is about
    d2kd compare output/mine          # of a run: teacher and student

CONFIG is a recipe (of one that distils, its student), a yacs YAML or a model zoo name. A third part, WEIGHTS,RESULTS,
names a COCO results file of that detector. The first detector is the reference, normally the teacher, the second the
baseline, the last is the one asked about. Detections and counts are kept in DIR/comparison; interrupted, the same
command goes on.
"""

import argparse
from pathlib import Path

from ..utils.errors import InputError, need

INTERRUPTED = "interrupted; the same command continues"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
    need("plots", "matplotlib", "jinja2")
    from ..comparison.comparison import Options
    from ..comparison.detectors import load_data
    from ..study.report import compare_and_report

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
    from ..comparison.detectors import from_config
    from ..config import recipe_of
    from ..data.catalog import register_described

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
    from ..comparison.detectors import detectors_of_run, detectors_of_study, study_of
    from ..config import load
    from ..data.catalog import register_described

    study = study_of(folder)
    if study is None:
        detectors, measured_on = detectors_of_run(folder, dataset)
    else:
        detectors = detectors_of_study(folder, study["rows"], study["baseline"], study["featured"])
        measured_on = study["dataset"]
    for detector in detectors:
        register_described(load(detector.config), dataset or measured_on)
    return detectors, dataset or measured_on
