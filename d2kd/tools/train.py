"""Train or evaluate a recipe.

    d2kd train --config-file RECIPE [--resume] [--num-gpus N] [KEY=VALUE …]
    d2kd train --config-file RECIPE --eval-only (--resume | train.init_checkpoint=WEIGHTS)
    d2kd train --config-file PLAIN --distill METHOD --teacher TEACHER [KEY=VALUE …]

RECIPE is a LazyConfig: a file, or a name in d2kd or Detectron2's model zoo. The third form adds a teacher to a plain
recipe: a trained detector of Detectron2's model zoo, as in zoo:COCO-Detection/faster_rcnn_R_101_FPN_3x; an image classifier
of timm, as in timm:vit_small_patch14_dinov2, for methods between features; or any other detector by its CONFIG WEIGHTS.
``--resume`` logs each value that has changed, and whether it has an effect. ``--eval-only`` writes
``evaluation/results.json`` in the output folder. Use ``--num-gpus`` for several GPUs, and torchrun for several processes
on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..utils.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="a LazyConfig recipe")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in the output folder"
    )
    parser.add_argument("--eval-only", action="store_true", help="only evaluate the student")
    parser.add_argument(
        "--distill",
        metavar="METHOD",
        help="add a teacher to a plain recipe, with a method such as tar, icd or pkd, see docs/methods.md",
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        metavar=("CONFIG", "WEIGHTS"),
        help="for --distill: zoo:NAME or timm:NAME alone; or a LazyConfig, a yacs YAML or a model zoo name, and weights",
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="per machine")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="N", help="from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="address for several machines, such as tcp://FIRST:29500",
    )
    parser.add_argument("opts", nargs="*", help="overrides of the recipe")


def recipe(args: argparse.Namespace) -> DictConfig:
    """Return the recipe of the command line, with overrides applied."""
    from ..config import apply_overrides, distill, load, method, with_defaults
    from ..config.files import TIMM, ZOO

    if (args.distill is None) != (args.teacher is None):
        raise InputError("--distill METHOD and --teacher CONFIG WEIGHTS", "one of them", "both")
    config, overrides = load(args.config_file), args.opts
    if args.distill:
        # The words after the teacher are overrides.
        count = 1 if args.teacher[0].startswith((ZOO, TIMM)) else 2
        given, overrides = args.teacher[:count], [*args.teacher[count:], *args.opts]
        if len(given) < count:
            expected = f"CONFIG WEIGHTS, {ZOO}NAME or {TIMM}NAME"
            raise InputError("--teacher", f"{given[0]} alone", expected)
        teacher = given[0] if count == 1 else tuple(given)
        config = with_defaults(distill(config, teacher=teacher, **method(args.distill)))
        # Not the folder of the student alone, whose run it would replace.
        config.train.output_dir = f"{config.train.output_dir.rstrip('/')}_{args.distill}"
    return apply_overrides(config, overrides)


def evaluate(config: DictConfig, resume: bool) -> dict:
    """Evaluate the student with the weights of ``train.init_checkpoint``, or of the run's last checkpoint.

    The AP of each class is logged. Results and detections are written to ``evaluation`` in the run's folder.

    Args:
        config: a recipe.
        resume: whether the last checkpoint has precedence.

    Raises:
        InputError: if there is no checkpoint, it does not match, or its classes are not those of the test data.
    """
    import logging
    from pathlib import Path

    from detectron2.config import instantiate
    from detectron2.utils import comm

    from ..config import student_node, with_defaults, without_weights
    from ..data import check_dataset, dataset_names
    from ..engine import do_test
    from ..engine.checkpoint import StudentCheckpointer, training_class_names
    from ..engine.launch import pick_device
    from ..modeling.weights import file_sha256, load_weights_strict
    from ..utils.console import log_to_console
    from ..utils.env import collect_versions
    from ..utils.io import write_json

    log_to_console()
    logger = logging.getLogger(__name__)
    config = with_defaults(config)
    model = instantiate(without_weights(student_node(config.model)))
    model.to(pick_device(config.train.device))
    last = StudentCheckpointer(model, config.train.output_dir).last_checkpoint_file()
    start = config.train.init_checkpoint
    weights = (resume and last) or start or last
    if not weights:
        raise InputError(
            "--eval-only",
            f"no checkpoint in {config.train.output_dir}",
            "one there, or train.init_checkpoint=WEIGHTS",
        )
    names = check_dataset(dataset_names(config, "test"))
    load_weights_strict(model, weights, training_class_names(model, names))
    logger.info("Evaluating %s on %s", weights, ", ".join(names))
    if start and weights != start:
        logger.warning("train.init_checkpoint, %s, is not evaluated; without --resume it is", start)
    folder = Path(config.train.output_dir, "evaluation")
    results = do_test(config, model, output_dir=folder)
    if comm.is_main_process():
        about = {"weights": str(weights), "weights_sha256": file_sha256(weights), "dataset": names}
        about |= {"command": " ".join(sys.argv), "versions": collect_versions()}
        write_json(folder / "results.json", {"schema": 1, **about, "results": results})
        logger.info("Wrote %s", folder / "results.json")
    return results


def train(config: DictConfig, resume: bool) -> None:
    from ..doctor import SanityCheckHook
    from ..engine import Trainer

    trainer = Trainer(config)
    trainer.register_hooks([SanityCheckHook()])
    trainer.resume_or_load(resume)
    trainer.train()


def main_worker(args: argparse.Namespace) -> None:
    """Train or evaluate, in each process."""
    from ..engine.launch import process_group

    config = recipe(args)
    with process_group(config.train.device):
        (evaluate if args.eval_only else train)(config, args.resume)


def run(args: argparse.Namespace) -> None:
    from ..engine.launch import launch

    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError("--dist-url", "not given", "where the machines meet: tcp://FIRST:PORT")
    launch(main_worker, args)
