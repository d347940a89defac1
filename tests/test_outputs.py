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
def test_a_copy_has_the_students_outputs(family, objects):
    student = build(DETECTORS[family]())
    teacher = Teacher(build(DETECTORS[family]()), None)
    teacher.detector.requires_grad_()  # a teacher's outputs are constant, even if its weights learn
    examples = batch(objects=objects)
    ours = listen(student, examples)
    theirs = teacher.outputs(examples, ours.region_boxes)
    pairs = [(ours.features[level], theirs.features[level]) for level in ours.features]
    if family.endswith("rcnn"):
        assert len(ours.regions) == (3 if family == "cascade_rcnn" else 1)
        assert len(ours.regions[0].box_tensor) > 0
        for one, other in zip(ours.regions, theirs.regions, strict=True):
            assert len(one.gt_classes) == len(one.gt_boxes) == len(one.box_tensor)
            assert all(a is b for a, b in zip(one.boxes, other.boxes, strict=True))
            pairs += [(one.pred_class_logits, other.pred_class_logits)]
            pairs += [(one.pred_proposal_deltas, other.pred_proposal_deltas)]
    else:
        own = {"fcos": {"pred_centerness"}, "gfl": {"pred_distributions"}}.get(family, set())
        for name in {"pred_logits", "pred_anchor_deltas"} | own:
            pairs += zip(getattr(ours, name), getattr(theirs, name), strict=True)
        for name in {"pred_centerness", "pred_distributions"} - own:
            with pytest.raises(OutputNotAvailable, match=name):
                getattr(ours, name)
        anchors = sum(len(a) for a in ours.anchors)
        assert ours.gt_labels.shape == (2, anchors)
        assert ours.matched_gt_boxes.shape[1:] == (anchors, 4)
        assert sum(x.shape[1] for x in ours.pred_logits) == anchors
    for one, other in pairs:
        assert one.requires_grad and not other.requires_grad
        torch.testing.assert_close(one, other)


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


@pytest.mark.parametrize(
    "student, teacher, used_heads",
    [("cascade_rcnn", "faster_rcnn", [0, 0, 0]), ("faster_rcnn", "cascade_rcnn", [0])],
)
def test_stages_of_other_numbers_meet(student, teacher, used_heads):
    examples = batch()
    ours = listen(build(DETECTORS[student]()), examples)
    detector = build(DETECTORS[teacher](), 1)
    heads = detector.roi_heads.box_predictor
    heads = list(heads) if isinstance(heads, nn.ModuleList) else [heads]
    with capture({str(k): head for k, head in enumerate(heads)}) as calls:
        regions = Teacher(detector, None).outputs(examples, ours.region_boxes).regions
    assert len(regions) == len(ours.regions) == len(used_heads)
    assert all(len(calls[str(k)]) == used_heads.count(k) for k in range(len(heads)))


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


def test_a_method_is_captured_and_left_as_it_was():
    detector = build(DETECTORS["retinanet"]())
    detector.label_anchors = own = types.MethodType(type(detector).label_anchors, detector)
    for method in (own, detector.preprocess_image):
        before = dict(vars(detector))
        with pytest.raises(ZeroDivisionError), capture({"it": method}) as calls:
            images = detector.preprocess_image(batch())
            assert len(calls["it"]) == (method is not own)
            raise ZeroDivisionError
        assert vars(detector) == before
    (((arguments,), output),) = calls["it"]
    assert len(arguments) == 2 and torch.equal(output.tensor, images.tensor)


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


def test_an_output_that_a_family_lacks_is_named():
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
