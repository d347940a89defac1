"""The doctor finds nothing in a good run, and in a spoiled one what was spoiled; it leaves no trace."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from PIL import Image

from d2kd.config import apply_overrides, distill, with_defaults
from d2kd.data import incremental_split
from d2kd.doctor import Finding, SanityCheckHook, diagnose, exit_code, format_findings, sanity_check
from d2kd.doctor.data_checks import _check_annotations, check_data
from d2kd.doctor.runtime_checks import (
    check_features,
    check_inputs,
    check_losses,
    check_schedule,
    check_sizes,
    check_teacher,
)
from d2kd.engine import Trainer
from d2kd.losses import (
    DistillLoss,
    DistillLosses,
    ICDLoss,
    ImitationLoss,
    LwFLoss,
    TARLoss,
)
from d2kd.modeling import Teacher, TorchvisionBackbone
from d2kd.modeling.backbone.torchvision_backbone import (
    TORCHVISION_PIXEL_MEAN,
    TORCHVISION_PIXEL_STD,
)
from d2kd.testing import tiny_gfl
from d2kd.utils.random_state import random_state

from .common import CLASSES, build, command, perfect, tiny_faster_rcnn, tiny_retinanet
from .tiny_run import distiller, draw_data, recipe, teacher_weights, write_recipe

HEADS = "model.student.roi_heads"
LOSSES = dict(
    tar=L(TARLoss)(feature_weight=0.02, normalize=False),
    plain=L(ImitationLoss)(weight=0.0, normalize=False),
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A recipe with nothing wrong: its teacher, asked to detect, knows the ground truth."""
    draw_data(tmp_path / "data")
    truth = {}

    def detect(teacher, batch):
        if not truth:
            records = DatasetCatalog.get(f"tiny_{tmp_path / 'data'}")
            truth.update({r["image_id"]: r for r in records})
        return [{"instances": perfect(truth[x["image_id"]])} for x in batch]

    monkeypatch.setattr(Teacher, "detect", detect)
    model = distiller(teacher_weights(tmp_path), L(DistillLosses)(**LOSSES))
    return recipe(tmp_path / "data", tmp_path / "out", model, max_iter=100)


def examined(config, **options):
    folder = Path(config.train.output_dir).parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    findings = list(diagnose(config, **{"iterations": 2, **options}))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    return findings


def errors(findings):
    return {finding.subject: finding.found for finding in findings if finding.state == "error"}


def by_subject(config, **options):
    """What is found of a recipe by a look at a few images, without a step of training."""
    return {f.subject: f for f in examined(config, **{"iterations": 0, **options})}


def test_a_good_run(config, capfd):
    findings = examined(config)
    assert not errors(findings), format_findings(findings)
    assert capfd.readouterr().out == ""
    found = {finding.subject: finding.found for finding in findings}
    assert "6 images, 7 objects, 1 images without any" in found["train data"]
    assert "AP 100.0 on 6 of 6" in found["teacher"]
    matched = found["teacher's weights"]
    assert "0 missing" in matched and "0 of another shape" in matched
    assert "16 and 24 channels" in found["levels"]
    assert re.search(r"[\d.]+ s a step, [\d.]+ minutes for 100 without evaluation", found["cost"])
    assert {"image size", "anchors", "schedule"} < set(found)
    assert "0.005 of SGD at 2 images an iteration, 2 times" in found["learning rate"]
    assert not [f for f in findings if f.subject == "learning rate" and f.state != "ok"]
    assert exit_code(findings) == (1 if any(f.state == "warning" for f in findings) else 0)


def test_sizes_of_objects():
    """Against one cell of the finest map, and against the anchors."""
    detector = build(tiny_faster_rcnn())
    stride = min(spec.stride for spec in detector.backbone.output_shape().values())
    anchors = torch.cat(list(detector.proposal_generator.anchor_generator.cell_anchors))
    side = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1).sqrt().max().item()

    def found(width, height, count=10, detector=detector):
        objects = Instances((64, 64))
        objects.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 1 + width, 2 + height]] * count))
        batch = [{"image": torch.zeros(3, 64, 96), "instances": objects}]
        trainer = SimpleNamespace(model=detector)
        return {f.subject: f for f in check_sizes(trainer, [batch, [{"image": batch[0]["image"]}]])}

    usual = found(side, side)
    assert {f.state for f in usual.values()} == {"ok"} and set(usual) == {"image size", "anchors"}
    assert "images up to 96 x 64" in usual["image size"].found and "0 %" in usual["anchors"].found
    tiny = found(stride / 2, stride / 2)
    assert tiny["image size"].state == "warning" and "100 % are shorter" in tiny["image size"].found
    for unlike in (found(8 * side, 8 * side), found(4 * side, side / 4)):
        assert unlike["anchors"].state == "warning" and unlike["image size"].state == "ok"
        assert unlike["anchors"].advice
    assert found(side, side, count=0) == {}
    assert set(found(side, side, detector=build(tiny_gfl()))) == {"image size"}


def test_length_of_the_run(config):
    """Few passes over the images, many, and a decoder of ICD that has too few iterations."""

    def found(**changes):
        config.train.update(changes)
        return [f for f in check_schedule(Trainer(config))]

    (usual,) = found(max_iter=100)  # of 2 images, of 6
    assert usual.state == "ok" and "each of 6 images 33.3 times" in usual.found
    for iterations, advice in ((2, "train.max_iter=9"), (3000, "train.max_iter=1500")):
        (few,) = found(max_iter=iterations)
        assert few.state == "warning" and few.advice.startswith(advice)
    config.model.losses = L(DistillLosses)(own=L(ICDLoss)(heads=4))
    *_, icd = found(max_iter=100)
    assert icd.state == "warning" and icd.advice == "model.losses.own.aux_warmup=0.3"
    config.model.losses.own.aux_warmup = 0.3
    assert len(found()) == 1


def test_frozen_norms_over_random_weights(config):
    config.model = tiny_faster_rcnn()
    bottom_up = L(TorchvisionBackbone)(name="resnet18", norm="FrozenBN", out_features=["res4"])
    detector = build(config.model)
    detector.backbone.bottom_up = instantiate(bottom_up)
    norms = [m for m in detector.modules() if "FrozenBatchNorm" in type(m).__name__]

    def found():
        return {f.subject: f for f in sanity_check(with_defaults(config), detector)}["frozen norms"]

    assert found().state == "warning" and found().found.startswith(f"{len(norms)} of {len(norms)}")
    for norm in norms:  # some files have only the scale and offset, which include the statistics
        norm.weight.mul_(0.9)
    assert found().state == "ok"


def test_a_run_that_diverges(config):
    """Proposals that are not finite are named, in whichever step."""
    trainer = Trainer(config)

    def diverged(batch):
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    trainer._trainer.model.student.forward = diverged
    for iterations in (0, 2):
        found = errors(check_losses(trainer, iterations))
        assert found["losses"].startswith("the student's predictions is nan")


def test_few_weights_that_fit_are_told(config, tmp_path):
    whole = instantiate(config.model.student).state_dict()
    head = {key: value for key, value in whole.items() if not key.startswith("backbone.")}
    config.train.init_checkpoint = str(tmp_path / "some.pth")
    for given, state in ((whole, "ok"), (whole | {"more": torch.ones(1)}, "ok"), (head, "warning")):
        torch.save({"model": given}, tmp_path / "some.pth")
        assert by_subject(config, images=1)["student's weights"].state == state


def test_what_was_found_before_a_failure_is_shown(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        yield Finding("train data", "ok", "6 images")
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr("d2kd.doctor.diagnose", fails)
    arguments = ["--config-file", "baselines/retinanet_small_shapes.py"]
    with pytest.raises(SystemExit) as ended:
        command("doctor")(arguments)
    said = capsys.readouterr().out
    assert ended.value.code == 2 and "6 images" in said and "MemoryError: no room" in said
    with pytest.raises(MemoryError):
        command("doctor")([*arguments, "--debug"])


def test_a_box_is_inside_by_the_width_and_height_of_its_image():
    def said(*box):
        one = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        record = {"width": 100, "height": 50, "annotations": [one]}
        (boxes,) = (f for f in _check_annotations("it", [record], {0: "a"}) if "boxes" in f.subject)
        return boxes.found

    assert "all inside" in said(60, 20, 100.5, 50.5) == said(0, 0, 1, 1)
    for box in ((60, 20, 90, 60), (60, 20, 110, 40), (-5, 0, 9, 9), (0, -5, 9, 9)):
        assert said(*box).startswith("1 boxes lie outside their image, 0 have no area")


def test_an_increment_is_about_its_own_classes(tmp_path, config):
    """It has none of the other increments', and says so of no detector."""
    annotations(
        tmp_path, lambda all: [one.update(category_id=k) for one, k in zip(all, [1, 3] * 3 + [1])]
    )
    whole = config.dataloader.train.dataset.names
    for increment, missing in ((1, "no object of class 1"), (2, None)):
        names = L(incremental_split)(dataset=whole, split="2+1", increment=increment)
        config.dataloader.train.dataset.names = names
        found = {f.subject: f.found for f in check_data(with_defaults(config), images=1)}
        assert found.get("train data, classes") == missing
        assert found["test data, classes"] == "no object of class 1"


class Vertical(DistillLoss):
    """Finite, and steeper than any number says."""

    def forward(self, student, teacher):
        return (0 * student.features["p3"]).sqrt().sum()


def with_loss(config, node, loss):
    """The recipe with another pair of detectors and a single loss."""
    config.model = distiller(losses=L(DistillLosses)(it=loss))
    config.model.student, config.model.teacher.detector = node(), node(channels=24)
    return with_defaults(config)


def compared(config):
    """The finding of each distillation loss that trains the student."""
    trainer = Trainer(config)
    torch.manual_seed(0)
    return {f.subject: f for f in check_losses(trainer, 0) if f.subject.startswith("distill/")}


def ratio(finding):
    return float(finding.found.split("gradient ")[1].split()[0])


@pytest.mark.parametrize(
    "node, make",
    [
        (tiny_faster_rcnn, lambda weight: L(ImitationLoss)(weight=weight)),
        (tiny_retinanet, lambda weight: L(ICDLoss)(priors=None, weight=weight)),
        (tiny_gfl, lambda weight: L(LwFLoss)(weight=weight)),
    ],
)
def test_gradients_are_relative_to_those_of_the_task_losses(config, node, make):
    """They follow the weight."""
    half, whole = (compared(with_loss(config, node, make(weight))) for weight in (0.5, 1.0))
    names = [name for name, finding in whole.items() if "gradient" in finding.found]
    assert names
    for name in names:
        assert ratio(whole[name]) == pytest.approx(2 * ratio(half[name]), rel=0.1)
        assert whole[name].state == "ok" and not whole[name].advice


def test_a_loss_that_begins_late_is_looked_at_where_it_is_on(config):
    late = L(MultiStepParamScheduler)(values=[0.0, 1.0], num_updates=100, milestones=[40])
    found = compared(with_loss(config, tiny_retinanet, L(ImitationLoss)(weight=late)))
    assert found and all(ratio(finding) > 0 for finding in found.values())


def test_gradients_that_are_not_finite_and_that_are_none(config):
    trainer = Trainer(with_loss(config, tiny_retinanet, L(Vertical)()))
    assert errors(check_losses(trainer, 0)) == {"distill/loss_it": "0.0, gradient nan"}
    closed = L(TARLoss)(cls_margin=2.0, feature_weight=0, regression_weight=0)  # no gate opens
    found = compared(with_loss(config, tiny_retinanet, closed))
    assert [finding.state for finding in found.values()] == ["warning"]


def test_a_file_that_names_its_classes(config, tmp_path):
    file = tmp_path / "teacher.pth"
    content = torch.load(file)
    names = [f"class {k}" for k in range(CLASSES)]
    for stored in (names, [names[1], names[0], "other"]):
        torch.save(content | {"classes": stored}, file)
        found = by_subject(config, images=1)
        same = stored == names
        assert ("those of the data" in found["teacher's classes"].found) == same
        shared = "compared by number" if same else "2 of the student's 3 classes are known"
        assert shared in found["class map"].found
        assert {found["teacher's classes"].state, found["class map"].state} == {"ok"}


def _set(key, value):
    return lambda config, *_: OmegaConf.update(config, key, value)


def annotations(folder, change):
    """Other annotations in the file of the data."""
    file = folder / "data/data.json"
    content = json.loads(file.read_text())
    change(content["annotations"])
    file.write_text(json.dumps(content))


def _bad_data(config, folder):
    boxes = [{"bbox": [40, 40, 60, 10]}, {"bbox": [40, 40, 0, 10]}]
    annotations(folder, lambda those: [one.update(box) for one, box in zip(those, boxes)])
    (folder / "data/3.png").write_bytes(b"no image")


def _wide_teacher(config, folder):
    config.model.teacher.detector = tiny_faster_rcnn(channels=32)


def _other_classes(config, folder):
    config.model.teacher.detector = tiny_faster_rcnn(channels=24, classes=CLASSES + 2)
    config.model.losses = L(DistillLosses)(plain=L(ImitationLoss)(weight=1.0))
    config.model.teacher.weights = None


def _no_objects(config, folder):
    annotations(folder, list.clear)


def _too_many_classes(config, folder):
    for detector in (config.model.student, config.model.teacher.detector):
        detector.roi_heads.num_classes = CLASSES + 1
    config.model.teacher.weights = None


def _three(act):
    """A change of the file of an image."""
    return lambda config, folder: act(folder / "data/3.png")


SPOILED = [
    (_set("model.teacher.image_format", "RGB"), {"channel order": "teacher's image_format is RGB"}),
    (_set("dataloader.test.mapper.image_format", "RGB"), {"channel order": "images are BGR, test"}),
    (_set("model.student.input_format", "RGB"), {"channel order": "student's input_format is RGB"}),
    (_wide_teacher, {"teacher's weights": "of another shape", "the run": "misshapen"}),
    (_set("optimizer.lr", 1.0), {"learning rate": "1 of SGD at 2 images"}),
    (_set("optimizer.lr", 1e20), {"losses": "within 2 iterations"}),
    (_set("train.init_checkpoint", "gone.pth"), {"student's weights": "gone.pth"}),
    (_bad_data, {"train images": "1 of 6 cannot be", "train data, boxes": "1 boxes lie outside"}),
    (_no_objects, {"train data": "6 images, 0 objects"}),
    (_three(Image.new("RGB", (32, 64)).save), {"train images": "another size than annotated"}),
    (_three(Path.unlink), {"train data": "3.png: missing"}),
    (_other_classes, {"class map": f"{CLASSES} of the student, {CLASSES + 2} of the teacher"}),
    (_too_many_classes, {"the run": f"{CLASSES + 1} of the student"}),
]


@pytest.mark.parametrize("spoil, expected", SPOILED)
def test_a_spoiled_run(config, tmp_path, spoil, expected):
    spoil(config, tmp_path)
    findings = examined(config, iterations=2 if "losses" in expected else 0)
    found = errors(findings)
    for subject, text in expected.items():
        assert text in found.get(subject, ""), format_findings(findings)
    assert all(f.advice for f in findings if f.state == "error")
    assert exit_code(findings) == 2


def test_a_teacher_that_counts_otherwise(config, monkeypatch):
    """It is measured in the student's classes; one of which none is known, not at all."""
    names, detect = [f"class {k}" for k in range(CLASSES)], Teacher.detect
    config.model.classes, config.model.teacher.classes = names, names[::-1]

    def turned(teacher, batch):
        found = detect(teacher, batch)
        for one in found:
            one["instances"].pred_classes = CLASSES - 1 - one["instances"].pred_classes
        return found

    monkeypatch.setattr(Teacher, "detect", turned)
    assert "AP 100.0" in by_subject(config)["teacher"].found
    config.model.teacher.classes = ["x", "y", "z"]
    findings = by_subject(config)
    assert "teacher" not in findings and findings["class map"].state == "warning"


def test_a_teacher_that_knows_nothing(config, monkeypatch):
    blind = Instances((64, 64), pred_boxes=Boxes(torch.zeros(0, 4)))
    blind.scores, blind.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    monkeypatch.setattr(Teacher, "detect", lambda _, batch: [{"instances": blind} for _ in batch])
    findings = examined(config, iterations=0, images=3)
    assert "on 3 of 6 test images" in errors(findings)["teacher"]


class Counting(DatasetEvaluator):
    """An evaluator that takes no image ids, as most do."""

    def reset(self):
        self.seen = 0

    def process(self, inputs, outputs):
        self.seen += len(inputs)

    def evaluate(self):
        return {"seen": {"images": self.seen}}


@pytest.mark.parametrize(
    "ap, known, state",
    [(0.5, 3, "error"), (0.5, 1, "warning"), (5.0, 3, "warning"), (5.0, 1, "ok"), (50.0, 3, "ok")],
)
def test_a_class_that_a_teacher_lacks_is_no_ignorance(config, monkeypatch, ap, known, state):
    monkeypatch.setattr(Counting, "evaluate", lambda self: {"bbox": {"AP": ap}})
    names = [f"class {k}" for k in range(CLASSES)]
    config.model.classes = names
    config.model.teacher.classes = [*names[:known], "x", "y"][:CLASSES]
    config.dataloader.evaluator = L(Counting)()
    trainer = Trainer(config)
    (found,) = check_teacher(trainer.cfg, trainer.model, 1)
    assert found.state == state


def test_several_evaluators(config):
    trainer = Trainer(config)
    (one,) = check_teacher(trainer.cfg, trainer.model, 3)
    config.dataloader.evaluator = [L(Counting)(), config.dataloader.evaluator]
    trainer = Trainer(config)
    assert list(check_teacher(trainer.cfg, trainer.model, 3)) == [one]
    assert "AP 100.0 on 3 of 6" in one.found


def test_a_plain_recipe_of_a_dense_detector(tmp_path):
    draw_data(tmp_path / "data")
    config = recipe(tmp_path / "data", tmp_path / "out", tiny_retinanet(), max_iter=10)
    config.optimizer.lr = 0.1
    found = errors(examined(config, iterations=1))
    assert list(found) == ["learning rate"] and ", 80 times" in found["learning rate"]


def _named(student, teacher):
    return lambda c: (c.model.update(classes=student), c.model.teacher.update(classes=teacher))


def _without(node, key):
    return lambda c: OmegaConf.select(c, node).pop(key)


def _optimizer(kind, **options):
    return lambda c: c.optimizer.update(_target_=kind, **options)


FEW, MORE = f"{CLASSES} of the data (class 0, ", CLASSES + 1
FIRST_LOOK = [
    (_without("dataloader.train.mapper", "image_format"), "channel order", "ok", "no image_format"),
    (_without("dataloader.train.dataset", "names"), "classes", "ok", "data have no class names"),
    (_without("optimizer", "lr"), "learning rate", "ok", "SGD without a rate or batch size"),
    (_optimizer(torch.optim.AdamW, lr=1e-6), "learning rate", "warning", "1e-06 of AdamW at 2 im"),
    (_optimizer(torch.optim.RMSprop), "learning rate", "ok", "0.005 of RMSprop at 2 images"),
    (_set(f"{HEADS}.num_classes", MORE), "classes", "error", f"{MORE} of the student, {FEW}"),
    (_named([*"abc"], [*"cab"]), "class map", "ok", "3 of the student's 3 classes"),
    (_named([*"abc"], [*"def"]), "class map", "warning", "0 of the student's 3 classes"),
]


@pytest.mark.parametrize("change, subject, state, text", FIRST_LOOK)
def test_the_first_look(config, change, subject, state, text):
    config = with_defaults(config)
    change(config)
    config.model.losses = L(DistillLosses)(plain=L(ImitationLoss)(levels=["p3"]))
    config.model.teacher.weights = None
    found = [f for f in sanity_check(config, instantiate(config.model)) if f.subject == subject]
    assert found[0].state == state and text in found[0].found, found
    assert bool(found[0].advice) == (state != "ok")


def test_statistics_and_range_of_pixels(config):
    """Those of a backbone's weights are wanted where it began with them, and there alone."""
    trainer = Trainer(config)
    mapper, student = trainer.cfg.dataloader.train.mapper, trainer.model.student
    mapper.image_format = trainer.cfg.dataloader.test.mapper.image_format = "RGB"
    trainer.cfg.model.teacher.image_format = student.input_format = "RGB"

    def said():
        found = sanity_check(trainer.cfg, trainer.model)
        return [f.advice for f in found if f.state == "warning" and "weights want" in f.found]

    assert not said()
    student.backbone.bottom_up.pretrained = True
    student.backbone.bottom_up.pixel_statistics = TorchvisionBackbone.pixel_statistics
    (advice,) = said()
    assert "pixel_mean=[123.675,116.28,103.53]" in advice and "image_format=RGB" in advice
    student.pixel_mean.copy_(torch.tensor(TORCHVISION_PIXEL_MEAN).view(-1, 1, 1))
    student.pixel_std.copy_(torch.tensor(TORCHVISION_PIXEL_STD).view(-1, 1, 1))
    assert not said()
    student.pixel_std.fill_(1.0)
    assert said()
    student.pixel_mean.copy_(torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1))
    student.backbone.bottom_up.pretrained = False
    trainer.cfg.model.teacher.image_format = student.input_format = "BGR"
    mapper.image_format = trainer.cfg.dataloader.test.mapper.image_format = "BGR"
    found = [f for f in sanity_check(trainer.cfg, trainer.model) if f.state != "ok"]
    (finding,) = (f for f in found if f.subject != "frozen norms")  # the tiny network's are random
    assert finding.subject == "channel order" and "ImageNet's in RGB" in finding.found
    for image, state in (
        (torch.rand(3, 32, 32), "error"),
        (torch.full((3, 32, 32), 250), "warning"),
    ):
        (finding,) = check_inputs(trainer, [[{"image": image}]])
        assert finding.state == state and ("0 to 255" in finding.advice or state == "warning")


@pytest.mark.parametrize("scale, stride", [(2, "8, "), (1.5, "8, resized from 10.7, ")])
def test_the_first_look_at_two_scales(config, scale, stride):
    """A reduced recipe's channel order is that of the mapper inside, and its levels match by stride."""
    whole = distill(config, teacher=config.model.teacher, losses=L(DistillLosses)(), scale=scale)
    config = with_defaults(OmegaConf.create(whole._asdict(), flags={"allow_objects": True}))
    config.model.teacher.weights = None
    config.dataloader.train.mapper.mapper.image_format = "RGB"
    findings = sanity_check(config, instantiate(config.model))
    said = "dataloader.test.mapper.mapper.image_format=RGB"
    assert said in [f.advice for f in findings if f.subject == "channel order"]
    (levels,) = (f for f in findings if f.subject == "levels")
    assert levels.state == "ok" and f"p3 with p4 (stride {stride}" in levels.found


def test_what_trains_the_losses_own_parts_alone(config):
    config.model.losses = L(DistillLosses)(icd=L(ICDLoss)(priors=None, start=0.0))
    findings = by_subject(config, iterations=2)
    assert "what the loss owns" in findings["distill/loss_icd_identification"].found
    assert "of the task losses'" in findings["distill/loss_icd_distillation"].found


def test_a_level_that_outweighs_the_others(config):
    """As the coarsest of a RetinaNet may, on which no object of the data is large enough."""
    trainer = Trainer(config)
    model, batch = trainer.model, next(iter(trainer._trainer.data_loader))
    (finding,) = check_features(model, [batch, batch])
    assert finding.state == "ok" and finding.found.startswith("p2 ")
    before = dict(part.split() for part in finding.found.split(", "))
    backbone = model.teacher.detector.backbone
    backbone.register_forward_hook(lambda module, given, maps: {**maps, "p4": 50 * maps["p4"]})
    (finding,) = check_features(model, [batch, batch])
    after = dict(part.split() for part in finding.found.split(":")[0].split(", "))
    assert float(after.pop("p4")) == pytest.approx(50 * float(before.pop("p4")), rel=0.02)
    assert after == before and finding.state == "warning"
    rest = ",".join(before)
    assert finding.advice == (
        "if no objects are learned there, "
        f"model.losses.tar.levels=[{rest}] model.losses.plain.levels=[{rest}]"
    )
    overridden = apply_overrides(config, [word for word in finding.advice.split() if "=" in word])
    (finding,) = check_features(Trainer(overridden).model, [batch])
    assert "p4" not in finding.found
    one = L(ImitationLoss)(levels=["p3"], normalize=False)
    for losses in ({}, {"one": one}, {"in_its_units": L(ImitationLoss)()}):
        config.model.losses = L(DistillLosses)(**losses)
        assert not list(check_features(Trainer(config).model, [batch]))


def test_the_first_look_draws_and_changes_nothing(config, caplog):
    config.optimizer.lr = 1.0
    trainer = Trainer(config)
    before, state = random_state(), {k: v.clone() for k, v in trainer.model.state_dict().items()}
    hook = SanityCheckHook()
    hook.trainer = trainer
    with caplog.at_level("INFO", logger="d2kd.doctor"):
        hook.before_train()
    after = random_state()
    assert torch.equal(before.pop("torch"), after.pop("torch")) and before == after
    assert all(torch.equal(v, state[k]) for k, v in trainer.model.state_dict().items())
    norms, said = (record for record in caplog.records if record.levelname == "WARNING")
    assert norms.getMessage().startswith("frozen norms")  # of a tiny network with random weights
    assert "learning rate: 1 of SGD" in said.getMessage() and "optimizer.lr=" in said.getMessage()


def test_the_table():
    findings = [Finding("a", "ok", "fine"), Finding("longer", "warning", "odd", "look")]
    lines = format_findings(findings).splitlines()
    indent = " " * len("warning  longer  ")
    assert lines == ["ok       a       fine", "warning  longer  odd", f"{indent}-> look"]
    assert [exit_code(findings[:n]) for n in (0, 1, 2)] == [0, 0, 1]


@pytest.fixture
def file(tmp_path):
    return write_recipe(tmp_path / "plain.py", "recipe(_here / 'data', _here / 'out')")


def test_the_command(file, tmp_path, capsys):
    draw_data(tmp_path / "data")
    words = ["--config-file", file, "--json", tmp_path / "found.json"]
    with pytest.raises(SystemExit) as exit:
        command("doctor")([*words, "--iterations", 0, "optimizer.lr=9.0"])
    assert exit.value.code == 2 and "error    learning rate" in capsys.readouterr().out
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["schema"] == 1
    assert {"subject", "state", "found", "advice"} == set(content["rows"][0])


@pytest.mark.parametrize(
    "words, line",
    [
        ("--config-file {folder}/gone.py", "gone.py: no such config"),
        ("--images -1", "--images: -1"),
        ("--iterations -1", "--iterations: -1"),
        ("--json {folder}", "--json: "),
    ],
)
def test_refused_in_one_line(refuses, file, words, line):
    words = ["--config-file", file, *words.format(folder=file.parent).split()]
    refuses(lambda: command("doctor")(words), line)
