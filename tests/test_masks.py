"""Masks of regions: what the student's mask head trained with, the same places of the teacher, and TAR's mask term."""

import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling.roi_heads import mask_head
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.nn.functional import interpolate

from d2kd.data import build_train_loader, coco_dataset
from d2kd.data.datasets import check_masks
from d2kd.losses import DistillLosses, TARLoss
from d2kd.losses.tar import mask_term
from d2kd.modeling import Distiller, MaskRegions, Teacher, capture, get_outputs_class
from d2kd.modeling.outputs import OutputNotAvailable
from d2kd.structures.class_map import ClassMap
from d2kd.testing import (
    check_loss,
    distiller,
    forward_losses,
    tiny_cascade_mask_rcnn,
    tiny_cascade_rcnn,
    tiny_faster_rcnn,
    tiny_mask_rcnn,
)

from .common import batch, build

FAMILIES = {"mask_rcnn": tiny_mask_rcnn, "cascade_mask_rcnn": tiny_cascade_mask_rcnn}


def one_class(node):
    """The node with one mask for all classes."""
    node.roi_heads.mask_head.num_classes = 1
    return node


def recorded(detector, examples):
    """The student's outputs of one training forward."""
    kind = get_outputs_class(detector)
    with EventStorage(), capture(kind.hook_points(detector)) as calls:
        detector.train()(examples)
    return kind.from_calls(detector, examples, calls)


def teacher_masks(detector, examples, ours, **options):
    outputs = Teacher(detector, None, **options).outputs(examples)
    outputs.set_region_boxes(ours.region_boxes, ours.mask_boxes)
    return outputs.mask_regions


def triangles(examples, bitmasks=False):
    """The batch with half of each box as mask."""
    for x in examples:
        corners = [[polygon[:6] for polygon in one] for one in x["instances"].gt_masks.polygons]
        masks = PolygonMasks(corners)
        if bitmasks:
            masks = BitMasks.from_polygon_masks(masks.polygons, *x["instances"].image_size)
        x["instances"].gt_masks = masks
    return examples


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objects", [(2, 1), (0, 0), (3, 0)])
@pytest.mark.parametrize("agnostic", [False, True])
def test_a_copy_predicts_the_student_s_masks(family, objects, agnostic):
    node = FAMILIES[family]()
    node = one_class(node) if agnostic else node
    student, examples = build(node), batch(objects=objects)
    ours = recorded(student, examples)
    own = ours.mask_regions
    theirs = teacher_masks(build(node), examples, ours)
    assert own.class_agnostic == theirs.class_agnostic == agnostic
    assert own.pred_mask_logits.shape == (len(own.gt_classes), 1 if agnostic else 3, 28, 28)
    assert own.gt_masks.shape == own.select(own.gt_classes).shape
    assert bool(len(own.gt_masks)) == any(objects) == bool(own.gt_masks.any())
    assert all(a is b for a, b in zip(own.boxes, theirs.boxes, strict=True))
    torch.testing.assert_close(own.pred_mask_logits, theirs.pred_mask_logits)
    assert own.pred_mask_logits.requires_grad and not theirs.pred_mask_logits.requires_grad
    # The boxes are foreground regions of the first stage, also of a cascade.
    first = ours.regions[0]
    foreground = first.box_tensor[first.gt_classes < 3]
    torch.testing.assert_close(Boxes.cat(own.boxes).tensor, foreground)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bitmasks", [False, True])
def test_logits_and_targets_are_those_of_the_student_s_own_loss(family, bitmasks, monkeypatch):
    seen, entropy = [], mask_head.F.binary_cross_entropy_with_logits
    detector, examples = build(FAMILIES[family]()), triangles(batch(), bitmasks)
    with monkeypatch.context() as patch:
        patch.setattr(
            mask_head.F,
            "binary_cross_entropy_with_logits",
            lambda *given, **options: seen.append(given) or entropy(*given, **options),
        )
        own = recorded(detector, examples).mask_regions
    logits, targets = seen[-1]
    assert torch.equal(own.select(own.gt_classes), logits)
    assert 0.2 < targets.mean() < 0.8
    torch.testing.assert_close(own.gt_masks.float(), targets)


def test_nothing_is_left_on_the_mask_head():
    detector = build(tiny_mask_rcnn())
    before = dict(vars(detector.roi_heads.mask_head))
    recorded(detector, batch())
    assert vars(detector.roi_heads.mask_head) == before
    assert not any(module._forward_hooks for module in detector.modules())


def test_the_teacher_s_box_head_rests():
    student, teacher = build(tiny_mask_rcnn()), build(tiny_mask_rcnn(), 1)
    examples = batch()
    ours = recorded(student, examples)
    for part in (teacher.proposal_generator, teacher.roi_heads.box_head):
        part.register_forward_hook(lambda *_: pytest.fail("not needed for masks"))
    assert len(teacher_masks(teacher, examples, ours).pred_mask_logits)


def test_one_pooler_for_boxes_and_masks():
    """Its last call is that of the mask head."""
    student = build(tiny_cascade_mask_rcnn())
    student.roi_heads.mask_pooler = student.roi_heads.box_pooler
    ours = recorded(student, batch())
    assert len(ours.regions) == 3 and ours.mask_regions.pred_mask_logits.shape[-1] == 14


def test_boxes_are_scaled_to_a_teacher_s_larger_images():
    student, examples = build(tiny_mask_rcnn()), batch(sizes=((64, 64),), objects=(2,))
    ours = recorded(student, examples)
    examples[0]["teacher_image"] = interpolate(examples[0]["image"][None].float(), (128, 128))[0]
    theirs = teacher_masks(build(tiny_mask_rcnn()), examples, ours, scale=2)
    torch.testing.assert_close(theirs.boxes[0].tensor, ours.mask_boxes[0].tensor * 2)
    assert len(theirs.pred_mask_logits) == len(ours.mask_regions.pred_mask_logits)


def test_without_a_mask_head_there_are_no_masks():
    student, examples = build(tiny_faster_rcnn()), batch()
    ours = recorded(student, examples)
    assert ours.mask_boxes is None
    with pytest.raises(OutputNotAvailable, match="a GeneralizedRCNN without masks of regions"):
        ours.mask_regions  # noqa: B018
    with pytest.raises(OutputNotAvailable, match="no boxes of masks: the student has none"):
        teacher_masks(build(tiny_mask_rcnn()), examples, ours)


def test_a_head_that_pools_by_itself_is_not_read():
    """As PointRend's, whose logits are not those of regions of one size."""
    student = build(tiny_mask_rcnn())
    student.roi_heads.mask_pooler = None
    assert "mask_layers" not in get_outputs_class(student).hook_points(student)


TAR_MASKS = {"feature_weight": 0, "classification_weight": 0, "regression_weight": 0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {**TAR_MASKS, "mask_gate": "none"}], ids=["all terms", "masks alone"]
)
def test_properties(family, options):
    """Also with the mask term alone, for which the teacher computes no boxes."""
    assert len(check_loss(lambda: TARLoss(**options), {family: FAMILIES[family]})) == 8


@pytest.mark.parametrize(
    "student, teacher",
    [
        (tiny_faster_rcnn, tiny_faster_rcnn),
        (tiny_mask_rcnn, tiny_faster_rcnn),
        (tiny_faster_rcnn, tiny_mask_rcnn),
        (tiny_cascade_rcnn, tiny_cascade_mask_rcnn),
    ],
)
def test_without_two_mask_heads_the_loss_is_as_before(student, teacher):
    def losses(**options):
        loss = DistillLosses(tar=TARLoss(**options))
        sides = {"student": build(student()), "teacher": Teacher(build(teacher(), 1), None)}
        torch.manual_seed(0)
        return forward_losses(Distiller(**sides, losses=loss, max_iter=2).train(), batch())

    one, other = losses(mask_weight=5.0), losses(mask_weight=0)
    assert one.keys() == other.keys() and "distill/loss_tar_mask" not in one
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_mask_term_leaves_the_others_as_they_are():
    def losses(**options):
        torch.manual_seed(0)  # of the adapters
        model = distiller(lambda: TARLoss(**options), tiny_mask_rcnn)
        return forward_losses(model, batch())

    one, other = losses(), losses(mask_weight=0)
    assert one.keys() - other.keys() == {"distill/loss_loss_mask"}
    assert all(torch.equal(one[key], other[key]) for key in other)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_iou(probabilities, target):
    both = either = 0
    for q, y in zip(probabilities, target, strict=True):
        both += q > 0.5 and y
        either += q > 0.5 or y
    return both / either if either else 0.0


def slow_mask_term(student, teacher, rows, gt_masks, gate):
    """In float64, pixel by pixel; without rounding, since 1 - q is taken as it is."""
    total, opened = 0.0, 0
    for r, kept in enumerate(rows):
        if not kept:
            continue
        q_s, q_t = ([sigmoid(v) for v in x[r].flatten().tolist()] for x in (student, teacher))
        target = gt_masks[r].flatten().tolist()
        if gate == "better" and not slow_iou(q_t, target) > slow_iou(q_s, target):
            continue
        opened += 1
        for s, t in zip(q_s, q_t, strict=True):
            total += (t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))) / len(q_s)
    return total / max(1, sum(rows)), opened


class Drawn:
    """Ground truth of regions whose masks are given as the head sees them."""

    def __init__(self, masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def crop_and_resize(self, boxes, size):
        assert self.masks.shape[-1] == size
        return self.masks


def head_outputs(rows=12, classes=3, size=6, seed=0, labels=None, class_agnostic=False):
    """A mask head's outputs by hand, of objects in the upper half of their boxes; the last has no pixel."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 1 if class_agnostic else classes, size, size, generator=g)
    logits[:, :, : size // 2] += 1.5
    if labels is None:
        return MaskRegions([], logits, class_agnostic)
    drawn = torch.zeros(rows, size, size, dtype=torch.bool)
    drawn[:-1, : size // 2] = True
    one = Instances((9, 9), gt_classes=labels, gt_masks=Drawn(drawn))
    one.proposal_boxes = Boxes(torch.zeros(rows, 4))
    return MaskRegions([], logits, class_agnostic, [one])


LABELS = torch.tensor([0, 1, 2] * 4)


@pytest.mark.parametrize("gate", ["better", "none"])
@pytest.mark.parametrize("ours, theirs", [(False, False), (False, True), (True, False)])
def test_mask_term_restated(gate, ours, theirs):
    student = head_outputs(labels=LABELS, class_agnostic=ours)
    teacher = head_outputs(seed=1, class_agnostic=theirs)
    found = TARLoss(mask_gate=gate).masks(student, teacher)
    logits = [
        x.pred_mask_logits[torch.arange(12), LABELS * (x.pred_mask_logits.shape[1] > 1)].double()
        for x in (student, teacher)
    ]
    expected, opened = slow_mask_term(*logits, [True] * 12, student.gt_masks, gate)
    assert gate == "none" or 0 < opened < 12, "the scene decides nothing"
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gate", ["better", "none"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_only_objects_of_the_teacher_s_classes_are_compared(gate, agnostic):
    """Also by a teacher of one class, unless its masks are of all classes alike."""
    names, rows = ["a", "b", "c"], torch.arange(12)
    for known in (["c", "x", "a"], ["b"]):
        loss = TARLoss(mask_gate=gate)
        loss.class_map = ClassMap.from_names(names, known)
        student = head_outputs(labels=LABELS)
        teacher = head_outputs(classes=len(known), seed=1, class_agnostic=agnostic)
        found = loss.masks(student, teacher)
        kept = [agnostic or names[k] in known for k in LABELS.tolist()]
        index = [0 if agnostic or names[k] not in known else known.index(names[k]) for k in LABELS]
        logits = student.pred_mask_logits[rows, LABELS], teacher.pred_mask_logits[rows, index]
        expected, opened = slow_mask_term(
            *(x.double() for x in logits), kept, student.gt_masks, gate
        )
        assert opened and float(found) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_cross_entropy():
    student = torch.randn(5, 4, 4).requires_grad_()
    teacher, rows = torch.randn(5, 4, 4), torch.ones(5, dtype=torch.bool)
    (found,) = torch.autograd.grad(mask_term(student, teacher, rows), student)
    targets = teacher.sigmoid()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(student, targets)
    (expected,) = torch.autograd.grad(entropy, student)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [3, 12, 24, 7])
def test_a_teacher_s_grid_of_another_size_is_resized(size):
    """Of equal boxes: what is uniform stays so, and a half of the box stays a half."""
    rows = torch.ones(2, dtype=torch.bool)
    teacher = torch.full((2, size, size), -30.0)
    teacher[:, : -(-size // 2)] = 30.0
    student = torch.full((2, 12, 12), -30.0)
    student[:, :6] = 30.0
    # Against a student that has it the other way round; the rows where the grids' borders lie may be blurred.
    assert 20 < mask_term(-student, teacher, rows, student > 0) <= 30
    uniform = torch.full((2, 12, 12), 0.7)
    assert mask_term(uniform, torch.full((2, size, size), 0.7), rows).abs() < 1e-6
    assert mask_term(student[:0], teacher[:0], rows[:0], student[:0] > 0) == 0


def test_saturated_masks_have_a_finite_loss_and_gradient():
    student = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4]).expand(5, 5)[None].clone()
    student.requires_grad_()
    teacher = student.detach().mT.contiguous()
    value = mask_term(student, teacher, torch.tensor([True]))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    assert mask_term(teacher, teacher, torch.tensor([True])).abs() < 1e-6


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A COCO file of one image, as polygons and as RLE: two objects, one in two parts, and a crowd."""
    folder = tmp_path_factory.mktemp("annotated")
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    two = [[4, 4, 20, 4, 20, 30, 4, 30], [24, 4, 34, 4, 34, 30, 24, 30]]
    polygons = [two, [[30, 32, 60, 32, 60, 60]]]
    rows = [{"bbox": [4, 4, 30, 26], "area": 676}, {"bbox": [30, 32, 30, 28], "area": 420}]
    crowd = {"size": [64, 64], "counts": [0, 640, 3456]}
    rows.append({"bbox": [0, 0, 10, 64], "area": 640})
    for number, row in enumerate(rows):
        row |= {"id": number + 1, "image_id": 0, "category_id": number + 1, "iscrowd": number // 2}
    content = {"images": [{"id": 0, "file_name": "0.png", "width": 64, "height": 64}]}
    content["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate("abc")]
    rle = [mask_util.merge(mask_util.frPyObjects(one, 64, 64)) for one in polygons]
    for one in rle:
        one["counts"] = one["counts"].decode()
    for name, masks in (("polygon", polygons), ("bitmask", rle)):
        annotations = [row | {"segmentation": x} for row, x in zip(rows, [*masks, crowd])]
        (folder / f"{name}.json").write_text(json.dumps(content | {"annotations": annotations}))
    return folder


def mapped_examples(folder, form):
    name = coco_dataset(f"{folder} {form}", str(folder / f"{form}.json"), str(folder))
    options = {"use_instance_mask": True, "instance_mask_format": form}
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR", **options)
    loader = build_train_loader(
        dataset=get_detection_dataset_dicts(name), mapper=mapper, total_batch_size=1, num_workers=0
    )
    check_masks(loader)
    return [mapper(record) for record in get_detection_dataset_dicts(name)]


def test_a_detector_with_a_mask_head_needs_masks(annotated, refuses):
    name = coco_dataset(f"{annotated} boxes", str(annotated / "polygon.json"), str(annotated))
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    records = get_detection_dataset_dicts(name)
    loader = build_train_loader(dataset=records, mapper=mapper, total_batch_size=1, num_workers=0)
    check_masks(loader)
    line = "use_instance_mask: False, and a detector with a mask head; expected True; or "
    refuses(lambda: check_masks(loader, needed=True), line)


@pytest.mark.parametrize("known", [None, ["c", "b"], ["a"]])
def test_polygons_and_rle_teach_the_same(annotated, known):
    """In whole steps, with a teacher of the same classes or of others. No crowd has a region."""
    terms, targets = [], []
    for form in ("polygon", "bitmask"):
        torch.manual_seed(0)
        teacher = build(tiny_mask_rcnn(classes=len(known or "abc")), 1)
        torch.nn.init.normal_(teacher.roi_heads.mask_head.predictor.weight)
        model = Distiller(
            student=build(tiny_mask_rcnn()),
            teacher=Teacher(teacher, None, classes=known),
            losses=DistillLosses(tar=TARLoss(mask_gate="none")),
            max_iter=2,
            classes=known and ["a", "b", "c"],
        ).train()
        given = []
        model.losses.register_forward_pre_hook(lambda _, sides, given=given: given.append(sides[0]))
        losses = forward_losses(model, mapped_examples(annotated, form))
        sum(losses.values()).backward()
        terms.append(float(losses["distill/loss_tar_mask"].detach()))
        regions = given[0].mask_regions
        targets.append(regions.gt_masks)
        assert set(regions.gt_classes.tolist()) == {0, 1}
    assert terms[0] == terms[1] > 0
    same = (targets[0] == targets[1]).float().mean()
    assert same > 0.97 and 0.2 < targets[0].float().mean() < 0.9


def test_mask_gate_is_better_or_none(refuses):
    refuses(lambda: TARLoss(mask_gate="student"), "mask_gate: student; expected better or none")


def test_targets_are_not_cropped_where_no_gate_reads_them(monkeypatch):
    """Polygons are rasterised on the CPU, one by one."""
    model = distiller(lambda: TARLoss(mask_gate="none"), tiny_mask_rcnn)
    read = []
    monkeypatch.setattr(MaskRegions, "gt_masks", property(lambda self: read.append(self)))
    forward_losses(model, batch())
    assert not read
