"""Region tables where who is right is known by construction, and the agreement that training logs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd.comparison.detectors import input_scale
from d2kd.comparison.features import FeatureSimilarity
from d2kd.comparison.matching import GroundTruth
from d2kd.comparison.regions import RegionCounts, why_not_comparable
from d2kd.losses import DistillLosses, ImitationLoss, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.modeling.agreement import top1_agreement
from d2kd.modeling.outputs import DenseOutputs, RCNNOutputs, box_stages
from d2kd.structures.class_map import ClassMap
from d2kd.utils.errors import InputError

from .common import CLASSES, DETECTORS, batch, build, lively, tiny_faster_rcnn

CODER = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
OBJECT, CROWD = [10.0, 10, 30, 30], [60.0, 60, 90, 90]
PROPOSALS = torch.tensor(
    [
        OBJECT,
        [10, 10, 30, 24],  # IoU 0.7
        [10, 10, 30, 50],  # IoU 0.5: still on the object
        [60, 5, 80, 25],  # on nothing
        [65, 65, 85, 85],  # in the crowd
    ]
)


GIVEN = {"image": torch.zeros(3, 100, 100), "height": 100, "width": 100}


def truth(label=0):
    boxes = np.array([OBJECT, CROWD])
    boxes[:, 2:] -= boxes[:, :2]
    areas, crowd = boxes[:, 2] * boxes[:, 3], np.array([False, True])
    labels = np.array([label, 0])
    return GroundTruth((0,), ("a", "b"), np.zeros(2, int), labels, boxes, areas, crowd)


class Said:
    """A detector's outputs, made by hand; classes and shifts of each proposal, in the input's pixels."""

    def __init__(self, classes, shift=0.0, scale=1.0, num_classes=2):
        instances = Instances((100, 100))
        instances.proposal_boxes = Boxes(PROPOSALS * scale)
        self.proposals = [instances]
        self.detector = SimpleNamespace(device=torch.device("cpu"))
        self.classes, self.shift, self.asked = classes, shift, None
        self.num_classes = num_classes

    def set_region_boxes(self, boxes):
        self.asked = boxes[0][0].tensor

    @property
    def regions(self):
        mine = self.proposals[0].proposal_boxes.tensor
        equal = (self.asked[:, None] == mine[None]).all(dim=2)
        asked = equal.nonzero()[:, 1]
        said = torch.tensor(self.classes, dtype=torch.int64)[asked]
        logits = torch.nn.functional.one_hot(said, self.num_classes + 1).float()
        deltas = torch.zeros(len(logits), 4 * self.num_classes)
        deltas[:, 0::4] = self.shift  # in widths of the proposal
        return [
            SimpleNamespace(
                pred_class_logits=logits, pred_proposal_deltas=deltas, box2box_transform=CODER
            )
        ]


def ready(name, classes=("a", "b")):
    class_map = ClassMap.from_names(("a", "b"), classes)
    return SimpleNamespace(
        detector=SimpleNamespace(name=name),
        teacher=SimpleNamespace(outputs_class=RCNNOutputs, detector=None),
        class_map=class_map,
        to_detector_label=dict(class_map.pairs),
    )


def counted(
    outputs, detectors=None, ground_truth=None, known=(0, 1), thresholds=(0, 0), given=GIVEN
):
    """The table of one image, of which the detectors have these outputs."""
    detectors = detectors or [ready("t"), ready("s")]
    ground_truth = truth() if ground_truth is None else ground_truth  # one without objects is false
    counts = RegionCounts(detectors, ground_truth, list(known), list(thresholds))
    counts.update(0, [GIVEN, given], outputs)
    return counts.summarize()


def cells(both=0, first=0, second=0, neither=0):
    return {"both": both, "first": first, "second": second, "neither": neither}


def test_rows_by_hand():
    #           0: both right, 1: first alone, 2: second alone, 3: neither; 4 lies in the crowd
    table = counted([Said([0, 0, 1, 0, 1]), Said([0, 2, 0, 1, 0])])
    assert (table["rows"], table["foreground"]) == (4, 3)
    [pair] = table["pairs"]
    assert pair["all"]["class"] == cells(1, 1, 1, 1)
    assert pair["background"]["class"] == cells(neither=1)
    assert pair["by_class"]["a"]["rows"] == 3 and "b" not in pair["by_class"]
    assert pair["by_size"]["small"]["rows"] == 3
    assert pair["all"]["agreement"] == 1 / 4
    assert table["detectors"][0]["class_right_foreground"] == pytest.approx(2 / 3)


def test_a_class_that_the_data_set_lacks_is_none_of_its_own():
    """What a detector takes for something else it has not recognised, however near it was."""
    strange = Said([1, 0, 2, 1, 1], num_classes=3)  # zebra, a, b, zebra, zebra
    detectors = [ready("t"), ready("s", ("a", "zebra", "b"))]
    [pair] = counted([Said([0] * 5), strange], detectors)["pairs"]
    assert pair["all"]["class"] == cells(both=1, first=2, second=1)
    assert pair["background"]["class"] == cells(second=1)


def test_boxes_by_hand():
    # Shifted by half their width, all boxes overlap too little; unshifted, all overlap by 0.5 or more.
    table = counted([Said([0] * 5), Said([0] * 5, shift=0.5)])
    [pair] = table["pairs"]
    assert pair["all"]["box"] == cells(first=3)
    first, second = table["detectors"]
    assert first["iou_before"] == pytest.approx((1 + 0.7 + 0.5) / 3)
    assert first["iou_gained"] == pytest.approx(0) and second["iou_gained"] < -0.3


def test_a_detector_that_sees_the_image_larger_judges_the_same_places():
    said = Said([0] * 5, scale=2)
    table = counted([Said([0] * 5), said], given=GIVEN | {"image": torch.zeros(3, 200, 200)})
    # The crowd's row is judged, too; it is left out of the counts.
    torch.testing.assert_close(said.asked, PROPOSALS * 2)
    assert table["detectors"][1]["iou_after"] == pytest.approx(table["detectors"][0]["iou_after"])


def test_a_boxs_place_in_the_input_is_by_width_and_by_height():
    given = {"image": torch.zeros(3, 20, 60), "height": 10, "width": 20}
    assert (torch.ones(4) * input_scale(given)).tolist() == [3, 2, 3, 2]


def test_an_object_whose_class_not_all_know_has_no_row():
    detectors = [ready("t"), ready("s", ("x", "a"))]
    table = counted([Said([0] * 5), Said([1] * 5)], detectors, truth(label=1), known=[0])
    assert (table["rows"], table["foreground"]) == (1, 0)


def test_an_image_without_objects_or_proposals():
    nothing = GroundTruth((0,), ("a", "b"), *(x[:0] for x in list(vars(truth()).values())[2:]))
    table = counted([Said([2] * 5), Said([2] * 5)], ground_truth=nothing)
    assert table["rows"] == 5 == table["pairs"][0]["all"]["class"]["both"]
    empty = Said([])
    empty.proposals[0] = empty.proposals[0][:0]
    assert counted([empty, empty], ground_truth=nothing)["rows"] == 0


class Dense:
    """A one-stage detector's outputs, made by hand: logits of each anchor, and which it labels foreground."""

    anchors = [Boxes(torch.tensor([OBJECT, [60, 5, 80, 25], [5, 60, 25, 80], [30, 60, 50, 80]]))]
    images = SimpleNamespace(image_sizes=[(100, 100)])
    predictions = (None, None)

    def __init__(self, scores, foreground):
        self.pred_logits = [torch.tensor(scores).logit()[None]]
        self.pred_anchor_deltas = [torch.zeros(1, 4, 4)]
        labels = torch.where(torch.tensor(foreground), 1, 2)
        self.detector = SimpleNamespace(
            device=torch.device("cpu"),
            num_classes=2,
            box2box_transform=CODER,
            label_anchors=lambda _, given: ([labels], [given[0].gt_boxes.tensor[[0] * 4]]),
        )


def test_anchors_by_hand(monkeypatch):
    monkeypatch.setattr("d2kd.comparison.regions.NUM_TOP_ANCHORS", 1)
    low = [0.1, 0.1]
    first = Dense([[0.6, 0.1], [0.1, 0.9], low, low], [True, False, False, False])
    second = Dense([[0.7, 0.1], [0.2, 0.1], [0.95, 0.1], low], [False] * 4)
    detectors = [ready("t"), ready("s")]

    def table():
        for one, said in zip(detectors, (first, second)):
            one.teacher = SimpleNamespace(outputs_class=DenseOutputs, detector=said.detector)
        return counted([first, second], detectors, thresholds=[0.5, 0.8])

    found = table()
    # Labelled by the first; the first's best; the second's best. The fourth anchor matters to nobody.
    assert (found["kind"], found["rows"], found["foreground"]) == ("anchors", 3, 1)
    [pair] = found["pairs"]
    # The second says background of the object, for its class does not reach 0.8.
    assert pair["foreground"]["class"] == cells(first=1)
    assert pair["background"]["class"] == cells(first=1, second=1)
    assert pair["foreground"]["box"] == cells(both=1)
    # Nor does it say "a" where it says "zebra" more surely.
    second.pred_logits = [torch.tensor([[0.9, 0.1, 0.95], *[[0.1, 0.1, 0.1]] * 3]).logit()[None]]
    detectors[1] = ready("s", ("a", "b", "zebra"))
    [pair] = table()["pairs"]
    assert pair["foreground"]["class"] == cells(first=1)


@pytest.mark.parametrize("family", ["retinanet", "fcos", "gfl"])
def test_anchors_are_scored_as_detections_are(family):
    teacher = Teacher(lively(build(DETECTORS[family]())), None)
    examples = batch(sizes=((64, 64),), objects=(0,))
    [found] = teacher.detect(examples)
    scores = RegionCounts._scores(teacher.outputs(examples))
    torch.testing.assert_close(found["instances"].scores.max(), scores.max())


def test_features_by_hand():
    similarity = FeatureSimilarity(["t", "s", "u"], [{"p3": 2}, {"p3": 2}, {"p3": 4}])
    ours = torch.zeros(1, 2, 4, 6)
    ours[:, 0] = 1
    theirs = ours.clone()
    theirs[:, :, :2, :2] = -1  # cosine -1/sqrt(2) in the upper left quarter of the image
    theirs[
        ..., 4:
    ] = -1  # and in the padding, which does not count, nor where an object reaches into it
    features = [{"p3": ours}, {"p3": theirs}, {"p3": torch.zeros(1, 4, 4, 6)}]
    objects = torch.tensor([[0.0, 0, 20, 16], [30, 0, 48, 32]])  # none has the centre at 20
    similarity.update(features, (32, 32), (32, 48), objects)
    [row] = similarity.summarize()["rows"]
    assert row["in_objects"] == pytest.approx(-(0.5**0.5))
    assert row["everywhere"] == pytest.approx((12 - 4 * 0.5**0.5) / 16)
    assert similarity.summarize()["left_out"] == {"u": "4 channels beside 2"}


def taught(node, losses, teacher=None, classes=None, theirs=None):
    teacher = Teacher(teacher or build(node, 1), weights=None, classes=theirs)
    made = dict(student=build(node, 0), teacher=teacher, losses=losses, classes=classes)
    model = Distiller(max_iter=10, **made).train()
    model.agreement_period = 1
    return model


def counting_otherwise(node):
    """The student's copy, whose class k is the one before, and the last one the first."""
    detector = build(node, 0)
    for key, value in detector.state_dict().items():
        if "cls_score" in key:
            rows = value[: len(value) // CLASSES * CLASSES]  # the background's may follow
            rows.copy_(rows.unflatten(0, (-1, CLASSES)).roll(1, 1).flatten(0, 1))
    return detector


@pytest.mark.parametrize("family", list(DETECTORS))
def test_agreement_is_logged_and_complete_with_a_copy(family):
    node = DETECTORS[family]()
    copy, turned, names = build(node, 0), counting_otherwise(node), ["a", "b", "c"]
    for teacher, whole in (([copy], True), ([turned, names, ["c", "a", "b"]], True),
                           ([turned], False), ([None], False)):  # fmt: skip
        model, sides = taught(node, DistillLosses(tar=TARLoss()), *teacher), []
        model.losses.register_forward_pre_hook(lambda _, both, sides=sides: sides.extend(both))
        with EventStorage() as storage:
            model(batch())
        value = storage.latest()["distill/agreement"][0]
        assert value == 1 if whole else 0 <= value < 1
        assert value == top1_agreement(*sides, model.class_map)


def answers_of(levels, classes, seed):
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 3 * classes, side, side, generator=g) for side in levels]
    detector = SimpleNamespace(num_classes=classes)
    return DenseOutputs(detector, [], predictions=(maps, []))


@pytest.mark.parametrize("sides", [(8, 4, 2), (3, 1)], ids=["more than 100", "fewer"])
@pytest.mark.parametrize(
    "ours, theirs, names",
    [(4, 4, None), (1, 1, None), (4, 3, ("bcda", "dxc")), (2, 2, ("ab", "ba"))],
)
def test_agreement_by_level_is_that_of_all_logits(sides, ours, theirs, names):
    student, teacher = answers_of(sides, ours, 0), answers_of(sides, theirs, 1)
    class_map = names and ClassMap.from_names(*map(list, names))
    one, other = (torch.cat(x.pred_logits, dim=1) for x in (student, teacher))
    if class_map is not None:
        one, other = class_map.shared_logits(one, other)
    best = other.amax(dim=2).topk(min(100, other.shape[1]), dim=1).indices
    same = [(a[b].argmax(1) == c[b].argmax(1)).float() for a, b, c in zip(one, best, other)]
    assert top1_agreement(student, teacher, class_map) == pytest.approx(
        float(torch.cat(same).mean())
    )


def test_other_anchors_do_not_agree():
    for sides, classes in (((8, 4), 3), ((8, 4, 1), 3), ((8, 4, 2), 2)):
        assert top1_agreement(answers_of((8, 4, 2), 3, 0), answers_of(sides, classes, 1)) is None


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn"])
def test_classes_that_are_scored_one_by_one_are_not_compared_by_softmax(family, side):
    """As ``use_sigmoid_ce`` of later Detectron2 has them, beside a last logit that means nothing."""
    # A loss that reads the regions of both, but not their classes.
    model = taught(DETECTORS[family](), DistillLosses(tar=TARLoss(classification_weight=0)))
    detectors = {"student": model.student, "teacher": model.teacher.detector}
    box_stages(detectors[side].roi_heads)[-1][1].use_sigmoid_ce = True
    with EventStorage() as storage:
        model(batch())
    assert "distill/agreement" not in storage.latest()
    with pytest.raises(InputError, match="tar.regions: a GeneralizedRCNN with use_sigmoid_ce"):
        DistillLosses(tar=TARLoss()).setup(*detectors.values())
    compared = [ready(name) for name in detectors]
    for one in compared:
        one.teacher.detector = detectors[one.detector.name]
    assert why_not_comparable(compared).startswith(f"{side} scores each class independently")


def test_agreement_is_computed_once_in_a_period():
    model = taught(tiny_faster_rcnn(), DistillLosses(tar=TARLoss()))
    model.agreement_period = 3
    with EventStorage() as storage:
        for _ in range(7):
            model(batch())
            storage.step()
    assert [step for _, step in storage.history("distill/agreement").values()] == [2, 5]


def test_agreement_never_asks_the_teacher():
    model = taught(tiny_faster_rcnn(), DistillLosses(imitation=ImitationLoss()))
    model.teacher.detector.roi_heads.box_head.register_forward_hook(
        lambda *_: pytest.fail("asked for nothing but a scalar")
    )
    with EventStorage() as storage:
        model(batch())
    assert "distill/agreement" not in storage.latest()
