"""A frozen detector, or backbone, that is no submodule of the model it teaches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from ..structures.class_map import (
    ClassMap,
    apply_aliases,
    check_classes,
    class_names,
    num_classes_of,
)
from ..utils.compat import decode_in_float32
from ..utils.errors import InputError
from .feature_extractor import FeatureExtractor
from .inference_optimization import cast_weights_, compile_modules, fuse_norms
from .outputs import DetectorOutputs, autocast_context, current_autocast_dtype, get_outputs_class
from .weights import file_sha256, load_weights_strict, state_sha256

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen detector whose outputs are computed on demand.

    It is not an ``nn.Module``, so that a module to which it is assigned does not register it. Therefore it is not
    part of ``state_dict()``, ``parameters()``, the optimizer, DDP or ``train()``.

    Args:
        detector: the detector, or a :class:`FeatureExtractor` for losses of features; frozen and set to ``eval()`` here.
        weights: its checkpoint, any URI that Detectron2 reads, loaded strictly. None: the weights are not changed.
            "": those with which the backbone of a :class:`FeatureExtractor` was built.
        image_format: channel order of the student's batches, "BGR" or "RGB".
        input_format: channel order of the detector's inputs. None: the detector's attribute ``input_format``, or
            ``image_format`` if it has none.
        classes: names of its classes in its order, or the name of a data set that has them, if the student has
            others, see :class:`d2kd.structures.class_map.ClassMap`. None: those in its weights file, if it has class
            names and the student's differ; otherwise its classes are the student's.
        aliases: {a name in ``classes``, given or in the file: the student's name of that class}, where they differ.
        scale: size of its images divided by that of the student's, any number of at least 1. The batch must have both,
            see :class:`d2kd.data.DownscaledStudentMapper`. Levels are matched by their stride in the student's pixels;
            if the scale is no power of two, the teacher's maps are resized to the student's grid.
        fuse_norms: whether to fold batch norms into convolutions when outputs are first needed. The result is
            equal up to rounding. It renames weights, which are not saved anywhere.
        channels_last: whether to use the channels last memory format for its weights and feature maps.
        compile: whether to compile backbone and heads by ``torch.compile`` when outputs are first needed.
        dtype: precision of its computation, "float32", "bfloat16" or "float16". None: the student's, that of
            ``train.amp``. In lower precision than float32, weights of convolutions and linear layers are cast once, when
            outputs are first needed, and the precision stays.

    Attributes:
        checkpoint_classes: class names in its weights file, or None.

    Raises:
        InputError: the weights cannot be read, do not fit or are of other classes, or are "" and the detector was built with
            none; the detector has no class of outputs; the number of class names is wrong; an argument is invalid.
    """

    def __init__(
        self,
        detector: nn.Module,
        weights: str | None,
        image_format: str = "BGR",
        input_format: str | None = None,
        classes: str | Iterable[str] | None = None,
        aliases: Mapping[str, str] | None = None,
        scale: float = 1,
        fuse_norms: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        dtype: str | None = None,
    ):
        if dtype not in (None, *DTYPES):
            raise InputError("teacher.dtype", dtype, " or ".join(DTYPES))
        features_only = isinstance(detector, FeatureExtractor)
        self.outputs_class = DetectorOutputs if features_only else get_outputs_class(detector)
        decode_in_float32(detector)
        if features_only and classes is not None:
            raise InputError("teacher.classes", "given for a FeatureExtractor", "null: it has none")
        names = None if classes is None else class_names(classes, "teacher.classes")
        if names is not None:
            check_classes("teacher", detector, apply_aliases(names, aliases or {}))
        weights = None if weights is None else str(weights)  # a recipe may have a Path
        self.checkpoint_classes, self._built_sha256 = None, None
        built = features_only and detector.has_weights
        if weights == "" and not built:
            expected = (
                "its checkpoint, by model.teacher.weights=FILE; null for an untrained teacher"
            )
            if features_only:
                expected += "; or a backbone with weights of its own, by its pretrained=True"
            raise InputError("teacher.weights", "none", expected)
        if built and not weights:
            weights, self._built_sha256 = None, state_sha256(detector)
        self.weights = weights
        if weights is not None:
            stored = load_weights_strict(detector, weights, names)
            if stored and not features_only and len(stored) == num_classes_of(detector):
                self.checkpoint_classes = stored
        if aliases and names is None:
            names = self.checkpoint_classes
        if aliases and names is None:
            raise InputError("teacher.aliases", "no teacher.classes", "classes that they rename")
        self.classes = None if names is None else apply_aliases(names, aliases or {})
        self.detector = detector.eval().requires_grad_(False)
        input_format = input_format or getattr(detector, "input_format", None) or image_format
        self.flip_channels = input_format != image_format
        for order in (image_format, input_format) if self.flip_channels else ():
            if order not in ("BGR", "RGB"):
                found = f"{input_format}, of images in {image_format}"
                raise InputError("teacher.input_format", found, "BGR and RGB, or the same")
        if not isinstance(scale, Real) or not 1 <= scale < math.inf:
            raise InputError("teacher.scale", scale, "any number of at least 1")
        self.scale = int(scale) if scale == int(scale) else float(scale)
        self.dtype = DTYPES.get(dtype)
        self._pending_optimizations = {
            "fuse": fuse_norms,
            "cast": True,
            "channels_last": channels_last,
            "compile": compile,
        }

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights file, or of the weights with which a backbone was built; None if there are none."""
        return self._built_sha256 if self.weights is None else file_sha256(self.weights)

    @property
    def has_predictions(self) -> bool:
        """Whether it is a detector; a :class:`FeatureExtractor` has features alone."""
        return not isinstance(self.detector, FeatureExtractor)

    def convert_inputs(self, batched_inputs: list[dict]) -> list[dict]:
        """Return the batch with images of the teacher's size and channel order.

        The detector itself applies its pixel statistics. With a ``scale`` above 1, ``instances`` and ``proposals``
        are removed, because they are in the student's pixels.

        Raises:
            InputError: ``scale`` is above 1, and the batch has no images of the teacher's size; or an image is larger than
                the square to which the detector pads, as a ViTDet does.
        """
        if self.scale != 1:
            if not all("teacher_image" in x for x in batched_inputs):
                raise InputError(
                    "teacher.scale",
                    f"{self.scale}, but a batch without 'teacher_image'",
                    "mappers L(DownscaledStudentMapper)(mapper=…, scale=…) of training and test data",
                )
            names = {"instances", "proposals", "teacher_image"}
            batched_inputs = [
                {**{k: v for k, v in x.items() if k not in names}, "image": x["teacher_image"]}
                for x in batched_inputs
            ]
        # Later Detectron2's; it would crop a single image, and fail on several.
        padding = getattr(self.detector.backbone, "padding_constraints", {})
        if square := padding.get("square_size", 0):
            for x in batched_inputs:
                if max(size := tuple(x["image"].shape[-2:])) > square:
                    found, expected = f"an image of {size}", f"at most {square}, its square_pad"
                    raise InputError("size of the teacher's images", found, expected)
        if not self.flip_channels:
            return batched_inputs
        return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]

    def detect(self, batched_inputs: list[dict]) -> list[dict]:
        """Return the teacher's detections in the student's batch, as a detector in ``eval()`` returns them."""
        with autocast_context(self.detector, self.dtype):
            return self.detector(self.convert_inputs(batched_inputs))

    def predictor_in_student_classes(
        self, num_classes: int, class_map: ClassMap | None
    ) -> Callable[[list[dict]], list[dict]] | None:
        """Return :meth:`detect` in the student's classes, for evaluation on the student's data.

        Args:
            num_classes: number of the student's classes.
            class_map: None: the teacher's classes are the student's first ones.

        Returns:
            a function of batches, without detections of other classes; None, with a line in the log, if it detects
            nothing, or its classes cannot be mapped to the student's.
        """
        if not self.has_predictions:
            logger.info("The teacher's AP is not measured: a FeatureExtractor detects nothing")
            return None
        if class_map is None:
            if (count := num_classes_of(self.detector)) <= num_classes:
                return self.detect
            reason = f"it has {count} classes, the student {num_classes}, and no names"
        elif class_map.pairs:
            return lambda batched_inputs: [
                {**output, "instances": to_student_classes(output["instances"], class_map)}
                for output in self.detect(batched_inputs)
            ]
        else:
            reason = "none of its classes is the student's"
        logger.warning("The teacher's AP is not measured: %s", reason)
        return None

    def outputs(
        self,
        batched_inputs: list[dict],
        region_boxes: list[list[Boxes]] | None = None,
        taps: Sequence[str] = (),
    ) -> DetectorOutputs:
        """Return outputs that are computed, without gradient, when they are first read; nothing is computed here.

        If the teacher has no ``dtype``, the precision is that of the context of this call, also for outputs that
        are read in another context. From the first call under autocast on, it is that of autocast.

        Args:
            batched_inputs: the student's batch.
            region_boxes: see :attr:`DetectorOutputs.region_boxes`; if not known yet,
                :meth:`DetectorOutputs.set_region_boxes` sets them later.
            taps: names of submodules of the detector whose outputs are ``taps[name]``.

        Raises:
            InputError: its images are not ``scale`` times larger than the student's.
        """
        dtype = self.dtype or current_autocast_dtype(self.detector)
        self._optimize_for_inference(dtype)
        inputs = self.convert_inputs(batched_inputs)
        sizes = None
        if self.scale != 1:
            sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
            for small, x in zip(sizes, inputs):
                full = tuple(x["image"].shape[-2:])
                if any(abs(a - b * self.scale) >= self.scale for a, b in zip(full, small)):
                    found = f"{self.scale}, but an image of {full} beside the student's of {small}"
                    raise InputError("teacher.scale", found, "the scale of the mapper")
        outputs = self.outputs_class(
            self.detector, inputs, dtype=dtype, student_image_sizes=sizes, teacher_taps=taps
        )
        outputs.set_region_boxes(region_boxes)
        return outputs

    def check_taps(self, names: Iterable[str]) -> None:
        """Raise InputError unless all are submodules whose calls can be recorded."""
        for name in names:
            try:
                self.detector.get_submodule(name)
            except AttributeError:
                expected = "the name of a submodule"
                raise InputError(
                    "teacher_taps", f"no module {name!r} in the teacher", expected
                ) from None
            if name.partition(".")[0] not in self.outputs_class.computed_by:
                parts = ", ".join(self.outputs_class.computed_by)
                raise InputError("teacher_taps", f"{name!r}", f"a module in one of {parts}")
            if self._pending_optimizations["compile"]:
                expected = "false, with losses that record modules of the teacher"
                raise InputError("teacher.compile", "true", expected)

    def _optimize_for_inference(self, dtype: torch.dtype) -> None:
        """Apply the optimizations, once, after weights were loaded, inherited and moved to their device."""
        if self._pending_optimizations.pop("fuse", False):
            fuse_norms(self.detector)
        if dtype != torch.float32 and self._pending_optimizations.pop("cast", False):
            cast_weights_(self.detector, dtype)
            self.dtype = dtype  # of all that follows, since the weights have it
        if self._pending_optimizations.pop("channels_last", False):
            self.detector.to(memory_format=torch.channels_last)
        if self._pending_optimizations.pop("compile", False):
            compile_modules(self.detector)


def to_student_classes(detections: Instances, class_map: ClassMap) -> Instances:
    """Return a teacher's detections with the student's class ids, without those of classes the student lacks."""
    labels = class_map.labels_to_student(detections.pred_classes)
    shared = detections[labels >= 0]
    shared.pred_classes = labels[labels >= 0]
    return shared
