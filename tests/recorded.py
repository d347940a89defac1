"""A batch as a student and a teacher saw it, to be shown to each of the losses, whole, in parts or altered."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import d2kd.losses.icd as icd_module
from d2kd.layers.queries import InstanceQueries, make_queries
from d2kd.losses import (
    BCKDLoss,
    CWDLoss,
    DistillLosses,
    DISTLoss,
    DKDLoss,
    ERDLoss,
    FGDLoss,
    ICDLoss,
    ImitationLoss,
    LDLoss,
    LwFLoss,
    ReviewKDLoss,
    TARLoss,
)
from d2kd.modeling import Distiller, Teacher
from d2kd.modeling.outputs import MaskRegions, Regions, capture, has_mask_regions
from d2kd.structures.instance_priors import InstancePriors
from d2kd.testing import (
    CLASSES,
    batch,
    build,
    tiny_cascade_rcnn,
    tiny_faster_rcnn,
    tiny_fcos,
    tiny_gfl,
    tiny_mask_rcnn,
    tiny_retinanet,
)

_PRIORS = InstancePriors.uniform(CLASSES)


@dataclass(frozen=True)
class Case:
    """A loss on a pair of detectors.

    Attributes:
        loss: makes it, of further options.
        node: of student and teacher.
        classes: names of the student's classes and the teacher's; None: those of both are the same.
        prepare: changes the teacher.
        by_process: whether it is a mean over each process's images, as ReviewKD is.
    """

    loss: Callable
    node: Callable
    classes: tuple[list[str], list[str]] | None = None
    prepare: Callable[[nn.Module], object] = lambda teacher: None
    by_process: bool = False


def _imitation(mask: str, **options) -> ImitationLoss:
    return ImitationLoss(mask=mask, normalize=False, **options)


def _tar(**options) -> TARLoss:
    return TARLoss(feature_ramp=0, normalize=False, **options)


def _tar_ungated(**options) -> TARLoss:
    """For pairs of which the teacher nowhere finds the better box."""
    return _tar(reg_gate="none", **options)


def _with_boxes(teacher: nn.Module) -> None:
    """Of a stride to each side of a point: those of an untrained FCOS have no area, and would pass no gate."""
    nn.init.ones_(teacher.head.bbox_pred.bias)


def _with_masks(teacher: nn.Module) -> None:
    """That differ from the student's, which are all about 0.5 before training."""
    nn.init.normal_(teacher.roi_heads.mask_head.predictor.weight)


# The teacher knows two of the three, in another order, and two that are none of the student's.
_OTHERS = [f"class {k}" for k in range(CLASSES)], ["class 2", "other", "class 0", "another"]

LOSSES: dict[str, Case] = {
    "imitation": Case(lambda **o: _imitation("gaussian", **o), tiny_faster_rcnn),
    "imitation, in boxes": Case(lambda **o: _imitation("box", **o), tiny_fcos),
    "imitation, everywhere": Case(lambda **o: _imitation("none", **o), tiny_retinanet),
    "imitation, in units": Case(ImitationLoss, tiny_faster_rcnn),
    "tar": Case(_tar, tiny_faster_rcnn),
    "tar, cascade": Case(_tar, tiny_cascade_rcnn),
    "tar, other classes": Case(_tar_ungated, tiny_faster_rcnn, _OTHERS),
    "tar, masks": Case(_tar, tiny_mask_rcnn, prepare=_with_masks),
    "tar, one-stage": Case(_tar, tiny_retinanet),
    "tar, one-stage, other classes": Case(_tar_ungated, tiny_retinanet, _OTHERS),
    "tar, points": Case(_tar, tiny_fcos, prepare=_with_boxes),
    "tar, distributions": Case(_tar, tiny_gfl),
    "icd": Case(lambda **o: ICDLoss(heads=4, priors=_PRIORS, **o), tiny_retinanet),
    "icd, uniform": Case(
        lambda **o: ICDLoss(heads=4, priors=_PRIORS, weights="uniform", **o), tiny_retinanet
    ),
    "icd, in boxes": Case(
        lambda **o: ICDLoss(heads=4, priors=_PRIORS, weights="box", **o), tiny_faster_rcnn
    ),
    "icd, by instance": Case(
        lambda **o: ICDLoss(heads=4, layers=2, priors=_PRIORS, normalizer="instance", **o),
        tiny_faster_rcnn,
    ),
    "erd": Case(lambda **o: ERDLoss(alpha_cls=1.0, alpha_box=1.0, **o), tiny_gfl),
    "erd, by image, other classes": Case(
        lambda **o: ERDLoss(alpha_cls=1.0, alpha_box=1.0, class_pool="image", **o),
        tiny_gfl,
        _OTHERS,
    ),
    "lwf": Case(LwFLoss, tiny_gfl),
    "dkd": Case(DKDLoss, tiny_cascade_rcnn),
    "dkd, other classes": Case(DKDLoss, tiny_faster_rcnn, _OTHERS),
    "cwd": Case(CWDLoss, tiny_retinanet),
    "cwd, logits": Case(lambda **o: CWDLoss(source="logits", **o), tiny_retinanet, _OTHERS),
    # Without absolute differences, whose gradient jumps where a rounding changes a sign.
    "fgd": Case(lambda **o: FGDLoss(attention_weight=0, **o), tiny_faster_rcnn),
    "reviewkd, GN": Case(
        lambda **o: ReviewKDLoss(norm="GN", **o), tiny_faster_rcnn, by_process=True
    ),
    "bckd": Case(BCKDLoss, tiny_gfl),
    # Without boxes, which are nearly equal before training: the gradient of their IoU jumps there.
    "bckd, other classes": Case(lambda **o: BCKDLoss(box_weight=0.0, **o), tiny_retinanet, _OTHERS),
    "ld": Case(lambda **o: LDLoss(normalize_by="positives", **o), tiny_gfl),
    "dist, rows": Case(lambda **o: DISTLoss(intra_weight=0, **o), tiny_retinanet),
}


class Recorded:
    """One batch of four images, as a student and a teacher saw it, with the questions asked about it.

    Args:
        name: of :data:`LOSSES`.
        options: of the loss.
    """

    def __init__(self, name: str, **options):
        case = LOSSES[name]
        ours, theirs = case.classes or (None, None)
        self.batch = batch(sizes=((64, 64),) * 4, objects=(2, 1, 0, 0))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            count = len(theirs or range(CLASSES))
            student = build(case.node())
            teacher = build(case.node(width=6, channels=24, classes=count), 1)
            case.prepare(teacher)
            model = Distiller(
                student=student,
                teacher=Teacher(teacher, None, classes=theirs),
                losses=DistillLosses(loss=case.loss(**options)),
                max_iter=2,
                classes=ours,
            ).train()
            with capture(model.outputs_class.hook_points(student)) as calls, EventStorage():
                student(self.batch)
        self.outputs_class, self.losses = model.outputs_class, model.losses
        ours = model.outputs_class.from_calls(student, self.batch, calls)
        theirs = model.teacher.outputs(self.batch)
        theirs.set_region_boxes(ours.region_boxes, ours.mask_boxes)
        self.student, self.teacher = self._values(ours), self._values(theirs)
        self.detectors = (student, teacher)
        self.queries = make_queries(
            [x["instances"] for x in self.batch],
            _PRIORS,
            generator=torch.Generator().manual_seed(1),
        )

    @staticmethod
    def _values(outputs) -> dict:
        values = {"features": {k: v.detach() for k, v in outputs.features.items()}}
        if hasattr(outputs.detector, "roi_heads"):
            values["regions"] = outputs.regions
            if has_mask_regions(outputs.detector):
                values["masks"] = outputs.mask_regions
        else:
            values["predictions"] = [[x.detach() for x in kind] for kind in outputs.predictions]
        return values

    def loss(
        self,
        images: list[int],
        change: Callable[[Tensor], Tensor] = lambda value: value,
        regions: int | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed losses of some of the images, and their gradients by name.

        Args:
            change: made to every tensor that a detector said.
            regions: how many of each image are kept; None: all.
            dtype: of the autocast; float32: none.
            scale: by which the loss is multiplied for its gradients, and these divided, as by a scaler.
        """
        losses, leaves = copy.deepcopy(self.losses), {}
        self._change, self._regions = change, regions
        student = self._outputs(self.detectors[0], self.student, images, leaves)
        teacher = self._outputs(self.detectors[1], self.teacher, images, {})
        queries = InstanceQueries(*(x[images] for x in vars(self.queries).values()))
        make, icd_module.make_queries = icd_module.make_queries, lambda *_, **__: queries
        try:
            half = dtype != torch.float32
            with EventStorage(start_iter=1), torch.autocast("cpu", dtype if half else None, half):
                total = sum(losses(student, teacher, progress=0.5).values())
        finally:
            icd_module.make_queries = make
        (scale * total).backward()
        gradients = {k: p.grad / scale for k, p in losses.named_parameters() if p.grad is not None}
        for name, leaf in leaves.items():
            gradients[name] = leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad
            gradients[name] = gradients[name].float() / scale
        return total.detach(), gradients

    def _outputs(self, detector, values: dict, images: list[int], leaves: dict):
        def leaf(name: str, value: Tensor) -> Tensor:
            leaves[name] = self._change(value.detach().clone()).requires_grad_()
            return leaves[name]

        given = {
            "features": {k: leaf(f"student.{k}", v[images]) for k, v in values["features"].items()}
        }
        if "predictions" in values:
            given["predictions"] = [
                [leaf(f"student.{i}.{j}", x[images]) for j, x in enumerate(kind)]
                for i, kind in enumerate(values["predictions"])
            ]
        else:
            given["regions"] = [
                self._rows(stage, images, lambda k, v, i=i: leaf(f"student.region{i}.{k}", v))
                for i, stage in enumerate(values["regions"])
            ]
        if "masks" in values:
            given["mask_regions"] = self._masks(values["masks"], images, leaf)
        return self.outputs_class(detector, [self.batch[i] for i in images], **given)

    def _rows(self, stage: Regions, images: list[int], leaf: Callable) -> Regions:
        counts, kept = [len(boxes) for boxes in stage.boxes], slice(self._regions)
        rows = torch.cat([torch.arange(sum(counts)).split(counts)[i][kept] for i in images])
        given = {
            k: leaf(k, getattr(stage, k)[rows])
            for k in ("box_features", "pred_class_logits", "pred_proposal_deltas")
        }
        labels = {
            k: None if getattr(stage, k) is None else getattr(stage, k)[rows]
            for k in ("gt_classes", "gt_boxes")
        }
        boxes = [stage.boxes[i][kept] for i in images]
        return Regions(boxes, **given, box2box_transform=stage.box2box_transform, **labels)

    def _masks(self, masks: MaskRegions, images: list[int], leaf: Callable) -> MaskRegions:
        counts, kept = [len(boxes) for boxes in masks.boxes], slice(self._regions)
        rows = torch.cat([torch.arange(sum(counts)).split(counts)[i][kept] for i in images])
        return MaskRegions(
            [masks.boxes[i][kept] for i in images],
            leaf("student.masks", masks.pred_mask_logits[rows]),
            masks.class_agnostic,
            masks.instances and [masks.instances[i][kept] for i in images],
        )

    def by_image(self, name: str, gradient: Tensor, deal: list[int]) -> Tensor:
        """A gradient of the whole batch at what belongs to the dealt images."""
        if not name.startswith("student."):
            return gradient
        part = name.split(".")[1]
        if part == "masks":
            stage = self.student["masks"]
        elif part.startswith("region"):
            stage = self.student["regions"][int(part.removeprefix("region"))]
        else:
            return gradient[deal]
        counts = [len(boxes) for boxes in stage.boxes]
        parts = gradient.split(counts)
        return torch.cat([parts[i] for i in deal])


def relative(one: Tensor, other: Tensor) -> float:
    """How far one is from the other, by the other's norm."""
    if one.numel() == 0 and one.shape == other.shape:
        return 0.0
    return float((one - other).norm() / other.norm().clamp(min=1e-12))
