"""A teacher of larger images: the same view, levels and regions matched in the student's pixels."""

import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Instances, Keypoints
from omegaconf import OmegaConf

from d2kd.config import distill, load, with_downscaled_student
from d2kd.data import DownscaledStudentMapper
from d2kd.data.scales import downscale
from d2kd.layers.adapter import match_levels
from d2kd.losses import DistillLosses, ICDLoss, ImitationLoss, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.testing import edge_case_batches, step
from d2kd.utils.errors import InputError

from .common import DETECTORS, batch, build, lively, tiny_faster_rcnn, tiny_retinanet
from .tiny_run import recipe


def two_scales(examples, scale=2):
    """The batch as the mapper would give it."""
    samples = iter(copy.deepcopy(examples))
    mapper = DownscaledStudentMapper(lambda _: next(samples), scale)
    return [mapper({}) for _ in examples]


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("size", [(64, 96), (61, 47), (2, 1)])
def test_one_view_in_two_sizes(size, scale):
    (full,) = batch(sizes=(size,), objects=(2,))
    full["instances"].gt_keypoints = Keypoints(torch.ones(2, 5, 3))
    (sample,) = two_scales([full], scale)
    assert sample["teacher_image"] is full["image"] or sample["teacher_image"].equal(full["image"])
    assert sample["image"].dtype == torch.uint8
    height, width = -(-size[0] // scale), -(-size[1] // scale)
    assert sample["image"].shape == (3, height, width)
    ours, theirs = sample["instances"], full["instances"]
    assert ours.image_size == (height, width)
    factors = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    torch.testing.assert_close(ours.gt_boxes.tensor * factors, theirs.gt_boxes.tensor)
    torch.testing.assert_close(
        ours.gt_masks.get_bounding_boxes().tensor * factors,
        theirs.gt_masks.get_bounding_boxes().tensor,
    )
    points = ours.gt_keypoints.tensor[..., :2] * factors[:2]
    torch.testing.assert_close(points, torch.ones_like(points))
    assert (ours.gt_keypoints.tensor[..., 2] == 1).all()
    assert ours.gt_classes.equal(theirs.gt_classes)


@pytest.mark.parametrize("size", [(64, 96), (101, 77), (5, 3)])
def test_what_a_perfect_student_detects_is_the_object(size):
    """In the file's pixels, wherever it lies; and so are the regions that its teacher is asked about."""
    (full,) = batch(sizes=(size,), objects=(5,))
    (sample,) = two_scales([full | {"proposals": copy.deepcopy(full["instances"])}])
    truth = full["instances"].gt_boxes
    for key in ("instances", "proposals"):
        perfect = Instances(sample["image"].shape[-2:])
        perfect.pred_boxes = sample[key].gt_boxes.clone()
        found = detector_postprocess(perfect, *size)
        torch.testing.assert_close(found.pred_boxes.tensor, truth.tensor)
    teacher = Teacher(build(tiny_faster_rcnn()), None, scale=2)
    outputs = teacher.outputs([sample], region_boxes=[[sample["instances"].gt_boxes]])
    torch.testing.assert_close(outputs.region_boxes[0][0].tensor, truth.tensor)


def test_pixels_lie_where_they_lay():
    """A white stripe at the far end of an odd side is at the far end of the smaller one, as wide."""
    image = torch.zeros(1, 101, 101)
    image[..., 91:] = 100.0
    small = downscale(image, 2)
    assert small.shape == (1, 51, 51) and small[..., -1].min() == 100 and small[..., 0].max() == 0
    assert float((small / 100).sum(-1).mean()) * 101 / 51 == pytest.approx(10, abs=0.75)


def test_pixels_are_means():
    image = torch.arange(3 * 4 * 6).reshape(3, 4, 6).float()
    small = downscale(image, 2)
    assert small[1, 1, 2] == image[1, 2:4, 4:6].mean()
    assert downscale(torch.full((3, 5, 7), 9, dtype=torch.uint8), 2).unique().tolist() == [9]
    assert downscale(torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8), 2).item() == 1  # of 0.75


def test_samples_that_are_none_stay_none():
    assert DownscaledStudentMapper(lambda _: None, 2)({}) is None
    (sample,) = two_scales([{"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "height": 80}])
    assert "instances" not in sample and sample["height"] == 80


@pytest.mark.parametrize("scale", [1, 0, -2, 2.5])
def test_scales_that_are_none(scale):
    with pytest.raises(InputError, match=f"scale: {scale}; expected an integer of at least 2"):
        DownscaledStudentMapper(lambda x: x, scale)


def test_bitmaps_are_refused():
    instances = Instances((8, 8))
    instances.gt_masks = BitMasks(torch.ones(1, 8, 8))
    image = torch.zeros(3, 8, 8)
    with pytest.raises(InputError, match="mapper: masks as bitmaps"):
        two_scales([{"image": image, "instances": instances}])


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_levels_match_by_stride_in_the_students_pixels(family):
    student, teacher = build(DETECTORS[family]()), build(DETECTORS[family]())
    levels = list(student.backbone.output_shape())
    matches = match_levels(student.backbone, teacher.backbone, scale=2)
    assert matches and all(int(b[1:]) == int(a[1:]) + 1 for a, b in matches.items())
    assert levels[-1] not in matches
    with pytest.raises(InputError, match=f"no level of stride .*, for {levels[-1]!r}"):
        match_levels(student.backbone, teacher.backbone, levels, scale=2)


def losses_of(family):
    losses = {"imitation": ImitationLoss(), "icd": ICDLoss(heads=2, priors=None)}
    if family == "faster_rcnn":
        losses["tar"] = TARLoss()
    return DistillLosses(**losses)


def pair(family, scale=2):
    node = DETECTORS[family]
    teacher = Teacher(build(node(), seed=1), None, scale=scale)
    return Distiller(student=build(node()), teacher=teacher, losses=losses_of(family), max_iter=10)


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
@pytest.mark.parametrize("name", ["plain", *edge_case_batches()])
def test_every_loss_works_across_scales(family, name):
    examples = two_scales({"plain": batch(), **edge_case_batches()}[name])
    model = pair(family).train()
    losses = step(model, examples)
    assert all(torch.isfinite(value) for value in losses.values())
    assert any(key.startswith("distill/loss_icd") for key in losses)


def test_the_student_sees_the_small_images_alone():
    examples = two_scales(batch())
    model, alone = pair("retinanet").train(), build(tiny_retinanet()).train()
    ours = {k: v for k, v in step(model, examples).items() if not k.startswith("distill/")}
    theirs = step(alone, [{**x, "teacher_image": None} for x in examples])
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def test_regions_are_the_same_places():
    """A teacher of images that many times larger pools the same places, from maps of its own."""
    examples = two_scales(batch())
    teacher = Teacher(build(tiny_faster_rcnn()), None, scale=2)
    boxes = [x["instances"].gt_boxes for x in examples]
    outputs = teacher.outputs(examples, region_boxes=[boxes])
    (regions,) = outputs.regions
    (direct,) = (
        Teacher(build(tiny_faster_rcnn()), None)
        .outputs(batch(), region_boxes=[[x["instances"].gt_boxes for x in batch()]])
        .regions
    )
    torch.testing.assert_close(regions.pred_class_logits, direct.pred_class_logits)


def test_detections_are_in_the_files_pixels():
    examples = two_scales(batch())
    for example in examples:
        example["height"], example["width"] = 640, 480
    found = Teacher(lively(build(tiny_retinanet())), None, scale=2).detect(examples)
    plain = Teacher(lively(build(tiny_retinanet())), None).detect(
        [{**x, "height": 640, "width": 480} for x in batch()]
    )
    for ours, theirs in zip(found, plain):
        assert ours["instances"].image_size == (640, 480) and len(ours["instances"])
        torch.testing.assert_close(
            ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor
        )


def test_what_cannot_be():
    student, teacher = build(tiny_retinanet()), build(tiny_retinanet(), 1)
    with pytest.raises(InputError, match="anchors: a teacher of images 2 times larger"):
        Distiller(
            student=student,
            teacher=Teacher(teacher, None, scale=2),
            losses=DistillLosses(tar=TARLoss()),
            max_iter=4,
        )
    with pytest.raises(InputError, match="teacher.scale: 2, but a batch without 'teacher_image'"):
        Teacher(teacher, None, scale=2).outputs(batch())
    with pytest.raises(InputError, match=r"teacher.scale: 3, .* \(64, 64\) beside .* \(32, 32\)"):
        Teacher(teacher, None, scale=3).outputs(two_scales(batch()))
    with pytest.raises(InputError, match="teacher.scale: 0"):
        Teacher(teacher, None, scale=0)
    with pytest.raises(InputError, match="proposals_from: both, at 2 times"):
        Distiller(
            student=build(tiny_faster_rcnn()),
            teacher=Teacher(build(tiny_faster_rcnn()), None, scale=2),
            losses=DistillLosses(),
            max_iter=4,
            proposals_from="both",
        )


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


def test_a_recipe_at_two_scales(tmp_path):
    base = recipe(tmp_path / "data", tmp_path / "out", max_iter=2)
    small = with_downscaled_student(base, 2)
    for part in ("train", "test"):
        mapper = small.dataloader[part].mapper
        assert mapper.scale == 2 and mapper.mapper.image_format == "BGR"
        assert "scale" not in base.dataloader[part].mapper
    whole = distill(
        base,
        teacher=L(Teacher)(detector=tiny_retinanet(), weights=None),
        losses=L(DistillLosses)(),
        scale=2,
    )
    assert whole.model.teacher.scale == 2
    assert whole.dataloader.train.mapper.scale == 2
