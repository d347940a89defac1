"""PKD, CWD, MGD, FGD and ReviewKD: properties of all losses, their formulas in slow double precision, and their edges."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from fvcore.common.param_scheduler import LinearParamScheduler
from torch.nn.functional import conv2d, interpolate

from d2kd.config import method
from d2kd.losses import CWDLoss, DistillLosses, FGDLoss, MGDLoss, PKDLoss, ReviewKDLoss, fgd
from d2kd.losses.cwd import channel_divergence
from d2kd.losses.fgd import RelationBlock, background_mask, foreground_mask
from d2kd.losses.mgd import squared_error
from d2kd.losses.pkd import correlation_distance
from d2kd.losses.reviewkd import ReviewBlock, hierarchical_distance
from d2kd.modeling import Distiller, Teacher
from d2kd.structures.class_map import ClassMap
from d2kd.testing import DETECTORS, check_loss, distiller, forward_losses, sum_distill_losses

from .common import batch, build
from .parity import Arrays
from .parity.__main__ import METHODS as PARITY
from .parity.__main__ import compare, tolerance
from .test_scales import two_scales

DENSE = ("retinanet", "fcos", "gfl")
GRIDS = {"p3": (5, 7), "p4": (3, 4), "p5": (2, 2)}
NAMES = ("pkd", "cwd", "mgd", "fgd", "reviewkd")


def check_family(name, family):
    recipe = method(name)["losses"]
    recipe[name].seed = 0 if "seed" in recipe[name] else None
    recipe[name] = {k: v for k, v in recipe[name].items() if v is not None}
    assert len(check_loss(lambda: instantiate(recipe[name]), [family])) == 8


QUICK = {
    "pkd": "retinanet",
    "cwd": "faster_rcnn",
    "mgd": "gfl",
    "fgd": "fcos",
    "reviewkd": "retinanet",
}
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


def weights(shapes, seed=0):
    """Random learned weights of all levels; of those that multiply, a half."""
    generator = np.random.default_rng(seed)
    return {
        f"weight/{level}/{name}": (0.5 * generator.normal(size=shape)).astype(np.float32)
        for level in GRIDS
        for name, shape in shapes.items()
    }


def adapt(given, level):
    """The student's map of a level after a 1x1 convolution."""
    weight, bias = (given[f"weight/{level}/align.{part}"] for part in ("weight", "bias"))
    return conv2d(given[f"student_feature/{level}"], weight, bias)


def set_up(loss, *sides, class_map=None, **options):
    loss.class_map = class_map
    loss.setup(*detectors(*sides, **options))
    return loss


ALL = {"pkd": PKDLoss, "cwd": CWDLoss, "mgd": MGDLoss, "fgd": FGDLoss, "reviewkd": ReviewKDLoss}
SWEEP = pytest.mark.sweep


@pytest.mark.parametrize(
    "student, teacher, scale, sizes",
    [
        ("retinanet", "faster_rcnn", 1, ((64, 64), (48, 72))),
        ("faster_rcnn", "gfl", 1.5, ((61, 90), (48, 72))),
        pytest.param("cascade_rcnn", "fcos", 2, ((64, 64), (48, 72)), marks=SWEEP),
        pytest.param("gfl", "gfl", 1, ((1, 1),), marks=SWEEP),
        pytest.param("mask_rcnn", "faster_rcnn", 1, ((1, 150), (150, 1)), marks=SWEEP),
        pytest.param("fcos", "retinanet", 2, ((7, 5), (64, 64)), marks=SWEEP),
        pytest.param("retinanet", "retinanet", 1.5, ((7, 5),), marks=SWEEP),
    ],
)
def test_any_pair_at_any_scale(student, teacher, scale, sizes):
    """All methods at once on other families, widths and sizes of images, down to a pixel."""
    model = Distiller(
        student=build(DETECTORS[student]()),
        teacher=Teacher(build(DETECTORS[teacher](channels=24), 1), None, scale=scale),
        losses=DistillLosses(**{name: kind() for name, kind in ALL.items()}),
        max_iter=2,
    ).train()
    examples = batch(sizes=sizes, objects=(1,) * len(sizes))
    losses = forward_losses(model, examples if scale == 1 else two_scales(examples, scale))
    assert {key.split("_")[1] for key in losses if key.startswith("distill/")} == set(ALL)
    assert all(value.isfinite() for value in losses.values()), losses
    sum_distill_losses(losses).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


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
    assert sum_distill_losses(forward_losses(other, batch())).item() > 0


def test_pkd_refuses_an_unknown_side(refuses):
    refuses(lambda: PKDLoss(resize="both"), "resize: both; expected student or teacher")


# CWD


def test_cwd_in_double_precision(tmp_path):
    arrays = random_arrays(2) | {"tau": np.float32(4), "loss_weight": np.float32(3)}
    given, losses = Doubles(arrays), {}
    for level in GRIDS:
        s, t = (given[f"{side}_feature/{level}"] / 4 for side in ("student", "teacher"))
        p, q = (x.exp() / x.exp().sum(dim=(2, 3), keepdim=True) for x in (t, s))
        losses[level] = 3 * 4**2 * (p * (p / q).log()).sum() / (3 * 12)
    assert_agrees("cwd", arrays, given.gradients(losses), tmp_path)


def test_cwd_compares_cells_of_a_channel_and_not_channels():
    s, t = torch.randn(2, 3, 6, 4, 5)
    expected = channel_divergence(s, t)
    assert expected.shape == (3, 6) and (expected > 0).all()
    shift = torch.randn(3, 6, 1, 1)
    torch.testing.assert_close(channel_divergence(s + shift, t - shift), expected)
    cells = torch.randperm(20)
    shuffled = (x.flatten(2)[..., cells].unflatten(2, (4, 5)) for x in (s, t))
    torch.testing.assert_close(channel_divergence(*shuffled), expected)
    wider = (torch.cat([x, x], dim=3) for x in (s, t))  # twice the cells
    torch.testing.assert_close(channel_divergence(*wider), expected)
    assert not channel_divergence(s, s).any()
    scaled = channel_divergence(3 * s, 3 * t, temperature=3.0)  # scaling is a temperature
    torch.testing.assert_close(scaled, 9 * expected)
    assert channel_divergence(s.bfloat16(), t.bfloat16()).dtype == torch.float32


def test_cwd_gradient_is_the_difference_of_the_distributions():
    s, t = torch.randn(2, 2, 6, 4, 5)
    s.requires_grad_()
    CWDLoss(temperature=2.0).divergence(s, t).mean().backward()
    p, q = ((x / 2).flatten(2).softmax(dim=2).reshape(x.shape) for x in (s.detach(), t))
    torch.testing.assert_close(s.grad, 2 * (p - q) / (2 * 6))


def test_cwd_without_padding():
    s, t = torch.randn(2, 2, 6, 4, 5)
    valid = torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[0], valid[1, :3, :2] = True, True
    found = channel_divergence(s, t, valid=valid)
    torch.testing.assert_close(found[1], channel_divergence(s[1:, :, :3, :2], t[1:, :, :3, :2])[0])
    torch.testing.assert_close(found[0], channel_divergence(s[:1], t[:1])[0])
    s.requires_grad_()
    channel_divergence(s, t, valid=valid).sum().backward()
    assert s.grad.isfinite().all() and torch.equal(s.grad.abs().sum(dim=1) > 0, valid)


@pytest.mark.parametrize("source", ["features", "logits"])
def test_cwd_counts_padding_unless_told(source):
    def value(spoilt, **options):
        model = distiller(lambda: CWDLoss(source=source, **options), DETECTORS["gfl"])
        loss = model.losses.by_name["loss"]
        pairs = "logit_pairs" if source == "logits" else "map_pairs"
        compute = getattr(loss, pairs)

        def spoiling(*both):
            found = compute(*both)
            for s, _ in found.values():  # the first image is half as wide as the batch
                s.data[0, ..., math.ceil(s.shape[-1] / 2) :] += spoilt
            return found

        setattr(loss, pairs, spoiling)
        losses = forward_losses(model, batch(sizes=((64, 64), (64, 128))))
        return sum_distill_losses(losses).detach()

    assert torch.equal(value(0, valid_only=True), value(50, valid_only=True))
    assert abs(value(0) - value(50)) > 0.1


def test_cwd_temperature_is_in_units_of_the_teacher():
    """The same maps times 100 have the same loss, unless it is the published one."""
    s, t = torch.randn(2, 1, 16, 8, 8)
    images = SimpleNamespace(tensor=torch.zeros(1, 3, 64, 64), image_sizes=[(64, 64)])

    def value(factor, normalize):
        loss = CWDLoss(levels=["p3"], normalize=normalize)
        loss.setup(*detectors())
        teacher = outputs({"p3": factor * t}, images=images)
        return float(loss(outputs({"p3": factor * s}), teacher))

    assert value(100, True) == pytest.approx(value(1, True), rel=1e-4)
    assert value(100, False) > 10 * value(1, False)


@pytest.mark.parametrize("family", ["retinanet", "gfl"])
def test_cwd_of_logits_in_loops(family):
    """Channel by channel of the head's maps, of the classes that both have."""
    student, teacher = detectors(family, classes=4)
    loss = CWDLoss(source="logits", levels=["p3", "p5"], temperature=2.0)
    loss.class_map = ClassMap.from_names(("a", "b", "c"), ("x", "c", "b", "y"))
    loss.setup(student, teacher)
    assert loss.weight == 5
    images = torch.randn(2, 3, 64, 96)
    sides = []
    for detector in (student, teacher):
        features = detector.backbone(images)
        maps = [features[level] for level in detector.head_in_features]
        logits = [100 * x for x in detector.head(maps)[0]]
        sides.append(
            outputs(
                features,
                detector=detector,
                maps=logits,
                pred_logits=[permute_to_N_HWA_K(x, detector.num_classes) for x in logits],
            )
        )
    expected = 0.0
    for level in (0, 2):  # p3 and p5 of the head's
        s, t = (x.maps[level].double() / 2 for x in sides)
        s, t = (x.unflatten(1, (-1, classes)) for x, classes in ((s, 3), (t, 4)))
        anchors = s.shape[1]
        for n in range(2):
            for anchor in range(anchors):
                for ours, theirs in ((1, 2), (2, 1)):
                    q, p = (
                        x[n, anchor, k].flatten().softmax(0) for x, k in ((s, ours), (t, theirs))
                    )
                    expected += 4 * (p * (p / q).log()).sum() / (2 * anchors * 2)
    torch.testing.assert_close(loss(*sides), expected.float())


@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=[pytest.mark.sweep] * (x != "fcos")) for x in DENSE]
)
def test_cwd_of_logits_has_the_properties(family):
    assert len(check_loss(lambda: CWDLoss(source="logits", valid_only=True), [family])) == 8


def test_cwd_leaves_out_levels_that_are_only_pooled():
    loss = CWDLoss()
    loss.setup(*detectors("faster_rcnn"))
    assert (list(loss.levels), loss.weight) == (["p2", "p3", "p4", "p5"], 10)
    loss = CWDLoss()
    loss.setup(*detectors("retinanet"))
    assert list(loss.levels) == ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    "act, line",
    [
        (lambda: CWDLoss(source="boxes"), "source: boxes; expected features or logits"),
        (lambda: CWDLoss(temperature=0), "temperature: 0; expected a positive number"),
        (lambda: set_up(CWDLoss(source="logits"), "retinanet", "faster_rcnn"), "anchors: student"),
        (lambda: set_up(CWDLoss(source="logits"), "faster_rcnn"), "anchors: student"),
        (
            lambda: set_up(CWDLoss(source="logits", levels=["p2"])),
            r"levels: \['p2'\]; expected of p3, p4, p5, p6, p7",
        ),
        (lambda: set_up(CWDLoss(source="logits", levels={"p3": "p4"})), "levels: {'p3': 'p4'}"),
        (
            lambda: set_up(CWDLoss(source="logits"), classes=4),
            "num_classes: student 3, teacher 4; expected the same classes",
        ),
        (
            lambda: set_up(CWDLoss(source="logits"), class_map=ClassMap.from_names("abc", "xyz")),
            "classes: none is the student's and the teacher's; expected",
        ),
    ],
)
def test_cwd_refuses(refuses, act, line):
    refuses(act, line)


# MGD


def test_mgd_in_double_precision(tmp_path):
    """Of a student with 10 channels and a teacher with 12, on masks that come from given draws."""
    shapes = {"align.weight": (12, 10, 1, 1), "align.bias": (12,)}
    for k in (0, 2):
        shapes |= {f"generation.{k}.weight": (12, 12, 3, 3), f"generation.{k}.bias": (12,)}
    arrays = random_arrays(3, student=10) | weights(shapes)
    arrays |= {"alpha_mgd": np.float32(3e-4), "lambda_mgd": np.float32(0.3)}
    for level, size in GRIDS.items():
        uniform = np.random.default_rng(7).random((3, 1, *size))
        arrays[f"uniform/{level}"] = uniform.astype(np.float32)
    given, losses, masks = Doubles(arrays), {}, {}
    for level in GRIDS:
        masks[f"keep/{level}"] = (given[f"uniform/{level}"] <= 0.7).double()
        first, second = (
            [given[f"weight/{level}/generation.{k}.{part}"] for part in ("weight", "bias")]
            for k in (0, 2)
        )
        masked = adapt(given, level) * masks[f"keep/{level}"]
        made = conv2d(conv2d(masked, *first, padding=1).clamp(min=0), *second, padding=1)
        losses[level] = 3e-4 / 3 * ((made - given[f"teacher_feature/{level}"]) ** 2).sum()
    assert_agrees("mgd", arrays, masks | given.gradients(losses), tmp_path)


def test_mgd_masks_cells_of_all_channels():
    loss = set_up(MGDLoss(), "retinanet")
    loss.generators = torch.nn.ModuleDict({level: torch.nn.Identity() for level in loss.levels})
    seen, error = {}, loss.error

    def record(level, student, teacher, keep):
        seen.setdefault(level, []).append(keep)
        return error(level, student, teacher, keep)

    loss.error = record
    maps = {level: torch.randn(2, 16, 64, 80) for level in loss.levels}
    images = SimpleNamespace(tensor=torch.zeros(2, 3, 640, 512), image_sizes=[(640, 512)] * 2)
    before = torch.get_rng_state()
    for _ in range(2):
        loss(outputs(maps), outputs(maps, images=images))
    assert torch.equal(torch.get_rng_state(), before)
    for level, (first, second) in seen.items():
        assert first.shape == (2, 1, 64, 80) and set(first.unique().tolist()) == {0, 1}
        assert 1 - float(first.mean()) == pytest.approx(0.65, abs=0.02)
        draws = [first[0], first[1], second[0], second[1], seen["p3"][0][0] + (level == "p3")]
        assert not any(torch.equal(a, b) for k, a in enumerate(draws) for b in draws[:k])
    again = set_up(MGDLoss(), "retinanet")
    again.set_extra_state(torch.tensor([1, 0]))  # after one step
    uniform = torch.rand(2, 1, 64, 80, generator=again.generator())
    assert torch.equal(again.kept_cells(uniform), seen["p3"][1])
    other = torch.rand(2, 1, 64, 80, generator=MGDLoss(seed=1).generator())
    assert not torch.equal(again.kept_cells(other), seen["p3"][0])


def test_mgd_counts_masked_cells():
    """Where all is masked, every cell is generated from nothing, and all errors count."""
    loss = set_up(MGDLoss(mask_ratio=1.0, normalize=False, levels=["p3"], reduction="sum"))
    s, t = torch.randn(2, 2, 16, 5, 6)
    made = loss.generators["p3"](torch.zeros(2, 16, 5, 6))
    expected = ((made - t) ** 2).sum() / 2
    torch.testing.assert_close(loss(outputs({"p3": s}), outputs({"p3": t})), expected)


@pytest.mark.parametrize(
    "family, ratio, mean, summed, channels_times_cells",
    [("retinanet", 0.65, 115, 2e-5, 256 * 22400), ("faster_rcnn", 0.45, 11, 5e-7, 256 * 89250)],
)
def test_mgd_has_one_weight_for_images_of_any_size(
    family, ratio, mean, summed, channels_times_cells
):
    """That of the published sum for an image of 800x1344."""
    assert summed * channels_times_cells == pytest.approx(mean, rel=0.05)
    levels = {"retinanet": ["p3", "p4", "p5", "p6", "p7"], "faster_rcnn": ["p2", "p3", "p4", "p5"]}
    losses = []
    for reduction, weight in (("mean", mean), ("sum", summed)):
        torch.manual_seed(0)
        loss = MGDLoss(reduction=reduction, normalize=False)
        losses.append(set_up(loss, family))
        assert (loss.weight, loss.mask_ratio) == (weight, ratio)
        assert list(loss.levels) == levels[family]
    for count in (2, 3):
        maps = {level: torch.randn(count, 16, 6, 9) for level in losses[0].levels}
        zeros = {level: 0 * x for level, x in maps.items()}
        averaged, total = (loss(outputs(zeros), outputs(maps)) for loss in losses)
        entries = sum(x.numel() for x in maps.values())
        torch.testing.assert_close(averaged * entries, total * count)


def test_mgd_is_in_units_of_the_teacher():
    s, t = torch.randn(2, 1, 16, 8, 8)
    images = SimpleNamespace(tensor=torch.zeros(1, 3, 64, 64), image_sizes=[(64, 64)])

    def value(factor, normalize):
        torch.manual_seed(0)
        loss = set_up(MGDLoss(levels=["p3"], normalize=normalize))
        teacher = outputs({"p3": factor * t}, images=images)
        return float(loss(outputs({"p3": factor * s}), teacher).detach())

    assert value(100, True) == pytest.approx(value(1, True), rel=1e-4)
    assert value(100, False) > 1000 * value(1, False)


def test_mgd_sums_in_float32():
    big = torch.full((1, 64, 32, 32), 20.0, dtype=torch.float16)
    assert float(squared_error(big, -big)) == 1600 * 64 * 32 * 32


@pytest.mark.parametrize(
    "options, line",
    [
        ({"reduction": "max"}, "reduction: max; expected mean or sum"),
        ({"mask_ratio": 1.5}, "mask_ratio: 1.5; expected a probability"),
    ],
)
def test_mgd_refuses(refuses, options, line):
    refuses(lambda: MGDLoss(**options), line)


# FGD

BOXES = [
    [[0, 0, 47, 39.5], [3, 4.2, 17, 9], [16, 8, 24, 24], [30, 1, 30, 1]],
    [],
    [[0.0, 0.0, 28.0, 26.0]],  # the whole of the third image
]


def slow_masks(boxes, scales, size):
    """Cell by cell; scales are cells per pixel along x and y."""
    height, width = size
    foreground = torch.zeros(height, width, dtype=torch.float64)
    for x0, y0, x1, y1 in boxes:
        left, right = math.floor(x0 * scales[0]), math.ceil(x1 * scales[0])
        top, bottom = math.floor(y0 * scales[1]), math.ceil(y1 * scales[1])
        for y in range(top, min(bottom, height - 1) + 1):
            for x in range(left, min(right, width - 1) + 1):
                value = 1 / ((bottom + 1 - top) * (right + 1 - left))
                foreground[y, x] = max(foreground[y, x], value)
    background = (foreground == 0).double()
    return foreground, background / max(1, background.sum())


def slow_relation(given, level, side, features):
    def part(name):
        return [given[f"weight/{level}/{name}_{side}.{x}"] for x in ("weight", "bias")]

    def linear(x, weight, bias):
        return x @ weight.flatten(1).T + bias

    weight, bias = part("conv_mask")
    logits = (features * weight[0][:, 0, 0][:, None, None]).sum(dim=1) + bias
    shares = logits.exp() / logits.exp().sum(dim=(1, 2), keepdim=True)
    hidden = linear(
        (features * shares[:, None]).sum(dim=(2, 3)),
        *(given[f"weight/{level}/channel_add_conv_{side}.0.{x}"] for x in ("weight", "bias")),
    )
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    hidden = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    scale, shift = (
        given[f"weight/{level}/channel_add_conv_{side}.1.{x}"].flatten() for x in ("weight", "bias")
    )
    last = [given[f"weight/{level}/channel_add_conv_{side}.3.{x}"] for x in ("weight", "bias")]
    return features + linear((hidden * scale + shift).clamp(min=0), *last)[..., None, None]


def test_fgd_in_double_precision(tmp_path):
    """With an image without objects, a box that covers another image, and a narrower student."""
    shapes = {"align.weight": (12, 10, 1, 1), "align.bias": (12,)}
    for side in "st":
        shapes |= {f"conv_mask_{side}.weight": (1, 12, 1, 1), f"conv_mask_{side}.bias": (1,)}
        for k, shape in ((0, (6, 12, 1, 1)), (1, (6, 1, 1)), (3, (12, 6, 1, 1))):
            name = f"channel_add_conv_{side}.{k}"
            bias = shape if k == 1 else shape[:1]
            shapes |= {f"{name}.weight": shape, f"{name}.bias": bias}
    arrays = random_arrays(4, student=10) | weights(shapes, seed=5)
    coefficients = {"alpha": 2e-3, "beta": 7e-3, "gamma": 3e-3, "lambda": 4e-4}
    arrays |= {f"{name}_fgd": np.float32(value) for name, value in coefficients.items()}
    arrays["temp"] = np.float32(0.8)
    for i, boxes in enumerate(BOXES):
        arrays[f"image{i}/gt_boxes_xyxy"] = np.array(boxes, np.float32).reshape(-1, 4)
        arrays[f"image{i}/gt_classes"] = np.zeros(len(boxes), np.int64)
    given, losses, found = Doubles(arrays), {}, {}
    for level, size in GRIDS.items():
        s, t = adapt(given, level), given[f"teacher_feature/{level}"].detach()
        masks = []
        for i, boxes in enumerate(BOXES):
            height, width = arrays[f"image{i}/size_hw"].tolist()
            masks.append(slow_masks(boxes, (size[1] / width, size[0] / height), size))
        foreground, background = (torch.stack(x) for x in zip(*masks))

        def attentions(x):
            spatial, channels = x.abs().mean(dim=1) / 0.8, x.abs().mean(dim=(2, 3)) / 0.8
            spatial = spatial.exp() / spatial.exp().sum(dim=(1, 2), keepdim=True)
            channels = channels.exp() / channels.exp().sum(dim=1, keepdim=True)
            return math.prod(x.shape[2:]) * spatial, x.shape[1] * channels

        (s_space, s_channel), (t_space, t_channel) = attentions(s), attentions(t)
        errors = ((s - t) ** 2 * t_channel[..., None, None]).sum(dim=1) * t_space
        attention = (s_space - t_space).abs().sum() + (s_channel - t_channel).abs().sum()
        relations = [slow_relation(given, level, *side) for side in (("s", s), ("t", t))]
        terms = {
            "foreground": (errors * foreground).sum() / 3,
            "background": (errors * background).sum() / 3,
            "attention": attention / 3,
            "relation": ((relations[0] - relations[1]) ** 2).sum() / 3,
        }
        losses[level] = sum(c * x for c, x in zip(coefficients.values(), terms.values()))
        found |= {f"loss/{level}/{name}": value for name, value in terms.items()}
        found |= {
            f"foreground_mask/{level}": foreground,
            f"background_mask/{level}": background,
            f"teacher_spatial_attention/{level}": t_space,
            f"teacher_channel_attention/{level}": t_channel,
        }
    assert not background[2].any() and background[1].unique().tolist() == [0.25]
    assert_agrees("fgd", arrays, found | given.gradients(losses), tmp_path)


def boxes_of(*images):
    return [torch.tensor(boxes).float().reshape(-1, 4) for boxes in images]


def test_fgd_masks_lie_on_their_objects_whatever_the_padding():
    """The published ones are stretched in a padded image."""
    boxes, sizes = boxes_of(*BOXES), [(40, 50), (33, 39), (26, 28)]
    narrow = foreground_mask(boxes, sizes, (5, 7), 8)
    wide = foreground_mask(boxes, sizes, (9, 11), 8)
    torch.testing.assert_close(wide[:, :5, :7], narrow)
    for mask, image in zip(narrow, BOXES):
        expected, _ = slow_masks(image, (1 / 8, 1 / 8), (5, 7))
        torch.testing.assert_close(mask, expected.float())
    published = foreground_mask(boxes, sizes, (9, 11), None)
    assert (published[2] > 0).all() and 0 < int((wide[2] > 0).sum()) < 9 * 11
    whole = foreground_mask(boxes[:1], [(40, 56)], (5, 7), None)  # an image without padding
    torch.testing.assert_close(whole, narrow[:1])


def test_fgd_masks_have_the_smallest_box_and_none_without_objects(monkeypatch):
    boxes = boxes_of(BOXES[0], [])
    mask = foreground_mask(boxes, [(40, 50)] * 2, (5, 7), 8)
    assert float(mask[0, 0, 0]) == pytest.approx(1 / (4 * 3))  # of the second box
    assert float(mask[0, 1, 3]) == pytest.approx(1 / (2 * 2))  # of the last, which has no size
    assert float(mask[0, 4, 6]) == pytest.approx(1 / (7 * 6))  # of the first
    assert not mask[1].any()
    assert background_mask(mask)[1].unique().tolist() == pytest.approx([1 / 35])
    assert not background_mask(torch.ones(1, 5, 7)).any()
    monkeypatch.setattr(fgd, "MAX_CELLS_PER_CHUNK", 1)
    assert torch.equal(foreground_mask(boxes, [(40, 50)] * 2, (5, 7), 8), mask)
    none = foreground_mask(boxes_of([], []), [(40, 50)] * 2, (5, 7), None)
    assert none.shape == (2, 5, 7) and not none.any()


@pytest.mark.parametrize("published", [True, False])
def test_fgd_takes_its_masks_as_it_is_told(published):
    loss = set_up(FGDLoss(published_masks=published))
    loss.strides = {"p3": 8}
    truth = Instances((20, 20), gt_boxes=Boxes([[0.0, 0.0, 20.0, 20.0]]))
    mask = loss.foreground_mask([truth], (10, 10), "p3")
    assert bool((mask > 0).all()) == published


@pytest.mark.parametrize(
    "family, temperature, expected, levels",
    [
        ("faster_rcnn", 0.5, [5e-5, 2.5e-5, 5e-5, 5e-7], "p2 p3 p4 p5"),
        ("retinanet", 0.5, [1e-3, 5e-4, 5e-4, 5e-6], "p3 p4 p5 p6 p7"),
        ("gfl", 0.5, [1e-3, 5e-4, 5e-4, 5e-6], "p3 p4 p5 p6 p7"),
        ("fcos", 0.8, [1.6e-3, 8e-4, 8e-4, 8e-6], "p3 p4 p5 p6 p7"),
    ],
)
def test_fgd_defaults(family, temperature, expected, levels):
    loss = set_up(FGDLoss(), family)
    assert [loss.term_weight(name) for name in fgd.TERMS] == expected
    assert (loss.temperature, " ".join(loss.levels)) == (temperature, levels)
    kept = set_up(FGDLoss(temperature=2.0, attention_weight=0.25), family)
    assert (kept.temperature, kept.attention_weight, kept.background_weight) == (
        *(2.0, 0.25),
        expected[1],
    )


def test_fgd_weights_are_those_of_its_terms():
    """A term without a weight is not computed, and one may follow a schedule."""

    def terms(iteration=1, **options):
        torch.manual_seed(0)
        model = distiller(lambda: FGDLoss(levels=["p4"], **options), DETECTORS["retinanet"])
        losses = forward_losses(model, batch())
        return model, {
            key.removeprefix("distill/loss_loss_"): float(value.detach())
            for key, value in losses.items()
            if key.startswith("distill/")
        }

    ones = {f"{name}_weight": 1.0 for name in fgd.TERMS}
    _, single = terms(**ones)
    _, double = terms(**(ones | {"relation_weight": 2.0}))
    assert double == pytest.approx(single | {"relation": 2 * single["relation"]})
    model, some = terms(**(ones | {"relation_weight": 0, "foreground_weight": 0}))
    assert some == pytest.approx({name: single[name] for name in ("background", "attention")})
    assert not any("relation" in name for name, _ in model.losses.named_parameters())
    schedule = LinearParamScheduler(1.0, 0.0)  # a half at half of the run
    _, falling = terms(**(ones | {"attention_weight": schedule}))
    assert falling == pytest.approx(single | {"attention": single["attention"] / 2})


def test_fgd_relations_begin_as_the_identity_and_both_learn():
    block = RelationBlock(7)
    features = torch.randn(2, 7, 3, 4)
    assert torch.equal(block(features), features)
    torch.nn.init.normal_(block.transform[-1].weight)
    added = block(features) - features
    assert added.abs().max() > 0.01
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added))
    assert RelationBlock(1)(features[:, :1]).shape == (2, 1, 3, 4)
    model = distiller(FGDLoss, DETECTORS["retinanet"])
    loss = model.losses.by_name["loss"]
    sum_distill_losses(forward_losses(model, batch())).backward()
    for blocks in (loss.relations, loss.target_relations):
        assert all(block.transform[-1].weight.grad.any() for block in blocks.values())


def test_fgd_is_in_units_of_the_teacher():
    s, t = torch.randn(2, 1, 16, 8, 8)
    truth = Instances((64, 64), gt_boxes=Boxes([[9.0, 9.0, 40.0, 30.0]]))
    images = SimpleNamespace(tensor=torch.zeros(1, 3, 64, 64), image_sizes=[(64, 64)])

    def values(factor, normalize):
        loss = set_up(FGDLoss(levels=["p3"], normalize=normalize))
        teacher = outputs({"p3": factor * t}, images=images)
        found = loss(outputs({"p3": factor * s}, gt_instances=[truth]), teacher)
        return torch.stack(list(found.values())).tolist()

    assert values(10, True) == pytest.approx(values(1, True), rel=1e-3)
    assert values(10, False)[0] > 50 * values(1, False)[0]


def test_fgd_refuses(refuses):
    refuses(lambda: FGDLoss(temperature=0), "temperature: 0; expected a positive number")


# ReviewKD


def slow_norm(given, level, name, features, after):
    """Batch normalisation with the batch's statistics; `after` gets the running ones."""
    key = f"{level}/{name}.1"
    mean = features.mean(dim=(0, 2, 3))
    variance = features.var(dim=(0, 2, 3), correction=0)
    count = features.numel() // features.shape[1]
    for part, value in (("mean", mean), ("var", variance * count / (count - 1))):
        old = torch.from_numpy(given.arrays[f"weight/{key}.running_{part}"]).double()
        after[f"after/{key}.running_{part}"] = 0.9 * old + 0.1 * value
    scale, shift = (given[f"weight/{key}.{x}"][:, None, None] for x in ("weight", "bias"))
    standard = (features - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    return standard * scale + shift


def slow_hierarchy(s, t):
    weights, distances = [1.0], [((s - t) ** 2).mean()]
    height, width = s.shape[2:]
    for size in (4, 2, 1):
        if size >= height:
            continue
        total = 0.0
        for i in range(size):
            rows = slice(i * height // size, -((i + 1) * height // -size))
            for j in range(size):
                columns = slice(j * width // size, -((j + 1) * width // -size))
                a, b = (x[:, :, rows, columns].mean(dim=(2, 3)) for x in (s, t))
                total = total + ((a - b) ** 2).mean() / size**2
        weights.append(weights[-1] / 2)
        distances.append(total)
    return sum(w * x for w, x in zip(weights, distances)) / sum(weights)


def test_reviewkd_in_double_precision(tmp_path):
    """Of 10, 6 and 12 channels, on grids that are no multiples of each other."""
    shapes = {"conv1.0.weight": (6, 10, 1, 1), "conv2.0.weight": (12, 6, 3, 3)}
    for name, channels in (("conv1", 6), ("conv2", 12)):
        parts = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{name}.1.{part}": (channels,) for part in parts}
    attention = {"att_conv.0.weight": (2, 12, 1, 1), "att_conv.0.bias": (2,)}
    arrays = random_arrays(6, student=10) | weights(shapes | attention, seed=8)
    arrays = {k: v for k, v in arrays.items() if not k.startswith("weight/p5/att_conv")}
    for name in arrays:
        if name.endswith("running_var"):
            arrays[name] = np.abs(arrays[name])
    arrays["loss_weight"] = np.float32(2)
    given, losses, found, carried = Doubles(arrays), {}, {}, None
    for level in ("p5", "p4", "p3"):
        x = conv2d(given[f"student_feature/{level}"], given[f"weight/{level}/conv1.0.weight"])
        x = slow_norm(given, level, "conv1", x, found)
        if carried is not None:
            index = [
                [i * n // new for i in range(new)] for n, new in zip(carried.shape[2:], x.shape[2:])
            ]
            carried = carried[:, :, index[0]][..., index[1]]
            parts = [given[f"weight/{level}/att_conv.0.{part}"] for part in ("weight", "bias")]
            shares = conv2d(torch.cat([x, carried], dim=1), *parts)
            shares = 1 / (1 + (-shares).exp())
            x = x * shares[:, :1] + carried * shares[:, 1:]
        carried = x
        out = conv2d(x, given[f"weight/{level}/conv2.0.weight"], padding=1)
        out = slow_norm(given, level, "conv2", out, found)
        found[f"reviewed_feature/{level}"] = out
        losses[level] = 2 * slow_hierarchy(out, given[f"teacher_feature/{level}"])
    assert_agrees("reviewkd", arrays, found | given.gradients(losses), tmp_path)


def test_reviewkd_compares_in_several_resolutions():
    s, t = torch.randn(2, 2, 3, 5, 9)
    assert hierarchical_distance(s, s) == 0
    assert float(hierarchical_distance(s + 3, s)) == pytest.approx(9, rel=1e-5)
    torch.testing.assert_close(
        hierarchical_distance(s.double(), t.double()), slow_hierarchy(s.double(), t.double())
    )
    for height, weights in ((1, 1), (2, 1 + 1 / 2), (4, 1 + 3 / 4), (5, 1 + 7 / 8)):
        checked = torch.zeros(1, 1, height, 8)
        checked[..., ::2], checked[..., 1::2] = 1.0, -1.0  # 0 in every average
        found = float(hierarchical_distance(checked, 0 * checked))
        assert found == pytest.approx(1 / weights), height
    halves = hierarchical_distance(s.bfloat16() * 1e20, t.bfloat16())
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_reviewkd_of_one_cell_of_one_image(norm):
    """Of a single value there are no batch statistics."""
    block = ReviewBlock(10, 6, 12, norm, fuses=False).train()
    before = {name: x.clone() for name, x in block.named_buffers()}
    carried, out = block(torch.randn(1, 10, 1, 1))
    hierarchical_distance(out, torch.zeros_like(out)).backward()
    assert carried.shape == (1, 6, 1, 1) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert all(torch.equal(x, before[name]) for name, x in block.named_buffers())
    block(torch.randn(2, 10, 1, 1))
    changed = [not torch.equal(x, before[name]) for name, x in block.named_buffers()]
    assert all(changed) and bool(changed) == (norm == "BN")


def test_reviewkd_with_group_norm_does_not_depend_on_the_batch():
    torch.manual_seed(1)
    values = {}
    for norm in ("BN", "GN"):
        loss = set_up(ReviewKDLoss(norm=norm, normalize=False), "gfl")
        generator = torch.Generator().manual_seed(0)
        s, t = (
            {k: torch.randn(2, 16, 4, 4, generator=generator) for k in loss.levels}
            for _ in range(2)
        )
        one = [
            {
                side: {k: x[i : i + 1] for k, x in maps.items()}
                for side, maps in (("s", s), ("t", t))
            }
            for i in range(2)
        ]
        apart = [loss(outputs(x["s"]), outputs(x["t"])) for x in one]
        together = loss(outputs(s), outputs(t))
        values[norm] = float((together - sum(apart) / 2).abs().detach())
    assert values["GN"] < 1e-4 < values["BN"]


@pytest.mark.parametrize(
    "student, teacher, levels",
    [
        ("faster_rcnn", "mask_rcnn", "p2 p3 p4 p5 p6"),
        ("retinanet", "retinanet", "p3 p4 p5 p6 p7"),
        ("retinanet", "faster_rcnn", "p3 p4 p5"),
    ],
)
def test_reviewkd_goes_from_coarse_to_fine(student, teacher, levels, caplog):
    loss = ReviewKDLoss()
    student, teacher = detectors(student, teacher, channels=24)
    loss.setup(student, teacher)
    assert f"compares {levels.split()[0]} to {levels.split()[0]}, " in caplog.text
    assert (" ".join(loss.levels), loss.weight) == (levels, 1.0)
    assert list(loss.blocks) == levels.split()[::-1]
    assert [block.attention is not None for block in loss.blocks.values()] == [
        level != levels.split()[-1] for level in loss.blocks
    ]
    assert {block.expand[0].weight.shape[:2] for block in loss.blocks.values()} == {(24, 24)}
    narrow = ReviewKDLoss(width=6, levels={levels.split()[0]: "p4"})
    narrow.setup(student, teacher)
    assert [block.reduce[0].weight.shape[:2] for block in narrow.blocks.values()] == [(6, 16)]


def test_reviewkd_is_in_units_of_the_teacher():
    """Its own side ends in a normalisation, so it does not follow the student's scale either."""
    s, t = torch.randn(2, 2, 16, 8, 8)
    images = SimpleNamespace(tensor=torch.zeros(2, 3, 64, 64), image_sizes=[(64, 64)] * 2)

    def value(factor, normalize):
        torch.manual_seed(0)
        loss = set_up(ReviewKDLoss(levels=["p3"], normalize=normalize))
        teacher = outputs({"p3": factor * t}, images=images)
        return float(loss(outputs({"p3": 7 * factor * s}), teacher).detach())

    assert value(100, True) == pytest.approx(value(1, True), rel=1e-3)
    assert value(100, False) > 1000 * value(1, False)


@pytest.mark.parametrize(
    "options, line",
    [
        ({"norm": "LN"}, "norm: LN; expected BN or GN"),
        ({"width": 0}, "width: 0; expected a positive number of channels"),
    ],
)
def test_reviewkd_refuses(refuses, options, line):
    refuses(lambda: ReviewKDLoss(**options), line)
