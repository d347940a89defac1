"""Hooks in addition to Detectron2's: evaluation of the teacher, the best checkpoint, pictures of detections."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data import build_test_loader, check_dataset
from ..data.datasets import dataset_names, sample_evenly
from ..data.loader import dataset_of
from ..modeling import Distiller, Teacher
from ..modeling.weights import file_sha256
from ..structures.class_map import num_classes_of
from ..utils.env import config_hash
from ..utils.errors import InputError
from ..utils.io import read_metrics, read_rows, write_json
from ..utils.random_state import preserved_random_state
from ..visualization.panels import Scene, panel_metadata, scenes, side_by_side
from .checkpoint import StudentCheckpointer, get_student, teacher_class_names, training_class_names

logger = logging.getLogger(__name__)

# Of a panel in TensorBoard, in pixels; limited, because the event file has all pictures of a run.
MAX_PANEL_SIZE = 800
# Score threshold; lower than the tools' 0.5, because scores are low early in training.
SCORE_THRESHOLD = 0.3


def teacher_cache_file() -> Path:
    """Return the cache file of teachers' APs: in ``$D2KD_CACHE``, otherwise in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("D2KD_CACHE", Path(caches, "d2kd")), "teachers.json")


class EvalTeacher(HookBase):
    """Evaluate the teacher before the first step, with the student's evaluator.

    This costs minutes, once for each teacher, and detects the worst mistake, a teacher that does not fit the data.
    The AP is cached by the hashes of weights, data and the model's config, and by the class map. A teacher whose
    classes cannot be mapped to the student's is not evaluated, with a warning.

    Args:
        model: the Distiller.
        config: the recipe.
        evaluate: a function that evaluates a detector given as a function of batches.
    """

    def __init__(self, model: Distiller, config: DictConfig, evaluate: Callable[[Callable], dict]):
        self._teacher, self._class_map = model.teacher, model.class_map
        self._config, self._evaluate = config, evaluate
        self._is_known = True
        self._detect = self._teacher.predictor_in_student_classes(
            num_classes_of(model.student), self._class_map
        )

    def before_train(self) -> None:
        key = self._key()
        if self._detect is None:
            if comm.is_main_process():
                self.trainer.run_metadata.set(teacher={**key, "AP": None})
            return
        # All use what the main process has found in the cache, because all must take part in an evaluation.
        cached = comm.all_gather(self._read_cache(key))[0]
        average_precision = self._compute() if cached is None else cached["AP"]
        average_precision = comm.all_gather(average_precision)[0]
        if comm.is_main_process():
            if cached is None:
                self._write_cache({**key, "AP": average_precision})
            self.trainer.run_metadata.set(teacher={**key, "AP": average_precision})
            self._log(average_precision)

    def _key(self) -> dict:
        names = check_dataset(dataset_names(self._config, "test"))
        # The name is not enough: the annotations may have been edited since.
        files = [MetadataCatalog.get(name).get("json_file") for name in names]
        model = {k: v for k, v in self._config.model.teacher.items() if k != "weights"}
        dataloader = self._config.dataloader
        content = {"model": model, "data": dataloader.test, "by": dataloader.get("evaluator")}
        if self._class_map is not None:
            content["classes"] = self._class_map.pairs
        return {
            "weights": self._teacher.weights,
            "weights_sha256": self._teacher.weights_sha256,
            "dataset": names,
            "dataset_sha256": [
                file_sha256(f) if f and PathManager.isfile(f) else None for f in files
            ],
            "config_sha256": config_hash(content),
        }

    def _read_cache(self, key: dict) -> dict | None:
        """Return the result of this run, if it is resumed, or of any run of this user."""
        rows = [self.trainer.run_metadata.content["teacher"] or {}]
        if key["weights_sha256"] is not None:
            rows += read_rows(teacher_cache_file())
        items = {name: value for name, value in key.items() if name != "weights"}.items()
        return next((row for row in rows if "AP" in row and items <= row.items()), None)

    def _write_cache(self, row: dict) -> None:
        if row["weights_sha256"] is None:
            return
        try:
            write_json(
                teacher_cache_file(), {"schema": 1, "rows": [*read_rows(teacher_cache_file()), row]}
            )
        except OSError as error:  # without a cache, the evaluation is only repeated
            logger.warning("the teacher's AP is not cached: %s", error)

    def _compute(self) -> float | None:
        logger.info("Evaluating the teacher")
        results = self._evaluate(self._detect)
        self._is_known = "bbox" in results or not comm.is_main_process()
        value = results.get("bbox", {}).get("AP")
        return None if value is None or not math.isfinite(value) else float(value)

    def _log(self, average_precision: float | None) -> None:
        if average_precision is None and not self._is_known:
            logger.info("The teacher's AP is not known: the recipe's evaluator gives no bbox/AP")
            return
        fraction = 1.0 if self._class_map is None else self._class_map.shared_fraction
        # A class that the teacher lacks has an AP of 0.
        if average_precision is not None and average_precision >= fraction:
            note = "" if fraction == 1 else f"; it has {fraction:.0%} of the classes"
            logger.info("The teacher's AP is %.2f%s", average_precision, note)
            return
        found = "undefined" if average_precision is None else f"{average_precision:.3f}"
        bar = "!" * 78
        logger.warning(
            f"\n{bar}\n! The teacher's AP is {found} of 100: it does not fit this data, or was hardly trained.\n"
            f"! Check its weights, its config, its classes and their order before you train a student.\n{bar}"
        )


MEASURED_IMAGES = 64
"""Number of training images on which the teacher's features are measured."""


class MeasureFeatures(HookBase):
    """Measure the teacher's features before the first step of a new run, for losses that divide by their RMS.

    The main process measures on 64 evenly spaced training images, as the test mapper reads them, so without
    augmentation, and sends the result to the others. A resumed run has it in its checkpoint.

    Args:
        model: the Distiller.
        config: the recipe.
    """

    def __init__(self, model: Distiller, config: DictConfig):
        self._model, self._config = model, config

    def before_train(self) -> None:
        if self.trainer.start_iter > 0:
            return
        error = None
        if comm.is_main_process():
            try:
                measure_features(self._model, self._config, self.trainer.data_loader)
            except InputError as found:  # raised below, or the other processes would wait forever
                error = found
        if error := comm.all_gather(error)[0]:
            raise error
        for module in self._model.feature_rms():
            # On the CPU, or each process would hold memory of the main process's GPU.
            state = {name: value.cpu() for name, value in module.state_dict().items()}
            module.load_state_dict(comm.all_gather(state)[0])


def measure_features(model: Distiller, config: DictConfig, loader: Iterable) -> None:
    """Measure the teacher's features for the losses of a recipe's model, if one needs it, in this process.

    If the recipe has no test mapper or no list of training images, the first training batch will be used instead.

    Args:
        model: the Distiller.
        config: the recipe.
        loader: its training loader, whose list of images is used, so that annotations are not read again.

    Raises:
        InputError: an image cannot be read, or the features are not finite.
    """
    dataset, mapper = (
        OmegaConf.select(config, f"dataloader.{key}", default=None)
        for key in ("train.dataset", "test.mapper")
    )
    if not model.feature_rms() or dataset is None or mapper is None:
        return
    records = dataset_of(loader)
    if records is None:
        records = instantiate(dataset)
    if not hasattr(records, "__len__"):  # a stream
        return
    records = sample_evenly(records, MEASURED_IMAGES)
    images = build_test_loader(
        records, mapper=instantiate(mapper), sampler=range(len(records)), batch_size=4
    )
    with preserved_random_state():
        model.measure_features(images)


class PeriodicCheckpoint(hooks.PeriodicCheckpointer):
    """Detectron2's PeriodicCheckpointer, with ``max_to_keep`` also for files from before a resume.

    A run interrupted after its last periodic checkpoint, before the final one, writes the final one on resume.
    """

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is not None and self.trainer.start_iter > 0:
            last = self.checkpointer.get_checkpoint_file()
            written = [*reversed(self.checkpointer.older_checkpoints(last)), last]
            # Without files of later iterations, which were unreadable or are an earlier run's.
            unwritten = f"{self.file_prefix}_{self.trainer.start_iter:07d}.pth"
            self.recent_checkpoints = [file for file in written if Path(file).name < unwritten]
        if self.trainer.start_iter >= self.max_iter and not self.trainer.finished:
            last = self.trainer.start_iter - 1  # max_iter may have been lowered since
            with self.trainer.at_iteration(last):
                self.checkpointer.save(f"{self.file_prefix}_final", iteration=last)


class ResumableEvalHook(hooks.EvalHook):
    """Detectron2's EvalHook, which in a resumed run first does an evaluation that is missing.

    A checkpoint is written before the evaluation at the same iteration, so that a failing evaluation costs no
    training. If a run is interrupted between the two, the resumed run starts with this evaluation.

    Args:
        period: in iterations; 0: at the end alone.
        evaluate: a function that returns the results.
        metric: name of a metric that all evaluations have.
        metrics: path of ``metrics.json``, which has the metric if the evaluation was finished.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict], metric: str, metrics: Path):
        super().__init__(period, evaluate)
        self._metric, self._metrics = metric, metrics

    def before_train(self) -> None:
        done, trainer = self.trainer.start_iter, self.trainer
        due = self._period > 0 and done > 0 and done % self._period == 0 and done < trainer.max_iter
        if due and not comm.all_gather(self._is_done(done - 1))[0]:
            with trainer.at_iteration(done - 1):
                self._do_eval()

    def _is_done(self, iteration: int) -> bool:
        rows = read_metrics(self._metrics)
        return any(row["iteration"] == iteration and self._metric in row for row in rows)

    def after_train(self) -> None:
        # Detectron2's would also evaluate if the last iteration has failed.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


BEST_METRIC_FILE = "model_best.json"
"""File name, in a run's folder, of the best metric so far and its iteration."""


class LazyPeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's PeriodicWriter, which opens its files when training begins.

    Args:
        build: a function that returns the writers.
        period: iterations between two lines.
    """

    def __init__(self, build: Callable[[], list[EventWriter]], period: int):
        super().__init__([], period)
        self._build = build

    def before_train(self) -> None:
        self._writers = self._build()


class BestCheckpoint(HookBase):
    """Save the state with the highest metric so far as ``model_best.pth``; to be placed after the evaluation hook.

    The best value is written to ``model_best.json`` and to all checkpoints, so that a resumed run does not
    overwrite a better state. ``--resume`` never continues from ``model_best.pth``. If no evaluation had the metric, as
    of a detector that finds nothing, the last state is kept, so that a finished run always has this file.

    Args:
        period: that of the evaluation hook.
        checkpointer: the checkpointer of the run.
        metric: name in the evaluation's results, such as ``"bbox/AP"``.
    """

    def __init__(self, period: int, checkpointer: StudentCheckpointer, metric: str):
        self._period, self._checkpointer, self._metric = period, checkpointer, metric
        self._file = Path(checkpointer.save_dir, BEST_METRIC_FILE)
        self._best = -math.inf

    def state_dict(self) -> dict:
        return {"metric": self._metric, "value": self._best}

    def load_state_dict(self, state_dict: dict) -> None:
        if state_dict["metric"] == self._metric:
            self._best = state_dict["value"]

    def before_train(self) -> None:
        if self.trainer.start_iter > 0:
            rows = [row for row in read_rows(self._file) if row.get("metric") == self._metric]
            self._best = max([self._best, *(row["value"] for row in rows)])
            last = self.trainer.start_iter - 1
            with self.trainer.at_iteration(
                last
            ):  # if the evaluation hook has done a missing evaluation
                self._save_if_best(last)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._check_metric(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not interrupted
            last = self.trainer.max_iter - 1
            self._check_metric(last)
            if self._best == -math.inf:
                self._checkpointer.save("model_best", tag=False, iteration=last)
                logger.warning(
                    "no evaluation had %s: model_best.pth is the last state", self._metric
                )

    def _check_metric(self, iteration: int) -> None:
        if comm.is_main_process() and self._metric not in self.trainer.storage.latest():
            logger.warning("no %s in the evaluation: which state is best is unknown", self._metric)
        self._save_if_best(iteration)

    def _save_if_best(self, iteration: int) -> None:
        # Only the main process has results, but all processes must take part in saving.
        value = comm.all_gather(self.trainer.storage.latest().get(self._metric, (None,))[0])[0]
        if value is None or not value > self._best:
            return
        self._best = value
        self._checkpointer.save("model_best", tag=False, iteration=iteration)
        if comm.is_main_process():
            row = {"metric": self._metric, "value": value, "iteration": iteration}
            write_json(self._file, {"schema": 1, "rows": [row]})
            logger.info("Best %s so far: %.3f", self._metric, value)


class DrawDetections(HookBase):
    """Write pictures of ground truth | teacher | student for a fixed set of images to TensorBoard.

    The pictures, ``detections/<name of the scene>``, are written every ``period`` iterations and after the last
    one. They show detections with a score of at least 0.3. The hook does not change the training in any bit. It
    must be in the main process alone, which draws while the others continue.

    Args:
        period: in iterations, at least 1.
        scenes: the images.
        metadata: metadata of their data set, for the class names.
        student: the detector without DDP, whose forward would wait for the other processes.
        classes: names of the student's classes in its order, or None.
        teacher: None: pictures have no panel of a teacher.
    """

    def __init__(
        self,
        period: int,
        scenes: Iterable[Scene],
        metadata,
        student: nn.Module,
        classes: Sequence[str] | None,
        teacher: Teacher | None = None,
    ):
        self._period, self._scenes = period, list(scenes)
        self._student, self._teacher = student, teacher
        names = {"student": classes}
        if teacher is not None:
            names["teacher"] = teacher_class_names(teacher, classes)
        self._metadata = panel_metadata(metadata, names, getattr(student, "num_old_classes", 0))

    @classmethod
    def from_config(
        cls,
        cfg: DictConfig,
        model: nn.Module,
        classes: Sequence[str] | None,
        student: nn.Module | None = None,
    ) -> DrawDetections | None:
        """Build the hook for the first test images of a recipe; None in other processes and without tensorboard.

        Args:
            cfg: the recipe.
            model: the detector or :class:`Distiller`, without DDP.
            classes: names of the student's classes, or None.
            student: the detector to draw, if it is not the model's.

        Raises:
            InputError: the recipe has no test images.
        """
        period = cfg.train.draw_period
        if OmegaConf.select(cfg, "dataloader.test.dataset.names", default=None) is None:
            found = f"{period}, and the recipe has no dataloader.test.dataset.names"
            raise InputError("train.draw_period", found, "images to draw, or 0")
        if not comm.is_main_process():
            return None
        if not has_tensorboard():
            logger.warning("train.draw_period has no effect: tensorboard cannot be imported")
            return None
        test, student = cfg.dataloader.test, student or get_student(model)
        names = check_dataset(dataset_names(cfg, "test"))
        # From the catalog, because the test mapper removes annotations.
        records = itertools.chain.from_iterable(map(DatasetCatalog.get, names))
        records = list(itertools.islice(records, cfg.train.draw_images))
        return cls(
            period,
            scenes(records, instantiate(test.mapper)),
            MetadataCatalog.get(names[0]),
            student,
            classes or training_class_names(student, names),
            model.teacher
            if isinstance(model, Distiller) and model.teacher.has_predictions
            else None,
        )

    def before_train(self) -> None:
        teacher = self._teacher
        if teacher is None:
            return
        with preserved_random_state():
            for scene in self._scenes:  # once, because neither teacher nor images change
                scene.add("teacher", teacher.detect)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period != 0 and done != self.trainer.max_iter:
            return
        with preserved_random_state(), eval_mode(self._student):
            for scene in self._scenes:
                scene.add("student", self._student)
                picture = side_by_side(
                    scene.image, scene.panels, self._metadata, SCORE_THRESHOLD, MAX_PANEL_SIZE
                )
                name = f"detections/{scene.name}"
                self.trainer.storage.put_image(name, picture.transpose(2, 0, 1))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to ``eval()`` inside the block, and restore the mode of each submodule at its end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_tensorboard() -> bool:
    """Return whether tensorboard, which d2kd does not require, can be imported for Detectron2's writer."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True
