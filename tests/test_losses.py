"""Each loss has the properties of all losses, and agrees with a slow restatement of its formula."""

import doctest
import importlib
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import LinearParamScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from d2kd import testing
from d2kd.losses import (
    DistillLoss,
    DistillLosses,
    EpochDecay,
    FeatureLoss,
    ICDLoss,
    ImitationLoss,
    LwFLoss,
    SeededLoss,
    TARLoss,
)
from d2kd.losses.base import get_weight
from d2kd.losses.dense import DenseLoss
from d2kd.losses.functional import (
    in_float32,
    masked_squared_error,
    sigmoid_divergence,
)
from d2kd.losses.tar import classification_term, regression_term
from d2kd.modeling import Regions
from d2kd.modeling.anchors import check_anchors
from d2kd.modeling.box_regression import select_class_deltas
from d2kd.testing import DETECTORS, check_loss, distiller, forward_losses, sum_distill_losses
from d2kd.utils.errors import InputError

from .common import batch, build

LOSSES = {
    "imitation, whole map": (ImitationLoss, {"mask": "none"}, ["retinanet"]),
    "imitation, box": (ImitationLoss, {}, DETECTORS),
    "imitation, Gaussian": (ImitationLoss, {"mask": "gaussian", "adapter": "3x3"}, ["faster_rcnn"]),
    "TAR": (TARLoss, {}, DETECTORS),
    "TAR, no gates": (
        TARLoss,
        {"cls_gate": "none", "reg_gate": "none"},
        ["cascade_rcnn", "retinanet"],
    ),
    "TAR, both gates": (TARLoss, {"reg_gate": "both", "cls_margin": 0.1}, ["faster_rcnn", "fcos"]),
    "TAR, student gate": (
        TARLoss,
        {"reg_gate": "student", "temperature": 2.0},
        ["faster_rcnn", "retinanet"],
    ),
    "TAR, no features": (
        TARLoss,
        {"feature_weight": 0, "cls_gate": "none", "background_weight": 0.5},
        ["faster_rcnn", "fcos"],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_properties(name):
    kind, options, detectors = LOSSES[name]
    checked = check_loss(lambda: kind(**options), list(detectors))
    assert len(checked) == 8 * len(detectors)


@pytest.mark.parametrize("family", DETECTORS)
@pytest.mark.parametrize("sizes", [((1, 1),), ((1, 150), (150, 1)), ((7, 5), (64, 64))])
def test_images_of_a_few_pixels(family, sizes):
    """No level has a whole cell of such an image, and its padding is most of the batch."""
    for make in (TARLoss, lambda: ICDLoss(heads=4)):
        model = distiller(make, DETECTORS[family])
        losses = forward_losses(model, batch(sizes=sizes, objects=(1,) * len(sizes)))
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values()), losses
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


class Faulty(ImitationLoss):
    """A loss with a fault of each kind, to see that the check can fail."""

    def __init__(self, fault="not silent", **options):
        super().__init__(**options)
        self.fault = fault

    def setup(self, student, teacher):
        super().setup(student, teacher)
        self.__dict__["disturbed"] = student

    def forward(self, student, teacher):
        value = super().forward(student, teacher)
        head = teacher.detector.head
        maps = [teacher.features[level] for level in teacher.detector.head_in_features]
        faults = {
            "not silent": lambda: value + 0.01 / self.weight,
            "detached": lambda: value.detach(),
            "not finite": lambda: value / len(student.gt_instances[0]),
            "disturbs": lambda: [p.data.mul_(1.01) for p in self.disturbed.parameters()],
            "draws": lambda: torch.rand(1),
            "hooked": lambda: self.disturbed.register_forward_hook(lambda *_: None),
            "trains the teacher": teacher.detector.train,
            "runs too much": lambda: head(maps),
        }
        found = faults[self.fault]()
        return found if self.fault in ("not silent", "detached", "not finite") else value


@pytest.mark.parametrize(
    "fault, message",
    [
        ("not silent", "zero for equal detectors: the loss of a detector and its copy is 0.0"),
        ("detached", "gradients: the student's gradient has norm 0.0"),
        ("disturbs", r"student unchanged: \['backbone.* differ from a step without distillation"),
        ("draws", "student unchanged: the global random generator was used"),
        ("hooked", "student unchanged: hooks left"),
        ("trains the teacher", "teacher hidden: it is in training mode"),
        ("runs too much", "the teacher's head ran, but was not read"),
        ("not finite", "no ground truth"),
    ],
)
def test_the_check_can_fail(fault, message):
    with pytest.raises(AssertionError, match=f"retinanet: .*{message}"):
        check_loss(lambda: Faulty(fault), ["retinanet"])


def test_the_table_counts_what_is_kept_and_names_what_is_broken(monkeypatch, capsys):
    """Of methods by name, as ICD is, whose recipe refers to a seed and to priors."""

    class Elsewhere(ImitationLoss):
        def setup(self, student, teacher):
            raise InputError("student", type(student).__name__, "another family")

    kinds = {"loud": Faulty, "elsewhere": Elsewhere}
    recipes = {k: {"losses": L(DistillLosses)(it=L(kind)())} for k, kind in kinds.items()}
    recipes["icd"] = testing.method("icd")
    monkeypatch.setattr(testing, "METHODS", recipes)
    monkeypatch.setattr(testing, "method", recipes.get)
    monkeypatch.setattr(testing, "DETECTORS", {"retinanet": DETECTORS["retinanet"]})
    assert testing.main() == 1
    head, *rows, broken = capsys.readouterr().out.splitlines()
    assert head.split() == ["passed", "retinanet"]
    expected = ["loud failed", "elsewhere -", "icd 8 of 8"]
    assert [" ".join(row.split()) for row in rows] == expected
    assert broken.startswith("loud: retinanet: zero for equal detectors: the loss of a detector")


def test_masked_squared_error_restated():
    s, t = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5, dtype=torch.float64)
    slow = sum(
        float(m * e.square().sum() / (2 * mask.sum()))
        for m, e in zip(mask.flatten(), (s - t).movedim(1, -1).flatten(0, 2), strict=True)
    )
    assert float(masked_squared_error(s, t, mask)) == pytest.approx(slow)
    assert float(masked_squared_error(s, t, mask * 0)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_maths_is_float32_inside_autocast(dtype):
    @in_float32
    def product(a, b):
        return a @ b

    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.ones(2, 2, dtype=dtype)
        assert product(half, torch.ones(2, 2)).dtype == product(half, b=half).dtype == torch.float32
    big = torch.full((1, 64, 8, 8), 200.0, dtype=torch.float16)
    value = masked_squared_error(big, -big, torch.ones(1, 8, 8))
    assert torch.isfinite(value), "overflowed in half precision"


class Integers(TorchDispatchMode):
    """The largest tensor of integers that is made."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(result, "dtype", None) == torch.int64:
            self.count = max(self.count, result.numel())
        return result


def softmax(row):
    e = [math.exp(x - max(row)) for x in row]
    return [x / sum(e) for x in e]


LABELS = torch.tensor([0, 1, 2, 3, 3, 3, 0, 1, -1, 2, 3, 0])
NAMES = ("cls_gate", "background_weight", "cls_margin", "temperature")
CLASSIFICATION = [
    dict(zip(NAMES, values))
    for values in itertools.product(["better", "none"], [1.0, 0.25], [0.0, 0.2], [1.0, 2.0])
]


@pytest.mark.parametrize("options", CLASSIFICATION)
def test_classification_term_restated(options):
    gate, background_weight, margin, tau = options.values()
    s, t = torch.randn(2, 12, 4, dtype=torch.float64) * 2
    slow = 0.0
    for i, y in enumerate(LABELS.tolist()):
        if y < 0:
            continue
        p, q = (softmax((x[i] / tau).tolist()) for x in (t, s))
        open_ = gate == "none" or p[y] > q[y] + margin
        weight = tau**2 * (background_weight if y == 3 else 1.0)
        slow += open_ * weight * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    student, teacher = (SimpleNamespace(pred_class_logits=x, gt_classes=LABELS) for x in (s, t))
    found = TARLoss(**options).classification(student, teacher)
    assert float(found) == pytest.approx(slow / 11, abs=1e-12)


@pytest.mark.parametrize("options", CLASSIFICATION)
def test_dense_classification_term_restated(options):
    gate, background_weight, margin, tau = options.values()
    s, t = torch.randn(2, 12, 3, dtype=torch.float64) * 2
    slow, foreground = 0.0, 0
    for i, y in enumerate(LABELS.tolist()):
        if y < 0:
            continue
        foreground += y < 3
        for c in range(3):
            p, q = (1 / (1 + math.exp(-float(x[i, c]) / tau)) for x in (t, s))
            target = float(y == c)
            open_ = gate == "none" or abs(p - target) < abs(q - target) - margin
            entropy = -p * math.log(q) - (1 - p) * math.log(1 - q)
            weight = background_weight if y == 3 else 1.0
            slow += open_ * weight * tau**2 * abs(p - q) * entropy
    student, teacher = (
        SimpleNamespace(pred_logits=[x[None]], gt_labels=LABELS, is_labelled=True) for x in (s, t)
    )
    with Integers() as integers:
        found = TARLoss(**options).dense_classification(student, teacher)
    assert integers.count <= len(LABELS), "targets as large as the logits"
    assert float(found) == pytest.approx(slow / foreground, abs=1e-12)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_divergence_of_sigmoids_pulls_towards_the_teacher(tau):
    """As hard as binary cross entropy does, times how far apart they are, which is constant."""
    s = torch.tensor([-2.0, 0.0, 3.0, 1.0], requires_grad=True)
    t = torch.tensor([0.0, -2.0, 4.0, 1.0])
    sigmoid_divergence(s, t, tau)[0].sum().backward()
    assert torch.equal(s.grad.sign(), torch.tensor([-1.0, 1.0, -1.0, 0.0]))
    apart = (s.detach() / tau).sigmoid() - (t / tau).sigmoid()
    torch.testing.assert_close(s.grad, tau * apart.abs() * apart)


def test_no_regions_give_a_differentiable_zero():
    s = torch.zeros(0, 4, requires_grad=True)
    loss = classification_term(s, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    loss = loss + regression_term(s, torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0 and s.grad.shape == (0, 4)


CODER = (10.0, 10.0, 5.0, 5.0)


def regions(boxes, deltas, classes, gt, *, coder=CODER, num_classes=3):
    return Regions(
        [Boxes(boxes)],
        torch.zeros(len(boxes), 1),
        torch.zeros(len(boxes), num_classes + 1),
        deltas,
        Box2BoxTransform(weights=coder),
        gt_classes=classes,
        gt_boxes=gt,
    )


def scene():
    """Regions near their ground truth, with random deltas for 3 classes and 2 background rows."""
    torch.manual_seed(3)
    corner = torch.rand(8, 2) * 50
    boxes = torch.cat([corner, corner + 10 + torch.rand(8, 2) * 30], dim=1)
    gt = boxes + torch.randn(8, 4) * 3
    classes = torch.tensor([0, 1, 2, 3, 1, 0, 3, 2])
    return boxes, gt, classes, torch.randn(8, 12) * 0.5, torch.randn(8, 12) * 0.5


def slow_iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])  # noqa: E731
    return common / (area(a) + area(b) - common)


def slow_decode(box, deltas, weights):
    w, h = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = (d / k for d, k in zip(deltas, weights, strict=True))
    cx, cy = box[0] + w / 2 + dx * w, box[1] + h / 2 + dy * h
    w, h = w * math.exp(dw), h * math.exp(dh)
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def slow_encode(box, target, weights):
    w, h = box[2] - box[0], box[3] - box[1]
    tw, th = target[2] - target[0], target[3] - target[1]
    dx = (target[0] + tw / 2 - box[0] - w / 2) / w
    dy = (target[1] + th / 2 - box[1] - h / 2) / h
    raw = (dx, dy, math.log(tw / w), math.log(th / h))
    return [d * k for d, k in zip(raw, weights, strict=True)]


def slow_smooth_l1(s, t):
    errors = [abs(a - b) for a, b in zip(s, t, strict=True)]
    return sum(e**2 / 2 if e < 1 else e - 0.5 for e in errors)


def sides_of(loss):
    """What the loss is given as ``s`` and ``t``, once it has been called."""
    given, forward = {}, loss.forward
    loss.forward = lambda s, t: given.update(s=s, t=t) or forward(s, t)
    return given


@pytest.mark.parametrize("gate", ["proposal", "student", "both", "none"])
@pytest.mark.parametrize("teacher_coder", [CODER, (20.0, 20.0, 10.0, 10.0)])
@pytest.mark.parametrize("agnostic", [False, True])
def test_regression_restated(gate, teacher_coder, agnostic):
    boxes, gt, classes, s_deltas, t_deltas = scene()
    if agnostic:
        t_deltas = t_deltas[:, :4]
    value = TARLoss(reg_gate=gate).regression(
        regions(boxes, s_deltas, classes, gt),
        regions(boxes, t_deltas, None, None, coder=teacher_coder),
    )
    slow, positives, opened = 0.0, 0, 0
    for i, y in enumerate(classes.tolist()):
        if y == 3:
            continue
        positives += 1
        box, target = boxes[i].tolist(), gt[i].tolist()
        s = s_deltas[i, 4 * y : 4 * y + 4].tolist()
        t = (t_deltas[i] if agnostic else t_deltas[i, 4 * y : 4 * y + 4]).tolist()
        decoded = slow_decode(box, t, teacher_coder)
        bars = []
        if gate in ("proposal", "both"):
            bars.append(slow_iou(box, target))
        if gate in ("student", "both"):
            bars.append(slow_iou(slow_decode(box, s, CODER), target))
        if slow_iou(decoded, target) > max(bars, default=-1):
            opened += 1
            slow += slow_smooth_l1(s, slow_encode(box, decoded, CODER))
    assert gate == "none" or 0 < opened < positives, "the scene decides nothing"
    assert float(value) == pytest.approx(slow / positives, rel=1e-4)


@pytest.mark.parametrize("gate", ["proposal", "student", "both"])
def test_boxes_without_a_size_open_no_gate(gate):
    """Their IoU with an object without a size is 0/0, and with another one 0."""
    boxes, gt, classes, ours, theirs = scene()
    boxes[:, 2:] = boxes[:, :2]
    gt[::2] = boxes[::2]
    ours.requires_grad_()
    value = TARLoss(reg_gate=gate).regression(
        regions(boxes, ours, classes, gt), regions(boxes, theirs, None, None)
    )
    value.backward()
    assert value == 0 and not ours.grad.any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 8.0])
def test_where_regression_turns_from_square_to_absolute(beta):
    boxes, gt, classes, ours, theirs = scene()
    found = TARLoss(reg_gate="none", smooth_l1_beta=beta).regression(
        regions(boxes, ours, classes, gt), regions(boxes, theirs, None, None)
    )
    rows = classes < 3
    s, t = (select_class_deltas(deltas[rows], classes[rows]) for deltas in (ours, theirs))
    errors = (s - t).abs()
    square, absolute = errors**2 / (2 * beta), errors - beta / 2
    slow = torch.where(errors < beta, square, absolute).sum() / len(errors)
    assert beta in (0, 8) or 0 < (errors < beta).sum() < errors.numel()
    torch.testing.assert_close(found, slow)


@pytest.mark.parametrize("gate", ["proposal", "student", "none"])
@pytest.mark.parametrize("family", ["retinanet", "fcos", "gfl"])
def test_dense_regression_restated(family, gate):
    """Through a whole step, anchor by anchor, with boxes decoded and compared in loops."""
    model = distiller(lambda: TARLoss(reg_gate=gate), DETECTORS[family])
    with torch.no_grad():
        torch.manual_seed(0)
        for detector in (model.student, model.teacher.detector):
            detector.head.bbox_pred.weight.normal_(std=0.05)
    loss = model.losses.by_name["loss"]
    given = sides_of(loss)
    forward_losses(model, batch(objects=(3, 3)))
    student, teacher = given["s"], given["t"]
    value = loss.dense_regression(student, teacher)
    anchors = Boxes.cat(student.anchors).tensor.tolist()
    s_deltas, t_deltas = (torch.cat(x.pred_anchor_deltas, dim=1) for x in (student, teacher))
    coder = model.student.box2box_transform
    slow, positives, opened = 0.0, 0, 0
    for n, i in itertools.product(range(2), range(len(anchors))):
        if not 0 <= student.gt_labels[n, i] < 3:
            continue
        positives += 1
        target = student.matched_gt_boxes[n, i].tolist()
        s, t = s_deltas[n, i].tolist(), t_deltas[n, i].tolist()
        bar = anchors[i]
        if family == "retinanet":
            boxes = [slow_decode(anchors[i], d, coder.weights) for d in (s, t)]
        else:
            side = (anchors[i][2] - anchors[i][0]) / getattr(coder, "anchor_scale", 1)
            x, y = ((anchors[i][k] + anchors[i][k + 2]) / 2 for k in (0, 1))
            boxes = [
                [x - left * side, y - up * side, x + right * side, y + down * side]
                for left, up, right, down in ([max(0, v) for v in deltas] for deltas in (s, t))
            ]
        if gate != "proposal" or family != "retinanet":  # a point is no proposal
            bar = boxes[0]
        if gate == "none" or slow_iou(boxes[1], target) > slow_iou(bar, target):
            opened += 1
            slow += slow_smooth_l1(s, t)
    assert gate == "none" or 0 < opened < positives, "the scene decides nothing"
    assert float(value.detach()) == pytest.approx(slow / positives, rel=1e-4)


def test_the_stages_of_a_cascade_add_up():
    weights = {"classification_weight": 2.0, "regression_weight": 3.0}
    make = lambda: TARLoss(feature_weight=0, **weights)  # noqa: E731
    model = distiller(make, DETECTORS["cascade_rcnn"])
    loss = model.losses.by_name["loss"]
    given = sides_of(loss)
    losses = forward_losses(model, batch())
    stages = list(zip(given["s"].regions, given["t"].regions, strict=True))
    assert len(stages) == 3
    for name in ("classification", "regression"):
        terms = [float(getattr(loss, name)(*stage).detach()) for stage in stages]
        # half-way through the run the decay has come to a half
        expected = weights[f"{name}_weight"] * sum(terms) / 2
        assert float(losses[f"distill/loss_loss_{name}"]) == pytest.approx(expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_imitation_restated(normalize):
    """Through a whole step: the mask, the levels' mean, the weight and the teacher's RMS, by loops over cells."""
    make = lambda: ImitationLoss(levels=["p3", "p4"], weight=0.5, normalize=normalize)  # noqa: E731
    model = distiller(make, DETECTORS["retinanet"])
    examples, loss = batch(), model.losses.by_name["loss"]
    given = sides_of(loss)
    value = forward_losses(model, examples)["distill/loss_loss"]
    total = 0.0
    for level, stride in (("p3", 8), ("p4", 16)):
        maps = (given[side].features[level] for side in "st")
        s, t = loss.adapters(*maps, level)
        errors = ((s - t) ** 2).sum(dim=1).detach()
        weighted = cells = 0.0
        for n, i, j in itertools.product(*map(range, errors.shape)):
            x, y = (j + 0.5) * stride, (i + 0.5) * stride
            inside = any(
                x0 <= x <= x1 and y0 <= y <= y1
                for x0, y0, x1, y1 in examples[n]["instances"].gt_boxes.tensor.tolist()
            )
            cells += inside
            weighted += inside * float(errors[n, i, j])
        rms = 1.0
        if normalize:
            sizes = [[math.ceil(n / stride) for n in x["image"].shape[-2:]] for x in examples]
            parts = [t[n, :, :h, :w].flatten() for n, (h, w) in enumerate(sizes)]
            rms = float(torch.cat(parts).square().mean().sqrt())
        total += weighted / (2 * max(1, cells)) / rms**2
    assert float(value) == pytest.approx(0.5 * total / 2, rel=1e-4)


@pytest.mark.parametrize("make", [ImitationLoss, lambda: TARLoss(feature_ramp=0)])
def test_features_are_compared_in_units_of_the_teacher(make):
    """The same pair of feature maps times 100 has the same loss, unless it is the published one."""

    def value(factor, normalize):
        model = distiller(make, DETECTORS["faster_rcnn"], same=True)
        loss = model.losses.by_name["loss"]
        loss = getattr(loss, "feature", loss)
        loss.normalize = normalize
        levels = list(loss.levels)
        generator = torch.Generator().manual_seed(0)
        maps = {level: torch.randn(1, 16, 8, 8, generator=generator) for level in levels}
        truth = Instances((64, 64), gt_boxes=Boxes([[0.0, 0.0, 64.0, 64.0]]))
        student = {level: factor * (x + 0.5) for level, x in maps.items()}
        teacher = {level: factor * x for level, x in maps.items()}
        images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
        return loss(
            SimpleNamespace(features=student, gt_instances=[truth]),
            SimpleNamespace(features=teacher, images=images),
        ).item()

    assert value(100, True) == pytest.approx(value(1, True))
    assert value(100, False) == pytest.approx(1e4 * value(1, False))


def test_objects_lie_in_the_students_pixels():
    """Nothing beside them counts, also where the teacher's images, and so its strides, are larger."""
    theirs = torch.full((1, 16, 8, 8), 100.0)
    theirs[..., :4, :4] = 1.0
    truth = Instances((64, 64), gt_boxes=Boxes([[0.0, 0.0, 32.0, 32.0]]))
    student = SimpleNamespace(features={"p3": 0 * theirs}, gt_instances=[truth])
    teacher = SimpleNamespace(features={"p4": theirs})
    plain = ImitationLoss(levels=["p3"], normalize=False)
    part = TARLoss(levels=["p3"], mask="box", normalize=False)
    icd = ICDLoss(levels=["p3"], weights="box")
    for loss in (plain, part, icd):
        loss.scale = 2
        loss.setup(build(DETECTORS["faster_rcnn"]()), build(DETECTORS["faster_rcnn"]()))
    assert plain(student, teacher) == part.feature(student, teacher) == 16 / 2
    assert icd.strides == plain.strides == {"p3": 8}


@pytest.mark.parametrize("family", ["retinanet", "gfl"])
@pytest.mark.parametrize(
    "make", [lambda: ImitationLoss(mask="none"), ImitationLoss, LwFLoss, lambda: ICDLoss(heads=4)]
)
def test_outputs_in_padding_do_not_count(make, family):
    def value(spoilt):
        torch.manual_seed(0)
        model = distiller(make, DETECTORS[family])
        loss = model.losses.by_name["loss"]
        forward = loss.forward

        def spoiling(student, teacher):
            for one in (*student.features.values(), *student.predictions[0]):
                # The first image is 64 pixels wide, of 128 that the batch is.
                one.data[0, ..., math.ceil(one.shape[-1] / 2) :] += spoilt
            return forward(student, teacher)

        loss.forward = spoiling
        return sum_distill_losses(forward_losses(model, batch(sizes=((64, 64), (64, 128)))))

    assert value(0) > 0 and torch.equal(value(0), value(100))


def test_decay_by_epoch():
    decay = EpochDecay(epochs=4)
    assert [decay(k / 8) for k in range(8)] == [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert decay(1.0) == decay(1.7) == 0.25, "a run continued past its end must not go negative"
    with pytest.raises(InputError, match="epochs: 0"):
        EpochDecay(0)


class Constant(DistillLoss):
    calls = 0

    def __init__(self, **options):
        super().__init__(**options)
        self.idle = torch.nn.Parameter(torch.ones(2))

    def forward(self, student, teacher):
        self.calls += 1
        return {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}


FALLING = LinearParamScheduler(1.0, 0.0)


@pytest.mark.parametrize(
    "weight, progress, expected",
    [
        (2.0, 0.5, {"_a": 4.0, "_b": 6.0}),
        (FALLING, 0.75, {"_a": 0.5, "_b": 0.75}),
        (FALLING, 1.0, {"_a": 0.0, "_b": 0.0}),
        (FALLING, 3.0, {"_a": 0.0, "_b": 0.0}),
        (0, 0.5, {"": 0.0}),
    ],
)
def test_weights_and_schedules(weight, progress, expected):
    """Parameters that nothing uses stay in the graph, in a term that is there if there is one."""
    loss = Constant(weight=weight)
    with EventStorage() as storage:
        terms = DistillLosses(it=loss)(SimpleNamespace(is_labelled=True), None, progress=progress)
    found = {key.removeprefix("distill/loss_it"): value.item() for key, value in terms.items()}
    assert found == pytest.approx(expected, abs=1e-9)
    assert loss.calls == bool(weight)
    sum(terms.values()).backward()
    assert loss.idle.grad is not None and not loss.idle.grad.any()
    assert "distill/weight_it" in storage.latest()


def test_terms_follow_their_schedules():
    """The feature term grows while its ramp lasts; each term's own weight may be a schedule."""
    names = ("feature", "classification", "regression")

    def terms(iteration, **options):
        torch.manual_seed(0)
        model = distiller(lambda: TARLoss(weight=1.0, **options), DETECTORS["retinanet"])
        model.max_iter = 4
        with EventStorage(start_iter=iteration):
            losses = model(batch())
        return [float(losses[f"distill/loss_loss_{name}"].detach()) for name in names]

    fixed = {f"{name}_weight": 1.0 for name in names}
    whole = terms(0, feature_ramp=0, **fixed)
    falling = {f"{name}_weight": LinearParamScheduler(0.02, 0.0) for name in names}
    for iteration, grown, left in ((1, 0.5, 0.75), (3, 1.0, 0.25)):
        ramped = [grown * whole[0], *whole[1:]]
        assert terms(iteration, feature_ramp=0.5, **fixed) == pytest.approx(ramped)
        scheduled = [x * left * 0.02 for x in whole]
        assert terms(iteration, feature_ramp=0, **falling) == pytest.approx(scheduled)
    assert get_weight(TARLoss().ramp, 250 / 90000) == pytest.approx(0.5)  # 500 iterations long


@pytest.mark.parametrize(
    "options, line",
    [
        ({"cls_gate": "worse"}, "cls_gate: worse; expected better or none"),
        ({"reg_gate": ""}, "reg_gate: ; expected proposal or student"),
        ({"mask": "round"}, "mask: round; expected gaussian or box"),
        ({"feature_ramp": 1}, "feature_ramp: 1; expected a fraction"),
    ],
)
def test_bad_options(options, line):
    with pytest.raises(InputError, match=line):
        TARLoss(**options)


def test_only_distill_losses_can_be_summed():
    with pytest.raises(InputError, match="losses.it: Linear; expected a DistillLoss"):
        DistillLosses(it=torch.nn.Linear(1, 1))


def test_a_loss_cannot_overwrite_the_students_own():
    model = distiller(ImitationLoss, DETECTORS["retinanet"])
    model.losses = DistillLosses(cls=model.losses.by_name["loss"])
    losses = forward_losses(model, batch())
    assert {"loss_cls", "distill/loss_cls"} <= losses.keys()


@pytest.mark.parametrize(
    "name",
    [
        "base",
        "bckd",
        "crosskd",
        "cwd",
        "dist",
        "dkd",
        "erd",
        "fgd",
        "functional",
        "icd",
        "imitation",
        "ld",
        "lwf",
        "mgd",
        "pgd",
        "pkd",
        "reviewkd",
        "tar",
    ],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"d2kd.losses.{name}")
    losses = [x for x in vars(module).values() if inspect.isclass(x) and issubclass(x, DistillLoss)]
    bases = {DistillLoss, FeatureLoss, SeededLoss, DenseLoss}
    assert all("Example:" in loss.__doc__ for loss in losses if loss not in bases)
    assert doctest.testmod(module).failed == 0


def test_two_losses_of_one_name_are_refused(refuses):
    losses = DistillLosses(one_a=Constant(weight=0), one=Constant())
    with EventStorage():
        line = "losses.one: a second distill/loss_one_a; expected a name of its own"
        refuses(lambda: losses({}, {}), line)


@pytest.mark.parametrize(
    "make, line",
    [
        (
            lambda: ImitationLoss(weight=-0.1),
            "losses.it.weight: -0.1; expected a number of at least 0",
        ),
        (lambda: TARLoss(feature_weight=-1), "losses.it.weight: -1; expected"),
        (lambda: TARLoss(regression_weight=-1.0), "losses.it.regression_weight: -1.0; expected"),
        (lambda: ImitationLoss(weight=float("nan")), "losses.it.weight: nan; expected"),
    ],
)
def test_a_weight_that_would_teach_the_opposite_is_refused(refuses, make, line):
    detectors = [build(DETECTORS["faster_rcnn"](), seed) for seed in (0, 1)]
    refuses(lambda: DistillLosses(it=make()).setup(*detectors), line)


def test_anchors_beside_none_are_refused(refuses):
    detectors = build(DETECTORS["retinanet"]()), build(DETECTORS["faster_rcnn"]())
    line = "anchors: student RetinaNet, teacher GeneralizedRCNN; expected the same anchors"
    refuses(lambda: check_anchors(*detectors), line)
