"""Write the detections of a detector as labels, to train another detector with them (pseudo-labels).

    d2kd label --config-file RECIPE --weights FILE --images photographs/ --output labels.json --min-score 0.5
    d2kd label --config-file COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml --weights teacher.pkl --images photographs/ \\
        --output labels.json --student mine.py --dataset mine_val --precision 0.9
    d2kd label --weights model.onnx --images photographs/ --output labels.json --min-score 0.5 fish=0.4

The images are all those in a folder, or those of a data set, whose annotations are not used. RECIPE is a LazyConfig (its
student, if it has a teacher), a yacs YAML or a model zoo name; an ONNX file that `d2kd export` wrote needs none.

The output is a COCO-style file for d2kd.data.coco_dataset. Its classes are those of --classes, of the training data of
--student, of the data set of the images, of --dataset, or of the detector: the first of these that there is. Detections
of other classes are left out. Images without a detection are in it; images that cannot be read are named and left out.

A higher minimum score leaves out more objects, a lower one has more errors. With --dataset it is chosen for each class on
that labelled data set, at IoU 0.5: as the score of the highest F1, or with --precision as the lowest one that reaches it.
A class is left out if no score can be chosen, such as one without an object there. Scores of --min-score CLASS=SCORE are
not chosen; a number alone is for the classes for which none can be chosen.

Finished images are kept beside the output; if interrupted, run the same command again to continue.
"""

import argparse
import sys
from pathlib import Path

from ..utils.errors import InputError

INTERRUPTED = "interrupted; the same command continues"
DEFAULT_SCORE = 0.5
MAX_NAMED = 10  # unreadable files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", help="the detector; not needed for an ONNX file")
    parser.add_argument("--weights", required=True, help="its checkpoint, or an ONNX file")
    parser.add_argument("--images", required=True, help="a folder of images, or a data set")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--student",
        metavar="RECIPE",
        help="the recipe to be trained: its classes, data sets, and aliases of its teacher",
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="classes of the labels")
    parser.add_argument(
        "--min-score",
        nargs="+",
        default=[],
        metavar="SCORE",
        help="minimum scores: a number, CLASS=SCORE, or both; 0.5 by default",
    )
    parser.add_argument("--dataset", help="the labelled data set on which scores are chosen")
    parser.add_argument("--precision", type=float, help="minimum precision of each class, to 1")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def run(args: argparse.Namespace) -> None:
    import shutil

    from ..comparison.detectors import load_data, load_detector_for_classes
    from ..comparison.labels import (
        choose_thresholds,
        count_labels,
        given_thresholds,
        write_labels,
    )
    from ..engine.interruption import StopSignals
    from ..engine.launch import pick_device
    from ..utils.console import ProgressBar, suppress_output
    from ..utils.errors import TrainingInterrupted
    from ..utils.io import check_output_folder

    default, given = parse_min_scores(args.min_score)
    if args.precision is not None and not 0 < args.precision <= 1:
        raise InputError("--precision", args.precision, "above 0, and at most 1")
    if args.precision is not None and not args.dataset:
        raise InputError("--precision", "given without --dataset", "both")
    if args.output.is_dir():
        raise InputError("--output", f"{args.output} is a folder", "the file to write")
    check_output_folder(args.output.parent, "--output")
    console, signals = sys.stdout, StopSignals()

    def progress(name: str):
        bar = ProgressBar(f"  {name}", console)

        def update(done: int, total: int) -> None:
            bar(done, total)
            if done == total:
                bar.close()
            elif signals.received:
                bar.close()
                raise TrainingInterrupted(INTERRUPTED, 128 + signals.received)

        return update

    def warn(text: str) -> None:
        print(text, file=console)

    device = pick_device(args.device)
    student = register(args)
    detector = detector_of(args, student)
    cache = args.output.with_name(f"{args.output.name}.thresholds")
    with suppress_output():
        data = load_data(args.dataset) if args.dataset else None
        images = images_of(args, student, data)
        ready = load_detector_for_classes(detector, images.name, images.classes, device)
        classes = ready.class_map.student
        if unknown := [name for name in given if name not in classes]:
            raise InputError("--min-score", f"no class {unknown[0]!r}", f"of {', '.join(classes)}")
        with signals.recorded():
            if data is None:
                score = DEFAULT_SCORE if default is None else default
                thresholds = given_thresholds(classes, score, given)
            else:
                bar = progress(args.dataset)
                thresholds = choose_thresholds(
                    ready, data, cache, bar, args.precision, default, given, warn
                )
            if data is not None or given:
                print(thresholds, file=console, flush=True)
            content = write_labels(
                args.output, ready, images, thresholds, progress(args.images), warn
            )
    shutil.rmtree(cache, ignore_errors=True)
    report(args.images, content, ready.class_map)
    print(f"{args.output}: {count_labels(content)}; its image_root is {images.root}")


def parse_min_scores(words: list[str]) -> tuple[float | None, dict[str, float]]:
    """Return the number alone, if there is one, and the scores by class."""
    from ..comparison.labels import check_min_score

    default, given = None, {}
    for word in words:
        name, equals, text = word.rpartition("=")
        try:
            score = float(text)
        except ValueError:
            raise InputError("--min-score", word, "a score from 0 to 1, or CLASS=SCORE") from None
        check_min_score("--min-score", score)
        if name in given or (not equals and default is not None):
            raise InputError("--min-score", f"{word} and another", "one for each class")
        if equals:
            given[name] = score
        else:
            default = score
    return default, given


def register(args: argparse.Namespace):
    """Register the data sets that the recipes know; return the student's recipe, if it is given."""
    from ..config import load, load_recipe_or_none
    from ..data.catalog import register_from_config

    student = load(args.student) if args.student else None
    recipes = [student, load_recipe_or_none(args.config_file) if args.config_file else None]
    for recipe in recipes:
        for name in (args.images, args.dataset):
            if recipe is not None and name:
                register_from_config(recipe, name)
    return student


def detector_of(args: argparse.Namespace, student):
    """Return the detector of the command line."""
    from ..comparison.detectors import detector_from_config, detector_from_onnx
    from ..config import is_distiller

    if args.weights.endswith(".onnx"):
        detector = detector_from_onnx(args.weights, args.weights, args.config_file)
    elif args.config_file:
        detector = detector_from_config(args.weights, args.config_file, args.weights)
    else:
        raise InputError("--config-file", "nothing", "the detector, unless --weights is ONNX")
    if student is not None and is_distiller(student.model):
        detector.aliases = dict(student.model.teacher.get("aliases") or {})
    return detector


def images_of(args: argparse.Namespace, student, data):
    """Return the images, with the classes of their labels."""
    from dataclasses import replace

    from detectron2.config import instantiate
    from detectron2.data import DatasetCatalog

    from ..comparison.labels import UnlabelledImages
    from ..data.datasets import training_classes
    from ..structures.class_map import class_names

    if args.images in DatasetCatalog.list():
        images = UnlabelledImages.from_dataset(args.images)
    elif Path(args.images).is_dir():
        images = UnlabelledImages.from_folder(Path(args.images))
    else:
        raise InputError("--images", args.images, "a folder, or a data set that a recipe registers")
    classes = args.classes
    if classes is None and student is not None:
        named = student.model.get("classes")
        classes = training_classes(student) if named is None else class_names(instantiate(named))
        if classes is None:
            found = "no class names in its training data"
            raise InputError("--student", found, "a recipe with data, or --classes")
    known = [(images.classes, images.category_ids)]
    if data is not None:
        known.append((data.truth.classes, data.category_ids))
    classes = next((c for c in (classes, *(c for c, _ in known)) if c is not None), None)
    classes = None if classes is None else tuple(classes)
    ids = next((ids for names, ids in known if names == classes), None)
    return replace(images, classes=classes, category_ids=ids)


def report(name: str, content: dict, class_map) -> None:
    """Print what is left out of the labels."""
    lacking = [c for k, c in enumerate(class_map.student) if k not in class_map.student_ids]
    if lacking:
        print(f"no labels of {', '.join(lacking)}: the detector does not know them")
    others = content["info"]["detections_of_other_classes"]
    if others:
        print(f"left out: {others} detections of other classes")
    unreadable = content["info"]["unreadable"]
    for one in unreadable[:MAX_NAMED]:
        print(f"left out: {one['file_name']}: {one['reason']}")
    if len(unreadable) > MAX_NAMED:
        print(f"left out: {len(unreadable) - MAX_NAMED} more, which are in the file's info")
    if unreadable:
        total = len(unreadable) + len(content["images"])
        print(f"{len(unreadable)} of {total} images of {name} cannot be read")
