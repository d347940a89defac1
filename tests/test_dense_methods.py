"""Losses between the predictions of dense detectors: BCKD, CrossKD, LD and PGD."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, pairwise_iou
from torchvision.ops import generalized_box_iou_loss

from d2kd.losses import BCKDLoss, CrossKDLoss, DistillLosses, LDLoss, PGDLoss
from d2kd.losses.crosskd import centerness
from d2kd.losses.dense import positives_per_image
from d2kd.losses.ld import localization_region
from d2kd.losses.pgd import gaussian_map
from d2kd.modeling import Distiller, Teacher
from d2kd.testing import DETECTORS, check_loss, distiller, forward_losses, sum_distill_losses

from .common import ROOT, batch, build
from .parity import Arrays, compare
from .parity.__main__ import METHODS, tolerance
from .parity.dense import gfl_pair

DENSE = ["retinanet", "fcos", "gfl"]
QUICK = {"BCKD": "gfl", "CrossKD": "fcos", "LD": "gfl", "PGD": "retinanet"}
LOSSES = {"BCKD": (BCKDLoss, DENSE), "CrossKD": (CrossKDLoss, DENSE), "LD": (LDLoss, ["gfl"])}
EACH = [
    pytest.param(name, family, marks=[pytest.mark.sweep] * (QUICK[name] != family))
    for name, (_, families) in LOSSES.items()
    for family in families
]


@pytest.mark.parametrize("name, family", EACH)
def test_properties(name, family):
    assert len(check_loss(LOSSES[name][0], [family])) == 8


@pytest.mark.parametrize("name", LOSSES)
def test_detectors_whose_predictions_do_not_correspond(refuses, name):
    make, families = LOSSES[name]

    def setup(student, teacher, **options):
        return lambda: DistillLosses(it=make()).setup(student, teacher, **options)

    retinanet, fcos, gfl = (build(DETECTORS[family]()) for family in DENSE)
    rcnn = build(DETECTORS["faster_rcnn"]())
    detector = gfl if families == ["gfl"] else retinanet
    refuses(setup(rcnn, rcnn), "losses.it.(anchors|distributions): student GeneralizedRCNN")
    refuses(setup(detector, fcos), "losses.it.(anchors|distributions): ")
    refuses(setup(detector, detector, scale=2), "losses.it.anchors: a teacher of images 2 times")
    more = build(DETECTORS["gfl" if detector is gfl else "retinanet"](classes=5))
    refuses(setup(detector, more), "losses.it.num_classes: student 3, teacher 5; expected the same")
    with pytest.raises(Exception, match="none is the student's and the teacher's"):
        make_mapped(make, detector, ["x", "y", "z"])


def make_mapped(make, student, teacher_classes, **options):
    """A Distiller of a student with classes a, b, c, whose teacher has other names."""
    family = {"RetinaNet": "retinanet", "FCOS": "fcos", "GFL": "gfl"}[type(student).__name__]
    teacher = build(DETECTORS[family](classes=len(teacher_classes)), 1)
    return Distiller(
        student=student,
        teacher=Teacher(teacher, None, classes=teacher_classes),
        losses=DistillLosses(loss=make(**options)),
        max_iter=2,
        classes=["a", "b", "c"],
    ).train()


def outputs_of(model, examples=None):
    """The outputs of both detectors, and the loss."""
    seen = []
    forward = model.losses.forward
    model.losses.forward = lambda s, t, **o: seen.extend((s, t)) or forward(s, t, **o)
    forward_losses(model, batch() if examples is None else examples)
    del model.losses.forward
    return *seen, model.losses.by_name["loss"]


@pytest.mark.parametrize("name", LOSSES)
def test_classes_of_one_side_do_not_count(name):
    """Neither their logits nor the anchors of their objects; the order of the others is the student's."""
    make, families = LOSSES[name]
    model = make_mapped(make, build(DETECTORS[families[0]]()), ["c", "x", "a"])
    student, teacher, loss = outputs_of(model)
    s, t = loss.logits(student, teacher)
    ours, theirs = (torch.cat(x.pred_logits, dim=1) for x in (student, teacher))
    assert torch.equal(s, ours[..., [0, 2]]) and torch.equal(t, theirs[..., [2, 0]])
    given, labels = student.gt_labels, loss.labels(student)
    table = torch.tensor([0, -1, 1, 2, -1])  # a, b, c, background, ignored
    assert torch.equal(labels, table[given]) and (given == 1).any()
    # The loss is the same whatever the teacher thinks of x.
    bias, found = model.teacher.detector.head.cls_score.bias, []
    for change in (slice(0), slice(1, None, 3), slice(2, None, 3)):
        with torch.no_grad():
            bias[change] += 3
        loss.num_forwards = 0  # the same random numbers
        found.append(sum_distill_losses(forward_losses(model, batch())).item())
    assert found[0] == found[1] != found[2]


# Another file of each method, as a slow restatement of the formulas in float64 has it: three images, one of them
# without objects, and sizes that are no multiples of the strides.

LEVELS = {"p3": 8, "p4": 16, "p5": 32}
PADDED = 184, 136


def grids():
    return {level: tuple(math.ceil(x / s) for x in PADDED) for level, s in LEVELS.items()}


def square_anchors(scale=8.0, offset=0.0):
    """``(R, 4)`` of all levels, centers at multiples of the stride plus an offset in strides."""
    found = []
    for (height, width), stride in zip(grids().values(), LEVELS.values()):
        for y, x in itertools.product(range(height), range(width)):
            center = (x + offset) * stride, (y + offset) * stride
            half = scale * stride / 2
            found.append([center[0] - half, center[1] - half, center[0] + half, center[1] + half])
    return torch.tensor(found, dtype=torch.float64)


def images(generator, objects=(3, 0, 2), classes=4):
    arrays = {"padded_hw": torch.tensor(PADDED), "strides": torch.tensor(list(LEVELS.values()))}
    arrays["num_classes"] = torch.tensor(classes)
    for i, count in enumerate(objects):
        start = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 70
        side = 12 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 55
        arrays[f"image{i}/size_hw"] = torch.tensor([170 + i, 130])
        arrays[f"image{i}/gt_boxes_xyxy"] = torch.cat([start, start + side], dim=1)
        arrays[f"image{i}/gt_classes"] = torch.randint(classes, (count,), generator=generator)
    return arrays


def normal(generator, *shape, scale=1.0, mean=0.0):
    return mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def gfl_arrays(seed):
    """Predictions of two GFLs, in float64 with float32's values."""
    generator = torch.Generator().manual_seed(seed)
    arrays = images(generator)
    arrays["reg_max"], arrays["anchors_xyxy"] = torch.tensor(16), square_anchors()
    for level, size in grids().items():
        for kind, channels, mean in (("class", 4, -1.5), ("box", 68, 0)):
            student = normal(generator, 3, channels, *size, scale=1.3, mean=mean)
            noise = normal(generator, 3, channels, *size)
            arrays[f"student_{kind}_logits/{level}"] = student.float().double()
            arrays[f"teacher_{kind}_logits/{level}"] = (student + noise).float().double()
    return arrays


def rows(x, k):
    """``(N, A * k, H, W)`` to ``(N, H * W * A, k)``."""
    n, _, h, w = x.shape
    return x.view(n, -1, k, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, k)


def box_iou(a, b):
    """Of two boxes."""
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    inter = max(width, 0) * max(height, 0)
    return inter / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - inter)


def atss(arrays, i):
    """Labels of an image by ATSS and, for each object, the IoU of all anchors and the threshold."""
    anchors = arrays["anchors_xyxy"]
    sizes = [math.prod(size) for size in grids().values()]
    labels = torch.full((len(anchors),), int(arrays["num_classes"]))
    best, regions = torch.zeros(len(anchors), dtype=torch.float64), []
    for box, label in zip(arrays[f"image{i}/gt_boxes_xyxy"], arrays[f"image{i}/gt_classes"]):
        iou = [box_iou(a, box.tolist()) for a in anchors.tolist()]
        iou = torch.tensor(iou, dtype=torch.float64)
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        distance = (centers - (box[:2] + box[2:]) / 2).norm(dim=1)
        nearest, start = [], 0
        for size in sizes:
            order = distance[start : start + size].argsort()[:9]
            nearest += (order + start).tolist()
            start += size
        threshold = iou[nearest].mean() + iou[nearest].std()
        regions.append((iou, threshold))
        for a in nearest:
            inside = (centers[a] - box[:2] > 0.01).all() and (box[2:] - centers[a] > 0.01).all()
            if iou[a] >= threshold and inside and iou[a] > best[a]:
                best[a], labels[a] = iou[a], label
    return labels, regions


def leaves(arrays, *names):
    """By name and level, with gradient if the student's."""
    for name in (f"{name}/{level}" for name in names for level in LEVELS):
        arrays[name] = arrays[name].clone().requires_grad_(name.startswith("student"))


def save(path, arrays):
    """Write an npz file in float32."""
    np.savez(
        path,
        **{
            name: x.detach().float().numpy() if x.is_floating_point() else x.numpy()
            for name, x in arrays.items()
        },
    )
    return Arrays(path)


GFL_INPUTS = [
    f"{side}_{kind}_logits" for side in ("student", "teacher") for kind in ("class", "box")
]


def gfl_levels(arrays):
    """For each level, its name, its anchors' rows and all predictions: ``(N, cells, 4)`` and ``(N, cells, 4, 17)``."""
    leaves(arrays, *GFL_INPUTS)
    start = 0
    for level, size in grids().items():
        cells = slice(start, start := start + math.prod(size))
        given = [rows(arrays[f"{name}/{level}"], k) for name, k in zip(GFL_INPUTS, (4, 68, 4, 68))]
        yield (
            level,
            cells,
            given[0],
            given[1].unflatten(-1, (4, 17)),
            given[2],
            given[3].unflatten(-1, (4, 17)),
        )


def finish(arrays, total):
    """Add the total and the gradients to the arrays."""
    arrays["loss"] = total.detach()
    total.backward()
    for name, x in list(arrays.items()):
        if x.requires_grad:
            kind, level = name.split("/")
            arrays[f"{kind}_grad/{level}"] = x.grad


def restated_bckd(arrays):
    weights = arrays["kd_weight"], arrays["box_weight"] = torch.tensor(2.0), torch.tensor(1.5)
    labels = arrays["atss_labels"] = torch.stack([atss(arrays, i)[0] for i in range(3)])
    arrays["normalizer"] = torch.tensor(float(sum(max(1, int((x < 4).sum())) for x in labels)))
    total, has = 0, []
    for level, cells, s, s_edges, t, t_edges in gfl_levels(arrays):
        has.append(bool((labels[:, cells] < 4).any()))
        p_s, p_t = s.sigmoid(), t.sigmoid()
        factor = (p_t - p_s).abs()
        classes = (factor * -(p_t * p_s.log() + (1 - p_t) * (1 - p_s).log())).sum()
        stride, anchors = LEVELS[level], arrays["anchors_xyxy"][cells]
        center = (anchors[:, :2] + anchors[:, 2:]) / 2
        boxes = []
        for edges in (s_edges, t_edges):
            d = (edges.softmax(-1) * torch.arange(17)).sum(-1) * stride
            boxes.append(torch.cat([center - d[..., :2], center + d[..., 2:]], dim=-1))
        box = (factor.amax(-1).detach() * generalized_box_iou_loss(*boxes)).sum()
        for name, weight, term in zip(("classification", "box"), weights, (classes, box)):
            value = weight * term / arrays["normalizer"] * has[-1]
            arrays[f"loss/{name}/{level}"] = value.detach()
            total = total + value
    arrays["level_has_positives"] = torch.tensor(has)
    finish(arrays, total)


def kl(t, s, temperature):
    """tau^2 times the mean over the last dimension, as published."""
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).mean(-1)


def restated_ld(arrays):
    values = {"ld_weight": 0.5, "vlr_weight": 0.125, "kd_weight": 4.0}
    values |= {"ld_temperature": 4.0, "kd_temperature": 1.0}
    arrays |= {name: torch.tensor(value) for name, value in values.items()}
    anchors, found = arrays["anchors_xyxy"], [atss(arrays, i) for i in range(3)]
    labels = arrays["atss_labels"] = torch.stack([label for label, _ in found])
    for name in ("vlr_region", "paper/vlr_region"):
        arrays[name] = torch.zeros(3, len(anchors), dtype=torch.float64)
        for i, (_, objects) in enumerate(found):
            for box, (iou, threshold) in zip(arrays[f"image{i}/gt_boxes_xyxy"].tolist(), objects):
                for a, anchor in enumerate(anchors.tolist()):
                    hull = [max(anchor[k + 2], box[k + 2]) - min(anchor[k], box[k]) for k in (0, 1)]
                    offset = [(anchor[k] + anchor[k + 2] - box[k] - box[k + 2]) / 2 for k in (0, 1)]
                    overlap = float(iou[a])
                    if name == "vlr_region":
                        sides = (
                            min(anchor[k + 2], box[k + 2]) - max(anchor[k], box[k]) for k in (0, 1)
                        )
                        overlap = math.prod(max(x, 0) for x in sides) / math.prod(
                            anchor[k + 2] - anchor[k] for k in (0, 1)
                        )
                    d = overlap - (offset[0] ** 2 + offset[1] ** 2) / (hull[0] ** 2 + hull[1] ** 2)
                    if threshold / 4 <= d < threshold:
                        arrays[name][i, a] = max(arrays[name][i, a], iou[a])
    total = 0
    for level, cells, s, s_edges, t, t_edges in gfl_levels(arrays):
        positive = labels[:, cells] < 4
        edges = kl(t_edges, s_edges, values["ld_temperature"]).sum(-1)
        score = s.detach().sigmoid().amax(-1)
        classes = kl(t, s, values["kd_temperature"])[positive].sum() / max(1, positive.sum())
        for name, term in (
            ("main", values["ld_weight"] * (score * edges)[positive].sum() / 4),
            ("vlr", values["vlr_weight"] * (arrays["vlr_region"][:, cells] * edges).sum() / 16),
            ("classification", values["kd_weight"] * classes),
        ):
            arrays[f"loss/{name}/{level}"] = term.detach()
            total = total + term
    finish(arrays, total)


def head_arrays(kind, joint, groups, boxes, generator):
    """The teacher's blocks after the joint, and the maps of both towers."""
    width, blocks, classes = 12, 4, 4
    per_cell = 2 if kind == "retinanet" else 1
    found = {"num_groups": torch.tensor(groups), "anchors_of_a_cell": torch.tensor(per_cell)}
    if groups:
        found["teacher_weight/scales"] = torch.tensor([0.8, 1.2, 1.4])
    for tower, channels, bias in (
        ("classification", classes * per_cell, -1.5),
        ("regression", boxes * per_cell, 1.5 if kind == "fcos" else 0.0),
    ):
        for block in range(joint, blocks):
            name = f"teacher_weight/{tower}/{block}"
            found[f"{name}/conv.weight"] = normal(generator, width, width, 3, 3, scale=0.15)
            if groups:
                found[f"{name}/gn.weight"] = normal(generator, width, scale=0.2, mean=1)
                found[f"{name}/gn.bias"] = normal(generator, width, scale=0.2)
            else:
                found[f"{name}/conv.bias"] = normal(generator, width, scale=0.2)
        found[f"teacher_weight/{tower}/predictor.weight"] = normal(
            generator, channels, width, 3, 3, scale=0.06
        )
        found[f"teacher_weight/{tower}/predictor.bias"] = normal(
            generator, channels, scale=0.3, mean=bias
        )
        for level, size in grids().items():
            teacher = normal(generator, 3, width, *size, mean=0.3)
            found[f"teacher_{tower}_tower/{level}"] = teacher
            found[f"student_{tower}_tower/{level}"] = 2 * teacher + normal(
                generator, *teacher.shape, mean=1
            )
    return {
        f"{kind}/{name}": x.float().double() if x.is_floating_point() else x
        for name, x in found.items()
    }


def crosskd_arrays(seed):
    generator = torch.Generator().manual_seed(seed)
    arrays = {**images(generator), "reg_max": torch.tensor(16)}
    arrays |= head_arrays("gfl", 2, 4, 68, generator)
    arrays |= head_arrays("retinanet", 2, 0, 4, generator)
    arrays |= head_arrays("fcos", 3, 6, 4, generator)
    tall = square_anchors(4)
    tall = torch.stack([tall, tall * torch.tensor([1, 1.1, 1, 1.3])], dim=1).flatten(0, 1)
    arrays["retinanet/anchors_xyxy"] = tall.float().double()
    points = square_anchors(0, offset=0.5)[:, :2]
    arrays["fcos/points_xy"] = points
    arrays["gfl/temperature"] = torch.tensor(2.0)
    for kind, weights in (
        ("gfl", (2.0, 3.0, 11.0)),
        ("retinanet", (0.5, 2.0, 9.0)),
        ("fcos", (0.7, 1.5, 6.5)),
    ):
        for name, value in zip(
            ("classification_weight", "regression_weight", "normalizer"), weights
        ):
            arrays[f"{kind}/{name}"] = torch.tensor(value)
        for level, size in grids().items() if kind != "fcos" else ():
            cells = math.prod(size) * int(arrays[f"{kind}/anchors_of_a_cell"])
            arrays[f"{kind}/is_used/{level}"] = torch.rand(3, cells, generator=generator) > 0.1
    return arrays


def finish_head(arrays, kind, tower, x):
    """The teacher's layers after the joint."""
    x = x.relu()
    for block in range(4):
        name = f"{kind}/teacher_weight/{tower}/{block}"
        if f"{name}/conv.weight" not in arrays:
            continue
        x = F.conv2d(x, arrays[f"{name}/conv.weight"], arrays.get(f"{name}/conv.bias"), padding=1)
        if groups := int(arrays[f"{kind}/num_groups"]):
            norm = (arrays[f"{name}/gn.{part}"] for part in ("weight", "bias"))
            x = F.group_norm(x, groups, *norm)
        x = x.relu()
    weight, bias = (
        arrays[f"{kind}/teacher_weight/{tower}/predictor.{p}"] for p in ("weight", "bias")
    )
    return F.conv2d(x, weight, bias, padding=1)


def restated_crosskd(arrays):
    for kind in ("gfl", "retinanet", "fcos"):
        sums, start = {"classification": 0, "regression": 0, "confidence": 0}, 0
        for k, (level, stride) in enumerate(LEVELS.items()):
            cross, own = {}, {}
            for tower in ("classification", "regression"):
                name = f"{kind}/student_{tower}_tower/{level}"
                s = arrays[name] = arrays[name].clone().requires_grad_()
                t = arrays[f"{kind}/teacher_{tower}_tower/{level}"]
                moments = []
                for x in (s, t):
                    flat = x.transpose(0, 1).flatten(1)
                    mean = flat.sum(1) / flat.shape[1]
                    deviation = ((flat - mean[:, None]) ** 2).sum(1) / (flat.shape[1] - 1)
                    moments.append((mean[:, None, None], deviation.sqrt()[:, None, None]))
                (s_mean, s_std), (t_mean, t_std) = moments
                x = (s - s_mean) / (s_std + 1e-6) * t_std + t_mean
                cross[tower], own[tower] = (finish_head(arrays, kind, tower, y) for y in (x, t))
                if tower == "regression" and kind != "retinanet":
                    scale = arrays[f"{kind}/teacher_weight/scales"][k]
                    cross[tower], own[tower] = cross[tower] * scale, own[tower] * scale
                if tower == "regression" and kind == "fcos":
                    cross[tower], own[tower] = (
                        y.relu() * stride for y in (cross[tower], own[tower])
                    )
                kind_of_map = "class" if tower == "classification" else "box"
                arrays[f"{kind}/cross_{kind_of_map}_logits/{level}"] = cross[tower].detach()
            p, q = (rows(x["classification"], 4).sigmoid() for x in (cross, own))
            used = arrays.get(f"{kind}/is_used/{level}", torch.ones(p.shape[:2], dtype=torch.bool))
            bce = -(q * p.log() + (1 - q) * (1 - p).log())
            sums["classification"] += ((p - q).abs() * bce).sum(-1)[used].sum()
            confidence = q.amax(-1)[used]
            sums["confidence"] += confidence.sum()
            ours, theirs = (rows(x["regression"], 68 if kind == "gfl" else 4) for x in (cross, own))
            if kind == "gfl":
                temperature = float(arrays["gfl/temperature"])
                ours, theirs = (x.unflatten(-1, (4, 17)) for x in (ours, theirs))
                term = 17 * kl(theirs, ours, temperature).mean(-1)
            elif kind == "retinanet":
                anchors = arrays["retinanet/anchors_xyxy"][start : start + ours.shape[1]]
                size, center = (
                    anchors[:, 2:] - anchors[:, :2],
                    (anchors[:, 2:] + anchors[:, :2]) / 2,
                )
                boxes = []
                for d in (ours, theirs):
                    half = size * d[..., 2:].clamp(max=math.log(1000 / 16)).exp() / 2
                    middle = center + d[..., :2] * size
                    boxes.append(torch.cat([middle - half, middle + half], dim=-1))
                term = generalized_box_iou_loss(*boxes)
            else:
                inter = torch.min(ours, theirs)
                inter, a, b = (
                    (x[..., 0] + x[..., 2]) * (x[..., 1] + x[..., 3]) for x in (inter, ours, theirs)
                )
                term = -(inter / (a + b - inter).clamp(min=1e-6)).clamp(min=1e-6).log()
            start += ours.shape[1]
            sums["regression"] += (confidence * term[used]).sum()
        divisor = arrays[f"{kind}/normalizer"]
        divisors = {
            "classification": divisor,
            "regression": sums["confidence"].detach() if kind == "gfl" else divisor,
        }
        total = 0
        for name, value in divisors.items():
            term = arrays[f"{kind}/{name}_weight"] * sums[name] / value
            arrays[f"{kind}/loss/{name}"] = term.detach()
            total = total + term
        arrays[f"{kind}/loss"] = total.detach()
        total.backward()
        for name in [name for name, x in arrays.items() if x.requires_grad]:
            tower, level = name.rsplit("/", 1)
            arrays[f"{tower}_grad/{level}"] = arrays[name].grad
            arrays[name] = arrays[name].detach()


def pgd_arrays(seed):
    generator = torch.Generator().manual_seed(seed)
    arrays = {**images(generator), "anchors_xyxy": square_anchors(6)}
    numbers = {"alpha": 0.5, "beta": 0.2, "gamma": 0.7, "delta": 0.01, "temp": 0.6}
    numbers |= {"quality_exponent/classification": 0.3, "quality_exponent/regression": 0.9}
    arrays |= {name: torch.tensor(value) for name, value in numbers.items()}
    arrays["topk"], arrays["level_weights"] = torch.tensor(9), torch.tensor([2.0, 0.5, 1.5])
    count = len(arrays["anchors_xyxy"])
    boxes = arrays["anchors_xyxy"] + normal(generator, 3, count, 4, scale=4)
    arrays["teacher_boxes_xyxy"] = boxes.float().double()
    for i in range(3):
        objects = len(arrays[f"image{i}/gt_classes"])
        for name in ("classification", "regression"):
            uniform = torch.rand(objects, 9, 2, generator=generator, dtype=torch.float64)
            arrays[f"image{i}/uniform/{name}"] = uniform.float().double()
    for level, size in grids().items():
        arrays[f"teacher_class_logits/{level}"] = normal(generator, 3, 4, *size, mean=-1)
        for name in ("classification", "regression"):
            teacher = normal(generator, 3, 12, *size).relu()
            arrays[f"teacher_{name}_feature/{level}"] = teacher
            arrays[f"student_{name}_feature/{level}"] = (
                teacher + normal(generator, *teacher.shape)
            ).relu()
    return arrays


def restated_map(arrays, i, name):
    """Map of an image, over the cells of all levels."""
    anchors = arrays["anchors_xyxy"]
    centers, xi = (anchors[:, :2] + anchors[:, 2:]) / 2, arrays[f"quality_exponent/{name}"]
    logits = [rows(arrays[f"teacher_class_logits/{level}"], 4)[i] for level in LEVELS]
    p, found = torch.cat(logits).sigmoid(), torch.zeros(len(anchors), dtype=torch.float64)
    boxes = arrays["teacher_boxes_xyxy"][i].tolist()
    for g, box in enumerate(arrays[f"image{i}/gt_boxes_xyxy"]):
        iou = torch.tensor([box_iou(a, box.tolist()) for a in boxes], dtype=torch.float64)
        quality = p[:, arrays[f"image{i}/gt_classes"][g]] ** (1 - xi) * iou**xi
        best = quality.argsort(descending=True)[:9]
        x = centers[best] + (arrays[f"image{i}/uniform/{name}"][g] - 0.5) * 0.1
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / 9
        for a in best.tolist():
            if (centers[a] > box[:2]).all() and (centers[a] < box[2:]).all():
                d = centers[a] - mean
                found[a] = max(found[a], math.exp(-0.5 * d @ covariance.inverse() @ d))
    return found


def restated_pgd(arrays):
    centers = (arrays["anchors_xyxy"][:, :2] + arrays["anchors_xyxy"][:, 2:]) / 2
    sizes = [math.prod(size) for size in grids().values()]
    maps = {
        name: torch.stack([restated_map(arrays, i, name) for i in range(3)])
        for name in ("classification", "regression")
    }
    background = []
    for i in range(3):
        boxes = arrays[f"image{i}/gt_boxes_xyxy"]
        inside = [((centers > box[:2]) & (centers < box[2:])).all(1) for box in boxes]
        background.append(~torch.stack([*inside, torch.zeros(len(centers)) > 0]).any(0))
    maps["background"] = torch.stack(background).double()
    for name, x in maps.items():
        for (level, size), part in zip(grids().items(), x.split(sizes, dim=1)):
            arrays[f"{name}_map/{level}"] = part.view(3, *size)
    t = arrays["temp"]
    for prefix in ("own_mask/", ""):
        leaves(arrays, "student_classification_feature", "student_regression_feature")
        total = 0
        for k, level in enumerate(LEVELS):
            values = {}
            for name in ("classification", "regression"):
                S, T = (arrays[f"{side}_{name}_feature/{level}"] for side in ("student", "teacher"))
                cells = [x.abs().mean(1).flatten(1) / t for x in (S, T)]
                cells = [x.shape[1] * x.exp() / x.exp().sum(1, keepdim=True) for x in cells]
                channels = [(x.abs() / t).exp() for x in (S, T)]
                channels = [12 * x / x.sum(1, keepdim=True) for x in channels]
                weighted = (channels[1] * (S - T) ** 2).flatten(2)
                gap = (channels[0] - channels[1]).abs().flatten(2)
                mask = arrays[f"{name}_map/{level}"].flatten(1)
                if name == "regression":
                    used = mask != 0
                    value = arrays["gamma"] * (mask * weighted.mean(1))[used].sum()
                    value = (value + arrays["delta"] * gap.sum(1)[used].sum()) / max(1, used.sum())
                else:
                    value = 0
                    for i, j in itertools.product(range(3), range(3)):
                        if prefix and i != j:
                            continue
                        error = cells[1][i] * weighted[i].sum(0)
                        for m, w in ((mask[j], "alpha"), (background_of(arrays, level, j), "beta")):
                            if (m != 0).any():
                                value = value + arrays[w] * (m * error).sum() / (m != 0).sum()
                    value = arrays["level_weights"][k] * value / 3
                    attention = gap.sum() / cells[0].shape[1] + (cells[0] - cells[1]).abs().sum()
                    value = value + arrays["delta"] * attention / 3
                values[name] = value
                if not prefix or name == "classification":
                    arrays[f"{prefix}loss/{name}/{level}"] = value.detach()
            total = total + sum(values.values())
        arrays[f"{prefix}loss"] = total.detach()
        total.backward()
        for name, level in itertools.product(("classification", "regression"), LEVELS):
            key = f"student_{name}_feature"
            if not prefix or name == "classification":
                arrays[f"{prefix}{key}_grad/{level}"] = arrays[f"{key}/{level}"].grad
            arrays[f"{key}/{level}"] = arrays[f"{key}/{level}"].detach()


def background_of(arrays, level, image):
    return arrays[f"background_map/{level}"][image].flatten()


RESTATED = {
    "bckd": (gfl_arrays, restated_bckd),
    "crosskd": (crosskd_arrays, restated_crosskd),
    "ld": (gfl_arrays, restated_ld),
    "pgd": (pgd_arrays, restated_pgd),
}


@pytest.mark.parametrize("method", RESTATED)
def test_other_arrays_agree(method, tmp_path):
    """Each method is its formula, and what reads the reference arrays takes any file of their form."""
    make, restate = RESTATED[method]
    arrays = make(7)
    inputs = set(arrays)
    restate(arrays)
    for name, value in METHODS[method](reference := save(tmp_path / "other.npz", arrays)).items():
        assert compare(value, reference[name], *tolerance(method, name))[2], name
        inputs.add(name)
    assert inputs >= {name for name in arrays if "weight" not in name and "temperature" not in name}


def reference(method):
    return Arrays(ROOT / f"tests/parity/{method}.npz")


def terms_of(loss, arrays=None):
    """Terms of the anchors of the reference arrays of BCKD or LD, with which the loss is set up."""
    return loss.anchor_terms(*gfl_pair(arrays or reference("ld"), loss))


class TestBCKD:
    def test_levels_without_objects_count(self):
        every, published = (terms_of(BCKDLoss(levels=x)) for x in ("all", "with_objects"))
        for name, terms in every.items():
            assert (terms[:, -20:] > 0).all() and not published[name][:, -20:].any()
            assert torch.equal(terms[:, :-20], published[name][:, :-20])

    def test_objects_of_other_classes_do_not_count(self):
        model = make_mapped(BCKDLoss, build(DETECTORS["gfl"]()), ["c", "x", "a"])
        student, teacher, loss = outputs_of(model)
        for term in loss.anchor_terms(student, teacher).values():
            assert torch.equal(term > 0, loss.labels(student) >= 0)

    def test_ignored_anchors_do_not_count(self):
        model = distiller(BCKDLoss, DETECTORS["retinanet"])
        student, teacher, loss = outputs_of(model)
        labels = student.gt_labels.clone()
        labels[:, ::3] = -1
        student.__dict__["labels"] = labels, student.matched_gt_boxes
        for term in loss.anchor_terms(student, teacher).values():
            assert torch.equal(term > 0, labels >= 0)

    def test_the_factor_may_be_constant(self):
        """The value is the same; the gradient of a logit is then |p_T - p_S| (p_S - p_T)."""
        arrays, gradients = reference("ld"), []
        for factor_gradient in (True, False):
            loss = BCKDLoss(box_weight=0, factor_gradient=factor_gradient)
            student, teacher = gfl_pair(arrays, loss)
            loss(student, teacher)["class"].backward()
            gradients.append(student.predictions[0][0].grad)
        assert terms_of(BCKDLoss())["class"].allclose(terms_of(loss)["class"])
        p_s, p_t = (arrays.tensor(f"{x}_class_logits/p3").sigmoid() for x in ("student", "teacher"))
        (z,) = loss.normalizer(positives_per_image(loss.labels(student) < 5))
        torch.testing.assert_close(gradients[1], (p_t - p_s).abs() * (p_s - p_t) / z)
        assert not gradients[0].allclose(gradients[1])

    def test_its_box_weight_depends_on_the_family(self):
        found = {}
        for family in DENSE:
            detector = build(DETECTORS[family]())
            DistillLosses(it=(loss := BCKDLoss())).setup(detector, detector)
            found[family] = loss.box_weight
        assert found == {"retinanet": 1, "fcos": 1, "gfl": 4}

    def test_unknown_levels(self, refuses):
        refuses(lambda: BCKDLoss(levels="p3"), "levels: p3; expected all or with_objects")


def towers(family, blocks, norm=None, seed=0, **options):
    """A detector whose towers have a number of blocks."""
    node = DETECTORS[family](**options)
    node.head.conv_dims = list(node.head.conv_dims) * blocks
    if norm:
        node.head.norm = norm
    return build(node, seed)


def pair_of(student, teacher, make=CrossKDLoss):
    teacher, losses = Teacher(teacher, None), DistillLosses(loss=make())
    return Distiller(student=student, teacher=teacher, losses=losses, max_iter=2).train()


class TestCrossKD:
    @pytest.mark.parametrize("family", DENSE)
    def test_ground_truth_alone_teaches_the_rest_of_the_students_head(self, family):
        model = pair_of(towers(family, 2), towers(family, 2))
        with torch.no_grad():
            for parameter in model.student.head.parameters():
                parameter.add_(torch.randn_like(parameter) / 10)
        loss = model.losses.by_name["loss"]
        assert loss.joint == 1 and not list(loss.parameters())
        sum_distill_losses(forward_losses(model, batch())).backward()
        first = {f"{name}.0.weight" for name in ("cls_subnet", "bbox_subnet")}
        learned = {n for n, p in model.student.head.named_parameters() if p.grad is not None}
        assert {name for name in learned if "subnet.0.weight" in name} == first
        assert not any(name.split(".")[1] in "345" for name in learned if "subnet" in name)
        assert not any("cls_score" in name or "bbox_pred" in name for name in learned)

    def test_a_map_gets_the_teachers_statistics(self):
        s, t = torch.randn(2, 3, 5, 4) * 3 + 2, torch.randn(2, 3, 5, 4)
        s[:, 1], s.requires_grad = 7.0, True  # a channel that is constant
        loss = CrossKDLoss()
        found = loss.aligned(s, t)
        for c in (0, 2):
            torch.testing.assert_close(found[:, c].mean(), t[:, c].mean())
            torch.testing.assert_close(found[:, c].std(), t[:, c].std())
        torch.testing.assert_close(found[:, 1], t[:, 1].mean().expand(2, 5, 4))
        found.square().sum().backward()
        assert s.grad.isfinite().all()
        single = torch.randn(1, 3, 1, 1)
        assert torch.equal(loss.aligned(single, t[:1, :, :1, :1]), single)
        loss.make_identity()
        assert torch.equal(loss.aligned(s, t), s)

    def test_the_joint_depends_on_the_depth(self, caplog):
        caplog.set_level("INFO")
        found = {}
        for family, blocks in (("gfl", 1), ("gfl", 3), ("gfl", 5), ("fcos", 4), ("retinanet", 4)):
            (loss := CrossKDLoss()).setup(towers(family, blocks), towers(family, blocks))
            found[family, blocks] = loss.joint
        assert list(found.values()) == [0, 2, 3, 2, 3]
        assert "CrossKD joins after 2 blocks, as towers have 3" in caplog.text
        (loss := CrossKDLoss()).setup(towers("gfl", 2), towers("gfl", 4))
        assert loss.joint == 1

    def test_towers_of_other_depth_and_width(self):
        model = pair_of(towers("gfl", 3, channels=8), towers("gfl", 4))
        loss = model.losses.by_name["loss"]
        assert loss.joint == 2
        shapes = {name: tuple(x.weight.shape) for name, x in loss.adapters.items()}
        assert shapes == {"cls_subnet": (16, 8, 1, 1), "bbox_subnet": (16, 8, 1, 1)}
        sum_distill_losses(forward_losses(model, batch())).backward()
        assert all(p.grad.abs().sum() > 0 for n, p in loss.named_parameters() if "weight" in n)

    def test_norms_with_statistics_of_each_level(self):
        """The rest of the head uses a level's own."""
        student, teacher = (towers("retinanet", 2, norm="BN") for _ in range(2))
        for norm in (x for x in teacher.head.modules() if isinstance(x, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(norm.running_mean)
        model = pair_of(student, teacher)
        student, teacher, loss = outputs_of(model)
        loss.make_identity()
        student.taps.update(
            {ours: teacher.taps[theirs] for ours, theirs in zip(loss.taps, loss.teacher_taps)}
        )
        cross = loss.cross_outputs(student, teacher)
        for ours, theirs in zip(cross.predictions, teacher.predictions, strict=True):
            assert all(map(torch.equal, ours, theirs))

    def test_it_divides_by_the_centerness(self):
        model = distiller(CrossKDLoss, DETECTORS["fcos"])
        student, _, loss = outputs_of(model)
        positive = student.gt_labels < 3
        matched = list(map(Boxes, student.matched_gt_boxes))
        expected = student.detector.compute_ctrness_targets(student.anchors, matched)
        found = centerness(student)
        torch.testing.assert_close(found[positive], expected[positive])
        assert found.isfinite().all() and 0 < found[positive].min() and found.max() <= 1

    def test_a_batch_without_objects_is_no_stronger(self):
        model = distiller(CrossKDLoss, DETECTORS["fcos"])
        some, none = (
            sum_distill_losses(forward_losses(model, batch(objects=n))) for n in ((1, 0), (0, 0))
        )
        assert 0 < none < 100 * some

    @pytest.mark.parametrize("joint", [-1, 3])
    def test_a_joint_beyond_the_tower(self, refuses, joint):
        loss, detector = CrossKDLoss(joint=joint), towers("gfl", 2)
        line = f"joint: {joint}; expected from 0 to 2, the blocks of a tower"
        refuses(lambda: loss.setup(detector, detector), line)

    def test_a_head_without_towers(self, refuses):
        detector = towers("gfl", 2)
        detector.head.bbox_subnet = torch.nn.Identity()
        line = "head: a GFLHead without a Sequential bbox_subnet; expected a head with the towers"
        refuses(lambda: CrossKDLoss().setup(detector, detector), line)


class TestLD:
    def test_only_objects_and_their_regions_count(self):
        arrays = reference("ld")
        terms = terms_of(loss := LDLoss(), arrays)
        student, _ = gfl_pair(arrays, loss)
        positive, region = student.gt_labels < 5, loss.region(student)
        assert torch.equal(terms["main"] > 0, positive)
        assert torch.equal(terms["class"] > 0, positive)
        assert torch.equal(terms["vlr"] > 0, region > 0)
        # Levels count alike, however many objects they have.
        again = terms_of(LDLoss(class_weight=1), arrays)["class"]
        assert torch.equal(again * 10, terms["class"])

    def test_weights_in_the_region(self):
        arrays = reference("ld")
        by_iou, mask, published = (
            (loss := LDLoss(**options)).region(gfl_pair(arrays, loss)[0])
            for options in ({}, {"vlr_weighting": "mask"}, {"vlr": "published"})
        )
        assert torch.equal(mask, (by_iou > 0).float()) and 0 < by_iou.amax() < 1
        outside = ((published > 0) & ~(by_iou > 0)).sum() / (published > 0).sum()
        assert 0.3 < outside < 0.5  # of the released region

    def test_its_region_has_anchors_that_are_not_quite_foreground(self):
        """An anchor equal to the object is foreground, and one far away is nothing."""
        box = torch.tensor([[32.0, 32.0, 96.0, 96.0]])
        anchors = [Boxes(square_anchors().float()[: 23 * 17])]
        region = localization_region(anchors, Boxes(box))[:, 0]
        iou = pairwise_iou(anchors[0], Boxes(box))[:, 0]
        assert iou.max() == 1 and region[iou.argmax()] == 0
        assert not region[iou < 0.05].any() and (region > 0).sum() > 9
        assert torch.equal(region[region > 0], iou[region > 0])

    def test_padding_has_no_region(self):
        """As no foreground: the region of a small image is the same beside a larger one."""
        small, large = batch(((64, 64), (160, 128)))
        alone, beside = (
            outputs_of(distiller(LDLoss, DETECTORS["gfl"]), x) for x in ([small], [small, large])
        )
        areas = []
        for student, _, loss in (alone, beside):
            region, padded = loss.region(student)[0], student.gt_labels[0] < 0
            assert not region[padded].any()
            areas.append(region[region > 0])
        assert torch.equal(*areas) and len(areas[0])

    def test_sums_or_means(self):
        arrays = reference("ld")
        sums, means = (terms_of(LDLoss(normalize_by=x), arrays) for x in ("none", "positives"))
        positives = (arrays["atss_labels"] < 5).sum()
        for name, ratio in (("main", positives), ("vlr", positives), ("class", 1)):
            torch.testing.assert_close(means[name] * ratio, sums[name])

    @pytest.mark.parametrize(
        "option, line",
        [
            ({"vlr": "giou"}, "vlr: giou; expected diou or published"),
            ({"vlr_weighting": "none"}, "vlr_weighting: none; expected iou or mask"),
            ({"normalize_by": "image"}, "normalize_by: image; expected none or positives"),
        ],
    )
    def test_unknown_options(self, refuses, option, line):
        refuses(lambda: LDLoss(**option), line)

    def test_other_bins(self, refuses):
        student, node = build(DETECTORS["gfl"]()), DETECTORS["gfl"]()
        node.head.reg_max = 8
        line = "distributions: student GFL with reg_max 16, teacher GFL with 8; expected two GFLs"
        refuses(lambda: LDLoss().setup(student, build(node)), line)


class TestPGD:
    def test_the_first_blocks_are_compared(self):
        model = pair_of(towers("gfl", 2, channels=8), towers("gfl", 3), PGDLoss)
        loss = model.losses.by_name["loss"]
        assert loss.taps == ("head.cls_subnet.2", "head.bbox_subnet.2") == loss.teacher_taps
        assert {name: tuple(x.weight.shape) for name, x in loss.adapters.items()} == {
            "cls_subnet": (16, 8, 1, 1),
            "bbox_subnet": (16, 8, 1, 1),
        }
        sum_distill_losses(forward_losses(model, batch())).backward()
        learned = {n for n, p in model.student.head.named_parameters() if p.grad is not None}
        expected = {
            f"{x}_subnet.{k}" for x in ("cls", "bbox") for k in ("0.weight", "1.weight", "1.bias")
        }
        assert learned == expected
        assert all(p.grad.abs().sum() > 0 for p in loss.parameters())

    def test_a_map_lies_around_the_best_predictions_in_the_object(self):
        """Here a square of 3 x 3 cells, two of whose columns are in the object."""
        y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
        centers = torch.stack([x.flatten(), y.flatten()], dim=1) * 8
        best = ((x - 3).abs() <= 1) & ((y - 2).abs() <= 1)
        quality, counts = best.float().flatten()[:, None], (x <= 3).flatten()[:, None]
        found = gaussian_map(centers, quality, counts, torch.full((1, 9, 2), 0.5)).view(6, 7)
        assert torch.equal(found > 0, best & (x <= 3)) and found.max() == found[2, 3] == 1
        torch.testing.assert_close(found[2, 2], torch.tensor(-0.75).exp())  # variance: 2/3 cells
        torch.testing.assert_close(found[1, 2], torch.tensor(-1.5).exp())
        # The higher value of two objects counts.
        both = gaussian_map(
            centers,
            quality.repeat(1, 2) * torch.tensor([1, 0.9]),
            counts.repeat(1, 2),
            torch.full((2, 9, 2), 0.5),
        )
        assert torch.equal(both.view(6, 7), found)
        # All in one place: no division by 0.
        assert gaussian_map(centers[:1], quality[:1], counts[:1], torch.full((1, 1, 2), 0.5)) == 1

    def test_cells_of_several_anchors_have_the_highest_value(self):
        student, teacher, loss = outputs_of(distiller(PGDLoss, DETECTORS["retinanet"]))
        loss.num_forwards = 0
        found = loss.prediction_maps(student, teacher)
        assert [x.shape for x in found["regression"]] == [
            x[:, 0].shape for x in teacher.predictions[0]
        ]
        assert len(student.anchors[0]) > found["regression"][0][0].numel()
        values = torch.cat([x.flatten(1) for x in found["regression"]], dim=1)
        assert values.max() <= 1 and (values > 0).any(dim=1).all()
        background = torch.cat([x.flatten(1) for x in found["background"]], dim=1)
        assert not (values * background).any() and set(background.unique().tolist()) == {0, 1}

    def test_objects_of_other_classes_have_no_map_and_are_no_background(self):
        model = make_mapped(PGDLoss, build(DETECTORS["fcos"]()), ["c", "x", "a"])
        student, teacher, loss = outputs_of(model)
        for gt in student.gt_instances:
            gt.gt_classes = torch.ones_like(gt.gt_classes)  # b
        found = loss.prediction_maps(student, teacher)
        assert not any(x.any() for x in found["classification"] + found["regression"])
        assert (found["background"][0] == 0).any()

    def test_images_without_objects_are_background(self):
        student, teacher, loss = outputs_of(
            distiller(PGDLoss, DETECTORS["gfl"]), batch(objects=(1, 0))
        )
        found = loss.prediction_maps(student, teacher)
        assert all((x[1] == 1).all() for x in found["background"])
        assert not any(x[1].any() for x in found["classification"] + found["regression"])

    def test_each_image_has_its_own_mask(self):
        """Released code: each has those of all, so its errors count as often as there are images."""
        own, every = PGDLoss(attention_weight=0), PGDLoss(attention_weight=0, masks="all")
        s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        masks = torch.rand(2, 4, 5), torch.ones(2, 4, 5)
        args = s, t, *masks, 1.0
        torch.testing.assert_close(
            own.classification(*(x[:1] if torch.is_tensor(x) else x for x in args)),
            every.classification(*(x[:1] if torch.is_tensor(x) else x for x in args)),
        )
        assert every.classification(*args) > own.classification(*args)
        same = s, t, *(x[:1].expand(2, -1, -1) for x in masks), 1.0
        torch.testing.assert_close(every.classification(*same), 2 * own.classification(*same))

    def test_units_of_the_teacher(self):
        """The scale of both does not matter, that of the student alone does."""
        loss = PGDLoss()
        student, teacher, _ = outputs_of(
            pair_of(towers("gfl", 1), towers("gfl", 1, seed=1), lambda: loss)
        )
        maps = loss.prediction_maps(student, teacher)

        def value(normalize, ours, theirs):
            loss.normalize = normalize
            s, t = (copy.copy(x) for x in (student, teacher))
            s.taps = {name: [x * ours for x in given] for name, given in student.taps.items()}
            t.taps = {name: [x * theirs for x in given] for name, given in teacher.taps.items()}
            return sum(sum(x) for x in loss.terms(loss.map_pairs(s, t), maps).values()).item()

        assert value(True, 50, 50) == pytest.approx(value(True, 1, 1), rel=1e-4)
        assert value(False, 5, 5) > 2 * value(False, 1, 1)
        assert value(True, 5, 1) > 2 * value(True, 1, 1)

    def test_the_noise_is_its_own_and_repeats(self):
        student, teacher, loss = outputs_of(distiller(PGDLoss, DETECTORS["gfl"]))
        before, drawn = torch.get_rng_state(), []
        for number in (0, 1, 0):
            loss.num_forwards = number
            drawn.append(loss.prediction_maps(student, teacher)["classification"][0])
        assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        "option, line",
        [
            ({"masks": "none"}, "masks: none; expected own or all"),
            ({"topk": 0}, "topk: 0; expected at least 1"),
            ({"level_weights": [1, 2]}, "level_weights: 2; expected one for each of 5 levels"),
        ],
    )
    def test_invalid_options(self, refuses, option, line):
        detector = build(DETECTORS["gfl"]())
        refuses(lambda: PGDLoss(**option).setup(detector, detector), line)

    def test_a_tower_without_blocks(self, refuses):
        detector = towers("gfl", 1)
        detector.head.cls_subnet = torch.nn.Sequential(torch.nn.Identity())
        line = "head: a tower without a block; expected at least one, with a ReLU"
        refuses(lambda: PGDLoss().setup(detector, detector), line)
