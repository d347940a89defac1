"""Pictures of what a recipe's detectors see: ground truth | teacher | student; and of where ICD looks.

    d2kd visualize --what detections --config-file RECIPE --dataset shapes_test --output DIR \\
        --weights student=output/model_final.pth teacher=teacher.pth
    d2kd visualize --what attention --config-file output/config.yaml --dataset shapes_test --output DIR
    d2kd visualize --what selection --config-file RECIPE --dataset shapes_test --output DIR

A detector is drawn if its weights are known: given here, the teacher's also by the recipe, and the student's by what
training left in the recipe's output folder. That file holds ICD's decoder, too: ``attention`` shows, with a panel for
each object, which cells of the teacher's levels it is recognised by. ``selection`` shows where ERD compares student and
teacher: the locations of class logits, those of boxes, and what non-maximum suppression leaves of these.
"""

import argparse
from pathlib import Path

from ..utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--what", choices=["detections", "attention", "selection"], default="detections"
    )
    parser.add_argument("--config-file", required=True, help="a LazyConfig recipe")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="WHO=FILE", help="WHO is student or teacher"
    )
    parser.add_argument("--dataset", required=True, help="one that is registered or in the recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--number", type=int, default=8, help="of images, spread over the data set")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score of a detection")
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, such as train.device=cpu")


def run(args: argparse.Namespace) -> None:
    from detectron2.config import instantiate
    from omegaconf import OmegaConf

    from ..config import load, student_of
    from ..data.catalog import register_described
    from ..visualization.erd_selection import draw_selection
    from ..visualization.icd_attention import draw_attention
    from ..visualization.panels import draw_detections

    weights = {}
    for given in args.weights:
        who, _, file = given.partition("=")
        if who not in ("student", "teacher") or not file:
            raise InputError("--weights", given, "student=FILE or teacher=FILE")
        weights[who] = file
    if args.number < 1:
        raise InputError("--number", args.number, "at least 1")
    config = load(args.config_file, args.opts)
    if OmegaConf.select(config, "dataloader.test.mapper") is None:
        raise InputError(args.config_file, "no dataloader.test.mapper", "how images are read")
    register_described(config, args.dataset)
    mapper = instantiate(config.dataloader.test.mapper)
    if args.what == "attention":
        loss, teacher = icd_of(config, weights)
        drawn = draw_attention(args.output, args.dataset, loss, teacher, mapper, args.number)
        written = drawn.files
        shown = f"attention, {drawn.inside:.0%} of it in boxes that cover {drawn.by_chance:.0%}"
    elif args.what == "selection":
        loss, teacher = erd_of(config, weights)
        written = draw_selection(args.output, args.dataset, loss, teacher, mapper, args.number)
        shown = "selected locations"
    else:
        detectors = detectors_of(config, weights, args.dataset)
        written = draw_detections(
            args.output,
            args.dataset,
            detectors,
            mapper,
            args.number,
            args.threshold,
            student_of(config.model).get("num_old_classes", 0),
        )
        shown = " | ".join(["ground truth", *detectors])
    print(f"{shown}: {len(written)} pictures in {args.output}")


def left_by_training(config, weights: dict[str, str]) -> str:
    """The run's checkpoint: what was given as the student's, or what lies in the output folder."""
    left = Path(config.train.output_dir, "model_final.pth")
    if "student" not in weights and not left.is_file():
        raise InputError("--weights", f"no student, and no {left}", "student=FILE")
    return weights.get("student", str(left))


def give_teacher(config, weights: dict[str, str], what: str, method: str) -> None:
    """Give the recipe's teacher the weights asked for; refuse a recipe without a teacher, or one without weights."""
    from ..config import is_distiller

    if not is_distiller(config.model):
        raise InputError(f"--what {what}", "a plain recipe", f"one that distils by {method}")
    node = config.model.teacher
    node.weights = weights.get("teacher", node.weights)
    if not node.weights:
        raise InputError("--weights", "no teacher, and none in the recipe", "teacher=FILE")


def icd_of(config, weights: dict[str, str]) -> tuple:
    """The recipe's ICD loss, as trained, and the teacher it looks at."""
    from detectron2.config import instantiate

    from ..config import teacher_of, without_weights
    from ..engine.launch import pick_device
    from ..visualization.icd_attention import load_icd

    give_teacher(config, weights, "attention", "ICD")
    device, model = pick_device(config.train.device), config.model
    checkpoint = left_by_training(config, weights)
    teacher = instantiate(teacher_of(model))
    student = instantiate(without_weights(model.student))
    loss = load_icd(model, student, teacher, checkpoint)
    teacher.detector.to(device)
    return loss.to(device), teacher


def erd_of(config, weights: dict[str, str]) -> tuple:
    """The recipe's ERD loss and its teacher."""
    from detectron2.config import instantiate

    from ..config import without_weights
    from ..engine.launch import pick_device
    from ..losses import ERDLoss

    give_teacher(config, weights, "selection", "ERD")
    model = instantiate(without_weights(config.model)).to(pick_device(config.train.device))
    losses = [loss for loss in model.losses.by_name.values() if isinstance(loss, ERDLoss)]
    if not losses:
        raise InputError("--what selection", "a recipe without it", "one that distils by ERD")
    return losses[0], model.teacher


def detectors_of(config, weights: dict[str, str], dataset: str) -> dict:
    """Teacher, if the recipe has one with weights, and student: title -> (function of batches, names of its classes).

    The student's are those in its file, else the recipe's, else the data set's.
    """
    from detectron2.config import instantiate

    from ..config import is_distiller, student_of, teacher_of, without_weights
    from ..engine.checkpoint import learned_classes, teacher_classes
    from ..engine.launch import pick_device
    from ..modeling.weights import CLASSES, load_strict, read
    from ..structures.class_map import class_names

    device = pick_device(config.train.device)
    checkpoint = left_by_training(config, weights)
    if "teacher" in weights and not is_distiller(config.model):
        raise InputError("--weights", "teacher=, and the recipe has none", "a distillation recipe")
    student = instantiate(without_weights(student_of(config.model))).to(device).eval()
    load_strict(student, checkpoint)
    names = read(checkpoint).get(CLASSES)
    if names is None and config.model.get("classes") is not None:
        names = class_names(instantiate(config.model.classes))
    names = names or learned_classes(student, [dataset])
    detectors = {}
    if is_distiller(config.model):
        node = config.model.teacher
        node.weights = weights.get("teacher", node.weights)
        if node.weights:
            teacher = instantiate(teacher_of(config.model))
            teacher.detector.to(device)
            detectors["teacher"] = teacher.detect, teacher_classes(teacher, names)
    return detectors | {"student": (student, names)}
