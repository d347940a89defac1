"""Capture and ask agree, and leave nothing behind."""

import types

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2kd.modeling import DenseOutputs, RCNNOutputs, Teacher, capture, get_outputs_class
from d2kd.modeling.outputs import OutputNotAvailable
from d2kd.modeling.outputs import rcnn as outputs_module
from d2kd.utils.errors import InputError

from .common import DETECTORS, batch, build


def listen(detector, examples):
    kind = get_outputs_class(detector)
    with EventStorage(), capture(kind.hook_points(detector)) as calls:
        detector.train()(examples)
    return kind.from_calls(detector, examples, calls)


@pytest.mark.parametrize("family", DETECTORS)
@pytest.mark.parametrize("objects", [(2, 1), (0, 0), (3, 0)])
def test_a_copy_answers_what_the_student_said(family, objects):
    student = build(DETECTORS[family]())
    teacher = Teacher(build(DETECTORS[family]()), None)
    teacher.detector.requires_grad_()  # a teacher's outputs are constant, even if its weights learn
    examples = batch(objects=objects)
    said = listen(student, examples)
    asked = teacher.outputs(examples, said.region_boxes)
    for level, feature in said.features.items():
        assert feature.requires_grad and not asked.features[level].requires_grad
        torch.testing.assert_close(feature, asked.features[level])
    if family.endswith("rcnn"):
        assert len(said.regions) == (3 if family == "cascade_rcnn" else 1)
        assert len(said.regions[0].box_tensor) > 0
        pairs = []
        for ours, theirs in zip(said.regions, asked.regions, strict=True):
            assert len(ours.gt_classes) == len(ours.gt_boxes) == len(ours.box_tensor)
            assert all(a is b for a, b in zip(ours.boxes, theirs.boxes, strict=True))
            pairs += [(ours.pred_class_logits, theirs.pred_class_logits)]
            pairs += [(ours.pred_proposal_deltas, theirs.pred_proposal_deltas)]
    else:
        pairs = list(zip(said.pred_logits, asked.pred_logits, strict=True))
        pairs += list(zip(said.pred_anchor_deltas, asked.pred_anchor_deltas, strict=True))
        anchors = sum(len(a) for a in said.anchors)
        assert said.gt_labels.shape == (2, anchors) and said.matched_gt_boxes.shape[1:] == (
            anchors,
            4,
        )
        assert sum(x.shape[1] for x in said.pred_logits) == anchors
        if family == "fcos":
            pairs += list(zip(said.pred_centerness, asked.pred_centerness, strict=True))
        else:
            with pytest.raises(OutputNotAvailable, match="pred_centerness"):
                said.pred_centerness  # noqa: B018
        if family == "gfl":
            pairs += list(zip(said.pred_distributions, asked.pred_distributions, strict=True))
        else:
            with pytest.raises(OutputNotAvailable, match="pred_distributions"):
                said.pred_distributions  # noqa: B018
    for ours, theirs in pairs:
        assert ours.requires_grad and not theirs.requires_grad
        torch.testing.assert_close(ours, theirs)


def test_the_row_of_a_region_follows_its_box():
    """Permuting the shared boxes of an image permutes the teacher's answers, and nothing else."""
    examples = batch()
    said = listen(build(DETECTORS["faster_rcnn"]()), examples)
    teacher = Teacher(build(DETECTORS["faster_rcnn"](), 1), None)
    straight = teacher.outputs(examples, region_boxes=said.region_boxes).regions[0]
    turned = [[boxes[torch.arange(len(boxes) - 1, -1, -1)] for boxes in said.region_boxes[0]]]
    reverse = teacher.outputs(examples, region_boxes=turned).regions[0]
    first = len(said.region_boxes[0][0])
    torch.testing.assert_close(
        straight.pred_class_logits[:first], reverse.pred_class_logits[:first].flip(0)
    )


def test_a_cascade_labels_its_stages_itself(monkeypatch):
    """What we find for later stages is what the cascade found for its own loss."""
    detector = build(DETECTORS["cascade_rcnn"]())
    heads = detector.roi_heads
    # The second stage's boxes lie 0.3 widths aside: their IoU with an object, 0.54 at best, is enough for the first
    # stage's rule alone.
    heads.box_predictor[0].bbox_pred.bias.data[0] = 3.0
    own = []
    label = detector.roi_heads._match_and_label_boxes
    monkeypatch.setattr(
        detector.roi_heads,
        "_match_and_label_boxes",
        lambda *args: own.append(label(*args)) or own[-1],
    )
    said = listen(detector, batch(objects=(3, 0)))
    assert len(own) == 2
    for proposals, regions in zip(own, said.regions[1:], strict=True):
        assert torch.equal(torch.cat([p.gt_classes for p in proposals]), regions.gt_classes)
        first = len(proposals[0])
        assert torch.equal(proposals[0].gt_boxes.tensor, regions.gt_boxes[:first])
        assert torch.equal(regions.gt_boxes[first:], regions.boxes[1].tensor)
    second = said.regions[1]
    first_rule = heads.proposal_matchers[0], second.boxes, said.gt_instances, heads.num_classes
    assert not torch.equal(outputs_module.match_and_label_boxes(*first_rule)[0], second.gt_classes)


def test_regions_are_labelled_when_they_are_read(monkeypatch):
    detector = build(DETECTORS["cascade_rcnn"]())
    labelled = []
    match = outputs_module.match_and_label_boxes
    monkeypatch.setattr(
        outputs_module, "match_and_label_boxes", lambda *args: labelled.append(1) or match(*args)
    )
    said = listen(detector, batch())
    assert len(said.region_boxes) == 3 and not labelled
    for stage in said.regions:
        assert stage.pred_class_logits.requires_grad and stage.box_features.requires_grad
    assert said.regions is said.regions and len(labelled) == 2


@pytest.mark.parametrize(
    "student, teacher, asked_heads",
    [("cascade_rcnn", "faster_rcnn", [0, 0, 0]), ("faster_rcnn", "cascade_rcnn", [0])],
)
def test_stages_of_other_numbers_meet(student, teacher, asked_heads):
    examples = batch()
    said = listen(build(DETECTORS[student]()), examples)
    detector = build(DETECTORS[teacher](), 1)
    heads = detector.roi_heads.box_predictor
    heads = list(heads) if isinstance(heads, nn.ModuleList) else [heads]
    with capture({str(k): head for k, head in enumerate(heads)}) as calls:
        answers = Teacher(detector, None).outputs(examples, said.region_boxes).regions
    assert len(answers) == len(said.regions) == len(asked_heads)
    assert [len(calls[str(k)]) for k in range(len(heads))] == [
        asked_heads.count(k) for k in range(len(heads))
    ]


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_dense_predictions_keep_the_detectors_own_order(family):
    detector = build(DETECTORS[family]())
    examples = batch()
    said = listen(detector, examples)
    predictions = detector.head([said.features[f] for f in detector.head_in_features])
    sizes = [detector.num_classes, 4, 1][: len(predictions)]
    theirs = detector._transpose_dense_predictions(predictions, sizes)
    for ours, expected in zip((said.pred_logits, said.pred_anchor_deltas), theirs, strict=False):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_capture_removes_its_hooks_even_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), capture({"it": module}) as calls:
        module(torch.zeros(1, 2))
        assert len(calls["it"]) == 1
        raise ZeroDivisionError
    assert not module._forward_hooks


def test_a_method_is_heard_and_left_as_it_was():
    detector = build(DETECTORS["retinanet"]())
    detector.label_anchors = own = types.MethodType(type(detector).label_anchors, detector)
    for method in (own, detector.preprocess_image):
        before = dict(vars(detector))
        with pytest.raises(ZeroDivisionError), capture({"it": method}) as calls:
            images = detector.preprocess_image(batch())
            assert len(calls["it"]) == (method is not own)
            raise ZeroDivisionError
        assert vars(detector) == before
    (((heard,), output),) = calls["it"]
    assert len(heard) == 2 and torch.equal(output.tensor, images.tensor)


@pytest.mark.parametrize("family", ["retinanet", "fcos", "gfl"])
@pytest.mark.parametrize("objects", [(2, 1), (0, 0), (3, 0)])
def test_labels_are_those_of_the_student_s_own_loss(family, objects, monkeypatch):
    detector = build(DETECTORS[family]())
    examples = batch(objects=objects)
    said = listen(detector, examples)
    assert "label_anchors" not in vars(detector)
    again = DenseOutputs(detector, examples, features=said.features)
    with monkeypatch.context() as patch:
        patch.setattr(type(detector), "label_anchors", None)
        found = [said.gt_labels, said.matched_gt_boxes, *(a.tensor for a in said.anchors)]
    asked = [again.gt_labels, again.matched_gt_boxes, *(a.tensor for a in again.anchors)]
    assert all(torch.equal(a, b) for a, b in zip(found, asked, strict=True))
    for ours, theirs in zip(said.gt_instances, again.gt_instances, strict=True):
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)


def test_a_dense_detector_need_not_label_anchors():
    detector = build(DETECTORS["retinanet"]())
    calls = {"backbone": [((), {})], "head": [((), ([], []))], "anchor_generator": []}
    said = DenseOutputs.from_calls(detector, batch(), calls)
    assert said.captured_labels is None and len(said.gt_instances) == 2


def test_what_a_family_does_not_say_is_named():
    dense = Teacher(build(DETECTORS["retinanet"]()), None).outputs(batch())
    assert isinstance(dense, DenseOutputs)
    with pytest.raises(OutputNotAvailable, match="a RetinaNet has no 'regions'"):
        dense.regions  # noqa: B018
    two_stage = Teacher(build(DETECTORS["faster_rcnn"]()), None).outputs(batch())
    assert isinstance(two_stage, RCNNOutputs)
    with pytest.raises(OutputNotAvailable, match="no region boxes"):
        two_stage.regions  # noqa: B018


@pytest.mark.parametrize("name", ["features", "pred_logits", "pred_anchor_deltas", "gt_labels"])
def test_a_detector_s_own_error_stays_its_own(name, monkeypatch):
    """Also one by which Python means that there is no such attribute."""
    teacher = Teacher(build(DETECTORS["retinanet"]()), None)
    outputs = teacher.outputs(batch())
    outputs.gt_instances = []

    def fail(*_):
        raise AttributeError("no 'stem' in it")

    monkeypatch.setattr(teacher.detector.backbone, "forward", fail)
    with pytest.raises(AttributeError, match="no 'stem' in it") as raised:
        getattr(outputs, name)
    assert raised.traceback[-1].name == "fail"


def test_an_unknown_detector_is_refused():
    with pytest.raises(InputError, match="Linear: .*; expected a GeneralizedRCNN"):
        get_outputs_class(nn.Linear(1, 1))
