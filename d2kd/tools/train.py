"""Train or evaluate what a recipe says.

    d2kd train --config-file RECIPE [--resume] [--num-gpus N] [KEY=VALUE …]
    d2kd train --config-file RECIPE --eval-only (--resume | train.init_checkpoint=WEIGHTS)
    d2kd train --config-file PLAIN --distill METHOD --teacher CONFIG WEIGHTS [KEY=VALUE …]

RECIPE is a LazyConfig, on disk or by its name in d2kd or in Detectron2's model zoo. The third form makes a
plain recipe one with a teacher. On several GPUs: ``--num-gpus``; in several processes on a CPU: torchrun.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..utils.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="a LazyConfig recipe")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output folder"
    )
    parser.add_argument("--eval-only", action="store_true", help="measure the student alone")
    parser.add_argument(
        "--distill",
        metavar="METHOD",
        help="make a plain recipe one with a teacher, by tar, icd or imitation",
    )
    parser.add_argument(
        "--teacher",
        nargs=2,
        metavar=("CONFIG", "WEIGHTS"),
        help="of --distill: a LazyConfig, a yacs YAML or a name in the model zoo, and its weights",
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="of this machine")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="N", help="from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where the machines meet, such as tcp://FIRST:29500",
    )
    parser.add_argument("opts", nargs="*", help="overrides of the recipe")


def recipe(args: argparse.Namespace) -> DictConfig:
    """The recipe of the command line, overrides applied."""
    from ..config import distill, load, method, override, with_defaults

    if (args.distill is None) != (args.teacher is None):
        raise InputError("--distill METHOD and --teacher CONFIG WEIGHTS", "one of them", "both")
    config = load(args.config_file)
    if args.distill:
        config = with_defaults(distill(config, teacher=args.teacher, **method(args.distill)))
    return override(config, args.opts)


def evaluate(config: DictConfig, resume: bool) -> dict:
    """Measure the student alone: of ``train.init_checkpoint``, or of the run's last checkpoint.

    Raises:
        InputError: there is no checkpoint, or it does not fit; or its classes are not those of the test data.
    """
    from detectron2.config import instantiate

    from ..config import student_of, with_defaults, without_weights
    from ..data import check_dataset, dataset_names
    from ..engine import do_test
    from ..engine.checkpoint import StudentCheckpointer, learned_classes
    from ..engine.launch import pick_device
    from ..modeling.weights import load_strict

    config = with_defaults(config)
    model = instantiate(without_weights(student_of(config.model)))
    model.to(pick_device(config.train.device))
    last = StudentCheckpointer(model, config.train.output_dir).last()
    weights = (resume and last) or config.train.init_checkpoint or last
    if not weights:
        raise InputError(
            "--eval-only",
            f"no checkpoint in {config.train.output_dir}",
            "one there, or train.init_checkpoint=WEIGHTS",
        )
    names = check_dataset(dataset_names(config, "test"))
    load_strict(model, weights, learned_classes(model, names))
    return do_test(config, model)


def train(config: DictConfig, resume: bool) -> None:
    from ..doctor import FirstLook
    from ..engine import Trainer

    trainer = Trainer(config)
    trainer.register_hooks([FirstLook()])
    trainer.resume_or_load(resume)
    trainer.train()


def work(args: argparse.Namespace) -> None:
    """What each process does."""
    from ..engine.launch import joined

    config = recipe(args)
    with joined(config.train.device):
        (evaluate if args.eval_only else train)(config, args.resume)


def run(args: argparse.Namespace) -> None:
    from ..engine.launch import launch

    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError("--dist-url", "not given", "where the machines meet: tcp://FIRST:PORT")
    launch(work, args)
