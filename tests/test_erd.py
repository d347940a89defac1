"""ERD and LwF against slow restatements, and how a detector grows by new classes."""

import copy
import math
import statistics

import pytest
import torch
from detectron2.structures import Boxes, ImageList, pairwise_iou
from detectron2.utils.events import EventStorage

from d2kd.losses import DistillLosses, ERDLoss, LwFLoss
from d2kd.modeling import DenseOutputs, Distiller, Teacher
from d2kd.structures.class_map import ClassMap
from d2kd.testing import (
    check_loss,
    forward_losses,
    sum_distill_losses,
    tiny_fcos,
    tiny_gfl,
    tiny_retinanet,
)
from d2kd.utils.errors import InputError

from .common import batch, build
from .parity.gfl_erd import detector

OLD, NEW = ["cat", "ox"], ["hen", "dog", "fox"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# The method, restated


def answers(images=3, old=4, new=2, side=64, levels=("p3", "p4", "p5")):
    """Outputs of an old detector and of its successor, whose answers require gradients."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(side // 2 ** int(level[1:]),) * 2 for level in levels]

    def draw(channels, mean=0.0):
        return [torch.randn(images, channels, *s, generator=generator) * 2 + mean for s in shapes]

    # Scores below one half, as a detector's are: above it none would stand out.
    theirs, ours = [draw(old, -4), draw(68)], [draw(old + new, -4), draw(68)]
    for x in ours[0] + ours[1]:
        x.requires_grad_()
    teacher = detector(list(levels), old, 16)
    student = detector(list(levels), old + new, 16, old)
    anchors = teacher.anchor_generator(theirs[0])
    whole = ImageList(torch.zeros(images, 3, side, side), [(side, side)] * images)
    return (
        DenseOutputs(student, [], predictions=ours, anchors=anchors),
        DenseOutputs(teacher, [], predictions=theirs, anchors=anchors, images=whole),
    )


def rows_of(images, outputs):
    """The outputs for some of the images."""
    kept = [[x[images].detach().requires_grad_() for x in kind] for kind in outputs.predictions]
    return DenseOutputs(outputs.detector, [], predictions=kept, anchors=outputs.anchors)


def bound(student, teacher, **options):
    loss = ERDLoss(**options)
    loss.setup(student.detector, teacher.detector)
    return loss


def of(loss, student, teacher):
    with EventStorage():
        return loss(student, teacher)


def slow_nms(boxes, scores, classes, threshold):
    # As torchvision keeps classes apart. Boxes beyond the image's left may still meet another class's.
    boxes = boxes + torch.tensor(classes)[:, None] * (boxes.max() + 1)
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        overlap = pairwise_iou(Boxes(boxes[i : i + 1]), Boxes(boxes[kept]))
        if not kept or overlap.max() <= threshold:
            kept.append(i)
    return sorted(kept)


def slow_erd(student, teacher, loss):
    """The two terms as one process sees them, image by image and location by location."""
    centers = Boxes.cat(teacher.anchors).get_centers()
    strides = [8.0 * 2**level for level, a in enumerate(teacher.anchors) for _ in range(len(a))]
    old = teacher.detector.num_classes
    c_t, c_s = (torch.cat(x.pred_logits, 1)[..., :old] for x in (teacher, student))
    z_t, z_s = (torch.cat(x.pred_distributions, 1) for x in (teacher, student))
    judge = c_s if loss.box_weight_from == "student" else c_t
    tau = loss.temperature

    def beyond(values, alpha):
        bar = statistics.mean(values) + alpha * statistics.stdev(values)
        return [a for a, v in enumerate(values) if v > bar]

    squares, means, box = [], [], 0.0
    for i in range(len(c_t)):
        g = [float(row.sigmoid().max()) for row in c_t[i]]
        h = [float(row.max()) for row in z_t[i]]
        of_image = [(c_s[i, a] - c_t[i, a]) ** 2 for a in beyond(g, loss.alpha_cls)]
        squares += of_image
        means.append(torch.cat(of_image).mean())

        rows = beyond(h, loss.alpha_box)
        boxes = []
        for a in rows:
            d = (z_t[i, a].softmax(-1) * torch.arange(17.0)).sum(-1)
            d = d * strides[a] if loss.decode_with_stride else d
            x, y = centers[a]
            boxes.append(torch.stack([x - d[0], y - d[1], x + d[2], y + d[3]]))
        scores, classes = [g[a] for a in rows], [int(c_t[i, a].argmax()) for a in rows]
        for j in slow_nms(torch.stack(boxes), scores, classes, loss.nms_thresh):
            a = rows[j]
            p, q = ((z[i, a] / tau).softmax(-1) for z in (z_t, z_s))
            kl = (p * (p / q).log()).sum(-1).mean()  # over the four edges
            box = box + loss.ld_weight * judge[i, a].sigmoid().max().detach() * tau**2 * kl / 17
    n, reference = len(c_t), loss.reference_images_per_process
    scale = 1.0 if reference is None else reference / n
    pooled = torch.cat(squares).mean()
    classification = pooled if loss.class_pool == "batch" else scale * sum(means)
    return {"classification": classification, "box": scale * box}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_pool": "image", "reference_images_per_process": None},
        {"class_pool": "image", "reference_images_per_process": 3.0, "box_weight_from": "teacher"},
        {"decode_with_stride": True, "nms_thresh": 0.3, "temperature": 2.0, "ld_weight": 1.0},
        {"alpha_cls": 1.0, "alpha_box": 0.5},
    ],
)
def test_the_method_restated(options):
    student, teacher = answers()
    loss = bound(student, teacher, **options)
    found = of(loss, student, teacher)
    slow = slow_erd(student, teacher, loss)
    leaves = student.predictions[0] + student.predictions[1]
    for name in found:
        assert found[name].item() > 0
        torch.testing.assert_close(found[name], slow[name], rtol=1e-4, atol=1e-6)
        gradients = [
            torch.autograd.grad(x[name], leaves, retain_graph=True, materialize_grads=True)
            for x in (found, slow)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("make", [ERDLoss, LwFLoss])
def test_old_classes_go_by_name(make):
    """From a teacher whose classes have other numbers the student learns the same."""
    student, teacher = answers()
    order = [2, 0, 3, 1]
    turned = [x[:, order] for x in teacher.predictions[0]], teacher.predictions[1]
    turned = DenseOutputs(
        teacher.detector, [], predictions=turned, anchors=teacher.anchors, images=teacher.images
    )
    found = []
    for other, numbers in ((teacher, range(4)), (turned, order)):
        loss = make()
        loss.class_map = ClassMap.from_names("abcdef", ["abcd"[k] for k in numbers])
        loss.setup(student.detector, other.detector)
        value = of(loss, student, other)
        value = sum(value.values()) if isinstance(value, dict) else value
        gradients = torch.autograd.grad(value, student.predictions[0])
        assert not any(x[:, 4:].any() for x in gradients), "new classes were touched"
        found.append((value, *gradients))
    torch.testing.assert_close(*found)
    assert all(value.item() > 0 for value, *_ in found)


@pytest.mark.parametrize("old", [4, 1])
@pytest.mark.parametrize("images", [3, 1])
def test_images_are_selected_together_as_alone(images, old):
    """The last of several says nothing that stands out."""
    student, teacher = answers(images, old)
    if images > 1:
        for x in teacher.predictions[0] + teacher.predictions[1]:
            x[-1] = 0.5
    loss = bound(student, teacher, nms_thresh=0.3, decode_with_stride=True)
    together = loss.select(teacher, loss.gather_predictions(teacher, "teacher"))
    for i in range(images):
        theirs = rows_of([i], teacher)
        alone = loss.select(theirs, loss.gather_predictions(theirs, "teacher"))
        for name in ("classes", "boxes", "kept"):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0])
        assert together.kept[i].any() == (images == 1 or i < images - 1)


def test_nothing_stands_out():
    """Equal answers everywhere select nothing: both terms are 0, and so are their gradients."""
    student, teacher = answers()
    for kind in teacher.predictions:
        for x in kind:
            x.fill_(0.5)
    losses = of(bound(student, teacher), student, teacher)
    assert set(losses) == {"classification", "box"} and not any(
        value.item() for value in losses.values()
    )
    sum(losses.values()).backward()
    assert not any(x.grad.any() for kind in student.predictions for x in kind)


def test_what_is_selected_is_logged():
    student, teacher = answers()
    with EventStorage() as storage:
        loss = bound(student, teacher)
        loss(student, teacher)
        selection = loss.select(teacher, loss.gather_predictions(teacher, "teacher"))
        values = {k: v[0] for k, v in storage.latest().items()}
    shares = {name: getattr(selection, name).float().mean().item() for name in ("classes", "boxes")}
    for name, share in shares.items():
        assert values[f"distill/erd_selected_{name}"] == pytest.approx(share)
        assert 0 < share <= 0.2  # of any numbers, by Cantelli's inequality
    kept = selection.kept.sum().item() / 3
    assert values["distill/erd_kept_boxes"] == pytest.approx(kept) and kept > 0
    assert (selection.boxes | ~selection.kept).all(), "something was kept that was not selected"


# What every loss has


@pytest.mark.parametrize(
    "options",
    [{}, {"class_pool": "image", "decode_with_stride": True, "box_weight_from": "teacher"}],
)
def test_properties(options):
    check_loss(lambda: ERDLoss(**options), ["gfl"])


@pytest.mark.parametrize("family", ["gfl", "retinanet", "fcos"])
def test_properties_of_lwf(family):
    check_loss(LwFLoss, [family])


def test_lwf_compares_everything():
    student, teacher = answers()
    loss = LwFLoss()
    loss.setup(student.detector, teacher.detector)
    ours, theirs = (torch.cat(x.pred_logits, 1)[..., :4] for x in (student, teacher))
    torch.testing.assert_close(loss(student, teacher), ((ours - theirs) ** 2).mean())


@pytest.mark.parametrize(
    "student, teacher, line",
    [
        (tiny_retinanet(), tiny_gfl(), "distributions: student RetinaNet with reg_max None, teach"),
        (tiny_gfl(), tiny_fcos(), "distributions: .*expected two GFLs with the same reg_max"),
        (tiny_gfl(), tiny_gfl(classes=4), "num_classes: student 3, teacher 4; expected the teach"),
    ],
)
def test_what_cannot_be_compared(student, teacher, line):
    with pytest.raises(InputError, match=line):
        ERDLoss().setup(build(student), build(teacher))


@pytest.mark.parametrize(
    "options, line",
    [
        ({"class_pool": "mean"}, "class_pool: mean; expected batch or image"),
        ({"box_weight_from": "both"}, "box_weight_from: both; expected student or teacher"),
    ],
)
def test_unknown_choices(options, line):
    with pytest.raises(InputError, match=line):
        ERDLoss(**options)


# A detector that grows


def old_detector(seed=1):
    """One that finds something, with weights everywhere."""
    model = build(tiny_gfl(classes=len(OLD)), seed)
    with torch.no_grad():
        for p in model.head.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
        model.head.cls_score.bias += 4
    return model


def grown(old, losses=None, classes=(*OLD, *NEW), old_classes=OLD):
    student = tiny_gfl(classes=len(classes))
    student.num_old_classes = len(old_classes)
    return Distiller(
        student=build(student),
        teacher=Teacher(old, None, classes=list(old_classes)),
        losses=DistillLosses(**(losses or {})),
        max_iter=2,
        inherit=[""],
        classes=list(classes),
    )


def test_at_first_it_is_the_old_detector():
    """It detects the same objects, scores new classes as unlikely, and has nothing to learn from the teacher."""
    old = old_detector()
    model = grown(copy.deepcopy(old), {"erd": ERDLoss()})
    with torch.no_grad():
        found = [m.eval()(batch()) for m in (model, old)]
    for a, b in zip(*found, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(b) and torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
        torch.testing.assert_close(a.scores, b.scores)
    bias = model.student.head.cls_score.bias
    torch.testing.assert_close(bias[len(OLD) :], torch.full((len(NEW),), -math.log(99)))
    losses = forward_losses(model.train(), new_batch())
    assert abs(float(sum_distill_losses(losses))) <= 1e-9


def new_batch(**options):
    """Objects of new classes alone."""
    examples = batch(classes=len(NEW), **options)
    for example in examples:
        example["instances"].gt_classes += len(OLD)
    return examples


def test_without_names_the_old_rows_are_the_first():
    old = old_detector()
    node = tiny_gfl(classes=len(OLD) + 1)
    node.num_old_classes = len(OLD)
    student, fresh = build(node), build(node)
    parts = dict(student=student, teacher=Teacher(old, None), losses=DistillLosses())
    Distiller(**parts, max_iter=1, inherit=["head."])
    for name in ("weight", "bias"):
        found, theirs, made = (getattr(x.head.cls_score, name) for x in (student, old, fresh))
        assert torch.equal(found[: len(OLD)], theirs) and torch.equal(found[-1], made[-1])


@pytest.mark.parametrize("losses", [{"it": ERDLoss}, {"it": LwFLoss}, {}])
@pytest.mark.parametrize(
    "classes", [("hen", "ox", "dog", "cat", "fox"), ("ox", "hen", "cat", "dog", "fox")]
)
def test_what_is_kept_is_what_the_task_leaves_aside(losses, classes):
    """Old classes are the first ones, in any order; others would be learned by nobody, or twice."""
    made = {name: loss() for name, loss in losses.items()}
    grown(old_detector(), made, classes=("ox", "cat", "hen", "dog", "fox"))
    known = ", ".join(str(k) for k, name in enumerate(classes) if name in OLD)
    line = f"num_old_classes: 2, and the teacher has the student's {known}; expected the old"
    with pytest.raises(InputError, match=line):
        grown(old_detector(), made, classes=classes)


@pytest.mark.parametrize("objects", [(2, 1), (0, 0)])
def test_the_task_is_that_of_a_detector_of_the_new_classes(objects):
    """Losses are those of a GFL with the new classes alone, and rows of old classes get no gradient."""
    model = grown(old_detector()).train()
    score = model.student.head.cls_score
    alone = build(tiny_gfl(classes=len(NEW)))
    state = {
        k: v[len(OLD) :] if k.startswith("head.cls_score.") else v
        for k, v in model.student.state_dict().items()
    }
    alone.load_state_dict(state)
    losses = forward_losses(model, new_batch(objects=objects))
    expected = forward_losses(alone.train(), batch(classes=len(NEW), objects=objects))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    sum(losses.values()).backward()
    for grad in (score.weight.grad, score.bias.grad):
        assert not grad[: len(OLD)].any() and grad[len(OLD) :].any()


def test_old_objects_are_refused():
    with pytest.raises(InputError, match="ground truth: an object of class 0, which is an old one"):
        examples = new_batch()
        examples[0]["instances"].gt_classes[0] = 0
        forward_losses(grown(old_detector()).train(), examples)
    with pytest.raises(InputError, match="num_old_classes: 3; expected from 0 to 2"):
        node = tiny_gfl()
        node.num_old_classes = 3
        build(node)


@pytest.mark.parametrize(
    "node, names, line",
    [
        (tiny_gfl(classes=2), ["ox", "cat"], "its classes are cat, ox; expected the classes ox, c"),
        (tiny_gfl(), ["a", "b", "c"], "its classes are cat, ox; expected the classes a, b"),
        (tiny_retinanet(classes=2), OLD, "missing.*expected all weights of this RetinaNet"),
    ],
)
def test_another_ones_checkpoint_is_refused(node, names, line, tmp_path):
    file = tmp_path / "old.pth"
    torch.save({"model": old_detector().state_dict(), "classes": OLD}, file)
    known = Teacher(build(tiny_gfl(classes=2)), str(file), classes=OLD)
    assert known.classes == tuple(OLD)
    with pytest.raises(InputError, match=line):
        Teacher(build(node), str(file), classes=names)


def test_names_without_an_old_class_are_refused(refuses):
    teacher = Teacher(build(tiny_gfl(classes=1)), None, classes=["x"])
    parts = dict(student=build(tiny_gfl()), teacher=teacher, max_iter=1, classes=["a", "b", "c"])
    line = "losses.erd.classes: none is the student's and the teacher's; expected the old ones in"
    refuses(lambda: Distiller(losses=DistillLosses(erd=ERDLoss()), **parts), line)


def test_the_published_settings_are_the_defaults():
    loss = ERDLoss()
    found = loss.alpha_cls, loss.alpha_box, loss.nms_thresh, loss.temperature, loss.ld_weight
    assert found == (2.0, 2.0, 0.005, 10.0, 0.25)
