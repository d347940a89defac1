#!/usr/bin/env python3
"""Train or evaluate what a recipe says.

    train_net.py --config-file RECIPE [--resume] [--num-gpus N] [KEY=VALUE …]
    train_net.py --config-file RECIPE --eval-only (--resume | train.init_checkpoint=WEIGHTS)
    train_net.py --config-file PLAIN --distill METHOD --teacher CONFIG WEIGHTS [KEY=VALUE …]

RECIPE is a LazyConfig, on disk or by its name in d2kd or in Detectron2's model zoo. The third form makes a
plain recipe one with a teacher. On several GPUs: ``--num-gpus``; in several processes on a CPU: torchrun.
"""

from __future__ import annotations

import argparse

# First, because it keeps torch's remarks on Detectron2's code from the user's terminal.
from d2kd.config import (
    METHODS,
    distill,
    load,
    method,
    override,
    student_of,
    with_defaults,
    without_weights,
)
from d2kd.data import check_dataset
from d2kd.doctor import FirstLook
from d2kd.engine import Trainer, do_test
from d2kd.engine.checkpoint import StudentCheckpointer, learned_classes
from d2kd.engine.launch import joined, launch, pick_device
from d2kd.errors import InputError, reporting
from d2kd.modeling.weights import load_strict

# isort: split
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig, OmegaConf


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = default_argument_parser(epilog=" ")
    parser.description = __doc__
    parser.add_argument("--distill", choices=METHODS, help="make a plain recipe one with a teacher")
    parser.add_argument(
        "--teacher",
        nargs=2,
        metavar=("CONFIG", "WEIGHTS"),
        help="of --distill: a LazyConfig, a yacs YAML or a name in the model zoo, and its weights",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def recipe(args: argparse.Namespace) -> DictConfig:
    """The recipe of the command line, overrides applied."""
    if not args.config_file:
        raise InputError("--config-file", "not given", "a LazyConfig recipe")
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
    names = OmegaConf.select(config, "dataloader.test.dataset.names", default=None)
    load_strict(
        model, weights, None if names is None else learned_classes(model, check_dataset(names))
    )
    return do_test(config, model)


def train(config: DictConfig, resume: bool) -> None:
    trainer = Trainer(config)
    trainer.register_hooks([FirstLook()])
    trainer.resume_or_load(resume)
    trainer.train()


def main(args: argparse.Namespace) -> None:
    config = recipe(args)
    with joined(config.train.device):
        (evaluate if args.eval_only else train)(config, args.resume)


def run(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with reporting(args.debug):
        launch(main, args)


if __name__ == "__main__":
    run()
