"""Classes are matched by name, and only what both detectors know is compared."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances

from d2kd.losses import DistillLosses, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.modeling.teacher import to_student_classes
from d2kd.structures.class_map import ClassMap, class_names
from d2kd.testing import forward_losses
from d2kd.utils.errors import InputError

from .common import DETECTORS, batch, build

STUDENT = ["cat", "Traffic Light", "ox"]
TEACHER = ["dog", "ox", "bird", "traffic_light"]


def test_names_match_but_for_their_spelling():
    classes = ClassMap.from_names(STUDENT, TEACHER)
    assert classes.pairs == ((1, 3), (2, 1)) and not classes.is_identity
    assert str(classes) == "2 of the student's 3 classes are known to the teacher; not cat"
    assert ClassMap.from_names(STUDENT, STUDENT).is_identity
    assert not ClassMap.from_names(STUDENT, STUDENT[::-1]).is_identity
    assert not ClassMap.from_names(STUDENT, [*STUDENT, "hen"]).is_identity
    with pytest.raises(InputError, match="classes: 'a' 2 times; expected a name once"):
        ClassMap.from_names(["a", "b", "a"], TEACHER)


ALIKE = [
    ["कार", "कूर"],
    ["มด", "มีด"],
    ["C", "C++", "C#", "c"],
    ["+", "-", "_", "+/-"],
    ["<1 m", ">1 m", "1 m"],
    ["+1", "-1", "1"],
    ["A+", "A-", "A"],
    ["cafe", "cafe\u0301"],
    ["a b", "a-b", "A_B"],
]


@pytest.mark.parametrize("names", ALIKE, ids="|".join)
def test_names_that_are_nearly_alike_stay_apart(names):
    """A list is itself in any order, and what it lacks is nothing else in it."""
    assert ClassMap.from_names(names, names).is_identity
    turned = names[::-1]
    expected = [(k, turned.index(name)) for k, name in enumerate(names)]
    assert list(ClassMap.from_names(names, turned).pairs) == expected
    for k, name in enumerate(names):
        rest = names[:k] + names[k + 1 :]
        pairs = ClassMap.from_names(names, rest).pairs
        assert list(pairs) == [(names.index(other), i) for i, other in enumerate(rest)], name


def test_the_spelling_counts_where_it_decides():
    assert ClassMap.from_names(["caf\u00e9"], ["Cafe\u0301"]).pairs == ((0, 0),)
    assert not ClassMap.from_names(["cafe"], ["cafe\u0301"]).pairs
    assert not ClassMap.from_names(["a b"], ["a-b", "A_B"]).pairs  # which of them?
    for one, other in (
        pair.split() for pair in ("कार कूर", "มด มีด", "C C++", "<1 >1", "+1 -1", "A A-", "- _")
    ):
        assert not ClassMap.from_names([one], [other]).pairs
    assert ClassMap.from_names(["A b", "a-B"], ["a-B", "a_b"]).pairs == ((0, 1), (1, 0))
    assert ClassMap.from_names(["a", "a"], ["a", "a"]).is_identity


def test_labels_among_the_shared_classes():
    classes = ClassMap.from_names(STUDENT, TEACHER)
    labels = torch.tensor([[-1, 0, 1], [2, 3, 3]])
    assert classes.map_labels(labels).tolist() == [[-1, -1, 0], [1, 2, 2]]
    assert classes.map_labels(labels[:0]).shape == (0, 3)
    nothing = ClassMap.from_names(["a"], ["b"])
    assert nothing.map_labels(torch.tensor([-1, 0, 1])).tolist() == [-1, -1, 0]


def test_detections_by_the_students_numbers():
    """Without those of classes that the student does not have."""
    found = Instances((9, 9), scores=torch.arange(5.0), pred_classes=torch.tensor([0, 1, 2, 3, 1]))
    known = to_student_classes(found, ClassMap.from_names(STUDENT, TEACHER))
    assert known.pred_classes.tolist() == [2, 1, 2] and known.scores.tolist() == [1, 3, 4]


def test_names_of_a_data_set():
    name = "d2kd_test_classes"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    try:
        assert class_names(name) == class_names([name]) == class_names(["a", "b"]) == ("a", "b")
        with pytest.raises(InputError, match=f"it: 'd2kd_test_clases'; expected {name}"):
            class_names("d2kd_test_clases", "it")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    with pytest.raises(InputError, match="classes: no class"):
        class_names([])


def make(family, *, student=STUDENT, teacher=TEACHER, aliases=None, loss=None):
    detector = build(DETECTORS[family](classes=len(teacher)), seed=1)
    return Distiller(
        student=build(DETECTORS[family](classes=len(student))),
        teacher=Teacher(detector, None, classes=teacher, aliases=aliases),
        losses=DistillLosses(tar=loss or TARLoss()),
        max_iter=2,
        classes=student,
    ).train()


@pytest.mark.parametrize("family", DETECTORS)
def test_a_teacher_of_other_classes_teaches(family):
    losses = forward_losses(make(family), batch())
    sum(losses.values()).backward()
    terms = {key for key in losses if key.startswith("distill/")}
    assert len(terms) == 3 + (family == "mask_rcnn") and all(
        torch.isfinite(losses[key]) for key in terms
    )


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_the_order_of_classes_does_not_matter(family):
    """A teacher whose classes and rows are turned round teaches the same."""
    models = [
        make(family, teacher=classes, loss=TARLoss(reg_gate="none"))
        for classes in (STUDENT, STUDENT[::-1])
    ]
    with torch.no_grad():
        for model in models:  # whose boxes are of a class
            part = model.teacher.detector
            part = part.roi_heads.box_predictor if family == "faster_rcnn" else part.head
            part.bbox_pred.weight *= 50
        if family == "faster_rcnn":
            deltas = [4 * k + i for k in (2, 1, 0) for i in range(4)]
            layers = [(part.cls_score, [2, 1, 0, 3]), (part.bbox_pred, deltas)]
        else:
            layers = [(part.cls_score, [3 * anchor + k for anchor in range(2) for k in (2, 1, 0)])]
        for layer, order in layers:
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
    straight, turned = (forward_losses(model, batch()) for model in models)
    assert straight["distill/loss_tar_regression"] > 1e-3
    for key in straight:
        torch.testing.assert_close(straight[key], turned[key], rtol=1e-5, atol=1e-7)


def test_what_the_teacher_does_not_know_gives_no_term():
    """Every object is a cat, which the teacher does not know: only background is left to compare."""
    examples = batch(objects=(3, 2))
    for example in examples:
        example["instances"].gt_classes[:] = 0
    for family in ("faster_rcnn", "retinanet"):
        loss = TARLoss(cls_gate="none", reg_gate="none", background_weight=0.0)
        losses = forward_losses(make(family, loss=loss), examples)
        assert losses["distill/loss_tar_classification"].item() == 0
        assert float(losses["distill/loss_tar_regression"]) == 0
        assert float(losses["distill/loss_tar_feature"]) > 0


def test_both_sides_are_normalised_over_what_is_shared():
    loss = TARLoss(cls_gate="none")
    loss.class_map = ClassMap.from_names(["a", "b"], ["b", "c"])
    sides = [
        SimpleNamespace(pred_class_logits=torch.tensor([logits]), gt_classes=torch.tensor([1]))
        for logits in ([5.0, 1.0, -1.0], [0.5, 9.0, 0.25])
    ]
    q, p = (torch.tensor(x).softmax(0) for x in ([1.0, -1.0], [0.5, 0.25]))
    assert float(loss.classification(*sides)) == pytest.approx(float((p * (p / q).log()).sum()))


@pytest.mark.parametrize("family", ["faster_rcnn", "fcos"])
def test_without_a_shared_class_features_alone_are_compared(family, caplog):
    model = make(family, teacher=["x", "y", "z"])
    losses = forward_losses(model, batch())
    assert {key for key in losses if key.startswith("distill/")} == {"distill/loss_tar_feature"}
    assert "only features" in caplog.text


def test_aliases_are_the_students_names():
    model = make("faster_rcnn", aliases={"dog": "cat"})
    assert model.losses.by_name["tar"].class_map.pairs == ((0, 0), (1, 3), (2, 1))
    with pytest.raises(InputError, match="teacher.aliases: 'dogs'; expected of dog"):
        make("faster_rcnn", aliases={"dogs": "cat"})


@pytest.mark.parametrize(
    "student, teacher, line",
    [
        (None, TEACHER, "classes: only the teacher's; expected those of the student"),
        (STUDENT, ["a"], "classes of the teacher: 1 names; expected 4, one for each class"),
        (["a"], TEACHER, "classes of the student: 1 names; expected 3"),
    ],
)
def test_names_must_fit_the_detectors(student, teacher, line):
    with pytest.raises(InputError, match=line):
        Distiller(
            student=build(DETECTORS["retinanet"]()),
            teacher=Teacher(build(DETECTORS["retinanet"](classes=4)), None, classes=teacher),
            losses=DistillLosses(tar=TARLoss()),
            max_iter=2,
            classes=student,
        )
