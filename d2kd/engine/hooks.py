"""The hooks Detectron2 lacks: the teacher's worth, the student's best state, pictures of what both see."""

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

from ..data import check_dataset
from ..data.datasets import dataset_names
from ..modeling import Distiller, Teacher
from ..modeling.weights import sha256
from ..structures.class_map import num_classes_of
from ..utils.env import config_hash
from ..utils.errors import InputError
from ..utils.io import read_rows, write_json
from ..utils.random_state import preserved_random_state
from ..visualization.curves import read_metrics
from ..visualization.panels import Scene, described, scenes, side_by_side
from .checkpoint import StudentCheckpointer, learned_classes, student_of, teacher_classes

logger = logging.getLogger(__name__)

# Of a panel in TensorBoard, in pixels: an event file keeps every picture of a run.
LONGEST_SIDE = 800
# Lower than the tools' one half: a young student is unsure of what it finds.
DRAWN_FROM = 0.3


def cache_file() -> Path:
    """Where measured teachers are remembered: in ``$D2KD_CACHE``, else in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("D2KD_CACHE", Path(caches, "d2kd")), "teachers.json")


class EvalTeacher(HookBase):
    """Measures the teacher before the first step, with the evaluator that will measure the student.

    It costs minutes, once for a teacher, and catches the worst mistake there is: a teacher that knows
    nothing. The AP is remembered by the weights' hash, the data, the model's config and which class is which.
    A teacher whose classes cannot be told to be the student's is not measured, and a warning says so.

    Args:
        model: the teacher and its student.
        config: the whole recipe.
        evaluate: measures a detector given as a callable on batches.
    """

    def __init__(self, model: Distiller, config: DictConfig, evaluate: Callable[[Callable], dict]):
        self._teacher, self._class_map = model.teacher, model.class_map
        self._config, self._evaluate = config, evaluate
        self._detect = self._teacher.as_student(num_classes_of(model.student), self._class_map)

    def before_train(self) -> None:
        key = self._key()
        if self._detect is None:
            if comm.is_main_process():
                self.trainer.record.set(teacher={**key, "AP": None})
            return
        # One process looks and all believe it: evaluating is a matter of all of them.
        known = comm.all_gather(self._remembered(key))[0]
        average_precision = self._measure() if known is None else known["AP"]
        average_precision = comm.all_gather(average_precision)[0]
        if comm.is_main_process():
            if known is None:
                self._remember({**key, "AP": average_precision})
            self.trainer.record.set(teacher={**key, "AP": average_precision})
            self._say(average_precision)

    def _key(self) -> dict:
        names = check_dataset(dataset_names(self._config, "test"))
        # A name says little: the annotations behind it may have been edited since.
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
            "dataset_sha256": [sha256(f) if f and PathManager.isfile(f) else None for f in files],
            "config_sha256": config_hash(content),
        }

    def _remembered(self, key: dict) -> dict | None:
        """What this run, or any run of this user, has found before."""
        rows = [self.trainer.record.content["teacher"] or {}]
        if key["weights_sha256"] is not None:
            rows += read_rows(cache_file())
        wanted = {name: value for name, value in key.items() if name != "weights"}
        return next((row for row in rows if "AP" in row and wanted.items() <= row.items()), None)

    def _remember(self, row: dict) -> None:
        if row["weights_sha256"] is None:
            return
        try:
            write_json(cache_file(), {"schema": 1, "rows": [*read_rows(cache_file()), row]})
        except OSError as error:  # a home that cannot be written costs a repetition, no more
            logger.warning("the teacher's AP is not remembered: %s", error)

    def _measure(self) -> float | None:
        logger.info("Evaluating the teacher")
        results = self._evaluate(self._detect)
        value = results.get("bbox", {}).get("AP")
        return None if value is None or not math.isfinite(value) else float(value)

    def _say(self, average_precision: float | None) -> None:
        share = 1.0 if self._class_map is None else self._class_map.share
        # A class that it does not know counts as an AP of 0.
        if average_precision is not None and average_precision >= share:
            of = "" if share == 1 else f"; it knows {share:.0%} of the classes"
            logger.info("The teacher's AP is %.2f%s", average_precision, of)
            return
        found = "undefined" if average_precision is None else f"{average_precision:.3f}"
        bar = "!" * 78
        logger.warning(
            f"\n{bar}\n! The teacher's AP is {found} of 100: it knows nothing about this data. Look at its\n"
            f"! weights, its config, its classes and their order before you train a student.\n{bar}"
        )


class Checkpoints(hooks.PeriodicCheckpointer):
    """Detectron2's, which after a resume still knows what it wrote before, and keeps no more than it may.

    A run that ended between its last two files, the periodic and the final one, is given the final one.
    """

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is not None and self.trainer.start_iter > 0:
            last = self.checkpointer.get_checkpoint_file()
            written = [*reversed(self.checkpointer.before(last)), last]
            # What is still to be written does not count yet: it could not be read, or was an earlier run's.
            unwritten = f"{self.file_prefix}_{self.trainer.start_iter:07d}.pth"
            self.recent_checkpoints = [file for file in written if Path(file).name < unwritten]
        if self.trainer.start_iter >= self.max_iter and not self.trainer.finished:
            last = self.trainer.start_iter - 1  # max_iter may have been lowered since
            with self.trainer.as_of(last):
                self.checkpointer.save(f"{self.file_prefix}_final", iteration=last)


class Evaluate(hooks.EvalHook):
    """Detectron2's, which makes up in a resumed run for what the run before had not come to.

    Checkpoints precede the evaluation that falls due with them, so that one that fails costs no training. A
    run that ended between the two is resumed behind it: the evaluation then comes first, of the very state.

    Args:
        period: iterations; 0: at the end alone.
        evaluate: gives the results.
        metric: one that every evaluation has.
        metrics: the file in which it stands once all that follows from it is done.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict], metric: str, metrics: Path):
        super().__init__(period, evaluate)
        self._metric, self._metrics = metric, metrics

    def before_train(self) -> None:
        done, trainer = self.trainer.start_iter, self.trainer
        due = self._period > 0 and done > 0 and done % self._period == 0 and done < trainer.max_iter
        if due and not comm.all_gather(self._is_known(done - 1))[0]:
            with trainer.as_of(done - 1):
                self._do_eval()

    def _is_known(self, iteration: int) -> bool:
        rows = read_metrics(self._metrics)
        return any(row["iteration"] == iteration and self._metric in row for row in rows)

    def after_train(self) -> None:
        # Detectron2's would evaluate, too, where the last iteration failed.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


BEST = "model_best.json"
"""What is best so far, in a run's folder."""


class Writers(hooks.PeriodicWriter):
    """Detectron2's, which opens its files when training begins.

    Args:
        build: makes the writers.
        period: iterations between two lines.
    """

    def __init__(self, build: Callable[[], list[EventWriter]], period: int):
        super().__init__([], period)
        self._build = build

    def before_train(self) -> None:
        self._writers = self._build()


class BestCheckpoint(HookBase):
    """Keeps the state with the highest metric so far as ``model_best.pth``; follows the evaluation hook.

    What is best stands in ``model_best.json`` beside it and in every checkpoint, so that a resumed run does not
    overwrite a better state. It is never the state that ``--resume`` goes on from.

    Args:
        period: the evaluation hook's.
        checkpointer: saves the state.
        metric: name in the evaluation's results, such as ``"bbox/AP"``.
    """

    def __init__(self, period: int, checkpointer: StudentCheckpointer, metric: str):
        self._period, self._checkpointer, self._metric = period, checkpointer, metric
        self._file = Path(checkpointer.save_dir, BEST)
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
            with self.trainer.as_of(last):  # if its evaluation was made up for
                self._keep_if_best(last)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._judge(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # it came to its end
            self._judge(self.trainer.max_iter - 1)

    def _judge(self, iteration: int) -> None:
        if comm.is_main_process() and self._metric not in self.trainer.storage.latest():
            logger.warning("no %s in the evaluation: which state is best is unknown", self._metric)
        self._keep_if_best(iteration)

    def _keep_if_best(self, iteration: int) -> None:
        # Only the main process has results, and saving takes all of them.
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
    """Puts ground truth | teacher | student of some images, always the same, into TensorBoard.

    The pictures, ``detections/<name of the scene>``, follow every ``period`` iterations and the last one; they
    show detections with a score of 0.3 or more. The hook only looks: a run is bit for bit the same without it.
    It belongs in one process, which draws while the others go on.

    Args:
        period: iterations, at least 1.
        scenes: the images.
        metadata: of their data set, for the names of the classes.
        student: the detector inside DDP, whose own forward would wait for the other processes.
        classes: names of the student's classes in its order, if they are known.
        teacher: None where there is none, and no panel of it.
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
            names["teacher"] = teacher_classes(teacher, classes)
        self._metadata = described(metadata, names, getattr(student, "num_old_classes", 0))

    @classmethod
    def from_config(
        cls, cfg: DictConfig, model: nn.Module, classes: Sequence[str] | None
    ) -> DrawDetections | None:
        """The hook of a recipe, which draws the first of its test images; None outside the main process, and where
        there is no tensorboard.

        Args:
            cfg: the recipe.
            model: the detector or :class:`Distiller` inside DDP.
            classes: names of the student's classes, if they are known.

        Raises:
            InputError: the recipe has no images to draw.
        """
        period = cfg.train.draw_period
        for key in ("dataloader.test.dataset.names", "dataloader.test.mapper"):
            if OmegaConf.select(cfg, key, default=None) is None:
                found = f"{period}, and the recipe has no {key}"
                raise InputError("train.draw_period", found, "images to draw, or 0")
        if not comm.is_main_process():
            return None
        if not has_tensorboard():
            logger.warning("train.draw_period has no effect: tensorboard cannot be imported")
            return None
        test, student = cfg.dataloader.test, student_of(model)
        names = check_dataset(dataset_names(cfg, "test"))
        # From the catalogue, since the test data as the loader gives them have no annotations.
        records = itertools.chain.from_iterable(map(DatasetCatalog.get, names))
        records = list(itertools.islice(records, cfg.train.draw_images))
        return cls(
            period,
            scenes(records, instantiate(test.mapper)),
            MetadataCatalog.get(names[0]),
            student,
            classes or learned_classes(student, names),
            model.teacher if isinstance(model, Distiller) else None,
        )

    def before_train(self) -> None:
        teacher = self._teacher
        if teacher is None:
            return
        with preserved_random_state():
            for scene in self._scenes:  # once: neither teacher nor image will change
                scene.add("teacher", teacher.detect)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period != 0 and done != self.trainer.max_iter:
            return
        with preserved_random_state(), evaluating(self._student):
            for scene in self._scenes:
                scene.add("student", self._student)
                picture = side_by_side(
                    scene.image, scene.panels, self._metadata, DRAWN_FROM, LONGEST_SIDE
                )
                name = f"detections/{scene.name}"
                self.trainer.storage.put_image(name, picture.transpose(2, 0, 1))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``eval()`` inside; after, every module is as it was, also one that was in ``eval()`` before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_tensorboard() -> bool:
    """Whether Detectron2's writer for it can work; tensorboard is no requirement of ours."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True
