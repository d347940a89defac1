"""Detectron2's DefaultTrainer for a LazyConfig."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import secrets
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
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
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import build_part, is_distiller, teacher_node, with_defaults
from ..config.saving import changed_values, save_config
from ..config.train import scale_to_batch_size
from ..data import check_dataset, use_seeded_loaders
from ..data.datasets import (
    check_has_objects,
    check_labelled,
    check_masks,
    check_same_classes,
    dataset_names,
    labelled_names,
    shared_images,
    training_classes,
)
from ..data.incremental import check_annotated_classes, check_num_classes
from ..data.loader import check_sample, has_unlabelled, images_used
from ..modeling import Distiller
from ..structures.class_map import ClassMap, num_classes_of
from ..utils.compat import decode_in_float32
from ..utils.console import log_to_console
from ..utils.errors import InputError, TrainingInterrupted
from ..utils.io import (
    check_output_folder,
    remove_temporary_files,
    report_full_disk,
    truncate_metrics,
)
from ..utils.memory import PeakMemory
from ..utils.random_state import preserved_random_state, set_random_state
from .checkpoint import (
    FINAL_CHECKPOINT,
    LOSS_NORMALIZER,
    StudentCheckpointer,
    check_same_checkpoint,
    get_student,
    redistribute_normalizer,
    training_class_names,
    unwrap_ddp,
)
from .ema import EMA
from .evaluation import (
    build_evaluator,
    build_recipe_test_loader,
    check_test_data,
    do_test,
    finite_metrics,
    get_test_dataset_name,
)
from .hooks import (
    BEST_METRIC_FILE,
    BestCheckpoint,
    DrawDetections,
    EvalTeacher,
    LazyPeriodicWriter,
    MeasureFeatures,
    PeriodicCheckpoint,
    ResumableEvalHook,
    has_tensorboard,
)
from .launch import pick_device
from .optimizer import (
    build_lr_scheduler,
    build_optimizer,
    hyperparameters,
    set_hyperparameters,
    student_optimizer,
)
from .run_info import RunLog, RunMetadata, suppress_input_error_traceback
from .train_step import NonFiniteError, TrainStep, build_amp, sync_batchnorm, wrap_ddp

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"

CONFIG_FILE = "config.yaml"

ONLY_AT_START = re.compile(
    r"train\.init_checkpoint"
    r"|model\.inherit(\..*)?"
    r"|model\.(student\.)?backbone\.bottom_up\.(weights|pretrained|checkpoint_path)"
)
"""Keys of a recipe that have no effect on a resumed run, whose weights are those of the checkpoint."""


class Trainer(DefaultTrainer):
    """The trainer of a recipe, whose model is a plain detector or a :class:`Distiller`.

    As in ``DefaultTrainer``, a subclass may override ``build_model``, ``build_optimizer``, ``build_lr_scheduler``,
    ``build_train_loader``, ``build_test_loader``, ``build_evaluator``, ``build_hooks``, ``build_writers`` and ``test``.
    They take the LazyConfig instead of a yacs config. ``DefaultTrainer``'s constructor needs a yacs config and is not
    called; the loop, its hooks and its logging are those of ``TrainerBase``.

    The constructor reads and checks all input and writes nothing: only :meth:`train` writes to the output folder.

    Args:
        cfg: a recipe: ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``, whose keys and
            defaults are those of :class:`d2kd.config.Train`. It is not changed.

    Attributes:
        cfg: the recipe with its defaults.
        seconds: time spent in steps, including those before a resume.
        run_metadata: the content of ``run.json``.
        finished: whether the resumed run had ended and written its final checkpoint. :meth:`train` then writes nothing,
            unless its last evaluation is missing.

    Raises:
        InputError: a value of the recipe is invalid.
    """

    def __init__(self, cfg: Any):
        TrainerBase.__init__(self)
        log_to_console()
        self._log = RunLog()
        with self._log.recording():
            self._build(with_defaults(cfg))

    def _build(self, cfg: DictConfig) -> None:
        scale_to_batch_size(cfg)
        self.cfg, train = cfg, cfg.train
        self.device = pick_device(train.device)
        self._seed_is_drawn = train.seed is None or train.seed < 0
        if self._seed_is_drawn:
            train.seed = comm.all_gather(secrets.randbits(31))[0]
        self.seconds = 0.0
        self.start_iter, self.max_iter = 0, train.max_iter
        self.finished = False
        self._random: dict | None = None
        self._images_before = 0  # of the stream, read before start_iter
        node = cfg.dataloader.train
        self._batch_size = (OmegaConf.is_dict(node) and node.get("total_batch_size")) or 0

        torch.backends.cudnn.benchmark = train.cudnn_benchmark
        self._check_data()
        check_output_folder(train.output_dir)
        test_loader = self.build_test_loader(cfg, get_test_dataset_name(cfg))
        self._is_measured = test_loader is not None
        check_sample(test_loader, "dataloader.test")
        # Seeded once for the weights and once for the loader, because a teacher or an adapter also uses random
        # numbers and must not change those of the student's run. Seeded again before the first step.
        seed_all_rng(train.seed)
        model = self.build_model(cfg)
        if train.sync_batchnorm and comm.get_world_size() > 1:
            model = self._with_sync_batchnorm(model)
        optimizer = self.build_optimizer(cfg, model)
        self._seed()
        loader = self.build_train_loader(cfg)
        self._check_unlabelled(model, loader)
        self._check_accumulate()
        try:
            num_classes = num_classes_of(get_student(model))
        except AttributeError:  # a detector of another family
            num_classes = None
        else:
            self._check_classes(model, num_classes)
        heads = getattr(get_student(model), "roi_heads", None)
        check_masks(loader, needed=bool(getattr(heads, "mask_on", False)))
        check_sample(loader, "dataloader.train", num_classes)
        self._trainer = TrainStep(
            wrap_ddp(model, self.device, train.ddp),
            loader,
            optimizer,
            build_amp(train.amp, self.device),
            train,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.ema = EMA(get_student(model), train.ema.decay) if train.ema.enabled else None
        self._classes = training_class_names(get_student(model), self._data)
        losses, self._teacher_sha256 = {}, None
        if isinstance(model, Distiller):
            model.agreement_period = train.log_period
            losses["losses"] = model.losses
            # Now, because the file may not exist when a checkpoint is written.
            self._teacher_sha256 = model.teacher.weights_sha256
        this = weakref.proxy(self)  # no reference cycle
        self.checkpointer = StudentCheckpointer(
            model,
            train.output_dir,
            self._classes,
            ema=self.ema,
            before_save=lambda: this.read_metrics(),
            trainer=this,
            **losses,
        )
        self.run_metadata = RunMetadata(Path(train.output_dir, "run.json"))
        self.register_hooks(self.build_hooks())

    def _check_data(self) -> None:
        names, self._test_data = (
            check_dataset(dataset_names(self.cfg, part)) for part in ("train", "test")
        )
        self._data = labelled_names(names)
        self._unlabelled_data = [name for name in names if name not in self._data]
        check_labelled(names, self._test_data)
        check_test_data(self.cfg)
        check_same_classes(self._data, self._test_data)
        check_has_objects(self._data)
        if shared := shared_images(names, self._test_data):
            logger.warning(
                "%d test images are training images, too, such as %s", len(shared), shared[0]
            )

    def _check_unlabelled(self, model: nn.Module, loader: Iterable) -> None:
        """Check that the model can have unlabelled images, if there are some."""
        separates_kinds = has_unlabelled(loader)
        if not self._unlabelled_data and not separates_kinds:
            return
        names = ", ".join(self._unlabelled_data)
        culprit = f"training data {names}" if names else "training data"
        if not isinstance(model, Distiller):
            expected = "a Distiller: only distillation learns from them"
            raise InputError(culprit, "unlabelled images, and a model without a teacher", expected)
        if not separates_kinds:
            found = "unlabelled images, and a loader that mixes them with others"
            raise InputError(culprit, found, "dataloader.train=L(build_train_loader)(…)")
        if hasattr(model.losses, "check_unlabelled"):
            model.losses.check_unlabelled()

    def _check_accumulate(self) -> None:
        parts, images = self.cfg.train.accumulate, self._batch_size // comm.get_world_size()
        if images and parts > images:
            raise InputError("train.accumulate", parts, f"at most {images}, a process's images")

    def _with_sync_batchnorm(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, Distiller):
            return sync_batchnorm(model, self.device)
        model.student = sync_batchnorm(model.student, self.device)
        return model

    def _check_classes(self, model: nn.Module, num_classes: int) -> None:
        """Check that the data have the student's classes; after loading, because some data have no names before."""
        student = get_student(model)
        check_annotated_classes(self._data, num_classes, getattr(student, "num_old_classes", 0))
        if self._is_measured:
            for name in self._test_data:  # may have classes of later increments
                check_num_classes(name, num_classes, least=1)
        names = training_class_names(student, self._data)
        if names is None or not isinstance(model, Distiller) or model.class_map is None:
            return
        classes = model.class_map.student
        same = ClassMap.from_names(classes, names)
        if not same.is_identity:
            k = next(k for k in range(len(classes)) if (k, k) not in same.pairs)
            raise InputError(
                "model.classes", f"class {k} is {classes[k]!r}", f"{names[k]!r}, as in the data"
            )

    def _seed(self) -> None:
        seed_all_rng(self.cfg.train.seed + comm.get_rank())

    # Methods that a subclass may override, as in Detectron2.

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        node = copy.deepcopy(cfg.model)
        if is_distiller(node):
            node.teacher = teacher_node(node)
            if node.get("classes") is None and node.teacher.get("classes") is None:
                # They matter if the teacher's checkpoint has others.
                node.classes = training_classes(cfg)
        model = build_part("model", node).to(pick_device(cfg.train.device))
        decode_in_float32(model)
        logger.info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: DictConfig, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: DictConfig) -> Iterable:
        dataloader = copy.deepcopy(cfg).dataloader
        use_seeded_loaders(dataloader, seed=cfg.train.seed)
        return build_part("dataloader.train", dataloader.train)

    @classmethod
    def build_test_loader(cls, cfg: DictConfig, dataset_name: str | None) -> Iterable | None:
        """Build the loader of ``cfg.dataloader.test``, for another data set if it is named; None: no evaluation."""
        return build_recipe_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: DictConfig, dataset_name: str | None) -> Any:
        """Build the evaluator of ``cfg.dataloader.evaluator``, for another data set if it is named."""
        return build_evaluator(cfg, dataset_name=dataset_name)

    @classmethod
    def test(cls, cfg: DictConfig, model: nn.Module | Callable, evaluators: Any = None) -> dict:
        """Evaluate a model on ``cfg.dataloader.test``, see :func:`do_test`."""
        with preserved_random_state():
            name = get_test_dataset_name(cfg)
            loader = cls.build_test_loader(cfg, name)
            if loader is None:  # a subclass may return None although the recipe has a test loader
                logger.info("no test loader: no evaluation")
                return {}
            evaluators = evaluators or cls.build_evaluator(cfg, name)
            return do_test(cfg, model, loader=loader, evaluator=evaluators)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        train, checkpointer, model = self.cfg.train, self.checkpointer, unwrap_ddp(self.model)
        main, measured = comm.is_main_process(), self._is_measured

        def evaluate() -> dict:
            self.read_metrics()
            detector = self.model if self.ema is None else self.ema.detector
            self._last_eval_results = self.test(self.cfg, detector)
            return finite_metrics(self._last_eval_results)  # JSON has no NaN

        def evaluate_teacher(detect: Callable) -> dict:
            cfg = copy.deepcopy(self.cfg)
            cfg.train.output_dir = str(Path(train.output_dir, "teacher"))
            return self.test(cfg, detect)

        return [
            EvalTeacher(model, self.cfg, evaluate_teacher)
            if train.eval_teacher and isinstance(model, Distiller) and measured
            else None,
            MeasureFeatures(model, self.cfg) if isinstance(model, Distiller) else None,
            hooks.IterationTimer(),
            hooks.LRScheduler(student_optimizer(self._trainer.optimizer)),
            # In every process, unlike Detectron2's, because a checkpoint has the random state of each.
            PeriodicCheckpoint(
                checkpointer,
                train.checkpointer.period,
                max_to_keep=train.checkpointer.max_to_keep if main else None,
            ),
            ResumableEvalHook(
                train.eval_period,
                evaluate,
                train.best_checkpoint or "bbox/AP",
                Path(train.output_dir, METRICS_FILE),
            ),
            BestCheckpoint(train.eval_period, checkpointer, train.best_checkpoint)
            if train.best_checkpoint and measured
            else None,
            DrawDetections.from_config(
                self.cfg, model, self._classes, self.ema and self.ema.detector
            )
            if train.draw_period
            else None,
            LazyPeriodicWriter(self.build_writers, train.log_period) if main else None,
        ]

    def register_hooks(self, hooks: list[hooks.HookBase | None]) -> None:
        super().register_hooks(hooks)
        # Last, so that scalars that other hooks log in a step are written with it.
        self._hooks.sort(key=lambda hook: isinstance(hook, LazyPeriodicWriter))

    def build_writers(self) -> list[EventWriter]:
        folder = self.cfg.train.output_dir
        writers = [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(folder, METRICS_FILE)),
        ]
        if has_tensorboard():
            writers.append(TensorboardXWriter(folder))
        return writers

    # Start, resume and end of a run.

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint in the output folder, or load ``train.init_checkpoint``.

        Raises:
            InputError: a file is missing, cannot be read or does not fit.
        """
        with self._log.recording():
            self.checkpointer.start_time = self.run_metadata.start_time
            last = self.checkpointer.load_last_checkpoint() if resume else None
            check_same_checkpoint(last)
            if last is not None:
                self._resume(*last)
            elif self.cfg.train.init_checkpoint:
                self.checkpointer.load_initial(self.cfg.train.init_checkpoint)
                if isinstance(unwrap_ddp(self.model), Distiller):
                    unwrap_ddp(self.model).inherit()

    def _resume(self, file: str, checkpoint: dict) -> None:
        changed = changed_values(self.cfg, Path(self.cfg.train.output_dir, CONFIG_FILE))
        for key, (before, now) in changed.items():
            if re.fullmatch(r"(train\.loss_)?optimizer(\.optimizer)?\._target_", key):
                raise InputError(key, f"{now}, and was {before}", "the same optimizer to resume")
        rest = self.checkpointer.restore(file, checkpoint)
        self.start_iter = self.iter + 1
        self.finished = self.start_iter >= self.max_iter and Path(file).name == FINAL_CHECKPOINT
        states, processes = rest.get("processes", ()), comm.get_world_size()
        if len(states) == processes:
            state = states[comm.get_rank()]
            self._random = state["random"]
        else:
            state = redistribute_normalizer(states, processes)
            note = f"; its {LOSS_NORMALIZER} is divided anew" if state else ""
            logger.warning("%s has no random state for this many processes%s", file, note)
        if LOSS_NORMALIZER in state:
            setattr(get_student(self.model), LOSS_NORMALIZER, state[LOSS_NORMALIZER])
        start = self.start_iter
        if self._batch_size:
            start = self._images_before // self._batch_size
        cfg = copy.deepcopy(self.cfg)
        use_seeded_loaders(cfg.dataloader, seed=cfg.train.seed, start=start)
        node = cfg.dataloader.train
        if start > 0 and not (OmegaConf.is_dict(node) and "start" in node):
            logger.warning("this data loader cannot be resumed: it starts from its beginning")
        self._trainer.reset_data_loader(self.build_train_loader(cfg))
        self.run_metadata.load()
        logger.info("Resuming from %s at iteration %d", file, self.start_iter)
        changed.pop("train.seed", None)  # load_state_dict() has logged it
        self._report_changes(changed)

    def _report_changes(self, changed: dict[str, tuple[str, str]]) -> None:
        """Log each value that differs from the run's ``config.yaml``, and whether it has an effect.

        Those without one get their former values, so that the new ``config.yaml`` has what is in effect.

        Args:
            changed: key -> (former value, value now), as YAML.
        """
        if self.finished and changed:
            logger.warning("The run is finished; no effect has: %s", ", ".join(changed))
            return
        for key, (before, now) in changed.items():
            if ONLY_AT_START.fullmatch(key) is None:
                logger.info("%s is %s and was %s: it takes effect now", key, now, before)
                continue
            logger.warning(
                "%s is %s and was %s: no effect, the weights are those of the checkpoint",
                key,
                now,
                before,
            )
            if before != "nothing":
                OmegaConf.update(self.cfg, key, yaml.safe_load(before))
        start = self.cfg.train.init_checkpoint
        if start and "train.init_checkpoint" not in changed:
            logger.info("train.init_checkpoint, %s, is not loaded again", start)

    def train(self) -> dict | None:
        """Train, and write checkpoints, metrics, log, config and ``run.json`` to the output folder.

        Returns:
            results of the last evaluation.

        Raises:
            InputError: a loss or gradient is not finite, or an image cannot be read. Checkpoints that were written
                before are whole.
            TrainingInterrupted: SIGINT or SIGTERM has arrived, in any process. A checkpoint of all steps is written first.
        """
        folder = self.cfg.train.output_dir
        if comm.all_gather(self.finished and self.run_metadata.is_finished)[0]:
            logger.info("The run in %s is finished. A larger train.max_iter trains on", folder)
            self._last_eval_results = self.run_metadata.content["rows"][-1]["results"]
            return self._last_eval_results
        self._peak = PeakMemory(self.device)
        with (
            self._log.recording(),
            self._trainer.stop_signals.recorded(),
            suppress_input_error_traceback(),
            report_full_disk(folder),
        ):
            if comm.is_main_process():
                self._open_output()
            comm.synchronize()
            try:
                TrainerBase.train(self, self.start_iter, self.max_iter)
            except BaseException:
                with contextlib.suppress(OSError):  # otherwise it would hide the first error
                    self._end_record(finished=False)
                raise
            else:
                self._end_record(finished=True)
            finally:
                self._log.close()
        return getattr(self, "_last_eval_results", None)

    def _end_record(self, finished: bool) -> None:
        results = getattr(self, "_last_eval_results", {})
        self.run_metadata.end(
            self.iter, self.seconds, results, self._peak.bytes, finished, self._images_used()
        )

    def _images_used(self) -> dict[str, int] | None:
        """Return how many images of each data set all processes have used, also before a resume; None if unknown.

        They are those of this recipe's data sets and ratio, if a resume has changed them.
        """
        if not self._batch_size or not comm.is_main_process():  # which alone writes run.json
            return None
        before = self._images_before // self._batch_size
        return images_used(self.data_loader, before + self.iter - self.start_iter)

    def _open_output(self) -> None:
        folder = Path(self.cfg.train.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(folder)
        if self.start_iter == 0:  # a new run must not use files of an earlier one
            for name in ("last_checkpoint", BEST_METRIC_FILE):
                (folder / name).unlink(missing_ok=True)
        self._log.open(folder / "log.txt")
        logger.info("Environment:\n%s", collect_env_info())
        try:
            save_config(self.cfg, folder / CONFIG_FILE)
        except InputError as error:  # the run does not need this copy of its recipe
            logger.warning("%s", error)
        truncate_metrics(folder / METRICS_FILE, self.start_iter)
        self.run_metadata.begin(
            seed=self.cfg.train.seed,
            device=str(self.device),
            processes=comm.get_world_size(),
            start_iter=self.start_iter,
            max_iter=self.max_iter,
            parameters=sum(p.numel() for p in get_student(self.model).parameters()),
            train_images=self._count_images(),
        )

    def _count_images(self) -> int | None:
        """Return the number of training images; None if the loader does not know it."""
        with contextlib.suppress(AttributeError, TypeError):  # Detectron2's loaders of a stream
            return len(self.data_loader.dataset)
        return None

    def before_train(self) -> None:
        self._init_random_state()  # for a hook that saves a checkpoint
        super().before_train()
        self._init_random_state()

    def _init_random_state(self) -> None:
        if self._random is None:
            self._seed()
        else:
            set_random_state(self._random)

    @contextlib.contextmanager
    def at_iteration(self, iteration: int) -> Iterator[None]:
        """Set the iteration to an earlier one inside the block, for hooks that do work that is missing there."""
        current = self.iter
        self.iter = self.storage.iter = iteration
        try:
            yield
        finally:
            self.iter = self.storage.iter = current

    def after_step(self) -> None:
        super().after_step()
        number, done = self._trainer.stopped_by, self.iter + 1
        if not number or done >= self.max_iter:
            return
        name = f"model_{self.iter:07d}"
        self.checkpointer.save(name, iteration=self.iter)
        comm.synchronize()  # a process that ends may end the others, before the file is whole
        file = Path(self.cfg.train.output_dir, f"{name}.pth")
        message = (
            f"stopped by {signal.Signals(number).name} after {done} of {self.max_iter} iterations"
        )
        message += f"; --resume continues from {file}"
        raise TrainingInterrupted(message if comm.is_main_process() else "", 128 + number)

    def after_train(self) -> None:
        # Detectron2 adds one to the iteration, also if the run had no iterations left.
        self.iter = min(self.iter, self.max_iter)
        if sys.exc_info()[0] is None:
            super().after_train()
            return
        # Training has failed, and an error that follows in a hook must not hide the first one.
        self.storage.iter = self.iter
        for hook in self._hooks:
            # Detectron2's writer divides by zero in the first iterations.
            with contextlib.suppress(OSError, ZeroDivisionError):
                hook.after_train()

    def run_step(self) -> None:
        start = time.perf_counter()
        with self._finite():
            super().run_step()
        if self.ema is not None:
            self.ema.update(get_student(self.model))
        self.seconds += time.perf_counter() - start
        done = self.iter + 1
        if done % self.cfg.train.log_period == 0 or done == self.max_iter:
            self.read_metrics()

    def read_metrics(self) -> None:
        """Check and log the metrics of the last step, which otherwise happens in the next one. All processes must call it.

        It is called before a checkpoint is written, before an evaluation, and every ``train.log_period`` iterations.

        Raises:
            InputError: a loss or gradient is not finite.
        """
        with self._finite():
            self._trainer.read_metrics()

    @contextlib.contextmanager
    def _finite(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            last = self.checkpointer.last_checkpoint_file()
            kept = f"--resume continues from {last}" if last else "no checkpoint was written before"
            raise InputError(
                f"{error.culprit} at iteration {error.iteration}",
                error.value,
                f"a finite number; {kept}",
            ) from None

    def state_dict(self) -> dict:
        # Detectron2 0.6 does not save optimizer and GradScaler; later versions save them under this key.
        state = TrainerBase.state_dict(self)
        return {
            **state,
            "_trainer": self._trainer.state_dict(),
            "seconds": self.seconds,
            "seed": self.cfg.train.seed,
            "images": self._images_before + (self.iter + 1 - self.start_iter) * self._batch_size,
            "teacher_sha256": self._teacher_sha256,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        own = hyperparameters(self.optimizer)
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        # Those of the recipe, which may have changed; after the last iteration the schedule has no value.
        if isinstance(self.scheduler, LRMultiplier) and self.iter + 1 < self.max_iter:
            set_hyperparameters(self.optimizer, self.scheduler, own)
        self.seconds = state_dict["seconds"]
        self._images_before = self._images_read(state_dict.get("images"))
        former = state_dict.get("teacher_sha256")
        if former not in (None, self._teacher_sha256):
            logger.warning(
                "the teacher's weights are %s and were %s (SHA-256)", self._teacher_sha256, former
            )
        seed, former = self.cfg.train.seed, state_dict.get("seed")
        if self._seed_is_drawn and former is not None:
            self.cfg.train.seed = former
        elif former not in (None, seed):
            logger.warning(
                "train.seed is %d and was %d: the data continue in another order", seed, former
            )

    def _images_read(self, images: int | None) -> int:
        """Return the number of images read until :attr:`iter`, rounded down to batches of this run's size.

        Args:
            images: the number in the checkpoint, None if it has none.
        """
        size, expected = self._batch_size, (self.iter + 1) * self._batch_size
        if images is None or images == expected or not size:
            return expected
        logger.warning(
            "dataloader.train.total_batch_size is %d and was another: the data continue at image %d; with "
            "aspect-ratio grouping some images may be used twice, or not at all",
            size,
            images - images % size,
        )
        return images - images % size
