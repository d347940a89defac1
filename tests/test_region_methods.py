"""DKD and DIST: the classes of regions and cells, beside slow restatements, and what these losses cannot compare."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import softmax

from d2kd.losses import DistillLosses, DISTLoss, DKDLoss
from d2kd.losses.dist import correlation_gaps
from d2kd.losses.dkd import decoupled_terms
from d2kd.modeling import Distiller, Teacher
from d2kd.structures.class_map import ClassMap
from d2kd.testing import DETECTORS, build, check_loss, distiller, forward_losses
from d2kd.utils.errors import InputError

from .common import batch

METHODS = {"dkd": DKDLoss, "dist": DISTLoss}
TWO_STAGE = "faster_rcnn", "mask_rcnn", "cascade_rcnn"


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, family", [("dkd", "cascade_rcnn"), ("dist", "retinanet")])
def test_properties(name, family):
    assert check_loss(METHODS[name], [family])


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name, family",
    [("dkd", x) for x in TWO_STAGE] + [("dist", x) for x in DETECTORS],
)
def test_properties_of_each_family(name, family):
    assert check_loss(METHODS[name], [family])


def decoupled(s, t, label, tau):
    """Both divergences of one row, by probabilities of Python."""
    p_s, p_t = (softmax(x.double() / tau, dim=0).tolist() for x in (s, t))

    def divergence(target, other):
        return sum(a * math.log(a / b) for a, b in zip(target, other) if a)

    binary = [(p[label], 1 - p[label]) for p in (p_t, p_s)]
    rest = [[x / (1 - p[label]) for k, x in enumerate(p) if k != label] for p in (p_t, p_s)]
    return tau**2 * divergence(*binary), tau**2 * divergence(*rest)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("rows, classes", [(7, 5), (4, 2), (1, 3)])
def test_dkd_restated(tau, rows, classes):
    s, t = draw(rows, classes), draw(rows, classes, seed=1)
    labels = torch.arange(rows) % classes
    expected = [decoupled(*row, tau) for row in zip(s, t, labels.tolist())]
    found = decoupled_terms(s, t, labels, temperature=tau)
    for ours, theirs in zip(found, zip(*expected), strict=True):
        assert ours.item() == pytest.approx(sum(theirs) / rows, rel=1e-4, abs=1e-6)
    if classes == 2:
        assert found[1] == 0  # one class beside the label


def test_dkd_of_a_very_sure_teacher_is_finite():
    s = draw(2, 4).requires_grad_()
    t = torch.tensor([[500.0, 0, 0, 0], [0, -400.0, 300.0, 0]])
    terms = decoupled_terms(s, t, torch.tensor([0, 1]))
    sum(terms).backward()
    assert all(torch.isfinite(x) for x in terms) and torch.isfinite(s.grad).all()


def test_dkd_leaves_out_rows_of_other_classes():
    """They count neither in the sum nor in the mean; without any row the value is 0."""
    s, t, labels = (
        draw(6, 4).requires_grad_(),
        draw(6, 4, seed=1),
        torch.tensor([0, -1, 2, 3, -1, 1]),
    )
    kept = labels >= 0
    for ours, theirs in zip(
        decoupled_terms(s, t, labels), decoupled_terms(s[kept], t[kept], labels[kept]), strict=True
    ):
        assert ours.item() == pytest.approx(theirs.item())
    nothing = decoupled_terms(s, t, torch.full((6,), -1))
    (gradient,) = torch.autograd.grad(sum(nothing), s)
    assert not any(nothing) and not gradient.any()


def stage(classes=3, rows=8, seed=0):
    logits = draw(rows, classes + 1, seed=seed)
    return SimpleNamespace(pred_class_logits=logits, gt_classes=torch.arange(rows) % (classes + 1))


def test_dkd_without_the_background():
    student, teacher = stage(), stage(seed=1)
    loss = DKDLoss(background="left_out")
    inside = student.gt_classes < 3
    expected = decoupled_terms(
        *(x.pred_class_logits[inside] for x in (student, teacher)), student.gt_classes[inside]
    )
    for ours, theirs in zip(loss.stage_terms(student, teacher), expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item())


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_only_shared_classes_are_compared(make):
    """The logits of a class of one side change nothing in DKD; in DIST they only share in the softmax."""
    loss, student, teacher = make(), stage(), stage(classes=2, seed=1)
    loss.class_map = ClassMap.from_names(["a", "b", "c"], ["c", "a"])
    if make is DKDLoss:
        before = loss.stage_terms(student, teacher)
        student.pred_class_logits[:, 1] += 5  # class b
        assert loss.stage_terms(student, teacher) == before
        student.pred_class_logits[:, 2] += draw(8, seed=3)
        assert loss.stage_terms(student, teacher) != before
    else:
        p, q = loss.region_table(student.pred_class_logits, teacher.pred_class_logits)
        assert torch.equal(p, softmax(student.pred_class_logits, 1)[:, [0, 2, 3]])
        assert torch.equal(q, softmax(teacher.pred_class_logits, 1)[:, [1, 0, 2]])
        p, q = loss.dense_table(draw(2, 12, 3), draw(2, 12, 2, seed=1), anchors=2)
        assert p.shape == q.shape == (12, 4)
        assert torch.equal(
            p.view(2, 6, 2, 2), draw(2, 12, 3)[..., [0, 2]].sigmoid().view(2, 6, 2, 2)
        )


def correlation(u, v):
    u, v = ([x - sum(w) / len(w) for x in w] for w in (u.tolist(), v.tolist()))
    product = sum(x * y for x, y in zip(u, v))
    return product / math.sqrt(sum(x * x for x in u) * sum(x * x for x in v))


@pytest.mark.parametrize("floor", [0, 1e-3])
def test_dist_restated(floor):
    p, q = draw(5, 7).sigmoid(), draw(5, 7, seed=1).sigmoid()
    inter, intra = DISTLoss(floor=floor).table_terms(p, q)
    rows = [1 - correlation(*x) for x in zip(p, q)]
    columns = [1 - correlation(*x) for x in zip(p.T, q.T)]
    assert inter.item() == pytest.approx(sum(rows) / 5, rel=1e-5)
    assert intra.item() == pytest.approx(sum(columns) / 7, rel=1e-5)


def test_dist_is_silent_for_equal_detectors_also_where_little_varies():
    """The authors' form has a loss and a gradient there."""
    nearly = 0.01 + torch.tensor([[1e-1], [1e-2], [1e-3], [1e-4], [1e-5]]) * draw(5, 30).sigmoid()
    for floor in (1e-3, 0):
        p = nearly.clone().requires_grad_()
        gaps, kept = correlation_gaps(p, nearly, floor)
        gaps.sum().backward()
        silent = gaps.abs().sum() < 1e-6 and p.grad.norm() < 1e-5
        assert silent == bool(floor)
        assert kept.tolist() == ([True] * 3 + [False] * 2 if floor else [True] * 5)


def test_the_gradient_of_a_constant_student_is_bounded():
    p, q = torch.full((2, 4), 0.3, requires_grad=True), draw(2, 4).sigmoid()
    gaps, _ = correlation_gaps(p, q, 1e-3)
    gaps.sum().backward()
    assert torch.isfinite(gaps).all() and 0 < p.grad.norm() < 1e4


def test_cascade_stages_add_up():
    model = distiller(DKDLoss, DETECTORS["cascade_rcnn"])
    terms = []
    of_stage = DKDLoss.stage_terms
    loss = model.losses.by_name["loss"]
    loss.stage_terms = lambda *both: terms.append(of_stage(loss, *both)) or terms[-1]
    losses = forward_losses(model, batch())
    assert len(terms) == 3
    assert losses["distill/loss_loss_target"] == sum(target for target, _ in terms)


def pair(family, classes=(3, 3), **options):
    student, teacher = (build(DETECTORS[family](classes=k)) for k in classes)
    return dict(student=student, teacher=Teacher(teacher, None, **options), max_iter=1)


@pytest.mark.parametrize(
    "make, arguments, line",
    [
        (DKDLoss, {"background": "none"}, "background: none; expected class or left_out"),
        (DKDLoss, {"temperature": 0}, "temperature: 0; expected a number above 0"),
        (DISTLoss, {"floor": -1}, "floor: -1; expected a number of at least 0"),
    ],
)
def test_invalid_arguments_are_refused(make, arguments, line, refuses):
    refuses(lambda: make(**arguments), line)


@pytest.mark.parametrize(
    "make, family, options, line",
    [
        (DKDLoss, "fcos", {}, "it.regions: the student, a FCOS, has none; expected two-stage"),
        (DKDLoss, "faster_rcnn", {"classes": (3, 4)}, "it.num_classes: student 3, teacher 4"),
        (DISTLoss, "gfl", {"classes": (3, 2)}, "it.num_classes: student 3, teacher 2"),
        (DISTLoss, "gfl", {"classes": (1, 1)}, "it.classes: 1 column: a class and an anchor"),
        (DISTLoss, "gfl", {"scale": 2}, "it.anchors: a teacher of images 2 times larger"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(make, family, options, line, refuses):
    refuses(lambda: Distiller(**pair(family, **options), losses=DistillLosses(it=make())), line)


def test_other_refusals_before_training(refuses):
    def build_losses(teacher=None, **changes):
        given = pair("faster_rcnn", **changes)
        if teacher is not None:
            given["teacher"] = Teacher(build(DETECTORS[teacher]()), None)
        return given

    one = build_losses(teacher="retinanet")
    refuses(
        lambda: Distiller(**one, losses=DistillLosses(it=DISTLoss())),
        "anchors: student Generalized",
    )
    sigmoid = build_losses()
    sigmoid["student"].roi_heads.box_predictor.use_sigmoid_ce = True
    refuses(
        lambda: Distiller(**sigmoid, losses=DistillLosses(it=DKDLoss())), "use_sigmoid_ce, whose"
    )
    apart = build_losses(classes=(3, 2))
    apart["teacher"].classes = ("x", "y")
    refuses(
        lambda: Distiller(**apart, losses=DistillLosses(it=DKDLoss()), classes=["a", "b", "c"]),
        "it.classes: none is the student's and the teacher's",
    )


def test_one_class_trains():
    for make in METHODS.values():
        model = distiller(make, DETECTORS["faster_rcnn"], classes=1)
        losses = forward_losses(model, batch(classes=1))
        assert all(torch.isfinite(x) for x in losses.values())
    with pytest.raises(InputError):
        distiller(DISTLoss, DETECTORS["gfl"], classes=1)
