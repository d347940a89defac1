"""Launching of one or several processes: by ``--num-gpus`` on CUDA, by torchrun on any device."""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from ..utils.compat import forget_process_groups, make_local_process_group
from ..utils.errors import InputError, TrainingInterrupted
from .interruption import EXIT_CODES, signals_to_children

EXIT_INPUT_ERROR = 2  # exit code after an InputError

DEVICE_TYPES = ("cpu", "cuda")  # that were thought of; others fail somewhere


def pick_device(name: str) -> torch.device:
    """Return the device of ``train.device``; "auto" is this process's CUDA device if CUDA is available.

    Raises:
        InputError: the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICE_TYPES:
        raise InputError("train.device", name, "auto, cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("train.device", f"{name}, and no CUDA here", "auto or cpu")
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            found = f"{name}, of {torch.cuda.device_count()} CUDA devices"
            raise InputError("train.device", found, "auto, or one that is there")
    return device


def launched_by_torchrun() -> bool:
    """Return whether the environment variables of torchrun are set."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Initialize the process group of torchrun's processes inside the block: NCCL on CUDA, gloo on the CPU.

    At the end, there should be no reference to objects that use the group, such as a trainer.
    """
    if dist.is_initialized():  # by Detectron2's launch
        with report_lost_process():
            yield
        return
    if not launched_by_torchrun():
        yield
        return
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    make_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", comm.get_world_size())))
    try:
        with report_lost_process():
            yield
    finally:
        # A group joins its threads when it has no more references. One that exists until Python exits may abort it.
        forget_process_groups()
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def report_lost_process() -> Iterator[None]:
    """Raise InputError if the code inside fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        # Errors of torch's type, or gloo's errors, which have none.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        # Without the source line of gloo before the message, and the advice after it.
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise InputError(
            f"process {comm.get_rank()} of {comm.get_world_size()}",
            f"another process is gone ({reason})",
            "all of them alive; see that process's output or the system's log",
        ) from error


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in this process, or in ``args.num_gpus`` processes.

    Raises:
        InputError: there are fewer GPUs, or a process was killed.
        SystemExit: a process has raised and printed an InputError or TrainingInterrupted.
    """
    if launched_by_torchrun() or args.num_gpus * args.num_machines <= 1:
        main(args)
        return
    if args.num_gpus > torch.cuda.device_count():
        raise InputError(
            "--num-gpus",
            f"{args.num_gpus}, and {torch.cuda.device_count()} GPUs here",
            "as many as there are; on a CPU, torchrun --nproc-per-node N",
        )
    try:
        with signals_to_children():
            launch_on_gpus(
                _run_one,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, multiprocessing.get_context("spawn").Lock()),
            )
    except ProcessExitedException as error:  # torch has ended the other processes
        if error.exit_code in (EXIT_INPUT_ERROR, *EXIT_CODES):  # the process has said why
            raise SystemExit(error.exit_code) from None
        ended_by = getattr(error, "signal_name", None) or f"exit code {error.exit_code}"
        raise InputError(
            f"process {error.error_index} of {args.num_gpus} here",
            f"ended by {ended_by}",
            "all of them alive; see the system's log",
        ) from error


def _run_one(
    main: Callable, args: argparse.Namespace, first: multiprocessing.synchronize.Lock
) -> None:
    """Run ``main(args)`` in one of several processes; only the first InputError is printed, and all exit with 2."""
    try:
        main(args)
    except InputError as error:
        if getattr(args, "debug", False):
            raise
        if first.acquire(block=False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_INPUT_ERROR) from None
    except TrainingInterrupted as error:
        if str(error):
            print(error, file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
