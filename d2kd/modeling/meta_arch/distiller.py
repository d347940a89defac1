"""The meta-architecture that trains a student beside its teacher."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, configurable, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.profiler import record_function

from ...structures.class_map import ClassMap, check_classes, class_names, num_classes_of
from ...utils.comm import anywhere
from ...utils.errors import InputError
from ..agreement import agreement
from ..inherit import inherit_weights
from ..outputs import RCNNOutputs, capture, more_proposals, outputs_of
from ..teacher import Teacher

logger = logging.getLogger(__name__)

SHARES = ("student", "both")

LOSSES = "distiller_losses"
"""The prefix of the losses' parameters in a Distiller's state dict."""


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """A student, its teacher and the losses between them.

    The student's own forward runs untouched while its joints are listened to; the teacher answers what the
    losses read. In ``eval()`` a Distiller is its student.

    Its state dict is its student's, with the parameters of the losses under ``distiller_losses.``: whatever saves or
    loads models reads and writes a plain detector. The teacher is not in it. Weights that are loaded replace inherited
    ones, unless they are only a part of the student's, such as a backbone: then it inherits once more.

    Args:
        student: any detector with readable outputs.
        teacher: its :class:`Teacher`.
        losses: a module called as ``losses(student outputs, teacher outputs, progress)`` that returns named
            losses; its optional ``bind(student, teacher, class_map, scale)`` sees both detectors once, and its
            optional ``taps`` names further modules of the student to listen to.
        max_iter: iterations of the run, for ``progress = iteration / max_iter``.
        inherit: prefixes of parameter names to start from the teacher's weights; ``[""]`` is all of them. With
            other classes, or these in another order, the rows of a GFL's classifier go by name, and so a detector
            grows; of other detectors the layers with rows for each class are left out.
        share: whose proposals the RoI heads judge. "student": its sampler's choice among its own, as it
            would be alone. "both": among its own and the teacher's, so its training is no longer the plain one.
        classes: names of the student's classes, or a data set that has them; needed where the teacher's
            are given.

    Raises:
        InputError: the losses ask for what these detectors do not have.
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
        share: str = "student",
        classes: str | Iterable[str] | None = None,
    ):
        super().__init__()
        if max_iter <= 0:
            raise InputError("max_iter", max_iter, "a positive number of iterations")
        if share not in SHARES:
            raise InputError("share", share, " or ".join(SHARES))
        self.student = student
        self.teacher = teacher
        self.losses = losses
        self.max_iter = max_iter
        self.kind = outputs_of(student)
        self.share = share
        if share == "both" and {self.kind, teacher.kind} != {RCNNOutputs}:
            kinds = f"a {type(student).__name__} and a {type(teacher.detector).__name__}"
            raise InputError("share", f"both, of {kinds}", "two detectors with proposals")
        if share == "both" and teacher.scale != 1:
            raise InputError("share", f"both, at {teacher.scale} times the size", "student")
        if share == "both" and teacher.detector.proposal_generator is None:
            raise InputError("share", "both, where the teacher has no RPN", "student")
        self.class_map = class_map_of(student, teacher, classes)
        self._grown = grown_classes(student, teacher.detector, self.class_map)
        if hasattr(losses, "bind"):
            losses.bind(student, teacher.detector, self.class_map, teacher.scale)
        self.taps = tuple(getattr(losses, "taps", ()))
        for name in self.taps:
            self._tapped(name)
        self.inherited = tuple(inherit)
        self.inherit()
        # The student may have been moved before it came here.
        self.to(self.device)
        self.register_state_dict_post_hook(_to_plain_keys)
        self.register_load_state_dict_pre_hook(_from_plain_keys)
        self.register_load_state_dict_post_hook(_after_load)

    def inherit(self) -> None:
        """Take over the teacher's weights once more, after an initialization that has overwritten some."""
        if self.inherited:
            class_map = self.class_map or self._grown
            flip = self.teacher.flip_channels
            inherit_weights(self.student, self.teacher.detector, self.inherited, class_map, flip)

    def _tapped(self, name: str) -> nn.Module:
        try:
            return self.student.get_submodule(name)
        except AttributeError:
            raise InputError(
                "taps", f"no module {name!r} in the student", "the name of a submodule"
            ) from None

    def __getattr__(self, name: str) -> Any:
        # What tools look up by a key of the state dict, or in any detector: ``backbone``, ``roi_heads``.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "student" not in self.__dict__.get("_modules", ()):
                raise
            return self.losses if name == LOSSES else getattr(self.student, name)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The student from the yacs config itself; teacher and losses from the LazyConfig it names.

        The teacher is told the channel order of the yacs config's images.

        Raises:
            InputError: the LazyConfig tells it another.
        """
        node = cfg.MODEL.DISTILLER
        student_cfg = cfg.clone()
        student_cfg.defrost()
        student_cfg.MODEL.META_ARCHITECTURE = node.META_ARCHITECTURE
        recipe = LazyConfig.load(node.CONFIG).model
        images, told = cfg.INPUT.FORMAT, recipe.teacher.get("image_format")
        if told not in (None, images):
            found = f"model.teacher.image_format={told}, beside INPUT.FORMAT {images}"
            raise InputError(node.CONFIG, found, "the same, or no image_format")
        recipe.teacher.image_format = images
        return {
            "student": META_ARCH_REGISTRY.get(node.META_ARCHITECTURE)(student_cfg),
            "teacher": instantiate(recipe.teacher),
            "losses": instantiate(recipe.losses),
            "max_iter": cfg.SOLVER.MAX_ITER,
            "inherit": tuple(node.INHERIT),
            "share": node.SHARE,
            "classes": tuple(node.CLASSES) or None,
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> Distiller:
        # The teacher is no submodule, yet must follow .to(), .cuda() and .half().
        self.teacher.detector._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, batched_inputs: list[dict]) -> Any:
        """Detectron2's training interface: the student's task losses and ``distill/loss_*`` together."""
        if not self.training:
            return self.student(batched_inputs)
        teacher = self.teacher.ask(batched_inputs)
        taps = {name: self._tapped(name) for name in self.taps}
        with contextlib.ExitStack() as during:
            calls = during.enter_context(capture(self.kind.joints(self.student)))
            tapped = during.enter_context(capture(taps))
            if self.share == "both":
                heads = self.student.roi_heads
                during.enter_context(more_proposals(heads, lambda: teacher.proposals))
            losses = self._own_losses(batched_inputs)
        student = self.kind.from_calls(self.student, batched_inputs, calls, tapped)
        teacher.share(student.shared)
        storage = get_event_storage()
        with record_function("d2kd/losses"):
            taught = self.losses(student, teacher, progress=storage.iter / self.max_iter)
        agreed = agreement(student, teacher, self.class_map)
        if agreed is not None:
            storage.put_scalar("distill/agreement", agreed)
        return {**losses, **taught}

    def _own_losses(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        """The student's; where its predictions are not finite in one process, all raise what that one raises."""
        losses, failure = {}, None
        try:
            with record_function("d2kd/student forward"):
                losses = self.student(batched_inputs)
        except FloatingPointError as error:
            failure = error
        # Alone with it, a process would leave the others waiting for its counts in the middle of the losses.
        if anywhere(failure is not None):
            raise failure or FloatingPointError("another process's predictions are not finite")
        return losses


def _plain(key: str, prefix: str) -> str:
    """The name in a plain detector of an entry of a Distiller that lies under ``prefix``."""
    for nested, plain in (("student.", ""), ("losses.", f"{LOSSES}.")):
        if key.startswith(prefix + nested):
            return prefix + plain + key.removeprefix(prefix + nested)
    return key


def _to_plain_keys(distiller: Distiller, state: dict, prefix: str, _: Any) -> None:
    """Hook of ``state_dict()``."""
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    state.update((_plain(key, prefix), value) for key, value in own.items())
    metadata = getattr(state, "_metadata", {})
    for key in list(metadata):
        # The student's own entry, which comes later, takes the Distiller's place.
        metadata[_plain(f"{key}.", prefix)[:-1]] = metadata.pop(key)


def _from_plain_keys(distiller: Distiller, state: dict, prefix: str, *_: Any) -> None:
    """Hook of ``load_state_dict()``, before it hands the entries to the submodules."""
    parts = (distiller._modules, distiller._parameters, distiller._buffers)
    own = {name for part in parts for name in part} - {"student", "losses"}  # of a subclass

    def nested(key: str) -> str:
        name = key.removeprefix(prefix)
        first, _, rest = name.partition(".")
        if not key.startswith(prefix) or first in own:
            return key
        return prefix + (f"losses.{rest}" if first == LOSSES else f"student.{name}")

    distiller._load_prefix = prefix
    for key in list(state):
        state[nested(key)] = state.pop(key)
    metadata = getattr(state, "_metadata", None) or {}
    known = {prefix + part for part in ("student", "losses")} | own
    for key, value in list(metadata.items()):  # the caller's, so nothing is taken out
        if not key.startswith(tuple(known)):  # as an earlier load has left it
            metadata[nested(f"{key}." if key else "").removesuffix(".")] = value


def _after_load(distiller: Distiller, incompatible: Any) -> None:
    """Hook of ``load_state_dict()``: missing and unexpected entries are named as in the file."""
    prefix = distiller.__dict__.pop("_load_prefix", "")  # a shallow copy calls its original's hook
    part = any(key.startswith(f"{prefix}student.") for key in incompatible.missing_keys)
    for keys in incompatible:
        keys[:] = [_plain(key, prefix) for key in keys]
    if part and distiller.inherited:
        logger.warning(
            "a part of the student's weights was loaded: it inherits the teacher's again"
        )
        distiller.inherit()


def class_map_of(
    student: nn.Module, teacher: Teacher, classes: str | Iterable[str] | None
) -> ClassMap | None:
    """What a student and its teacher share; None where the teacher's classes have no names.

    Args:
        student: the detector.
        teacher: its teacher.
        classes: as of :class:`Distiller`.

    Raises:
        InputError: the teacher's classes have names and the student's have none, or not as many as there are.
    """
    if teacher.classes is None:
        return None
    if classes is None:
        raise InputError("classes", "only the teacher's", "those of the student, too")
    names = class_names(classes)
    check_classes("student", student, names)
    class_map = ClassMap.by_name(names, teacher.classes)
    logger.info("%s", class_map)
    return class_map


def grown_classes(
    student: nn.Module, teacher: nn.Module, class_map: ClassMap | None
) -> ClassMap | None:
    """Which of a growing student's classes its teacher knows: the first ones; None for any other student.

    Args:
        student: one with ``num_old_classes`` grows.
        class_map: that of their names, None where there are none.

    Raises:
        InputError: the teacher knows others than the old classes, or not all of them.
    """
    old = getattr(student, "num_old_classes", 0)
    if not old:
        return None
    count, new = num_classes_of(teacher), num_classes_of(student)
    known = range(count) if class_map is None else class_map.of_student
    if set(known) != set(range(old)):
        found = f"{old}, and the teacher knows the student's {', '.join(map(str, sorted(known)))}"
        raise InputError("num_old_classes", found, "the old classes first, and all that it knows")
    names = tuple(map(str, range(new)))
    return class_map or ClassMap(names, names[:old], tuple((k, k) for k in range(old)))


def add_distiller_config(cfg: CfgNode) -> None:
    """Add ``MODEL.DISTILLER`` to a yacs config; ``MODEL.META_ARCHITECTURE = "Distiller"`` then uses it."""
    cfg.MODEL.DISTILLER = CfgNode()
    cfg.MODEL.DISTILLER.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.DISTILLER.CONFIG = ""
    cfg.MODEL.DISTILLER.INHERIT = []
    cfg.MODEL.DISTILLER.SHARE = "student"
    cfg.MODEL.DISTILLER.CLASSES = []  # the student's, where the teacher has others
