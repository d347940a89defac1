"""Write a report of what distillation changed, for several detectors on one data set.

    d2kd compare --dataset mine_val --output DIR --detector teacher=CONFIG,WEIGHTS \\
        --detector baseline=CONFIG,WEIGHTS --detector distilled=CONFIG,WEIGHTS
    d2kd compare output/shapes        # a study: teacher, baseline and featured student
    d2kd compare output/mine          # a run: teacher and student

CONFIG is a recipe (its student, if it has a teacher), a yacs YAML or a model zoo name. A third part, WEIGHTS,RESULTS,
is a COCO results file of the detector. The first detector is the reference, usually the teacher, the second is the
baseline, and the last is the student to evaluate. Detections and counts are stored in DIR/comparison; if interrupted,
run the same command again to continue.
"""

import argparse
import itertools
from pathlib import Path

from ..utils.errors import InputError, require_packages

INTERRUPTED = "interrupted; the same command continues"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, help="the output folder of a study or a run"
    )
    parser.add_argument("--dataset", help="a data set that is registered or in a recipe")
    parser.add_argument(
        "--detector",
        action="append",
        default=[],
        metavar="NAME=CONFIG,WEIGHTS[,RESULTS]",
        help="a detector; repeat for each",
    )
    parser.add_argument("--output", type=Path, help="folder for the report; FOLDER by default")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="score threshold for precision and recall",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="number of bootstrap samples")
    parser.add_argument(
        "--observe",
        type=int,
        metavar="N",
        help="compare regions and features on N images instead of all",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def run(args: argparse.Namespace) -> None:
    require_packages("plots", "matplotlib", "jinja2")
    from ..comparison.comparison import Options
    from ..comparison.detectors import load_data
    from ..report.build import compare_and_report
    from ..utils.io import check_output_folder

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
    check_output_folder(output, "--output")
    detectors, dataset = (
        detectors_from_folder(args.folder, args.dataset)
        if args.folder
        else detectors_from_args(args)
    )
    options = Options(
        threshold=args.threshold,
        resamples=args.resamples,
        observed=args.observe,
        device=args.device,
    )
    page = compare_and_report(detectors, load_data(dataset), output, options)
    print(f"\nOpen {page}")


def detectors_from_args(args: argparse.Namespace) -> tuple:
    """Return the detectors and the data set of the command line."""
    from ..comparison.detectors import detector_from_config
    from ..config import load_recipe_or_none
    from ..data.catalog import register_from_config

    if not args.dataset:
        raise InputError("--dataset", "nothing", "the name of a data set")
    detectors = []
    for text in args.detector:
        name, _, rest = text.partition("=")
        parts = split_files(rest)
        if not name or len(parts) not in (2, 3) or not all(parts):
            raise InputError("--detector", text, "NAME=CONFIG,WEIGHTS")
        detectors.append(detector_from_config(name, *parts))
        recipe = load_recipe_or_none(parts[0])
        if recipe is not None:
            register_from_config(recipe, args.dataset)
    return detectors, args.dataset


def split_files(text: str) -> list[str]:
    """Split a text at its commas, but not at those within the names of files, if only then all its parts are files."""
    parts = text.split(",")
    ways = [
        [",".join(parts[a:b]) for a, b in itertools.pairwise((0, *ends, len(parts)))]
        for count in (1, 2)
        for ends in itertools.combinations(range(1, len(parts)), count)
    ]
    found = [way for way in ways if all(Path(part).is_file() for part in way)]
    return found[0] if len(found) == 1 else parts


def detectors_from_folder(folder: Path, dataset: str | None) -> tuple:
    """Return the detectors of an output folder, and ``dataset``, by default the one of their evaluation."""
    from ..comparison.detectors import detectors_from_run, detectors_from_study, load_study_results
    from ..config import load
    from ..data.catalog import register_from_config

    study = load_study_results(folder)
    if study is None:
        detectors, measured_on = detectors_from_run(folder, dataset)
    else:
        detectors = detectors_from_study(
            folder, study["rows"], study["baseline"], study["featured"]
        )
        measured_on = study["dataset"]
    for detector in detectors:
        register_from_config(load(detector.config), dataset or measured_on)
    return detectors, dataset or measured_on
