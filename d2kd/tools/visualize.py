"""Draw the detections of a recipe: ground truth | teacher | student; or ICD's attention, or ERD's selected locations.

    d2kd visualize --what detections --config-file RECIPE --dataset shapes_test --output DIR \\
        --weights student=output/model_final.pth teacher=teacher.pth
    d2kd visualize --what attention --config-file output/config.yaml --dataset shapes_test --output DIR
    d2kd visualize --what selection --config-file RECIPE --dataset shapes_test --output DIR

A detector is drawn if it has weights. The default weights are, for the teacher, those of the recipe and, for the
student, those in the recipe's output folder, which include ICD's decoder. ``attention`` draws, for each object, the
decoder's attention over the teacher's feature maps. ``selection`` draws the locations at which ERD compares class
logits and boxes of student and teacher, and those of the boxes that remain after non-maximum suppression.
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
    parser.add_argument("--dataset", required=True, help="registered or in the recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--number", type=int, default=8, help="number of images, evenly spaced")
    parser.add_argument("--threshold", type=float, default=0.5, help="minimum score of detections")
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, such as train.device=cpu")


def run(args: argparse.Namespace) -> None:
    from detectron2.config import instantiate
    from omegaconf import OmegaConf

    from ..config import load, student_node
    from ..data.catalog import register_from_config
    from ..utils.io import check_output_folder
    from ..visualization.erd_selection import draw_selection
    from ..visualization.icd_attention import draw_attention
    from ..visualization.panels import draw_detections

    weights = {}
    for given in args.weights:
        who, _, file = given.partition("=")
        if who not in ("student", "teacher") or not file:
            raise InputError("--weights", given, "student=FILE or teacher=FILE")
        weights[who] = file
    check_output_folder(args.output, "--output")
    if args.number < 1:
        raise InputError("--number", args.number, "at least 1")
    config = load(args.config_file, args.opts)
    if OmegaConf.select(config, "dataloader.test.mapper") is None:
        raise InputError(args.config_file, "no dataloader.test.mapper", "how images are read")
    register_from_config(config, args.dataset)
    mapper = instantiate(config.dataloader.test.mapper)
    if args.what == "attention":
        loss, teacher = icd_of(config, weights)
        drawn = draw_attention(args.output, args.dataset, loss, teacher, mapper, args.number)
        written = drawn.files
        shown = f"attention, {drawn.fraction_inside:.0%} of it in boxes that cover {drawn.by_chance:.0%}"
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
            student_node(config.model).get("num_old_classes", 0),
        )
        shown = " | ".join(["ground truth", *detectors])
    print(f"{shown}: {len(written)} pictures in {args.output}")


def student_checkpoint(config, weights: dict[str, str]) -> str:
    """Return the run's checkpoint: the student's ``--weights``, or ``model_final.pth`` of the output folder."""
    final = Path(config.train.output_dir, "model_final.pth")
    if "student" not in weights and not final.is_file():
        raise InputError("--weights", f"no student, and no {final}", "student=FILE")
    return weights.get("student", str(final))


def set_teacher_weights(config, weights: dict[str, str], what: str, method: str) -> None:
    """Set the weights of the recipe's teacher; raise InputError if there is no teacher, or no weights."""
    from ..config import is_distiller, is_feature_extractor

    if not is_distiller(config.model):
        raise InputError(f"--what {what}", "a plain recipe", f"one that distils by {method}")
    node = config.model.teacher
    node.weights = weights.get("teacher", node.weights)
    if not node.weights and not (is_feature_extractor(node) and node.weights == ""):
        raise InputError("--weights", "no teacher, and none in the recipe", "teacher=FILE")


def icd_of(config, weights: dict[str, str]) -> tuple:
    """Return the recipe's trained ICD loss and its teacher."""
    from detectron2.config import instantiate

    from ..config import teacher_node, without_weights
    from ..engine.launch import pick_device
    from ..visualization.icd_attention import load_icd

    set_teacher_weights(config, weights, "attention", "ICD")
    device, model = pick_device(config.train.device), config.model
    checkpoint = student_checkpoint(config, weights)
    teacher = instantiate(teacher_node(model))
    student = instantiate(without_weights(model.student))
    loss = load_icd(model, student, teacher, checkpoint)
    teacher.detector.to(device)
    return loss.to(device), teacher


def erd_of(config, weights: dict[str, str]) -> tuple:
    """Return the recipe's ERD loss and its teacher."""
    from detectron2.config import instantiate

    from ..config import without_weights
    from ..engine.launch import pick_device
    from ..losses import ERDLoss

    set_teacher_weights(config, weights, "selection", "ERD")
    model = instantiate(without_weights(config.model)).to(pick_device(config.train.device))
    losses = [loss for loss in model.losses.by_name.values() if isinstance(loss, ERDLoss)]
    if not losses:
        raise InputError("--what selection", "a recipe without it", "one that distils by ERD")
    return losses[0], model.teacher


def detectors_of(config, weights: dict[str, str], dataset: str) -> dict:
    """Return title -> (function of batches, class names), for the teacher, if it is a detector with weights, and the student.

    The student's class names are those of its checkpoint, otherwise of the recipe, otherwise of the data set.
    """
    from detectron2.config import instantiate

    from ..config import (
        is_distiller,
        is_feature_extractor,
        student_node,
        teacher_node,
        without_weights,
    )
    from ..engine.checkpoint import teacher_class_names, training_class_names
    from ..engine.launch import pick_device
    from ..modeling.weights import CLASSES_KEY, load_checkpoint, load_weights_strict
    from ..structures.class_map import class_names

    device = pick_device(config.train.device)
    checkpoint = student_checkpoint(config, weights)
    if "teacher" in weights and not is_distiller(config.model):
        raise InputError("--weights", "teacher=, and the recipe has none", "a distillation recipe")
    if "teacher" in weights and is_feature_extractor(config.model.teacher):
        found = "teacher=, of a FeatureExtractor, which detects nothing"
        raise InputError("--weights", found, "student=FILE")
    student = instantiate(without_weights(student_node(config.model))).to(device).eval()
    load_weights_strict(student, checkpoint)
    names = load_checkpoint(checkpoint).get(CLASSES_KEY)
    if names is None and config.model.get("classes") is not None:
        names = class_names(instantiate(config.model.classes))
    names = names or training_class_names(student, [dataset])
    detectors = {}
    if is_distiller(config.model):
        node = config.model.teacher
        node.weights = weights.get("teacher", node.weights)
        if node.weights and not is_feature_extractor(node):
            teacher = instantiate(teacher_node(config.model))
            teacher.detector.to(device)
            detectors["teacher"] = teacher.detect, teacher_class_names(teacher, names)
    return detectors | {"student": (student, names)}
