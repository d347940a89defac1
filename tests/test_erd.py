"""ERD: a slow restatement, how detectors grow, and what does not depend on processes."""

import copy
import math

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes, ImageList, pairwise_iou
from detectron2.utils.events import EventStorage

from d2kd.losses import DistillLosses, ERDLoss, LwFLoss
from d2kd.losses.erd import elastic_selection
from d2kd.modeling import DenseOutputs, Distiller, Teacher
from d2kd.structures.class_map import ClassMap
from d2kd.testing import check_loss, step, sum_distill_losses, tiny_fcos, tiny_gfl, tiny_retinanet
from d2kd.utils.errors import InputError

from .common import batch, build
from .parity.gfl_erd import detector
from .two_processes import in_two

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
    squares, means, box = [], [], 0.0
    for i in range(len(c_t)):
        g = [max(float(v) for v in row.sigmoid()) for row in c_t[i]]
        h = [float(row.max()) for row in z_t[i]]

        def beyond(values, alpha):
            mean = sum(values) / len(values)
            std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
            return [a for a, v in enumerate(values) if v > mean + alpha * std]

        single_image_model = [(c_s[i, a] - c_t[i, a]) ** 2 for a in beyond(g, loss.alpha_cls)]
        squares += single_image_model
        means.append(
            torch.cat(single_image_model).mean() if single_image_model else torch.tensor(0.0)
        )

        rows = beyond(h, loss.alpha_box)
        boxes = []
        for a in rows:
            d = (z_t[i, a].softmax(-1) * torch.arange(17.0)).sum(-1)
            d = d * strides[a] if loss.decode_with_stride else d
            x, y = centers[a]
            boxes.append(torch.stack([x - d[0], y - d[1], x + d[2], y + d[3]]))
        kept = slow_nms(
            torch.stack(boxes),
            [g[a] for a in rows],
            [int(c_t[i, a].argmax()) for a in rows],
            loss.nms_thresh,
        )
        for a in (rows[j] for j in kept):
            judge = c_s if loss.box_weight_from == "student" else c_t
            v = judge[i, a].sigmoid().max().detach()
            for edge in range(4):
                p = (z_t[i, a, edge] / loss.temperature).softmax(-1)
                q = (z_s[i, a, edge] / loss.temperature).softmax(-1)
                kl = (p * (p / q).log()).sum()
                box = box + loss.ld_weight * v * loss.temperature**2 * kl / 17 / 4
    n, reference = len(c_t), loss.reference_images_per_process
    scale = 1.0 if reference is None else reference / n
    pooled = torch.cat(squares).mean() if squares else torch.tensor(0.0)
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
    ours = of(loss, student, teacher)
    slow = slow_erd(student, teacher, loss)
    assert all(value.item() > 0 for value in ours.values())
    leaves = student.predictions[0] + student.predictions[1]
    for name in ours:
        torch.testing.assert_close(ours[name], slow[name], rtol=1e-4, atol=1e-6)
        mine = torch.autograd.grad(ours[name], leaves, allow_unused=True)
        theirs = torch.autograd.grad(slow[name], leaves, allow_unused=True)
        for a, b in zip(mine, theirs, strict=True):
            a, b = (torch.zeros(()) if x is None else x for x in (a, b))
            torch.testing.assert_close(
                a + torch.zeros_like(b), b + torch.zeros_like(a), rtol=1e-3, atol=1e-7
            )


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


def test_what_stands_out():
    responses = torch.zeros(2, 100)
    responses[0, 3], responses[1, :50] = 1.0, 1.0
    chosen = elastic_selection(responses, 2.0)
    assert chosen[0].nonzero().flatten().tolist() == [3] and not chosen[1].any()
    assert not elastic_selection(torch.ones(1, 2), 2.0).any()


@pytest.mark.parametrize("old", [4, 1])
@pytest.mark.parametrize("images", [3, 1])
def test_images_are_selected_together_as_alone(images, old):
    """The last of several says nothing that stands out."""
    student, teacher = answers(images, old)
    if images > 1:
        for x in teacher.predictions[0] + teacher.predictions[1]:
            x[-1] = 0.5
    loss = bound(student, teacher, nms_thresh=0.3, decode_with_stride=True)
    together = loss.select(teacher, loss.gather_predictions(teacher, "teacher_ids"))
    for i in range(images):
        theirs = rows_of([i], teacher)
        alone = loss.select(theirs, loss.gather_predictions(theirs, "teacher_ids"))
        for name in ("classes", "boxes", "kept"):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0])
        assert together.kept[i].any() == (images == 1 or i < images - 1)


def test_what_is_said_is_put_together_once(monkeypatch):
    student, teacher = answers()
    read = []
    for name in ("pred_logits", "pred_distributions"):
        of_outputs = getattr(DenseOutputs, name).fget
        monkeypatch.setattr(
            DenseOutputs,
            name,
            property(lambda said, name=name, of=of_outputs: read.append((name, said)) or of(said)),
        )
    of(bound(student, teacher), student, teacher)
    assert len(read) == 4


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
        selection = loss.select(teacher, loss.gather_predictions(teacher, "teacher_ids"))
        values = {k: v[0] for k, v in storage.latest().items()}
    shares = {name: getattr(selection, name).float().mean().item() for name in ("classes", "boxes")}
    for name, share in shares.items():
        assert values[f"distill/erd_selected_{name}"] == pytest.approx(share)
        assert 0 < share <= 0.2  # of any numbers, by Cantelli's inequality
    kept = selection.kept.sum().item() / 3
    assert values["distill/erd_kept_boxes"] == pytest.approx(kept) and kept > 0
    assert (selection.boxes | ~selection.kept).all(), "something was kept that was not selected"


# Processes

DEALS = {"evenly": [[0, 1], [2, 3]], "unevenly": [[0], [1, 2, 3]]}


def _process(rank, folder, deal, options):
    student, teacher = answers(images=4)
    student, teacher = rows_of(deal[rank], student), rows_of(deal[rank], teacher)
    loss = of(bound(student, teacher, **options), student, teacher)
    total = sum(loss.values())
    total.backward()
    gradients = [x.grad for kind in student.predictions for x in kind]
    torch.save((total.detach(), gradients), f"{folder}/{rank}.pth")


@pytest.mark.parametrize("options", [{}, {"class_pool": "image"}], ids=["batch", "image"])
@pytest.mark.parametrize("deal", DEALS)
def test_two_processes_are_as_one(deal, options, tmp_path):
    """Means of losses and gradients, as DDP takes them, however the images are dealt."""
    deal = DEALS[deal]
    assert in_two(_process, tmp_path, deal, options) == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    student, teacher = answers(images=4)
    whole = sum(of(bound(student, teacher, **options), student, teacher).values())
    whole.backward()
    assert abs(float(sum(part[0] for part in parts) / 2 - whole)) <= 1e-5 * abs(float(whole))
    for rank, (_, gradients) in enumerate(parts):
        leaves = [x for kind in student.predictions for x in kind]
        for mine, x in zip(gradients, leaves, strict=True):
            torch.testing.assert_close(mine / 2, x.grad[deal[rank]], rtol=1e-5, atol=1e-9)


# What every loss has


def test_properties():
    check_loss(ERDLoss, ["gfl"])
    check_loss(
        lambda: ERDLoss(class_pool="image", decode_with_stride=True, box_weight_from="teacher"),
        ["gfl"],
    )


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


def test_the_published_settings_are_the_defaults():
    loss = ERDLoss()
    found = loss.alpha_cls, loss.alpha_box, loss.nms_thresh, loss.temperature, loss.ld_weight
    assert found == (2.0, 2.0, 0.005, 10.0, 0.25)


def test_unknown_choices():
    with pytest.raises(InputError, match="class_pool: mean; expected batch or image"):
        ERDLoss(class_pool="mean")
    with pytest.raises(InputError, match="box_weight_from: both; expected student or teacher"):
        ERDLoss(box_weight_from="both")


# A detector that grows


def old_detector(seed=1):
    """One that finds something, with weights everywhere."""
    model = build(tiny_gfl(classes=len(OLD)), seed)
    with torch.no_grad():
        for p in model.head.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
        model.head.cls_score.bias += 4
    return model


def grown(old, losses=None, classes=(*OLD, *NEW), old_classes=OLD, inherit=("",), **teacher):
    student = tiny_gfl(classes=len(classes))
    student.num_old_classes = len(old_classes)
    return Distiller(
        student=build(student),
        teacher=Teacher(old, None, classes=list(old_classes), **teacher),
        losses=DistillLosses(**(losses or {})),
        max_iter=2,
        inherit=inherit,
        classes=list(classes),
    )


def test_at_first_it_is_the_old_detector():
    """Old classes' outputs are the old detector's, and of the new ones nothing is found yet."""
    old = old_detector()
    model = grown(copy.deepcopy(old), {"erd": ERDLoss()})
    ours, theirs = model.student.eval(), old.eval()
    images = ours.preprocess_image(batch()).tensor
    with torch.no_grad():
        answers = [
            m.head([m.backbone(images)[f] for f in m.head_in_features]) for m in (ours, theirs)
        ]
        found = [m(batch()) for m in (model.eval(), theirs)]
    for a, b in zip(*answers):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x[:, : y.shape[1]], y, rtol=0, atol=1e-6)
    for a, b in zip(*found, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(b) and torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
        torch.testing.assert_close(a.scores, b.scores)
    state = model.student.state_dict()
    for key, value in old.state_dict().items():
        own = state[key][: len(OLD)] if key.startswith("head.cls_score.") else state[key]
        assert torch.equal(own, value), key
    bias = model.student.head.cls_score.bias
    torch.testing.assert_close(bias[len(OLD) :], torch.full((len(NEW),), -math.log(99)))

    losses = step(model.train(), new_batch())
    assert abs(float(sum_distill_losses(losses))) <= 1e-9


def new_batch(**options):
    """Objects of new classes alone."""
    examples = batch(classes=len(NEW), **options)
    for example in examples:
        example["instances"].gt_classes += len(OLD)
    return examples


def test_without_names_the_old_rows_are_the_first():
    old = old_detector()
    student = tiny_gfl(classes=len(OLD) + 1)
    student.num_old_classes = len(OLD)
    student, fresh = build(student), build(student)
    Distiller(
        student=student,
        teacher=Teacher(old, None),
        losses=DistillLosses(),
        max_iter=1,
        inherit=["head."],
    )
    for name in ("weight", "bias"):
        ours, theirs, made = (getattr(x.head.cls_score, name) for x in (student, old, fresh))
        assert torch.equal(ours[: len(OLD)], theirs) and torch.equal(ours[-1], made[-1])


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


def test_old_rows_learn_nothing_from_the_task():
    model = grown(old_detector()).train()
    losses = step(model, new_batch())
    assert not any(key.startswith("distill/") for key in losses)
    sum(losses.values()).backward()
    score = model.student.head.cls_score
    for grad in (score.weight.grad, score.bias.grad):
        assert not grad[: len(OLD)].any() and grad[len(OLD) :].any()
    none = step(grown(old_detector()).train(), new_batch(objects=(0, 0)))
    assert all(torch.isfinite(value) for value in none.values())


def test_the_task_is_that_of_a_detector_of_the_new_classes():
    """Sliced logits and shifted labels give what a GFL with the new classes alone says."""
    model = grown(old_detector()).train()
    alone = build(tiny_gfl(classes=len(NEW)))
    state = {
        k: v[len(OLD) :] if k.startswith("head.cls_score.") else v
        for k, v in model.student.state_dict().items()
    }
    alone.load_state_dict(state)
    ours, theirs = step(model, new_batch()), step(alone.train(), batch(classes=len(NEW)))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_a_healthy_start_is_lower_than_a_broken_one():
    """Weights that did not arrive show in the first losses of the boxes."""
    old = build(tiny_gfl(classes=len(NEW))).train()
    optimizer = torch.optim.Adam(old.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(step(old, batch(classes=len(NEW))).values()).backward()
        optimizer.step()
    names = ["a", "b", "c"]
    classes = (*names, *NEW)
    examples = batch(classes=len(NEW))
    for example in examples:
        example["instances"].gt_classes += 3
    healthy = step(grown(old, classes=classes, old_classes=names).train(), examples)
    broken = step(grown(old, classes=classes, old_classes=names, inherit=()).train(), examples)
    assert healthy["loss_dfl"] < 0.9 * broken["loss_dfl"]
    assert healthy["loss_box_reg"] < 0.9 * broken["loss_box_reg"]


def test_old_objects_are_refused():
    with pytest.raises(InputError, match="ground truth: an object of class 0, which is an old one"):
        examples = new_batch()
        examples[0]["instances"].gt_classes[0] = 0
        step(grown(old_detector()).train(), examples)
    with pytest.raises(InputError, match="num_old_classes: 3; expected from 0 to 2"):
        node = tiny_gfl()
        node.num_old_classes = 3
        build(node)


def test_a_student_is_the_next_teacher(tmp_path):
    """Nothing of a teacher is in a student's file, and three steps are a chain of two pairs."""
    DetectionCheckpointer(old_detector(), str(tmp_path)).save("step1")
    second = grown(
        build(tiny_gfl(classes=len(OLD))),
        {"erd": ERDLoss()},
        classes=(*OLD, "hen"),
        old_classes=OLD,
    )
    DetectionCheckpointer(second.student, str(tmp_path)).save("step2")
    third = Distiller(
        student=build(tiny_gfl(classes=5)),
        teacher=Teacher(
            build(tiny_gfl(classes=3), 9), str(tmp_path / "step2.pth"), classes=[*OLD, "hen"]
        ),
        losses=DistillLosses(erd=ERDLoss()),
        max_iter=2,
        inherit=[""],
        classes=[*OLD, *NEW],
    )
    keys = torch.load(tmp_path / "step2.pth", weights_only=False)["model"].keys()
    assert keys == third.student.state_dict().keys()
    assert torch.equal(
        third.student.head.cls_score.weight[:3], second.student.head.cls_score.weight
    )


@pytest.mark.parametrize(
    "node, names, line",
    [
        (
            tiny_gfl(classes=2),
            ["ox", "cat"],
            "its classes are cat, ox; expected the classes ox, cat",
        ),
        (
            tiny_gfl(classes=3),
            ["a", "b", "c"],
            "its classes are cat, ox; expected the classes a, b",
        ),
        (tiny_retinanet(classes=2), OLD, "missing.*expected all weights of this RetinaNet"),
        (tiny_gfl(classes=2), OLD, None),
    ],
)
def test_another_ones_checkpoint_is_refused(node, names, line, tmp_path):
    file = tmp_path / "old.pth"
    torch.save({"model": old_detector().state_dict(), "classes": OLD}, file)
    if line is None:
        assert Teacher(build(node), str(file), classes=names).classes == tuple(OLD)
        return
    with pytest.raises(InputError, match=line):
        Teacher(build(node), str(file), classes=names)


def test_names_without_an_old_class_are_refused(refuses):
    teacher = Teacher(build(tiny_gfl(classes=1)), None, classes=["x"])
    losses = DistillLosses(erd=ERDLoss())
    refuses(
        lambda: Distiller(
            student=build(tiny_gfl()),
            teacher=teacher,
            losses=losses,
            max_iter=1,
            classes=["a", "b", "c"],
        ),
        "losses.erd.classes: none is the student's and the teacher's; expected the old ones in both",
    )
