"""What one detector said about one batch.

The student's outputs are filled with what was captured while it trained, so they carry its graph; the
teacher's compute themselves, without gradient, when a loss first reads them. One class serves both:
*what was captured carries gradient; what is asked is constant.*

Letters: N images, R regions of the batch, K classes, A anchors of a location, (Hi, Wi) the grid of level i.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformRotated
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn
from torch.profiler import record_function

from ..structures.class_map import num_classes_of
from ..utils.compat import box_tensors
from ..utils.errors import InputError
from .meta_arch.gfl import integral

Call = tuple[tuple, Any]


@contextlib.contextmanager
def capture(joints: Mapping[str, nn.Module | Callable]) -> Iterator[dict[str, list[Call]]]:
    """Listen to modules, and to methods, while the block runs, and leave no hook behind.

    Args:
        joints: what to listen to, by the name under which its calls are wanted: a module, or the bound method
            of one. An ``nn.ModuleList`` is never called, so it cannot be listened to: name its members.

    Yields:
        for every name the calls ``(positional inputs, output)`` in order; empty if there was none.
    """
    calls: dict[str, list[Call]] = {name: [] for name in joints}
    with contextlib.ExitStack() as listening:
        for name, joint in joints.items():
            if not isinstance(joint, nn.Module):
                listened = _listened(joint, calls[name])
                listening.enter_context(mock.patch.object(joint.__self__, joint.__name__, listened))
                continue
            hook = joint.register_forward_hook(
                lambda _, inputs, output, heard=calls[name]: heard.append((inputs, output))
            )
            listening.callback(hook.remove)
        yield calls


def _listened(method: Callable, heard: list[Call]) -> Callable:
    def listened(*inputs: Any, **options: Any) -> Any:
        output = method(*inputs, **options)
        heard.append((inputs, output))
        return output

    return listened


class asked(functools.cached_property):
    """A property that computes itself once, without gradient, at its first reading."""

    def __get__(self, outputs: Any, owner: type | None = None) -> Any:
        if outputs is None:
            return self
        who = "student" if outputs.detector.training else "teacher"
        with record_function(f"d2kd/{who}.{self.attrname}"), torch.no_grad(), outputs.precision():
            return super().__get__(outputs, owner)


class Unreadable(LookupError):
    """A loss read what this family of detectors does not say."""


class Maps(dict):
    """Outputs by name, such as those of a backbone's levels.

    Raises:
        Unreadable: there is none of that name. A loss's own ``KeyError`` so stays its own.
    """

    def __missing__(self, name: str) -> Any:
        raise Unreadable(f"no {name!r} among {', '.join(map(str, self)) or 'none'}")


def precision_of(
    detector: nn.Module, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager:
    """The context in which a detector computes in a precision of its own; None: in that of the context around."""
    if dtype is None:
        return contextlib.nullcontext()
    kind = detector.device.type
    if dtype == torch.float32:
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype)


def precision_around(detector: nn.Module) -> torch.dtype:
    """The precision in which a detector would compute here: autocast's, or else float32."""
    kind = detector.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


class DetectorOutputs:
    """What every detector with a feature pyramid says.

    Args:
        detector: the module that speaks; ``eval()`` for a teacher.
        batched_inputs: Detectron2's list of dicts, images in the detector's own channel order.
        dtype: precision of what is asked; None: that of the context in which it is read.
        shared_sizes: (height, width) of each image as the detector that shares sees it; None: as here.
        captured: attributes known already, from the detector's own forward.
    """

    def __init__(
        self,
        detector: nn.Module,
        batched_inputs: list[dict],
        dtype: torch.dtype | None = None,
        shared_sizes: Sequence[tuple[int, int]] | None = None,
        **captured: Any,
    ):
        self.detector = detector
        self.batched_inputs = batched_inputs
        self.dtype, self.shared_sizes = dtype, shared_sizes
        self.__dict__.update(captured)

    def precision(self) -> contextlib.AbstractContextManager:
        """The context in which what is asked is computed."""
        return precision_of(self.detector, self.dtype)

    def __getattr__(self, name: str) -> Any:
        # Reached only where ordinary look-up failed.
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(type(self), name):
            # A property that failed by an AttributeError, which Python takes for "no such attribute": fail as itself.
            return object.__getattribute__(self, name)
        kind = type(self.__dict__.get("detector")).__name__
        raise Unreadable(f"a {kind} has no {name!r} ({type(self).__name__})")

    @classmethod
    def joints(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        """The modules and methods, by name, to listen to while ``detector`` trains."""
        return {"backbone": detector.backbone}

    @classmethod
    def from_calls(
        cls,
        detector: nn.Module,
        batched_inputs: list[dict],
        calls: dict[str, list[Call]],
        taps: dict[str, list[Call]] | None = None,
    ) -> DetectorOutputs:
        """The outputs of a detector whose forward was captured at its :meth:`joints`."""
        tapped = {name: [output for _, output in heard] for name, heard in (taps or {}).items()}
        return cls(detector, batched_inputs, taps=Maps(tapped), **cls._captured(calls))

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        return {"features": Maps(calls["backbone"][0][1])}

    @property
    def shared(self) -> dict[str, Any]:
        """What a teacher must know of this student to judge the same things."""
        return {}

    def share(self, shared: Mapping[str, Any]) -> None:
        """Take over what another detector shares; what this family has no use for is left aside."""
        self.__dict__.update({k: v for k, v in shared.items() if hasattr(type(self), k)})

    @asked
    def images(self) -> ImageList:
        """The normalised, padded batch, ``(N, 3, H, W)``."""
        return self.detector.preprocess_image(self.batched_inputs)

    @asked
    def gt_instances(self) -> list[Instances]:
        """Ground truth of each image: ``gt_boxes`` XYXY in absolute pixels of the padded input."""
        device = self.detector.device
        return [x["instances"].to(device) for x in self.batched_inputs]

    @asked
    def features(self) -> dict[str, Tensor]:
        """Feature maps by level name, ``{"p3": (N, C, H, W), …}``; ``p<n>`` has stride ``2**n``."""
        return Maps(self.detector.backbone(self.images.tensor))


@dataclass
class Regions:
    """What one stage of RoI heads said about its regions; row r belongs to box r.

    Attributes:
        boxes: a ``Boxes`` for each image, XYXY in absolute pixels; R boxes together.
        box_features: ``(R, D)``, what the box predictor saw.
        pred_class_logits: ``(R, K + 1)``, background last.
        pred_proposal_deltas: ``(R, 4K)``, or ``(R, 4)`` if class-agnostic.
        box2box_transform: the coder of the deltas.
        gt_classes: ``(R,)`` in ``[0, K]``, K background; None where nobody labelled the boxes.
        gt_boxes: ``(R, 4)`` matched ground truth; in an image without any, the boxes themselves.
    """

    boxes: list[Boxes]
    box_features: Tensor
    pred_class_logits: Tensor
    pred_proposal_deltas: Tensor
    box2box_transform: Box2BoxTransform
    gt_classes: Tensor | None = None
    gt_boxes: Tensor | None = None

    @property
    def box_tensor(self) -> Tensor:
        """All boxes, ``(R, 4)``."""
        return Boxes.cat(self.boxes).tensor


def box_stages(roi_heads: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Box head and box predictor of each stage: one of ``StandardROIHeads``, several of a cascade."""
    heads, predictors = roi_heads.box_head, roi_heads.box_predictor
    if isinstance(predictors, nn.ModuleList):
        return list(zip(heads, predictors, strict=True))
    return [(heads, predictors)]


def scores_by_sigmoid(detector: nn.Module) -> bool:
    """Whether a class of an R-CNN's region is scored by itself (``use_sigmoid_ce``, after Detectron2 0.6).

    The last logit, of the background, then means nothing, and a softmax of them is no score.
    """
    stages = box_stages(detector.roi_heads)
    return any(getattr(predictor, "use_sigmoid_ce", False) for _, predictor in stages)


class RCNNOutputs(DetectorOutputs):
    """What a ``GeneralizedRCNN`` on an FPN says: Faster and Mask R-CNN, and Cascade R-CNN with more stages."""

    region_boxes: list[list[Boxes]] | None = None
    """For each stage the regions' boxes by image: the student's own, and the ones a teacher is asked about."""

    predictor_calls: list[Call] | None = None
    """The calls of a student's box predictors while it trained, one for each stage."""

    @classmethod
    def joints(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        heads = detector.roi_heads
        joints = {
            "backbone": detector.backbone,
            "roi_heads": heads,
            "box_pooler": heads.box_pooler,
        }
        for stage, (_, predictor) in enumerate(box_stages(heads)):
            joints[f"box_predictor.{stage}"] = predictor
        return joints

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        ((_, features),) = calls["backbone"]
        ((inputs, (proposals, _)),) = calls["roi_heads"]
        # The pooler's inputs and not the proposals: later stages of a cascade pool other boxes, and with
        # train_on_pred_boxes the proposals change afterwards.
        boxes = [list(pooled) for (_, pooled), _ in calls["box_pooler"]]
        captured = {
            "features": Maps(features),
            "proposals": proposals,
            "region_boxes": boxes,
            "predictor_calls": [calls[f"box_predictor.{stage}"][0] for stage in range(len(boxes))],
        }
        if len(inputs) > 3:  # heads of another's own may be given them by name
            captured["gt_instances"] = inputs[3]
        return captured

    def _captured_regions(self) -> list[Regions]:
        """The student's own, with the labels that its loss gave them."""
        heads, regions = self.detector.roi_heads, []
        for stage, ((_, predictor), boxes, call) in enumerate(
            zip(box_stages(heads), self.region_boxes, self.predictor_calls, strict=True)
        ):
            (box_features, *_), (logits, deltas) = call
            if stage == 0:
                classes, matched = _sampled_labels(self.proposals, boxes)
            else:
                classes, matched = match_labels(
                    heads.proposal_matchers[stage], boxes, self.gt_instances, heads.num_classes
                )
            regions.append(
                Regions(
                    boxes,
                    box_features,
                    logits,
                    deltas,
                    predictor.box2box_transform,
                    gt_classes=classes,
                    gt_boxes=matched,
                )
            )
        return regions

    @property
    def shared(self) -> dict[str, Any]:
        return {"region_boxes": self.region_boxes}

    def share(self, shared: Mapping[str, Any]) -> None:
        boxes = shared.get("region_boxes")
        if boxes is not None and self.shared_sizes is not None:
            boxes = [[one.clone() for one in stage] for stage in boxes]
            for stage in boxes:
                for one, (h, w), x in zip(
                    stage, self.shared_sizes, self.batched_inputs, strict=True
                ):
                    height, width = x["image"].shape[-2:]
                    one.scale(width / w, height / h)
            shared = {**shared, "region_boxes": boxes}
        super().share(shared)

    @asked
    def proposals(self) -> list[Instances]:
        """Each image's proposals of the RPN, best first: ``proposal_boxes``, ``objectness_logits``.

        A student's are those its sampler chose, with ``gt_classes`` and ``gt_boxes``.
        """
        return self.detector.proposal_generator(self.images, self.features, None)[0]

    @asked
    def regions(self) -> list[Regions]:
        """One :class:`Regions` for each stage of shared boxes.

        Stage k is judged by stage k of this detector, or by its last one where it has fewer.
        A student's are those it trained with.
        """
        if self.predictor_calls is not None:
            return self._captured_regions()
        if self.region_boxes is None:
            raise Unreadable(
                f"no regions to ask a {type(self.detector).__name__} about: the student has none"
            )
        heads = self.detector.roi_heads
        stages = box_stages(heads)
        features = [self.features[level] for level in heads.box_in_features]
        regions = []
        for stage, boxes in enumerate(self.region_boxes):
            head, predictor = stages[min(stage, len(stages) - 1)]
            box_features = head(heads.box_pooler(features, boxes))
            logits, deltas = predictor(box_features)
            regions.append(
                Regions(boxes, box_features, logits, deltas, predictor.box2box_transform)
            )
        return regions


def _sampled_labels(proposals: list[Instances], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
    matched = [
        p.gt_boxes.tensor if p.has("gt_boxes") else b.tensor
        for p, b in zip(proposals, boxes, strict=True)
    ]
    return torch.cat([p.gt_classes for p in proposals]), torch.cat(matched)


@torch.no_grad()
def match_labels(
    matcher: Callable, boxes: list[Boxes], truth: list[Instances], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Label boxes as a cascade's stage does: ``(R,)`` classes, background last, and ``(R, 4)`` matched boxes.

    In an image without ground truth all are background, and a box is its own match.
    """
    classes, matched = [], []
    for ours, gt in zip(boxes, truth, strict=True):
        if len(gt) == 0:
            classes.append(torch.full((len(ours),), num_classes, device=ours.device))
            matched.append(ours.tensor)
            continue
        index, flags = matcher(pairwise_iou(gt.gt_boxes, ours))
        classes.append(torch.where(flags == 0, num_classes, gt.gt_classes[index]))
        matched.append(gt.gt_boxes.tensor[index])
    return torch.cat(classes), torch.cat(matched)


@contextlib.contextmanager
def more_proposals(roi_heads: nn.Module, of: Callable[[], list[Instances]]) -> Iterator[None]:
    """While the block runs, RoI heads choose among their own proposals and those of another detector.

    Args:
        roi_heads: called as ``(images, features, proposals, …)``.
        of: gives the further proposals of each image.
    """

    def join(_, inputs: tuple) -> tuple:
        images, features, proposals, *rest = inputs
        joined = []
        for own, other in zip(proposals, of(), strict=True):
            further = Instances(own.image_size)
            for name, value in own.get_fields().items():
                theirs = other.get(name)
                further.set(name, theirs if isinstance(value, Boxes) else theirs.to(value.dtype))
            joined.append(Instances.cat([own, further]))
        return images, features, joined, *rest

    handle = roi_heads.register_forward_pre_hook(join)
    try:
        yield
    finally:
        handle.remove()


class DenseOutputs(DetectorOutputs):
    """What a ``DenseDetector`` says of its anchors: RetinaNet, and FCOS and GFL, whose anchors are points with a size."""

    own_labels: tuple[list[Tensor], list[Boxes | Tensor]] | None = None
    """What a student's ``label_anchors`` returned when it trained: for each image labels and matched boxes."""

    @classmethod
    def joints(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        joints = {
            name: getattr(detector, name) for name in ("backbone", "head", "anchor_generator")
        }
        if hasattr(detector, "label_anchors"):  # else there are no labels to read
            joints["label_anchors"] = detector.label_anchors
        return joints

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        ((_, features),) = calls["backbone"]
        ((_, predictions),) = calls["head"]
        captured = {"features": Maps(features), "predictions": predictions}
        for _, anchors in calls["anchor_generator"]:
            captured["anchors"] = anchors
        for (_, truth), labels in calls.get("label_anchors", ()):
            captured |= {"gt_instances": truth, "own_labels": labels}
        return captured

    @asked
    def predictions(self) -> tuple[list[Tensor], ...]:
        """The head's raw answer: for each kind, a ``(N, A * k, Hi, Wi)`` map for each level."""
        return self.detector.head([self.features[f] for f in self.detector.head_in_features])

    @property
    def pred_logits(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, K)``, before the sigmoid."""
        return [by_anchor(x, self.detector.num_classes) for x in self.predictions[0]]

    @property
    def pred_anchor_deltas(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, 4)``, for the detector's ``box2box_transform``."""
        if hasattr(self.detector.head, "reg_max"):
            return [integral(x) for x in self.pred_distributions]
        return [by_anchor(x, 4) for x in self.predictions[1]]

    @property
    def pred_distributions(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, 4, n + 1)``, logits of each edge's distance in strides (GFL)."""
        if not hasattr(self.detector.head, "reg_max"):
            raise Unreadable(f"a {type(self.detector).__name__} has no 'pred_distributions'")
        bins = self.detector.head.reg_max + 1
        return [by_anchor(x, 4 * bins).unflatten(-1, (4, bins)) for x in self.predictions[1]]

    @property
    def pred_centerness(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, 1)``, before the sigmoid (FCOS)."""
        if len(self.predictions) < 3:
            raise Unreadable(f"a {type(self.detector).__name__} has no 'pred_centerness'")
        return [by_anchor(x, 1) for x in self.predictions[2]]

    @asked
    def anchors(self) -> list[Boxes]:
        """Anchors of each level, in the predictions' order."""
        return self.detector.anchor_generator(
            [self.features[f] for f in self.detector.head_in_features]
        )

    @asked
    def labels(self) -> tuple[Tensor, Tensor]:
        """The detector's own labelling: ``gt_labels`` and ``matched_gt_boxes`` together."""
        labels, boxes = self.own_labels or self.detector.label_anchors(
            self.anchors, self.gt_instances
        )
        return torch.stack(list(labels)), torch.stack(box_tensors(boxes))

    @property
    def gt_labels(self) -> Tensor:
        """``(N, sum Hi * Wi * A)`` in ``{-1, 0, …, K}``: -1 ignored, K background."""
        return self.labels[0]

    @property
    def matched_gt_boxes(self) -> Tensor:
        """``(N, sum Hi * Wi * A, 4)``; means something for foreground anchors alone."""
        return self.labels[1]


def check_classes(side: str, detector: nn.Module, classes: Sequence[str]) -> None:
    """Raise InputError unless there are as many names as classes."""
    if len(classes) != num_classes_of(detector):
        raise InputError(
            f"classes of the {side}",
            f"{len(classes)} names",
            f"{num_classes_of(detector)}, one for each class of the {type(detector).__name__}",
        )


def by_anchor(prediction: Tensor, size: int) -> Tensor:
    """``(N, A * size, H, W)`` to ``(N, H * W * A, size)``, a row for each anchor."""
    n, _, h, w = prediction.shape
    prediction = prediction.view(n, -1, size, h, w).permute(0, 3, 4, 1, 2)
    return prediction.reshape(n, -1, size)


def outputs_of(detector: nn.Module) -> type[DetectorOutputs]:
    """The kind of outputs that a detector gives, told by its parts rather than by its class.

    Raises:
        InputError: it is neither an R-CNN on a pyramid nor a dense detector with anchors, or its boxes are rotated.
    """
    for module in detector.modules():
        coder = getattr(module, "box2box_transform", None)
        if getattr(module, "box_dim", 4) != 4 or isinstance(coder, Box2BoxTransformRotated):
            raise InputError(
                type(detector).__name__, f"rotated boxes ({type(module).__name__})", "upright ones"
            )
    heads = getattr(detector, "roi_heads", None)
    if hasattr(heads, "box_predictor") and hasattr(heads, "box_pooler"):
        return RCNNOutputs
    if hasattr(detector, "head") and hasattr(detector, "anchor_generator"):
        return DenseOutputs
    raise InputError(
        type(detector).__name__,
        "a detector whose outputs cannot be read",
        "a GeneralizedRCNN on an FPN (Faster, Mask or Cascade R-CNN), a RetinaNet, an FCOS or a GFL",
    )
