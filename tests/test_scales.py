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
from d2kd.testing import edge_case_batches, forward_losses
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
    small, large = (x.gt_masks.get_bounding_boxes().tensor for x in (ours, theirs))
    torch.testing.assert_close(small * factors, large)
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


def pair(family):
    node = DETECTORS[family]
    losses = {"imitation": ImitationLoss(), "icd": ICDLoss(heads=2, priors=None)}
    losses |= {"tar": TARLoss()} if family == "faster_rcnn" else {}
    teacher = Teacher(build(node(), seed=1), None, scale=2)
    losses = DistillLosses(**losses)
    return Distiller(student=build(node()), teacher=teacher, losses=losses, max_iter=10)


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
@pytest.mark.parametrize("name", ["plain", *edge_case_batches()])
def test_every_loss_works_across_scales(family, name):
    examples = two_scales({"plain": batch(), **edge_case_batches()}[name])
    model = pair(family).train()
    losses = forward_losses(model, examples)
    assert all(torch.isfinite(value) for value in losses.values())
    assert any(key.startswith("distill/loss_icd") for key in losses)


def test_the_student_sees_the_small_images_alone():
    examples = two_scales(batch())
    model, alone = pair("retinanet").train(), build(tiny_retinanet()).train()
    ours = {
        k: v for k, v in forward_losses(model, examples).items() if not k.startswith("distill/")
    }
    theirs = forward_losses(alone, [{**x, "teacher_image": None} for x in examples])
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def test_regions_are_the_same_places():
    """A teacher of images that many times larger pools the same places, from maps of its own."""
    found = []
    for scale, examples in ((2, two_scales(batch())), (1, batch())):
        boxes = [x["instances"].gt_boxes for x in examples]
        outputs = Teacher(build(tiny_faster_rcnn()), None, scale=scale).outputs(
            examples, region_boxes=[boxes]
        )
        found.append(outputs.regions[0].pred_class_logits)
    torch.testing.assert_close(*found)


def test_detections_are_in_the_files_pixels():
    found = []
    for scale, examples in ((2, two_scales(batch())), (1, batch())):
        teacher = Teacher(lively(build(tiny_retinanet())), None, scale=scale)
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
                f"scale: {scale}; expected an",
            )
            for scale in (1, 0, -2, 2.5)
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
            lambda: _teacher(tiny_retinanet, 2).outputs(batch()),
            "teacher.scale: 2, but a batch without 'teacher_image'",
        ),
        (
            lambda: _teacher(tiny_retinanet, 3).outputs(two_scales(batch())),
            r"teacher.scale: 3, .* \(64, 64\) beside .* \(32, 32\)",
        ),
        (lambda: _teacher(tiny_retinanet, 0), "teacher.scale: 0"),
    ],
)
def test_what_is_refused(refuses, act, line):
    refuses(act, line)
