"""Detectron2's DefaultTrainer, driven by a LazyConfig."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import os
import secrets
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..classes import ClassMap, num_classes_of
from ..config import is_distiller, teacher_of
from ..data import check_dataset, use_seeded_loaders
from ..data.steps import check_count, check_objects
from ..errors import InputError
from ..modeling import Distiller
from ..visualization import scenes
from .checkpoint import (
    FINAL,
    NORMALIZER,
    StudentCheckpointer,
    learned_classes,
    student_of,
    unwrapped,
)
from .evaluation import build_test_loader, do_test
from .hooks import BEST, BestCheckpoint, Checkpoints, DrawDetections, EvalTeacher, Evaluate
from .launch import pick_device
from .optimizer import build_lr_scheduler, build_optimizer, students
from .random_state import set_random_state
from .recipe import complete, run_card
from .run_info import (
    RunLog,
    RunRecord,
    disk_is_full,
    explaining_full_disk,
    keep_metrics_before,
    remove_temporaries,
    save_config,
)
from .step import NotFinite, Step, distributed, precision

logger = logging.getLogger(__name__)

METRICS = "metrics.json"


class Trainer(DefaultTrainer):
    """Trains what a recipe says, a plain detector or a :class:`Distiller`.

    Loop, hooks, writers and orchestration are ``DefaultTrainer``'s; its ``build_*`` methods answer from the
    LazyConfig. Its constructor is not called, because all it makes is made otherwise here: a DDP that a CPU
    accepts, a step with any precision on any device, a checkpoint that is the student's.

    Construction reads and checks all input and writes nothing: the output folder is touched by
    :meth:`train` alone.

    Args:
        cfg: a recipe: ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``, of which
            ``configs/common/train.py`` lists the keys and their defaults. Left as it is.

    Attributes:
        config: the recipe, complete.
        cfg: the few values of it that Detectron2's own code reads, as a yacs config.
        seconds: time spent in steps, that of earlier parts of a resumed run included.
        record: what ``run.json`` says.
        finished: whether what was resumed had come to its end, and has left its last state whole.

    Raises:
        InputError: something the recipe names cannot be used.
    """

    def __init__(self, cfg: Any):
        TrainerBase.__init__(self)
        for name in ("detectron2", "fvcore", "d2kd"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name, distributed_rank=comm.get_rank())
        self._log = RunLog()
        with self._log.listening():
            self._build(complete(cfg))

    def _build(self, config: DictConfig) -> None:
        self.config = config
        self.device = pick_device(config.train.device)
        self._seed_is_drawn = config.train.seed is None or config.train.seed < 0
        if self._seed_is_drawn:
            config.train.seed = comm.all_gather(secrets.randbits(31))[0]
        self.cfg = run_card(config)
        self.seconds = 0.0
        self.start_iter, self.max_iter = 0, config.train.max_iter
        self.finished = False
        self._random: dict | None = None
        self._images_before = 0  # of the stream, read before start_iter
        node = config.dataloader.train
        self._batch_size = (OmegaConf.is_dict(node) and node.get("total_batch_size")) or 0

        torch.backends.cudnn.benchmark = config.train.cudnn_benchmark
        self._check_data()
        self._test_loader = build_test_loader(config)
        # Set once for the weights, once for the loader: building a teacher or an adapter, which draws too,
        # must not change what the student's run draws. A third time before the first step.
        seed_all_rng(config.train.seed)
        model = self.build_model(self.cfg)
        optimizer = self.build_optimizer(self.cfg, model)
        self._seed()
        loader = self.build_train_loader(self.cfg)
        self._check_classes(model)
        self._trainer = Step(
            distributed(model, self.device, config.train.ddp),
            loader,
            optimizer,
            precision(config.train.amp, self.device),
            config.train,
        )
        self.scheduler = self.build_lr_scheduler(self.cfg, optimizer)
        self._classes = learned_classes(student_of(model), self._data)
        losses, self._teacher_sha256 = {}, None
        if isinstance(model, Distiller):
            losses["losses"] = model.losses
            # Now, for the file may be gone when a checkpoint is written.
            self._teacher_sha256 = model.teacher.weights_sha256
        self.checkpointer = StudentCheckpointer(
            model,
            config.train.output_dir,
            self._classes,
            trainer=weakref.proxy(self),
            **losses,
        )
        self.record = RunRecord(Path(config.train.output_dir, "run.json"))
        self.register_hooks(self.build_hooks())

    def _check_data(self) -> None:
        found = {}
        for part in ("train", "test"):
            key = f"dataloader.{part}.dataset.names"
            names = OmegaConf.select(self.config, key, default=None)
            found[part] = [] if names is None else check_dataset(names)
        self._data, self._test_data = found["train"], found["test"]

    def _check_classes(self, model: nn.Module) -> None:
        """Whether the data are about the student's classes; of loaded data, since some have names only then."""
        student = student_of(model)
        try:
            num_classes = num_classes_of(student)
        except AttributeError:  # a detector of another kind
            return
        check_objects(self._data, num_classes, getattr(student, "num_old_classes", 0))
        if self._test_loader is not None:
            for name in self._test_data:  # which may have classes that come later
                check_count(name, num_classes, least=1)
        names = learned_classes(student, self._data)
        if names is None or not isinstance(model, Distiller) or model.class_map is None:
            return
        told = model.class_map.student
        same = ClassMap.by_name(told, names)
        if not same.is_identity:
            k = next(k for k in range(len(told)) if (k, k) not in same.pairs)
            raise InputError(
                "model.classes", f"class {k} is {told[k]!r}", f"{names[k]!r}, as in the data"
            )

    def _seed(self) -> None:
        seed_all_rng(self.config.train.seed + comm.get_rank())

    # What DefaultTrainer lets a subclass build.

    def build_model(self, cfg: CfgNode) -> nn.Module:
        node = copy.deepcopy(self.config.model)
        if is_distiller(node):
            node.teacher = teacher_of(node)
        model = instantiate(node).to(self.device)
        logger.info("Model:\n%s", model)
        return model

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(self.config, model)

    def build_lr_scheduler(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return build_lr_scheduler(self.config, optimizer)

    def build_train_loader(self, cfg: CfgNode) -> Iterable:
        """The training loader, from the image of the stream at which this run begins."""
        dataloader = copy.deepcopy(self.config).dataloader
        start = self._images_before // self._batch_size if self._batch_size else self.start_iter
        use_seeded_loaders(dataloader, seed=self.config.train.seed, start=start)
        if self.start_iter > 0 and "start" not in dataloader.train:
            logger.warning("this data loader cannot go on where it was: its stream starts anew")
        return instantiate(dataloader.train)

    def build_hooks(self) -> list[hooks.HookBase]:
        train, checkpointer = self.config.train, self.checkpointer
        keep = train.checkpointer.get("max_to_keep") if comm.is_main_process() else None
        metrics = Path(train.output_dir, METRICS)

        def evaluate() -> dict:
            self._last_eval_results = self.test(self.config, self.model, loader=self._test_loader)
            return finite(self._last_eval_results)  # JSON has no NaN

        return [
            self._eval_teacher_hook(),
            hooks.IterationTimer(),
            hooks.LRScheduler(students(self._trainer.optimizer)),
            # In every process, unlike Detectron2's: a checkpoint holds the random state of each.
            Checkpoints(checkpointer, train.checkpointer.period, max_to_keep=keep),
            Evaluate(train.eval_period, evaluate, train.best_checkpoint or "bbox/AP", metrics),
            BestCheckpoint(train.eval_period, checkpointer, train.best_checkpoint)
            if train.best_checkpoint and self._test_loader is not None
            else None,
            self._draw_hook(),
        ]

    def _eval_teacher_hook(self) -> EvalTeacher | None:
        model = unwrapped(self.model)
        if not (
            self.config.train.eval_teacher
            and isinstance(model, Distiller)
            and self._test_loader is not None
        ):
            return None
        folder = Path(self.config.train.output_dir, "inference", "teacher")
        return EvalTeacher(
            model,
            self.config,
            lambda detector: self.test(
                self.config, detector, loader=self._test_loader, output_dir=folder
            ),
        )

    def _draw_hook(self) -> DrawDetections | None:
        period = self.config.train.draw_period
        if period == 0:
            return None
        for key in ("dataloader.test.dataset.names", "dataloader.test.mapper"):
            if OmegaConf.select(self.config, key, default=None) is None:
                found = f"{period}, and the recipe has no {key}"
                raise InputError("train.draw_period", found, "images to draw, or 0")
        if not comm.is_main_process():
            return None
        if not has_tensorboard():
            logger.warning("train.draw_period has no effect: tensorboard cannot be imported")
            return None
        test, model = self.config.dataloader.test, unwrapped(self.model)
        names = check_dataset(test.dataset.names)
        # From the catalogue, since the test data as the loader gives them have no annotations.
        records = itertools.chain.from_iterable(map(DatasetCatalog.get, names))
        records = list(itertools.islice(records, self.config.train.draw_images))
        return DrawDetections(
            period,
            scenes(records, instantiate(test.mapper)),
            MetadataCatalog.get(names[0]),
            student_of(model),
            self._classes or learned_classes(student_of(model), names),
            model.teacher if isinstance(model, Distiller) else None,
        )

    def build_writers(self) -> list[EventWriter]:
        folder = self.config.train.output_dir
        writers = [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(folder, METRICS)),
        ]
        if has_tensorboard():
            writers.append(TensorboardXWriter(folder))
        return writers

    @classmethod
    def test(cls, cfg: DictConfig, model: Any, evaluators: None = None, **options: Any) -> dict:
        """Measure a model on ``cfg.dataloader.test``: :func:`do_test`."""
        return do_test(cfg, model, **options)

    # Beginning, going on, ending.

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the output folder's last checkpoint, or start from ``train.init_checkpoint``.

        Raises:
            InputError: a file is missing or cannot be read, or does not fit.
        """
        with self._log.listening():
            self.checkpointer.begun = self.record.begun
            last = self.checkpointer.read_last() if resume else None
            _check_agreed(last)
            if last is not None:
                self._resume(*last)
            elif self.config.train.init_checkpoint:
                self.checkpointer.load_initial(self.config.train.init_checkpoint)
                if isinstance(unwrapped(self.model), Distiller):
                    unwrapped(self.model).inherit()

    def _resume(self, file: str, checkpoint: dict) -> None:
        rest = self.checkpointer.restore(file, checkpoint)
        self.start_iter = self.iter + 1
        self.finished = self.start_iter >= self.max_iter and Path(file).name == FINAL
        states, processes = rest.get("processes", ()), comm.get_world_size()
        if len(states) == processes:
            own = states[comm.get_rank()]
            self._random = own["random"]
        else:
            own = _dealt_anew(states, processes)
            dealt = f"; its {NORMALIZER} is dealt to them anew" if own else ""
            logger.warning("%s has no random state for this many processes%s", file, dealt)
        if NORMALIZER in own:
            setattr(student_of(self.model), NORMALIZER, own[NORMALIZER])
        self._trainer.feed(self.build_train_loader(self.cfg))
        self.record.load()
        logger.info("Going on from %s, at iteration %d", file, self.start_iter)

    def train(self) -> dict | None:
        """Train; the output folder holds what there is to know about it.

        Returns:
            the last evaluation's results.

        Raises:
            InputError: a loss is not finite, or an image cannot be read. The last good state is kept.
        """
        folder = self.config.train.output_dir
        with (
            self._log.listening(),
            quiet_about_input_errors(),
            explaining_full_disk(folder),
        ):
            if comm.is_main_process():
                self._open_output()
            comm.synchronize()
            try:
                super().train()
            except BaseException:
                with contextlib.suppress(OSError):  # or it would hide what happened first
                    self._end_record()
                raise
            else:
                self._end_record()
            finally:
                self._log.close()
        return getattr(self, "_last_eval_results", None)

    def _end_record(self) -> None:
        self.record.end(self.iter, self.seconds, getattr(self, "_last_eval_results", {}))

    def _open_output(self) -> None:
        folder = Path(self.config.train.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        if self.start_iter == 0:  # a former run here is nothing to one that begins anew
            for name in ("last_checkpoint", BEST):
                (folder / name).unlink(missing_ok=True)
        self._log.open(folder / "log.txt")
        logger.info("Environment:\n%s", collect_env_info())
        save_config(self.config, folder / "config.yaml")
        keep_metrics_before(folder / METRICS, self.start_iter)
        self.record.begin(
            seed=self.config.train.seed,
            device=str(self.device),
            processes=comm.get_world_size(),
            start_iter=self.start_iter,
            max_iter=self.max_iter,
            parameters=sum(p.numel() for p in student_of(self.model).parameters()),
        )
        writers = hooks.PeriodicWriter(self.build_writers(), self.config.train.log_period)
        self.register_hooks([writers])

    def before_train(self) -> None:
        self._begin_random_state()  # for a hook that saves what it stands on
        super().before_train()
        self._begin_random_state()

    def _begin_random_state(self) -> None:
        if self._random is None:
            self._seed()
        else:
            set_random_state(self._random)

    @contextlib.contextmanager
    def as_of(self, iteration: int) -> Iterator[None]:
        """Inside, the clock stands at an iteration that is over; for what is owed to it."""
        now = self.iter
        self.iter = self.storage.iter = iteration
        try:
            yield
        finally:
            self.iter = self.storage.iter = now

    def after_train(self) -> None:
        # Detectron2 counts one step more, also of a run that had none left.
        self.iter = min(self.iter, self.max_iter)
        if sys.exc_info()[0] is None:
            super().after_train()
            return
        # Something failed, and all that may fail in its wake must not be reported in its place.
        self.storage.iter = self.iter
        for hook in self._hooks:
            with contextlib.suppress(OSError):
                hook.after_train()

    def run_step(self) -> None:
        start = time.perf_counter()
        try:
            super().run_step()
        except NotFinite as error:
            self._keep_last_good_state(error)
        self.seconds += time.perf_counter() - start

    def _keep_last_good_state(self, error: NotFinite) -> None:
        failed_at = self.iter
        self.iter = self._trainer.iter = failed_at - 1
        self.checkpointer.save("model_last_good", iteration=self.iter)
        self.iter = failed_at
        kept = Path(self.config.train.output_dir, "model_last_good.pth")
        raise InputError(
            f"{error.culprit} at iteration {failed_at}",
            error.value,
            f"a finite number; the state before it is in {kept}",
        ) from None

    def state_dict(self) -> dict:
        # Detectron2 0.6 forgets optimizer and scaler here; later versions save them under this key.
        state = TrainerBase.state_dict(self)
        return {
            **state,
            "_trainer": self._trainer.state_dict(),
            "seconds": self.seconds,
            "seed": self.config.train.seed,
            "images": self._images_before + (self.iter + 1 - self.start_iter) * self._batch_size,
            "teacher_sha256": self._teacher_sha256,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        self.seconds = state_dict["seconds"]
        self._images_before = self._images_read(state_dict.get("images"))
        former = state_dict.get("teacher_sha256")
        if former not in (None, self._teacher_sha256):
            logger.warning(
                "the teacher's weights are %s and were %s (SHA-256)", self._teacher_sha256, former
            )
        seed, former = self.config.train.seed, state_dict.get("seed")
        if self._seed_is_drawn and former is not None:
            self.config.train.seed = former
        elif former not in (None, seed):
            logger.warning(
                "train.seed is %d and was %d: the data go on in another order", seed, former
            )

    def _images_read(self, images: int | None) -> int:
        """Of the stream when :attr:`iter` was over, as a checkpoint says it, in whole batches of this run's size."""
        size, expected = self._batch_size, (self.iter + 1) * self._batch_size
        if images is None or images == expected or not size:
            return expected
        logger.warning(
            "dataloader.train.total_batch_size is %d and was another: the data go on at image %d; with "
            "aspect-ratio grouping some may come twice, or not at all",
            size,
            images - images % size,
        )
        return images - images % size


def _check_agreed(last: tuple[str, dict] | None) -> None:
    """Whether all processes go on from one checkpoint; or they would train different weights, and never say so.

    Raises:
        InputError: they do not.
    """
    found = "no checkpoint" if last is None else Path(last[0]).name
    for rank, other in enumerate(comm.all_gather(found)):
        if other != found:
            raise InputError(
                "--resume",
                f"{found} in process {comm.get_rank()}, {other} in process {rank}",
                "one output folder that all processes see",
            )


def _dealt_anew(states: Sequence[dict], processes: int) -> dict[str, Any]:
    """What each of another number of processes goes on with; a batch has as many images in all as before.

    A normalizer counts the foreground of its process's share of them, so it is their sum that stays.
    """
    known = [state[NORMALIZER] for state in states if NORMALIZER in state]
    return {NORMALIZER: sum(known) / processes} if known else {}


def has_tensorboard() -> bool:
    """Whether Detectron2's writer for it can work; tensorboard is no requirement of ours."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def finite(results: Mapping) -> dict:
    """Results, by task or not, without the metrics that are undefined."""
    return {
        name: finite(value) if isinstance(value, Mapping) else value
        for name, value in results.items()
        if isinstance(value, Mapping) or math.isfinite(value)
    }


@contextlib.contextmanager
def quiet_about_input_errors() -> Iterator[None]:
    """Keep Detectron2's loop from printing the traceback of an error that is the input's."""

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not (isinstance(error, InputError) or disk_is_full(error))

    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(keep)
    try:
        yield
    finally:
        loop.removeFilter(keep)
