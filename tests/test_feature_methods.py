"""PKD, CWD, MGD, FGD and ReviewKD: properties of all losses, their formulas in slow double precision, and their edges."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from torch.nn.functional import interpolate

from d2kd.config import method
from d2kd.losses import PKDLoss
from d2kd.losses.pkd import correlation_distance
from d2kd.testing import DETECTORS, check_loss, distiller, forward_losses, sum_distill_losses

from .common import batch, build
from .parity import Arrays
from .parity.__main__ import METHODS as PARITY
from .parity.__main__ import compare, tolerance

GRIDS = {"p3": (5, 7), "p4": (3, 4), "p5": (2, 2)}
NAMES = ("pkd",)


def check_family(name, family):
    recipe = method(name)["losses"]
    recipe[name].seed = 0 if "seed" in recipe[name] else None
    recipe[name] = {k: v for k, v in recipe[name].items() if v is not None}
    assert len(check_loss(lambda: instantiate(recipe[name]), [family])) == 7


QUICK = {"pkd": "retinanet"}
EACH = [
    pytest.param(name, family, marks=[pytest.mark.sweep] * (QUICK[name] != family))
    for name in NAMES
    for family in DETECTORS
]


@pytest.mark.parametrize("name, family", EACH)
def test_properties(name, family):
    check_family(name, family)


def random_arrays(seed=0, teacher=12, student=12, images=3, grids=GRIDS):
    """The arrays that the files of all methods have: odd grids, and the second of three images small."""
    generator = np.random.default_rng(seed)
    arrays = {
        "padded_hw": np.array([40, 56]),
        "strides": np.array([8, 16, 32]),
        **{f"image{i}/size_hw": np.array([40 - 7 * i, 50 - 11 * i]) for i in range(images)},
    }
    for level, size in grids.items():
        for side, channels in (("student", student), ("teacher", teacher)):
            scale, shift = generator.normal(size=(2, 1, channels, 1, 1))
            maps = generator.normal(size=(images, channels, *size)) * scale + shift
            arrays[f"{side}_feature/{level}"] = maps.astype(np.float32)
    return arrays


class Doubles:
    """The inputs of a file as doubles; those whose gradients are wanted are leaves."""

    def __init__(self, arrays):
        self.arrays, self.leaves = arrays, {}

    def __getitem__(self, name):
        if name not in self.leaves:
            value = torch.from_numpy(np.asarray(self.arrays[name]))
            self.leaves[name] = (
                value.double().requires_grad_() if value.is_floating_point() else value
            )
        return self.leaves[name]

    def gradients(self, losses):
        total = sum(losses.values())
        wanted = {
            name: leaf
            for name, leaf in self.leaves.items()
            if name.startswith(("student_feature/", "weight/")) and leaf.dtype == torch.float64
        }
        found = torch.autograd.grad(total, list(wanted.values()))
        names = (
            name.replace("feature/", "feature_grad/").replace("weight/", "weight_grad/")
            for name in wanted
        )
        return {
            **{f"loss/{level}": value for level, value in losses.items()},
            "loss": total,
            **dict(zip(names, found, strict=True)),
        }


def assert_agrees(name, arrays, expected, tmp_path):
    """The functions of training give what slow code in double precision does, in every array of a file."""
    np.savez(tmp_path / "inputs.npz", **arrays)
    found = PARITY[name](Arrays(tmp_path / "inputs.npz"))
    assert found.keys() <= expected.keys(), found.keys() - expected.keys()
    for key, value in found.items():
        reference = expected[key].detach().numpy()
        if reference.dtype == np.float64:
            reference = reference.astype(np.float32)
        assert compare(value, reference, *tolerance(name, key))[2], key


def detectors(student="retinanet", teacher=None, **options):
    return build(DETECTORS[student]()), build(DETECTORS[teacher or student](**options), 1)


def outputs(features, **more):
    return SimpleNamespace(features=features, **more)


# PKD


def test_pkd_in_double_precision(tmp_path):
    """As Pearson's correlation of each channel, up to the epsilon; also where a teacher's channel is constant."""
    arrays = random_arrays() | {"loss_weight": np.float32(10)}
    arrays["teacher_feature/p4"][:, 5] = 3.5
    arrays["teacher_feature/p3"] = random_arrays(1, grids={"p3": (4, 9)})["teacher_feature/p3"]
    given, losses = Doubles(arrays), {}
    for level in GRIDS:
        s, t = (given[f"{side}_feature/{level}"] for side in ("student", "teacher"))
        s = interpolate(s, t.shape[-2:], mode="bilinear", align_corners=False)
        s, t = (x.movedim(1, 0).flatten(1) for x in (s, t))
        count, distance = s.shape[1], 0.0
        for a, b in zip(s, t):
            a, b = ((x - x.mean()) / (x.std() + 1e-6) for x in (a, b))
            distance = distance + ((a - b) ** 2).mean()
        losses[level] = 10 / 2 * distance / len(s)
        if level == "p5":
            r = np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(s.detach(), t.detach())])
            assert float(losses[level].detach()) == pytest.approx(
                (count - 1) / count * 10 * (1 - r), rel=1e-4
            )
    assert_agrees("pkd", arrays, given.gradients(losses), tmp_path)


def test_pkd_depends_on_no_scale_and_no_shift():
    s, t = torch.randn(2, 3, 6, 4, 5)
    scale, shift = torch.rand(2, 6, 1, 1) + 0.5
    expected = correlation_distance(s, t)
    assert 0 < expected < 2
    for changed in ((scale * s + shift, t), (s, 100 * scale * t - shift)):
        torch.testing.assert_close(correlation_distance(*changed), expected)
    assert correlation_distance(-s, s) > expected > correlation_distance(s + 0.1 * t, s)
    halves = correlation_distance(s.bfloat16() * 1e4, t.bfloat16())
    assert halves.dtype == torch.float32 and float(halves) == pytest.approx(
        float(expected), rel=0.02
    )


def test_pkd_gives_a_dead_channel_no_gradient():
    """Published, it has one that is a million times larger; one cell, of which there is no deviation, gives NaN."""
    s, t = torch.randn(2, 2, 6, 4, 5)
    s[:, 2], s[:, 3] = 0.0, 2.0 + 1e-6 * torch.randn(2, 4, 5)
    s.requires_grad_()
    correlation_distance(s, t).backward()
    assert not s.grad[:, 2:4].any() and s.grad[:, [0, 1, 4, 5]].abs().min() > 0
    assert s.grad.abs().max() < 1
    cell = torch.randn(1, 6, 1, 1, requires_grad=True)
    value = correlation_distance(cell, torch.randn(1, 6, 1, 1))
    value.backward()
    assert value == 0 and not cell.grad.any()


@pytest.mark.parametrize(
    "student, teacher, levels, weight",
    [
        ("retinanet", "retinanet", ["p3", "p4", "p5", "p6"], 10),
        ("fcos", "retinanet", ["p3", "p4", "p5", "p6"], 10),
        ("faster_rcnn", "cascade_rcnn", ["p2", "p3", "p4", "p5"], 6),
        ("retinanet", "faster_rcnn", ["p3", "p4", "p5"], 10),
    ],
)
def test_pkd_defaults(student, teacher, levels, weight, caplog):
    loss = PKDLoss()
    loss.setup(*detectors(student, teacher))
    assert (list(loss.levels), loss.weight) == (levels, weight)
    assert ("leaves out the topmost level p" in caplog.text) == (
        (student, teacher) != ("retinanet", "faster_rcnn")
    )
    kept = PKDLoss(levels=["p4"], weight=0.5)
    kept.setup(*detectors(student, teacher))
    assert (list(kept.levels), kept.weight) == (["p4"], 0.5)


@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_pkd_of_levels_by_index(resize):
    """A RetinaNet's p3 beside a Faster R-CNN's p2, as published, whatever either side pads to."""
    pairs = {"p3": "p2", "p4": "p3"}
    loss = PKDLoss(levels=pairs, resize=resize)
    loss.setup(*detectors("retinanet", "faster_rcnn"))
    image = torch.randn(2, 16, 24, 32)  # cells of 4 pixels
    halved = torch.nn.functional.avg_pool2d(image, 2)
    s = {"p3": halved, "p4": torch.nn.functional.avg_pool2d(halved, 2)}
    t = {"p2": image, "p3": halved}
    wider = {
        name: torch.nn.functional.pad(x, (0, 8 // 2**k)) for k, (name, x) in enumerate(t.items())
    }
    images = SimpleNamespace(image_sizes=[(96, 128)] * 2)
    values = [
        float(loss(outputs(s), outputs(x, images=images, student_image_sizes=None)))
        for x in (t, wider)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    expected = 0.0
    for level, match in pairs.items():
        ours, theirs = s[level], t[match]
        if resize == "student":
            ours = interpolate(ours, theirs.shape[-2:], mode="bilinear")
        else:
            theirs = interpolate(theirs, ours.shape[-2:], mode="bilinear")
        expected += float(correlation_distance(ours, theirs))
    assert values[0] == pytest.approx(expected, rel=1e-4)


def test_pkd_at_another_scale_resizes_the_teacher():
    loss = PKDLoss(levels={"p3": "p3"})
    loss.scale = 1.5
    loss.setup(*detectors())
    s, t = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 12, 12)
    images = SimpleNamespace(image_sizes=[(96, 96)])
    teacher = outputs({"p3": t}, images=images, student_image_sizes=[(64, 64)])
    ((ours, theirs),) = loss.map_pairs(outputs({"p3": s}), teacher).values()
    assert ours is s or torch.equal(ours, s)
    assert theirs.shape == s.shape and math.isfinite(float(loss(outputs({"p3": s}), teacher)))


def test_pkd_adapts_where_channels_differ():
    same, other = (distiller(PKDLoss, DETECTORS["gfl"], same=x) for x in (True, False))
    assert not list(same.losses.parameters())
    assert {p.shape[0] for p in other.losses.parameters()} == {24}
    assert float(sum_distill_losses(forward_losses(other, batch()))) > 0


def test_pkd_refuses_an_unknown_side(refuses):
    refuses(lambda: PKDLoss(resize="both"), "resize: both; expected student or teacher")
