"""A teacher of larger images: the same view, levels and regions matched in the student's pixels."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, ImageList, Instances, Keypoints
from omegaconf import OmegaConf

from d2kd.config import distill, load, with_downscaled_student
from d2kd.data import DownscaledStudentMapper
from d2kd.data.scales import downscale
from d2kd.layers.adapter import (
    LevelStrides,
    covered_cells,
    match_levels,
    resize_map,
    teacher_maps,
)
from d2kd.losses import DistillLosses, ICDLoss, ImitationLoss, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.testing import edge_case_batches, forward_losses
from d2kd.utils.errors import InputError

from .common import DETECTORS, batch, build, lively, tiny_faster_rcnn, tiny_retinanet
from .test_layers import Backbone, shapes
from .tiny_run import recipe

SCALES = [2, 1.5]


def two_scales(examples, scale=2):
    """The batch as the mapper would give it."""
    samples = iter(copy.deepcopy(examples))
    mapper = DownscaledStudentMapper(lambda _: next(samples), scale)
    return [mapper({}) for _ in examples]


def small_side(side, scale):
    return math.ceil(side / scale) if scale == int(scale) else max(1, int(side / scale + 0.5))


@pytest.mark.parametrize("scale", [2, 3, 1.5, 4 / 3, 2.4])
@pytest.mark.parametrize("size", [(64, 96), (61, 47), (2, 1)])
def test_one_view_in_two_sizes(size, scale):
    (full,) = batch(sizes=(size,), objects=(2,))
    full["instances"].gt_keypoints = Keypoints(torch.ones(2, 5, 3))
    (sample,) = two_scales([full], scale)
    assert sample["teacher_image"] is full["image"] or sample["teacher_image"].equal(full["image"])
    assert sample["image"].dtype == torch.uint8
    height, width = (small_side(side, scale) for side in size)
    assert sample["image"].shape == (3, height, width)
    ours, theirs = sample["instances"], full["instances"]
    assert ours.image_size == (height, width)
    factors = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    torch.testing.assert_close(ours.gt_boxes.tensor * factors, theirs.gt_boxes.tensor)
    small, large = (x.gt_masks.get_bounding_boxes().tensor for x in (ours, theirs))
    torch.testing.assert_close(small * factors, large)
    points = ours.gt_keypoints.tensor[..., :2] * factors[:2]
    torch.testing.assert_close(points, torch.ones_like(points))
    assert (ours.gt_keypoints.tensor[..., 2] == 1).all()
    assert ours.gt_classes.equal(theirs.gt_classes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(64, 96), (101, 77), (5, 3)])
def test_what_a_perfect_student_detects_is_the_object(size, scale):
    """In the file's pixels, wherever it lies; and so are the regions that its teacher is asked about."""
    (full,) = batch(sizes=(size,), objects=(5,))
    (sample,) = two_scales([full | {"proposals": copy.deepcopy(full["instances"])}], scale)
    truth = full["instances"].gt_boxes
    for key in ("instances", "proposals"):
        perfect = Instances(sample["image"].shape[-2:])
        perfect.pred_boxes = sample[key].gt_boxes.clone()
        found = detector_postprocess(perfect, *size)
        torch.testing.assert_close(found.pred_boxes.tensor, truth.tensor)
    teacher = Teacher(build(tiny_faster_rcnn()), None, scale=scale)
    outputs = teacher.outputs([sample], region_boxes=[[sample["instances"].gt_boxes]])
    torch.testing.assert_close(outputs.region_boxes[0][0].tensor, truth.tensor)


def test_pixels_lie_where_they_lay():
    """A white stripe at the far end of an odd side is at the far end of the smaller one, as wide."""
    image = torch.zeros(1, 101, 101)
    image[..., 91:] = 100.0
    small = downscale(image, 2)
    assert small.shape == (1, 51, 51) and small[..., -1].min() == 100 and small[..., 0].max() == 0
    assert float((small / 100).sum(-1).mean()) * 101 / 51 == pytest.approx(10, abs=0.75)


@pytest.mark.parametrize("scale", [1.5, 4 / 3, 2.4, 3.7])
@pytest.mark.parametrize("side", [96, 101])
def test_no_pixel_is_shifted(side, scale):
    """A pixel of the smaller image has the value at its centre, except near the borders, which the filter covers."""
    ramp = torch.arange(side).float().expand(1, side, side)
    small = downscale(ramp, scale)
    count = small.shape[-1]
    assert abs(count * scale - side) <= scale / 2
    centres = (torch.arange(count) + 0.5) * side / count - 0.5
    inner = slice(2, -2)
    torch.testing.assert_close(small[0, 0, inner], centres[inner], rtol=0, atol=0.1)
    torch.testing.assert_close(downscale(ramp.mT, scale), small.mT)


def test_a_size_that_fits_is_exact():
    """Also where the quotient is not exact in floating point."""
    for side, scale, expected in ((384, 1.2, 320), (288, 1.2, 240), (384, 1.5, 256), (7, 1.4, 5)):
        assert downscale(torch.zeros(1, side, 8), scale).shape[1] == expected


def test_pixels_are_means():
    image = torch.arange(3 * 4 * 6).reshape(3, 4, 6).float()
    small = downscale(image, 2)
    assert small[1, 1, 2] == image[1, 2:4, 4:6].mean()
    assert downscale(torch.full((3, 5, 7), 9, dtype=torch.uint8), 2).unique().tolist() == [9]
    assert downscale(torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8), 2).item() == 1  # of 0.75


def test_samples_without_a_part_stay_so():
    assert DownscaledStudentMapper(lambda _: None, 2)({}) is None
    (sample,) = two_scales([{"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "height": 80}])
    assert "instances" not in sample and sample["height"] == 80


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_levels_match_by_stride_in_the_students_pixels(family):
    student, teacher = build(DETECTORS[family]()), build(DETECTORS[family]())
    levels = list(student.backbone.output_shape())
    matches = match_levels(student.backbone, teacher.backbone, scale=2)
    assert matches and all(int(b[1:]) == int(a[1:]) + 1 for a, b in matches.items())
    assert levels[-1] not in matches
    with pytest.raises(InputError, match=f"no level of stride .*, for {levels[-1]!r}"):
        match_levels(student.backbone, teacher.backbone, levels, scale=2)


LOG_STEP = math.log(2) / 2


@pytest.mark.parametrize("scale", [1.1, 1.4, 2**0.5, 1.5, 1.9, 2.5, 3, 3.3])
def test_levels_match_the_nearest_strides(scale):
    """Within half an octave, each once, and finer ones to finer ones; those beyond the last level to none."""
    student, teacher = Backbone(shapes(4, (2, 3, 4, 5, 6))), Backbone(shapes(4, (2, 3, 4, 5)))
    matches = match_levels(student, teacher, scale=scale)
    strides = [2 ** int(level[1:]) * scale for level in matches]
    found = [2 ** int(match[1:]) for match in matches.values()]
    assert found == sorted(set(found)) and strides == sorted(strides)
    for wanted, stride in zip(strides, found):
        assert abs(math.log(stride / wanted)) <= LOG_STEP + 1e-6
        assert all(
            abs(math.log(2**k / wanted)) > LOG_STEP - 1e-6 for k in range(2, 6) if 2**k != stride
        )
    unmatched = {f"p{k}" for k in range(2, 7)} - matches.keys()
    assert all(2 ** int(level[1:]) * scale > 32 * 2**0.5 - 1e-6 for level in unmatched)
    for level in unmatched:
        with pytest.raises(
            InputError, match=rf"no level to be matched .* of stride .*, for '{level}'"
        ):
            match_levels(student, teacher, [level], scale=scale)


def test_of_two_levels_as_near_the_finer():
    student, teacher = Backbone(shapes(4, (3, 4))), Backbone(shapes(4, (3, 4, 5)))
    assert match_levels(student, teacher, scale=2**0.5) == {"p3": "p3", "p4": "p4"}
    # Strides 8 and 9 are nearest to the same level, which takes the nearer.
    close = {"a": SimpleNamespace(stride=8), "b": SimpleNamespace(stride=9)}
    one = Backbone({"p": SimpleNamespace(stride=16)})
    assert match_levels(Backbone(close), one, scale=1.8) == {"b": "p"}
    assert match_levels(Backbone(close), one, scale=2.1) == {"a": "p"}
    with pytest.raises(InputError, match="no level to be matched .* of stride 14.4, for 'a'"):
        match_levels(Backbone(close), one, ["a"], scale=1.8)


@pytest.mark.parametrize("family, expected", [("faster_rcnn", "234"), ("retinanet", "346")])
def test_top_blocks_match_as_with_an_integer_scale(family, expected):
    student, teacher = build(DETECTORS[family]()), build(DETECTORS[family]())
    for scale in (1.5, 2):
        matches = match_levels(student.backbone, teacher.backbone, scale=scale)
        assert matches == {f"p{k}": f"p{int(k) + 1}" for k in expected}
    # Named, another kind of level is compared too.
    assert match_levels(student.backbone, teacher.backbone, ["p5"], scale=1.5) == {"p5": "p6"}


def linear(size, stride, image_size):
    """A map (3, H, W) of x, y and 1 at the centres of its cells, x and y as fractions of the image."""
    y, x = ((torch.arange(n) + 0.5) * stride / side for n, side in zip(size, image_size))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


SIZES = [(96, 144), (101, 77), (64, 140), (65, 33)]


@pytest.mark.parametrize("stride", [2, 8])
def test_levels_of_other_strides_show_the_same_places(stride):
    """Pairs of levels that a recipe names: the teacher's map is resized to the student's cells."""
    images = [linear(size, 1, size)[:2] for size in SIZES]
    student, teacher = outputs_of(images, 4, 32), outputs_of(images, stride, 64)
    pair = LevelStrides({"p2": "p2"}, {"p2": 4}, {"p2": stride})
    (theirs,), (valid,) = (
        teacher_maps(student, teacher, pair),
        covered_cells(student, teacher, pair),
    )
    ours = student.features["p2"]
    assert theirs.shape == ours.shape
    for a, b, cells, (height, width) in zip(ours, theirs, valid, SIZES):
        assert cells.sum() == math.ceil(height / 4) * math.ceil(width / 4)
        inside = slice(2, height // 4 - 2), slice(2, width // 4 - 2)
        torch.testing.assert_close(b[:, *inside], a[:, *inside], atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale, stride", [(1.5, 4), (1.5, 8), (1.3, 4), (2.7, 8), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cells_correspond_by_the_image(scale, stride, dtype):
    """A linear function of the image's coordinates has its own values at the new centres, whatever the padding."""
    small = [tuple(small_side(side, scale) for side in size) for size in SIZES]
    full = torch.stack([linear((32, 40), stride, size) for size in SIZES])
    new = torch.stack([linear((26, 37), 4, size) for size in small])
    resized = resize_map(full.to(dtype), stride, SIZES, (26, 37), 4, small)
    assert resized.dtype == dtype and resized.shape == new.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, expected, size in zip(resized.float(), new, SIZES):
        y, x = (expected[i] for i in (1, 0))
        # Between the centres of the first and last cell that the image covers.
        inside = torch.ones_like(x, dtype=torch.bool)
        for at, side in ((y, size[0]), (x, size[1])):
            inside &= (at * side >= stride / 2) & (
                at * side <= math.ceil(side / stride) * stride - stride / 2
            )
        assert inside.sum() > 0.5 * math.ceil(size[0] / scale / 4) * math.ceil(size[1] / scale / 4)
        assert (found - expected)[:, inside].abs().max() <= tolerance


def test_a_map_of_the_same_grid_stays():
    full = torch.randn(4, 2, 32, 40, generator=torch.Generator().manual_seed(0))
    sizes = [(128, 160)] * 4
    torch.testing.assert_close(
        resize_map(full, 4, sizes, (32, 40), 4, sizes), full, atol=1e-4, rtol=0
    )


def test_padding_is_not_read():
    full, cells = torch.zeros(1, 1, 16, 16), (math.ceil(37 / 4), math.ceil(50 / 4))
    full[..., cells[0] :, :] = full[..., :, cells[1] :] = 1e4
    resized = resize_map(full, 4, [(37, 50)], (16, 16), 4, [(25, 33)])
    assert resized.abs().max() < 0.1  # rounding; a neighbour's smallest share would be more
    full = torch.ones_like(full)
    full[..., cells[0] - 1, :] = 3
    last = resize_map(full, 4, [(37, 50)], (16, 16), 4, [(25, 33)])[0, 0, :, 0]
    assert last[-1] == pytest.approx(3) and last[0] == pytest.approx(1)


def outputs_of(images, stride, divisor, others=None):
    """Outputs of a detector whose features are the means of its pixels, at p2."""
    sizes = [tuple(image.shape[-2:]) for image in images]
    padded = ImageList.from_tensors(images, divisor)
    return SimpleNamespace(
        images=ImageList(padded.tensor, sizes),
        features={"p2": F.avg_pool2d(padded.tensor, stride)},
        student_image_sizes=others,
    )


@pytest.mark.parametrize("scale, stride", [(1.5, 4), (1.5, 8), (2.6, 8), (2, 4)])
def test_both_detectors_see_the_same_places(scale, stride):
    """From the mapper's images to the maps that are compared: each cell's mean coordinates are the same on both sides."""
    images = [linear(size, 1, size)[:2] for size in SIZES]
    samples = two_scales([{"image": image} for image in images], scale)
    small = [sample["image"] for sample in samples]
    sizes = [tuple(image.shape[-2:]) for image in small]
    student, teacher = outputs_of(small, 4, 32), outputs_of(images, stride, 64, sizes)
    given = student, teacher, LevelStrides({"p2": "p2"}, {"p2": 4}, {"p2": stride}, scale)
    (theirs,), (valid,) = teacher_maps(*given), covered_cells(*given)
    ours = student.features["p2"]
    assert theirs.shape == ours.shape
    for a, b, cells, (height, width) in zip(ours, theirs, valid, sizes):
        assert cells.sum() == math.ceil(height / 4) * math.ceil(width / 4)
        rows, columns = height // 4 - 4, width // 4 - 4  # whole cells, with whole ones beside them
        if min(rows, columns) > 0:
            inner = (..., slice(2, 2 + rows), slice(2, 2 + columns))
            assert (a[inner] - b[inner]).abs().max() < 0.1 * 4 / min(
                height, width
            )  # a tenth of a cell


def pair(family, scale=2):
    node = DETECTORS[family]
    losses = {"imitation": ImitationLoss(), "icd": ICDLoss(heads=2, priors=None)}
    losses |= {"tar": TARLoss(cls_gate="none", reg_gate="none")} if family == "faster_rcnn" else {}
    teacher = Teacher(build(node(), seed=1), None, scale=scale)
    losses = DistillLosses(**losses)
    return Distiller(student=build(node()), teacher=teacher, losses=losses, max_iter=10)


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
@pytest.mark.parametrize("name", ["plain", *edge_case_batches()])
@pytest.mark.parametrize("scale", SCALES)
def test_every_loss_works_across_scales(family, name, scale):
    examples = two_scales({"plain": batch(), **edge_case_batches()}[name], scale)
    model = pair(family, scale).train()
    losses = forward_losses(model, examples)
    assert all(torch.isfinite(value) for value in losses.values())
    assert any(key.startswith("distill/loss_icd") for key in losses)
    if name == "plain":
        distilled = {key: value for key, value in losses.items() if key.startswith("distill/")}
        for key, value in distilled.items():
            gradients = torch.autograd.grad(
                value, [*model.parameters()], retain_graph=True, allow_unused=True
            )
            norms = [gradient.norm() for gradient in gradients if gradient is not None]
            assert torch.isfinite(torch.stack(norms)).all() and max(norms) > 0, key


@pytest.mark.parametrize("mask", ["none", "box"])
def test_maps_that_are_constant_are_compared_alike_at_every_scale(mask):
    """Equal ones are equal, and others differ by as much as with images of one size: no cell counts more or less."""
    found = []
    for scale, examples in (
        (1, batch()),
        (2, two_scales(batch())),
        (1.5, two_scales(batch(), 1.5)),
    ):
        teacher = Teacher(build(tiny_faster_rcnn()), None, scale=scale)
        losses = DistillLosses(imitation=ImitationLoss(mask=mask, weight=1.0))
        student = build(tiny_faster_rcnn())
        model = Distiller(student=student, teacher=teacher, losses=losses, max_iter=2).train()
        value = {student.backbone: 7, teacher.detector.backbone: 7}
        for backbone in value:
            backbone.register_forward_hook(
                lambda one, given, maps, value=value: {
                    k: 0 * x + value[one] for k, x in maps.items()
                }
            )
        assert forward_losses(model, examples)["distill/loss_imitation"].item() < 1e-8
        value[teacher.detector.backbone] = 9
        found.append(forward_losses(model, examples)["distill/loss_imitation"].item())
    assert found[0] > 0 and found == pytest.approx(found[:1] * 3, rel=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_the_student_sees_the_small_images_alone(scale):
    examples = two_scales(batch(), scale)
    model, alone = pair("retinanet", scale).train(), build(tiny_retinanet()).train()
    ours = {
        k: v for k, v in forward_losses(model, examples).items() if not k.startswith("distill/")
    }
    theirs = forward_losses(alone, [{**x, "teacher_image": None} for x in examples])
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


@pytest.mark.parametrize("scale", SCALES)
def test_regions_are_the_same_places(scale):
    """A teacher of images that many times larger pools the same places, from maps of its own."""
    found = []
    for times, examples in ((scale, two_scales(batch(), scale)), (1, batch())):
        boxes = [x["instances"].gt_boxes for x in examples]
        outputs = Teacher(build(tiny_faster_rcnn()), None, scale=times).outputs(
            examples, region_boxes=[boxes]
        )
        found.append(outputs.regions[0].pred_class_logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("scale", SCALES)
def test_detections_are_in_the_files_pixels(scale):
    found = []
    for times, examples in ((scale, two_scales(batch(), scale)), (1, batch())):
        teacher = Teacher(lively(build(tiny_retinanet())), None, scale=times)
        detections = teacher.detect([{**x, "height": 640, "width": 480} for x in examples])
        assert all(x["instances"].image_size == (640, 480) for x in detections)
        found.append([x["instances"].pred_boxes.tensor for x in detections])
    assert all(map(len, found[0]))
    torch.testing.assert_close(*found)


def test_mappers_that_take_parts_from_elsewhere_keep_them():
    base = load("baselines/faster_rcnn_small_bccd.py")  # one's augmentation is another's
    base.dataloader.test.mapper.recompute_boxes = "???"  # which is not for us to complain about
    small = with_downscaled_student(base, 2)
    for part, count in (("train", 3), ("test", 1)):
        small.dataloader[part].mapper.mapper.recompute_boxes = False
        mapper = instantiate(small.dataloader[part].mapper)
        resize, *flips = mapper.mapper.augmentations.augs
        assert mapper.scale == 2 and len(flips) == count - 1
        assert small.dataloader[part].mapper.mapper.augmentations[0].short_edge_length == 240
    small.dataloader.train.mapper.mapper.augmentations[0].short_edge_length = 120
    assert small.dataloader.test.mapper.mapper.augmentations[0].short_edge_length == 240
    assert OmegaConf.is_interpolation(base.dataloader.test.mapper, "image_format")


@pytest.mark.parametrize("scale", SCALES)
def test_a_recipe_at_two_scales(tmp_path, scale):
    base = recipe(tmp_path / "data", tmp_path / "out", max_iter=2)
    small = with_downscaled_student(base, scale)
    for part in ("train", "test"):
        mapper = small.dataloader[part].mapper
        assert mapper.scale == scale and mapper.mapper.image_format == "BGR"
        assert "scale" not in base.dataloader[part].mapper
    whole = distill(
        base,
        teacher=L(Teacher)(detector=tiny_retinanet(), weights=None),
        losses=L(DistillLosses)(),
        scale=scale,
    )
    assert whole.model.teacher.scale == scale
    assert whole.dataloader.train.mapper.scale == scale


def _bitmaps():
    instances = Instances((8, 8))
    instances.gt_masks = BitMasks(torch.ones(1, 8, 8))
    two_scales([{"image": torch.zeros(3, 8, 8), "instances": instances}])


def _teacher(node, scale):
    return Teacher(build(node()), None, scale=scale)


def _distiller(node, **options):
    given = {"losses": DistillLosses(), "max_iter": 4, **options}
    return Distiller(student=build(node()), teacher=_teacher(node, 2), **given)


@pytest.mark.parametrize(
    "act, line",
    [
        *(
            (
                lambda scale=scale: DownscaledStudentMapper(len, scale),
                f"scale: {scale}; expected any number above 1",
            )
            for scale in (1, 0, -2, 0.5, math.nan, math.inf, "2")
        ),
        (_bitmaps, "mapper: masks as bitmaps"),
        (
            lambda: _distiller(tiny_retinanet, losses=DistillLosses(tar=TARLoss())),
            "anchors: a teacher of images 2 times larger",
        ),
        (
            lambda: _distiller(tiny_faster_rcnn, proposals_from="both"),
            "proposals_from: both, at 2 times",
        ),
        (
            lambda: Distiller(
                student=build(tiny_retinanet()),
                teacher=_teacher(tiny_retinanet, 1.5),
                losses=DistillLosses(tar=TARLoss()),
                max_iter=4,
            ),
            "losses.tar.anchors: a teacher of images 1.5 times larger; expected the same anchors, or",
        ),
        (
            lambda: _teacher(tiny_retinanet, 1.5).outputs(two_scales(batch(), 1.6)),
            r"teacher.scale: 1.5, but an image of \(64, 64\) beside .* \(40, 40\); expected the scale",
        ),
        (
            lambda: _teacher(tiny_retinanet, 2).outputs(batch()),
            "teacher.scale: 2, but a batch without 'teacher_image'",
        ),
        (
            lambda: _teacher(tiny_retinanet, 3).outputs(two_scales(batch())),
            r"teacher.scale: 3, .* \(64, 64\) beside .* \(32, 32\)",
        ),
        *(
            (
                lambda scale=scale: _teacher(tiny_retinanet, scale),
                f"teacher.scale: {scale}; expected any",
            )
            for scale in (0, 0.5, math.nan, math.inf, "2")
        ),
    ],
)
def test_what_is_refused(refuses, act, line):
    refuses(act, line)
