"""The meta-architecture: an ordinary student outside, a hidden teacher, inheriting, taps, yacs configs."""

import contextlib
import copy
import inspect
import re
import textwrap
from functools import partial

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from d2kd.config import add_d2kd_config
from d2kd.losses import DistillLoss, DistillLosses, ICDLoss, ImitationLoss, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.modeling.inherit import inherit_weights
from d2kd.testing import distiller, forward_losses, sum_distill_losses
from d2kd.utils.errors import InputError

from .common import DETECTORS, batch, build, lively, tiny_faster_rcnn, tiny_fcos, tiny_retinanet


def make(student=None, teacher=None, losses=None, **options):
    """A RetinaNet taught by another one, unless told otherwise."""
    if not isinstance(teacher, Teacher):
        teacher = Teacher(teacher or build(tiny_retinanet(), 1), None)
    return Distiller(
        student=student or build(tiny_retinanet()),
        teacher=teacher,
        losses=losses or DistillLosses(imitation=ImitationLoss()),
        max_iter=10,
        **options,
    )


def with_anchors(**changes):
    node = tiny_retinanet()
    node.anchor_generator.update(changes)
    return node


@pytest.mark.parametrize("family", DETECTORS)
def test_in_eval_a_distiller_is_its_student(family):
    model = lively(distiller(ImitationLoss, DETECTORS[family]).eval())
    examples = batch()
    with torch.no_grad():
        ours, alone = model(examples), model.student(examples)
    for a, b in zip(ours, alone, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


def test_a_training_loop_of_ones_own():
    """The example in the docstring: the student learns, the teacher does not, and what is saved is the student's."""
    example = inspect.getdoc(Distiller).split("of one's own::\n\n")[1].split("\n\nArgs:")[0]
    code = textwrap.dedent(example)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 12
    teacher, student = (build(tiny_faster_rcnn(channels=n), seed=n) for n in (24, 16))
    before = [copy.deepcopy(detector.state_dict()) for detector in (teacher, student)]
    names = dict(teacher=teacher, student=student.train(), batches=[batch()] * 3, torch=torch)
    exec(code, names)
    assert all((value == before[0][key]).all() for key, value in teacher.state_dict().items())
    assert any((value != before[1][key]).any() for key, value in student.state_dict().items())
    saved = names["model"].state_dict()
    plain = {key for key in saved if not key.startswith("distiller_losses.")}
    assert plain == set(before[1]) < set(saved)


def test_moving_the_distiller_moves_the_teacher():
    """And a student that was moved before takes its losses and its teacher along."""
    model = make().to(torch.float64)
    assert all(p.dtype == torch.float64 for p in model.teacher.detector.parameters())
    wide = tiny_retinanet(channels=24)
    for model in (
        make(teacher=build(wide)).to("meta"),
        make(build(tiny_retinanet()).to("meta"), build(wide)),
    ):
        moved = [*model.parameters(), *model.teacher.detector.parameters()]
        assert all(p.device.type == "meta" for p in moved)


def test_inherit_copies_what_fits_and_names_the_rest(caplog):
    student, teacher = build(tiny_retinanet()), build(tiny_retinanet(classes=5), 1)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with caplog.at_level("INFO", logger="d2kd"):
        make(student, teacher, inherit=["head.", "backbone.fpn_"])
    after, source = student.state_dict(), teacher.state_dict()
    for key, value in after.items():
        inherits = key.startswith(("head.", "backbone.fpn_")) and value.shape == source[key].shape
        assert torch.equal(value, source[key] if inherits else before[key]), key
    assert "head.cls_score.weight" in caplog.text and "not inherited" in caplog.text
    value = next(student.parameters())
    assert value.requires_grad and value.data_ptr() != next(teacher.parameters()).data_ptr()


@pytest.mark.parametrize("family", DETECTORS)
def test_what_has_rows_for_each_class_is_inherited_in_the_same_order_alone(family, caplog):
    """A class starts from its own weights or as it was made, never from another's."""
    names, no_losses = ["a", "b", "c"], DistillLosses()
    student, teacher = build(DETECTORS[family]()), build(DETECTORS[family](), 1)
    made = {key: value.clone() for key, value in student.state_dict().items()}
    source = teacher.state_dict()
    # What depends on the number of classes has rows for each of them.
    wider = build(DETECTORS[family](classes=5)).state_dict()
    rows = {key for key, value in wider.items() if value.shape != made[key].shape}

    def inherited(classes):
        student.load_state_dict(made)
        known = Teacher(teacher, None, classes=classes)
        make(student, known, no_losses, inherit=[""], classes=names)
        return student.state_dict()

    with caplog.at_level("INFO", logger="d2kd"):
        same = inherited(names)
        assert all(torch.equal(same[key], source[key]) for key in source)
        assert "not inherited" not in caplog.text
        turned = inherited(["c", "a", "b"])
    for key, value in turned.items():
        if key not in rows:
            assert torch.equal(value, source[key]), key
        elif family == "gfl":
            assert torch.equal(value, source[key][[1, 2, 0]]), key
        else:
            assert torch.equal(value, made[key]) and key in caplog.text, key
    assert rows


@pytest.mark.parametrize("family", DETECTORS)
def test_what_is_inherited_answers_the_same_image_the_same(family, caplog):
    """Also from a teacher that sees the channels in the other order."""
    mean, std, no_losses = [103.5, 116.3, 123.7], [57.4, 57.1, 58.4], DistillLosses()
    node, other = DETECTORS[family](), DETECTORS[family]()
    node.pixel_mean, node.pixel_std = mean, std
    other.pixel_mean, other.pixel_std = mean[::-1], std[::-1]
    student = build(node)
    teacher = Teacher(build(other, 1), None, image_format="BGR", input_format="RGB")
    for _ in range(2):  # inheriting once more turns nothing back
        make(student, teacher, no_losses, inherit=[""]).inherit()
    features = student.backbone(student.preprocess_image(batch()).tensor)
    for level, expected in teacher.outputs(batch()).features.items():
        torch.testing.assert_close(features[level], expected)
    assert "trained with" not in caplog.text
    student.pixel_std.fill_(1.0)
    with caplog.at_level("WARNING", logger="d2kd"):
        make(student, teacher, no_losses, inherit=[""])
    assert re.search(r"stem.conv1.weight was trained with pixel_std \[57.*is \[1.0", caplog.text)


class Tapped(DistillLoss):
    def __init__(self, *taps):
        super().__init__()
        self.taps = taps

    def forward(self, student, teacher):
        calls = [student.taps[name] for name in self.taps]
        assert all(len(of_one) == 5 for of_one in calls), "one call for each level"
        return sum(of_one[-1].square().mean() for of_one in calls)


def test_taps_reach_any_module_of_the_student():
    """Each loss to its own, and several to the same."""
    classes, boxes = "head.cls_subnet.0", "head.bbox_subnet.0"
    losses = DistillLosses(one=Tapped(classes), none=ImitationLoss(), both=Tapped(boxes, classes))
    model = make(losses=losses).train()
    forward_losses(model, batch())["distill/loss_both"].backward()
    for name in (classes, boxes):
        assert model.student.get_submodule(name).weight.grad.any()
    with pytest.raises(InputError, match="no module 'head.nothing'"):
        make(losses=DistillLosses(one=Tapped(classes), other=Tapped("head.nothing")))


class TeacherTapped(DistillLoss):
    """Reads modules of the teacher; ``ran`` lists which of its parts were computed then."""

    def __init__(self, *taps):
        super().__init__()
        self.teacher_taps = taps

    def forward(self, student, teacher):
        self.read = {name: teacher.taps[name] for name in self.teacher_taps}
        self.computed = {"features", "predictions", "regions"} & set(vars(teacher))
        return sum(x.square().mean() for x in student.features.values())


def test_taps_of_the_teacher_are_what_its_modules_computed():
    towers = "head.cls_subnet.0", "head.bbox_subnet.0"
    head, stem = TeacherTapped(*towers), TeacherTapped("backbone.bottom_up.stem")
    model = make(losses=DistillLosses(head=head, stem=stem)).train()
    forward_losses(model, batch())
    teacher = model.teacher.detector
    features = model.teacher.outputs(batch()).features
    for name in towers:
        expected = [teacher.get_submodule(name)(features[f]) for f in teacher.head_in_features]
        assert len(head.read[name]) == 5
        for ours, theirs in zip(head.read[name], expected):
            assert torch.equal(ours, theirs) and not ours.requires_grad
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_tap_of_the_teacher_computes_only_the_part_with_its_module():
    stem = TeacherTapped("backbone.bottom_up.stem")
    unread = TeacherTapped("head.cls_subnet.0")
    unread.weight = 0
    forward_losses(make(losses=DistillLosses(stem=stem, unread=unread)).train(), batch())
    assert stem.computed == {"features"} and len(stem.read["backbone.bottom_up.stem"]) == 1
    pair = [build(DETECTORS["cascade_rcnn"]()) for _ in range(2)]
    stages = TeacherTapped("roi_heads.box_head.0", "roi_heads.box_head.2")
    forward_losses(make(*pair, DistillLosses(stages=stages)).train(), batch())
    assert stages.computed == {"features", "regions"}
    assert all(len(calls) == 1 for calls in stages.read.values())


@pytest.mark.parametrize(
    "tap, options, line",
    [
        ("head.nothing", {}, "teacher_taps: no module 'head.nothing' in the teacher"),
        ("", {}, "teacher_taps: ''; expected a module in one of backbone, head"),
        ("head.cls_score", {"compile": True}, "teacher.compile: true; expected false"),
    ],
)
def test_taps_that_the_teacher_lacks_are_refused_before_training(tap, options, line):
    teacher = Teacher(build(tiny_retinanet()), None, **options)
    with pytest.raises(InputError, match=line):
        Distiller(
            student=build(tiny_retinanet()),
            teacher=teacher,
            losses=DistillLosses(one=TeacherTapped(tap)),
            max_iter=1,
        )


@pytest.mark.parametrize(
    "teacher, line",
    [
        (tiny_faster_rcnn(), "regions: student RetinaNet, teacher GeneralizedRCNN"),
        (tiny_retinanet(classes=9), "num_classes: student 3, teacher 9; expected the same"),
        (tiny_fcos(), r"anchors: anchors of a cell: student \[2, 2.*, teacher \[1, 1.*; expected"),
        (with_anchors(sizes=[[9, 18]] * 5), "anchors: sizes of anchors: student one set, teacher"),
        (with_anchors(offset=0.25), "anchors: offset of anchors: student 0.0, teacher 0.25"),
        (with_anchors(strides=[8, 16, 32, 64, 100]), r"anchors: strides of anchors: .*100\]"),
    ],
)
def test_what_tar_cannot_compare_is_refused_before_training(teacher, line):
    with pytest.raises(InputError, match=f"losses.it.{line}"):
        make(teacher=build(teacher), losses=DistillLosses(it=TARLoss()))


@pytest.mark.parametrize(
    "options, channels, line",
    [
        ({"levels": ["p2"]}, 16, "levels: the student's backbone has no 'p2'; expected of p3, p4"),
        ({"adapter": "none"}, 24, "adapter: none, but 'p3' has 16 and 24 channels; expected auto"),
    ],
)
def test_levels_that_cannot_be_compared_are_refused_before_training(options, channels, line):
    teacher, losses = (
        build(tiny_retinanet(channels=channels)),
        DistillLosses(it=ImitationLoss(**options)),
    )
    with pytest.raises(InputError, match=f"losses.it.{line}"):
        make(teacher=teacher, losses=losses)


def test_anchors_of_another_padding_are_refused():
    teacher = build(tiny_retinanet())
    teacher.backbone._size_divisibility = 64
    with pytest.raises(InputError, match="losses.it.anchors: padding: student 32, teacher 64"):
        make(teacher=teacher, losses=DistillLosses(it=TARLoss()))


class Reads(DistillLoss):
    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, student, teacher):
        return self.read(student, teacher)


@pytest.mark.parametrize(
    "family, read, line",
    [
        ("retinanet", lambda s, t: s.regions, "a RetinaNet has no 'regions'"),
        ("retinanet", lambda s, t: s.taps["head"], "no 'head' among none"),
        ("retinanet", lambda s, t: t.taps["head"], "no 'head' among none"),
        ("retinanet", lambda s, t: s.features["p9"], "no 'p9' among p3, .*p4"),
        ("retinanet", lambda s, t: t.features["p9"], "no 'p9' among p3, .*p4"),
        ("faster_rcnn", lambda s, t: s.features["p9"], "no 'p9' among p2, .*p4"),
        ("faster_rcnn", lambda s, t: t.features["p9"], "no 'p9' among p2, .*p4"),
    ],
)
def test_a_loss_that_reads_what_is_not_there_is_named(family, read, line):
    pair = build(DETECTORS[family]()), build(DETECTORS[family]())
    with pytest.raises(InputError, match=f"losses.mine: {line}"):
        forward_losses(make(*pair, DistillLosses(mine=Reads(read))).train(), batch())


@pytest.mark.parametrize("error", [KeyError("temperature"), IndexError(5), AttributeError("tau")])
def test_a_loss_s_own_error_stays_its_own(error):
    """Its traceback leads to the line at fault, and it is taken for nothing that a detector lacks."""

    def fail(student, teacher):
        raise error

    with pytest.raises(type(error)) as raised:
        forward_losses(make(losses=DistillLosses(mine=Reads(fail))).train(), batch())
    assert raised.value is error and raised.traceback[-1].name == "fail"


@pytest.mark.parametrize(
    "student, teacher", [("retinanet", "faster_rcnn"), ("faster_rcnn", "fcos")]
)
@pytest.mark.parametrize("loss", [ImitationLoss, lambda: ICDLoss(heads=4)])
def test_features_join_two_families(loss, student, teacher):
    """p6 is pooled in one and convolved in the other: no level to compare unless asked for."""
    pair = build(DETECTORS[student]()), build(DETECTORS[teacher](channels=24), 1)
    model = make(*pair, DistillLosses(it=loss())).train()
    assert (
        0
        < sum_distill_losses(forward_losses(model, batch(sizes=((33, 65), (64, 90)))))
        < float("inf")
    )
    assert list(model.losses.by_name["it"].levels) == ["p3", "p4", "p5"]
    wanted = make(*pair, DistillLosses(it=ImitationLoss(levels=["p6"]))).train()
    assert forward_losses(wanted, batch())["distill/loss_it"] > 0


@pytest.mark.parametrize("family", DETECTORS)
def test_a_teacher_that_computes_first_teaches_the_same(family):
    """To the bit, and nothing of a loss whose weight is 0."""
    found = []
    for first in (False, True):
        student, teacher = build(DETECTORS[family]()), build(DETECTORS[family](), 1)
        losses = DistillLosses(imitation=ImitationLoss())
        model = make(student, Teacher(teacher, None), losses, teacher_first=first).train()
        calls = []
        for name, detector in (("student", student), ("teacher", teacher)):
            record = partial(calls.append, name)
            detector.backbone.register_forward_hook(lambda *_, record=record: record())
        with torch.jit.optimized_execution(
            False
        ):  # the optimization of later calls rounds otherwise
            values = forward_losses(model, batch())
            sum(values.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({**values, **gradients})
        # The features are measured for the loss's units in the first forward, from the same computation.
        assert calls == (["teacher", "student"] if first else ["student", "teacher"])
        losses.by_name["imitation"].weight = 0.0
        calls.clear()
        forward_losses(model, batch())
        assert calls == ["student"]
    assert found[0].keys() == found[1].keys()
    different = [name for name, value in found[0].items() if not value.equal(found[1][name])]
    assert different == []


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "cascade_rcnn"])
def test_the_proposals_of_both(family):
    """The student's heads choose among twice the proposals; both then judge the same boxes."""
    student, teacher = build(DETECTORS[family]()), build(DETECTORS[family](), 1)
    losses = DistillLosses(tar=TARLoss())
    model = make(student, teacher, losses, proposals_from="both").train()
    examples = batch(objects=(2, 0))
    own = forward_losses(copy.deepcopy(student), examples)
    given = {}
    sample = student.roi_heads.label_and_sample_proposals
    student.roi_heads.label_and_sample_proposals = lambda proposals, targets: (
        given.update(proposals=proposals) or sample(proposals, targets)
    )
    both = forward_losses(model, examples)
    assert all(torch.isfinite(value) for value in both.values())
    same = {key for key, value in own.items() if torch.equal(value, both[key])}
    assert {key for key in own if "rpn" in key} <= same < own.keys()
    proposals = model.teacher.outputs(examples).proposals
    for joined, theirs in zip(given["proposals"], proposals, strict=True):
        count = len(theirs)
        assert len(joined) > count > 0
        last = joined[-count:].proposal_boxes.tensor
        assert torch.equal(last, theirs.proposal_boxes.tensor)
    assert not student.roi_heads._forward_pre_hooks
    teacher.proposal_generator = None  # with proposals of a file
    with pytest.raises(InputError, match="proposals_from: both, where the teacher has no RPN"):
        make(student, teacher, losses, proposals_from="both")


@pytest.mark.parametrize(
    "value, line",
    [
        ("theirs", "theirs; expected student or both"),
        ("both", "both, of a GeneralizedRCNN and a RetinaNet; expected two"),
    ],
)
def test_proposals_that_are_none(value, line):
    with pytest.raises(InputError, match=f"proposals_from: {line}"):
        make(build(tiny_faster_rcnn()), proposals_from=value)


RECIPE = """
from detectron2.config import LazyCall as L
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Teacher
from d2kd.testing import tiny_faster_rcnn
model = dict(
    teacher=L(Teacher)(detector=tiny_faster_rcnn(), weights=None),
    losses=L(DistillLosses)(imitation=L(ImitationLoss)(levels=["p2", "p3"])),
)
"""


def yacs(folder, recipe=RECIPE):
    """A small Faster R-CNN beside the recipe's teacher."""
    (folder / "recipe.py").write_text(recipe)
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.DISTILLER.CONFIG = str(folder / "recipe.py")
    return cfg


def test_yacs_users_build_it_by_name(tmp_path):
    cfg = yacs(tmp_path)
    cfg.MODEL.DISTILLER.INHERIT = ["backbone.fpn_output2"]
    cfg.MODEL.DISTILLER.PROPOSALS_FROM = "both"
    model = build_model(cfg)
    weights = [m.backbone.fpn_output2.weight for m in (model.student, model.teacher.detector)]
    assert torch.equal(*weights) and model.proposals_from == "both"
    assert isinstance(model, Distiller) and model.student.roi_heads.num_classes == 4
    assert model.max_iter == cfg.SOLVER.MAX_ITER
    assert torch.isfinite(forward_losses(model.train(), batch())["distill/loss_imitation"])


@pytest.mark.parametrize("anchors", ["RotatedAnchorGenerator", None])
def test_rotated_boxes_are_refused_before_training(tmp_path, anchors):
    """Of an RPN with its anchors, or of RoI heads alone, which judge other proposals."""
    cfg = yacs(tmp_path)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN" if anchors else "PrecomputedProposals"
    if anchors:
        cfg.MODEL.ANCHOR_GENERATOR.NAME = anchors
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = [1, 1, 1, 1, 1]
    cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignRotated"
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = [10, 10, 5, 5, 1]
    with pytest.raises(InputError, match="GeneralizedRCNN: rotated boxes .*; expected upright"):
        build_model(cfg)


@pytest.mark.parametrize("images, flipped", [("BGR", False), ("RGB", True)])
def test_yacs_users_give_the_channel_order_once(tmp_path, images, flipped):
    cfg = yacs(tmp_path)
    cfg.INPUT.FORMAT = images  # the teacher wants BGR
    assert build_model(cfg).teacher.flip_channels == flipped
    recipe = RECIPE.replace("weights=None", "weights=None, image_format='BGR'")
    (tmp_path / "recipe.py").write_text(recipe)
    refused = pytest.raises(InputError, match="image_format=BGR, beside INPUT.FORMAT RGB")
    with refused if flipped else contextlib.nullcontext():
        build_model(cfg)


def test_a_run_without_iterations_is_refused(refuses):
    model = dict(student=None, teacher=None, losses=None, max_iter=0)
    refuses(lambda: Distiller(**model), "max_iter: 0; expected a positive number of iterations")


def test_inheriting_across_channel_orders_needs_a_stem_to_turn(refuses):
    detector = nn.Module()
    detector.backbone = nn.Conv2d(1, 1, 1)
    refuses(
        lambda: inherit_weights(detector, detector, [""], flip_channels=True),
        "inherit: the teacher sees another channel order, and no convolution has three channels; ",
    )
