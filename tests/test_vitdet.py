"""Detectors on a plain transformer with a simple feature pyramid, whose batches are padded to a square.

Detectron2 has them after 0.6. Here, a stand-in has their interface, and convolutions that see nothing beyond a patch, so
that a feature is the same whatever the padding beside it.
"""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.modeling import Backbone, GeneralizedRCNN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import Boxes, ImageList
from torch import nn

from d2kd.losses import (
    CWDLoss,
    DistillLosses,
    FGDLoss,
    ICDLoss,
    ImitationLoss,
    MGDLoss,
    PKDLoss,
    ReviewKDLoss,
    TARLoss,
)
from d2kd.modeling import Distiller, Teacher
from d2kd.testing import batch, build, forward_losses, sum_distill_losses

from .common import tiny_faster_rcnn

SQUARE = 160
SIZES = (40, 70), (36, 72)  # the padding to 64 x 96 has more than half a cell of each level

LOSSES = {
    "imitation": lambda: ImitationLoss(mask="none"),
    "pkd": PKDLoss,
    "cwd": lambda: CWDLoss(valid_only=True),
    "mgd": MGDLoss,
    "fgd": FGDLoss,
    "reviewkd": ReviewKDLoss,
    "icd": lambda: ICDLoss(heads=2),
    "tar": lambda: TARLoss(cls_gate="none", reg_gate="none"),
}


class SimplePyramid(Backbone):
    """Levels "p2" to "p6" of one map at stride 16."""

    def __init__(self, channels: int, square_pad: int):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 16, stride=16)
        double = [nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(3)]
        self.stages = nn.ModuleList(
            [nn.Sequential(*double[:2]), double[2], nn.Identity(), nn.MaxPool2d(2)]
        )
        self.top_block, self._square_pad = LastLevelMaxPool(), square_pad
        self._out_feature_strides = {f"p{k}": 2**k for k in range(2, 7)}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)

    @property
    def padding_constraints(self):
        # "size_divisiblity", as Detectron2 spells it: what counts is the square.
        return {"size_divisiblity": 32, "square_size": self._square_pad}

    @property
    def size_divisibility(self):
        return 0 if self._square_pad else 32

    def forward(self, images):
        patches = self.patches(images)
        maps = [stage(patches) for stage in self.stages]
        return dict(zip(self._out_features, [*maps, *self.top_block(maps[-1])]))


class SquareRCNN(GeneralizedRCNN):
    """Pads as Detectron2's detectors do after 0.6."""

    def preprocess_image(self, batched_inputs):
        given = super().preprocess_image(batched_inputs)
        if square := self.backbone.padding_constraints["square_size"]:
            padded = given.tensor.new_zeros(len(given), 3, square, square)
            height, width = given.tensor.shape[-2:]
            padded[..., :height, :width] = given.tensor
            return ImageList(padded, given.image_sizes)
        return given


def vitdet(square: int, channels: int = 24, seed: int = 1) -> nn.Module:
    node = tiny_faster_rcnn(channels=channels)
    node._target_ = SquareRCNN
    node.backbone = L(SimplePyramid)(channels=channels, square_pad=square)
    return build(node, seed)


def distiller(loss, student, teacher) -> Distiller:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        losses, teacher = DistillLosses(loss=loss), Teacher(teacher, None)
        return Distiller(student=student, teacher=teacher, losses=losses, max_iter=2).train()


def terms(model, examples):
    losses = forward_losses(model, examples)
    sum_distill_losses(losses).backward()
    for name, parameter in model.student.backbone.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return {key: value for key, value in losses.items() if key.startswith("distill/")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_square_changes_no_loss(name):
    """Where the teacher's batch alone is padded to it: cells, objects and regions lie at the same places."""
    found = [
        terms(
            distiller(LOSSES[name](), build(tiny_faster_rcnn()), vitdet(square)),
            batch(sizes=SIZES),
        )
        for square in (0, SQUARE)
    ]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert value != 0, key
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_cells_of_the_student_alone_are_compared():
    examples, student = batch(sizes=SIZES), build(tiny_faster_rcnn())
    loss = ImitationLoss(mask="none")
    model = distiller(loss, student, vitdet(SQUARE))
    outputs = model.teacher.outputs(examples)
    assert outputs.images.tensor.shape[-2:] == (SQUARE, SQUARE)
    ours = type(outputs)(student, examples)
    valid = loss.valid_cells(ours, outputs)
    for level, (adapted, target) in loss.map_pairs(ours, outputs).items():
        stride = loss.strides[level]
        assert adapted.shape == target.shape and outputs.features[level].shape[-1] * stride >= 160
        for cells, (height, width) in zip(valid[level], SIZES):
            assert cells.shape == target.shape[-2:]
            rows, columns = (-(-side // stride) for side in (height, width))
            assert cells[:rows, :columns].all() and cells.sum() == rows * columns


def test_regions_lie_at_the_same_places():
    boxes = [[Boxes(torch.tensor([[3.0, 5, 30, 33], [0, 0, w, h]])) for h, w in SIZES]]
    found = []
    for square in (0, SQUARE):
        teacher = Teacher(vitdet(square), None)
        (regions,) = teacher.outputs(batch(sizes=SIZES), boxes).regions
        found.append(regions.pred_class_logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_on_a_square(name):
    model = distiller(LOSSES[name](), vitdet(SQUARE), build(tiny_faster_rcnn(channels=16), 2))
    found = terms(model, batch(sizes=SIZES))
    assert all(value.isfinite() and value != 0 for value in found.values())
    if name in ("imitation", "pkd", "reviewkd"):  # the others draw numbers for each cell or region
        smaller = distiller(LOSSES[name](), vitdet(0), build(tiny_faster_rcnn(channels=16), 2))
        for key, value in terms(smaller, batch(sizes=SIZES)).items():
            if name != "reviewkd":  # whose norms see the whole map
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("act", ["outputs", "detect"])
def test_images_beyond_the_square(act, refuses):
    """A single one would be cropped without a word."""
    teacher = Teacher(vitdet(SQUARE), None)
    examples = batch(sizes=((64, SQUARE + 1),), objects=(1,))
    line = r"images: an image of \(64, 161\); expected at most 160, its square_pad"
    refuses(lambda: getattr(teacher, act)(examples), line)
    getattr(teacher, act)(batch(sizes=((64, SQUARE),), objects=(1,)))
