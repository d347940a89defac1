"""The meta-architecture that trains a student with its teacher."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, configurable, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn
from torch.profiler import record_function

from ...layers.feature_rms import FeatureRMS
from ...structures.class_map import ClassMap, check_classes, class_names, num_classes_of
from ...utils.comm import any_rank
from ...utils.compat import decode_in_float32
from ...utils.errors import InputError
from ...utils.metrics import put_metric
from ..agreement import top1_agreement
from ..inherit import inherit_weights
from ..outputs import RCNNOutputs, append_proposals, capture, get_outputs_class
from ..teacher import Teacher
from ..weights import LOSSES_PREFIX

logger = logging.getLogger(__name__)

PROPOSALS_FROM = ("student", "both")

IMAGES = {"image", "teacher_image"}
"""Keys of the images in a batch, the second one where the teacher's are larger."""


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """A student, its teacher and the distillation losses between them.

    In training, forward hooks record outputs during the student's unchanged forward, and the teacher computes the
    outputs that the losses read. In ``eval()``, a Distiller behaves like its student.

    A batch of unlabelled images, whose dicts have ``unlabelled`` True, has the distillation losses alone. The student runs its
    training forward as if there were no objects, and its own losses, what it logs of them and its loss normalizer are left
    out. What any forward changes stays: running statistics of batch norms, and random numbers drawn for regions. All its
    parameters get a gradient, which is 0 where no loss reaches them.

    The state dict is that of the student, and parameters and buffers of the losses have the prefix
    ``distiller_losses.``, so that checkpoints are those of a plain detector. The teacher is not in it. Loading weights replaces inherited ones.
    After loading only a part of the student's weights, such as a backbone, the student inherits again.

    Two detectors, built in whatever way, and a training loop of one's own::

        from detectron2.utils.events import EventStorage
        from d2kd.losses import DistillLosses, TARLoss
        from d2kd.modeling import Distiller, Teacher

        losses = DistillLosses(tar=TARLoss())
        model = Distiller(student=student, teacher=Teacher(teacher, None), losses=losses, max_iter=len(batches))
        model.measure_features(batches[:4])  # of losses that divide by the size of the teacher's features
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with EventStorage() as storage:
            for batch in batches:
                optimizer.zero_grad()
                sum(model(batch).values()).backward()
                optimizer.step()
                storage.step()

    Args:
        student: a detector for which :func:`get_outputs_class` has a class.
        teacher: its :class:`Teacher`.
        losses: a module called as ``losses(student outputs, teacher outputs, progress)`` that returns a dict of
            losses. Its optional ``setup(student, teacher, class_map, scale)`` is called once here. Its optional
            ``is_active(progress)`` says whether it reads the teacher at all, and its optional ``taps`` and
            ``teacher_taps`` are names of further modules of student and teacher to record.
        max_iter: iterations of the run, for ``progress = iteration / max_iter``.
        inherit: prefixes of parameter names that are initialized with the teacher's weights; ``[""]`` is all.
            If the classes or their order differ, rows of a GFL's classifier are copied by class name, as
            incremental training needs; of other detectors, layers with rows for each class are not inherited.
        proposals_from: the proposals among which the student's RoI heads sample. "student": its own, as without a teacher.
            "both": its own and the teacher's, which changes the student's task losses, too.
        teacher_first: whether the teacher computes its features before the student's forward, not after it. The results are
            equal. Before, the student's activations do not yet need memory; after, the teacher's features do not.
        classes: names of the student's classes, or a data set that has them; required if the teacher's are given. A
            trainer takes those of the training data.

    Attributes:
        agreement_period: iterations between two values of the metric ``distill/agreement``, which reads all logits; a
            trainer sets it to ``train.log_period``.

    Raises:
        InputError: an argument is invalid, or the detectors lack something that the losses need. In training, a batch has
            images of both kinds, or unlabelled ones and a loss that needs ground truth.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher,
        losses: nn.Module,
        max_iter: int,
        inherit: Sequence[str] = (),
        proposals_from: str = "student",
        teacher_first: bool = False,
        classes: str | Iterable[str] | None = None,
    ):
        super().__init__()
        if max_iter <= 0:
            raise InputError("max_iter", max_iter, "a positive number of iterations")
        if proposals_from not in PROPOSALS_FROM:
            raise InputError("proposals_from", proposals_from, " or ".join(PROPOSALS_FROM))
        decode_in_float32(student)
        self.student = student
        self.teacher = teacher
        self.losses = losses
        self.max_iter = max_iter
        self.agreement_period = 20
        self.outputs_class = get_outputs_class(student)
        self.proposals_from, self.teacher_first = proposals_from, teacher_first
        if proposals_from == "both" and {self.outputs_class, teacher.outputs_class} != {
            RCNNOutputs
        }:
            kinds = f"a {type(student).__name__} and a {type(teacher.detector).__name__}"
            raise InputError("proposals_from", f"both, of {kinds}", "two detectors with proposals")
        if proposals_from == "both" and teacher.scale != 1:
            raise InputError(
                "proposals_from", f"both, at {teacher.scale} times the size", "student"
            )
        if proposals_from == "both" and teacher.detector.proposal_generator is None:
            raise InputError("proposals_from", "both, where the teacher has no RPN", "student")
        if inherit and not teacher.has_predictions:
            raise InputError("inherit", f"{list(inherit)}, of a FeatureExtractor", "[]")
        self.class_map = build_class_map(student, teacher, classes)
        self._incremental_class_map = None
        if teacher.has_predictions:
            self._incremental_class_map = incremental_class_map(
                student, teacher.detector, self.class_map
            )
        if hasattr(losses, "setup"):
            losses.setup(student, teacher.detector, self.class_map, teacher.scale)
        self.taps = tuple(getattr(losses, "taps", ()))
        for name in self.taps:
            self._tapped(name)
        self.teacher_taps = tuple(getattr(losses, "teacher_taps", ()))
        teacher.check_taps(self.teacher_taps)
        self.inherited = tuple(inherit)
        self.inherit()
        # The student may already be on another device.
        self.to(self.device)
        self.register_state_dict_post_hook(_to_plain_keys)
        self.register_load_state_dict_pre_hook(_from_plain_keys)
        self.register_load_state_dict_post_hook(_after_load)

    def inherit(self) -> None:
        """Copy the teacher's weights again, for use after an initialization that has overwritten some."""
        if self.inherited:
            class_map = self.class_map or self._incremental_class_map
            flip = self.teacher.flip_channels
            inherit_weights(self.student, self.teacher.detector, self.inherited, class_map, flip)

    def feature_rms(self) -> list[FeatureRMS]:
        """Return the losses' modules that need :meth:`measure_features`."""
        return [module for module in self.losses.modules() if isinstance(module, FeatureRMS)]

    @torch.no_grad()
    def measure_features(self, batches: Iterable[list[dict]]) -> None:
        """Measure the RMS of the teacher's features for the losses that divide by it, in this process.

        Args:
            batches: images in the student's format, best without augmentation.

        Raises:
            InputError: the features are not finite, or there is no batch.
        """
        modules, totals = self.feature_rms(), []
        for batch in batches:
            outputs = self.teacher.outputs(batch)
            totals.append([module.sums(outputs) for module in modules])
        if not totals:
            raise InputError("measure_features", "no batch", "at least one")
        for module, sums in zip(modules, zip(*totals, strict=True), strict=True):
            module.set_from(torch.stack(sums).sum(dim=0))

    def _tapped(self, name: str) -> nn.Module:
        try:
            return self.student.get_submodule(name)
        except AttributeError:
            raise InputError(
                "taps", f"no module {name!r} in the student", "the name of a submodule"
            ) from None

    def __getattr__(self, name: str) -> Any:
        # For code that uses keys of the state dict as attributes, or a detector's ``backbone`` or ``roi_heads``.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "student" not in self.__dict__.get("_modules", ()):
                raise
            return self.losses if name == LOSSES_PREFIX else getattr(self.student, name)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the student from the yacs config, and teacher and losses from the LazyConfig that it names.

        The teacher's ``image_format`` is that of the yacs config.

        Raises:
            InputError: the LazyConfig has another ``image_format``.
        """
        node = cfg.MODEL.DISTILLER
        student_cfg = cfg.clone()
        student_cfg.defrost()
        student_cfg.MODEL.META_ARCHITECTURE = node.META_ARCHITECTURE
        recipe = LazyConfig.load(node.CONFIG).model
        image_format, given = cfg.INPUT.FORMAT, recipe.teacher.get("image_format")
        if given not in (None, image_format):
            found = f"model.teacher.image_format={given}, beside INPUT.FORMAT {image_format}"
            raise InputError(node.CONFIG, found, "the same, or no image_format")
        recipe.teacher.image_format = image_format
        return {
            "student": META_ARCH_REGISTRY.get(node.META_ARCHITECTURE)(student_cfg),
            "teacher": instantiate(recipe.teacher),
            "losses": instantiate(recipe.losses),
            "max_iter": cfg.SOLVER.MAX_ITER,
            "inherit": tuple(node.INHERIT),
            "proposals_from": node.PROPOSALS_FROM,
            "classes": tuple(node.CLASSES) or None,
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> Distiller:
        # The teacher is no submodule, but .to(), .cuda() and .half() must apply to it.
        self.teacher.detector._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, batched_inputs: list[dict]) -> Any:
        """Return task losses and ``distill/loss_*`` in one dict in training, the student's detections in ``eval()``."""
        if not self.training:
            return self.student(batched_inputs)
        batched_inputs = self._images_on_device(batched_inputs)
        if any(x.get("unlabelled") for x in batched_inputs):
            batched_inputs = self._without_objects(batched_inputs)
        teacher = self.teacher.outputs(batched_inputs, taps=self.teacher_taps)
        storage = get_event_storage()
        progress = storage.iter / self.max_iter
        if self.teacher_first and getattr(self.losses, "is_active", lambda _: True)(progress):
            teacher.features  # noqa: B018  (computed, and kept for the losses)
        taps = {name: self._tapped(name) for name in self.taps}
        with contextlib.ExitStack() as stack:
            calls = stack.enter_context(capture(self.outputs_class.hook_points(self.student)))
            tapped = stack.enter_context(capture(taps))
            if self.proposals_from == "both":
                heads = self.student.roi_heads
                stack.enter_context(append_proposals(heads, lambda: teacher.proposals))
            losses = self._student_losses(batched_inputs)
        student = self.outputs_class.from_calls(self.student, batched_inputs, calls, tapped)
        teacher.set_region_boxes(student.region_boxes, student.mask_boxes)
        with record_function("d2kd/losses"):
            distill_losses = self.losses(student, teacher, progress=progress)
        if (storage.iter + 1) % self.agreement_period == 0:
            agreed = top1_agreement(student, teacher, self.class_map)
            if agreed is not None:
                put_metric("distill/agreement", agreed)
        return {**losses, **distill_losses}

    def _without_objects(self, batched_inputs: list[dict]) -> list[dict]:
        """Return a batch of unlabelled images with the ground truth of images without objects."""
        if not all(x.get("unlabelled") for x in batched_inputs):
            expected = "one kind in a batch, as d2kd's build_train_loader has"
            raise InputError("batch", "labelled and unlabelled images", expected)
        if hasattr(self.losses, "check_unlabelled"):
            self.losses.check_unlabelled()
        examples = []
        for x in batched_inputs:
            boxes, classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)
            none = Instances(tuple(x["image"].shape[-2:]), gt_boxes=boxes, gt_classes=classes)
            examples.append({**x, "instances": none})
        return examples

    @contextlib.contextmanager
    def _own_losses_left_out(self) -> Iterator[None]:
        """Leave out what the student logs and counts for its own losses in the block, such as its loss normalizer."""
        before = vars(self.student).copy()
        try:
            with EventStorage(get_event_storage().iter):
                yield
        finally:
            attributes = vars(self.student)
            for name in attributes.keys() - before:
                del attributes[name]
            attributes.update(before)

    def _images_on_device(self, batched_inputs: list[dict]) -> list[dict]:
        # Once for both detectors; and Detectron2 would wait for each image.
        return [
            {
                key: x.to(self.device, non_blocking=True) if key in IMAGES else x
                for key, x in example.items()
            }
            for example in batched_inputs
        ]

    def _student_losses(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        """Return the student's task losses; if its predictions are not finite in one process, raise in all.

        There are none of unlabelled images.
        """
        losses, failure = {}, None
        try:
            with record_function("d2kd/student forward"):
                if batched_inputs[0].get("unlabelled"):
                    with self._own_losses_left_out():
                        self.student(batched_inputs)
                else:
                    losses = self.student(batched_inputs)
        except FloatingPointError as error:
            failure = error
        # If only one process raised, the others would wait for its counts in the losses forever.
        if any_rank(failure is not None):
            raise failure or FloatingPointError("another process's predictions are not finite")
        return losses


def _plain(key: str, prefix: str) -> str:
    """Return the state dict key of a Distiller's entry: without "student.", and with the prefix of the losses."""
    for nested, plain in (("student.", ""), ("losses.", f"{LOSSES_PREFIX}.")):
        if key.startswith(prefix + nested):
            return prefix + plain + key.removeprefix(prefix + nested)
    return key


def _to_plain_keys(distiller: Distiller, state: dict, prefix: str, _: Any) -> None:
    """Rename the entries; a post-hook of ``state_dict()``."""
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    state.update((_plain(key, prefix), value) for key, value in own.items())
    metadata = getattr(state, "_metadata", {})
    for key in list(metadata):
        # The student's entry, which comes later, replaces the Distiller's.
        metadata[_plain(f"{key}.", prefix)[:-1]] = metadata.pop(key)


def _from_plain_keys(distiller: Distiller, state: dict, prefix: str, *_: Any) -> None:
    """Undo :func:`_to_plain_keys`; a pre-hook of ``load_state_dict()``."""
    parts = (distiller._modules, distiller._parameters, distiller._buffers)
    own = {name for part in parts for name in part} - {"student", "losses"}  # of a subclass

    def nested(key: str) -> str:
        name = key.removeprefix(prefix)
        first, _, rest = name.partition(".")
        if not key.startswith(prefix) or first in own:
            return key
        return prefix + (f"losses.{rest}" if first == LOSSES_PREFIX else f"student.{name}")

    distiller._load_prefix = prefix
    for key in list(state):
        state[nested(key)] = state.pop(key)
    metadata = getattr(state, "_metadata", None) or {}
    known = {prefix + part for part in ("student", "losses")} | own
    for key, value in list(metadata.items()):  # owned by the caller, so entries are only added
        if not key.startswith(tuple(known)):  # else an earlier load has added it
            metadata[nested(f"{key}." if key else "").removesuffix(".")] = value


def _after_load(distiller: Distiller, incompatible: Any) -> None:
    """Rename missing and unexpected keys as in the file, and inherit again; a post-hook of ``load_state_dict()``."""
    prefix = distiller.__dict__.pop("_load_prefix", "")  # a shallow copy calls its original's hook
    part = any(key.startswith(f"{prefix}student.") for key in incompatible.missing_keys)
    for keys in incompatible:
        keys[:] = [_plain(key, prefix) for key in keys]
    if part and distiller.inherited:
        logger.warning(
            "a part of the student's weights was loaded: it inherits the teacher's again"
        )
        distiller.inherit()


def build_class_map(
    student: nn.Module, teacher: Teacher, classes: str | Iterable[str] | None
) -> ClassMap | None:
    """Return the class map of a student and its teacher; None if the teacher's classes have no names, or only those in
    its checkpoint, and the student's are the same.

    Args:
        student: the detector.
        teacher: its teacher.
        classes: as for :class:`Distiller`.

    Raises:
        InputError: the teacher's classes have names, and the student's have none or another number of names.
    """
    if teacher.classes is None:
        if classes is None or teacher.checkpoint_classes is None:
            return None
        names = class_names(classes)
        if names == teacher.checkpoint_classes:
            return None
        check_classes("student", student, names)
        class_map = ClassMap.from_names(names, teacher.checkpoint_classes)
        logger.info("Classes of the teacher's file: %s", class_map)
        return class_map
    if classes is None:
        raise InputError("classes", "only the teacher's", "those of the student, too")
    names = class_names(classes)
    check_classes("student", student, names)
    class_map = ClassMap.from_names(names, teacher.classes)
    logger.info("%s", class_map)
    return class_map


def incremental_class_map(
    student: nn.Module, teacher: nn.Module, class_map: ClassMap | None
) -> ClassMap | None:
    """Return the class map of an incremental student, whose first classes are the teacher's; None for others.

    Args:
        student: incremental if its ``num_old_classes`` is not 0.
        teacher: the detector.
        class_map: that of the class names, None if they are not given.

    Raises:
        InputError: the teacher has classes other than the old ones, or not all of them.
    """
    old = getattr(student, "num_old_classes", 0)
    if not old:
        return None
    count, num_classes = num_classes_of(teacher), num_classes_of(student)
    shared = range(count) if class_map is None else class_map.student_ids
    if set(shared) != set(range(old)):
        found = f"{old}, and the teacher has the student's {', '.join(map(str, sorted(shared)))}"
        raise InputError("num_old_classes", found, "the old classes first, all of the teacher's")
    names = tuple(map(str, range(num_classes)))
    return class_map or ClassMap(names, names[:old], tuple((k, k) for k in range(old)))


def add_distiller_config(cfg: CfgNode) -> None:
    """Add ``MODEL.DISTILLER`` to a yacs config; ``MODEL.META_ARCHITECTURE = "Distiller"`` then uses it."""
    cfg.MODEL.DISTILLER = CfgNode()
    cfg.MODEL.DISTILLER.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.DISTILLER.CONFIG = ""
    cfg.MODEL.DISTILLER.INHERIT = []
    cfg.MODEL.DISTILLER.PROPOSALS_FROM = "student"
    cfg.MODEL.DISTILLER.CLASSES = []  # names of the student's classes, if the teacher has others
