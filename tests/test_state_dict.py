"""A Distiller is saved as its student, by whatever saves it, and goes on from there."""

import copy
import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2kd.data import coco_dataset
from d2kd.losses import DistillLosses, ICDLoss, ImitationLoss, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.modeling.weights import load_weights_strict
from d2kd.testing import forward_losses
from d2kd.utils.errors import InputError

from .common import batch, build, tiny_faster_rcnn, tiny_retinanet
from .test_distiller import RECIPE, Tapped, make, yacs
from .test_trainer import assert_same, data  # noqa: F401  (a fixture)

PREFIX = "distiller_losses."


def adapting(**options):
    """A Distiller whose loss has parameters."""
    return make(teacher=build(tiny_retinanet(channels=24), 1), **options)


def of_student(state):
    return {key: value for key, value in state.items() if not key.startswith(PREFIX)}


def assert_plain(file, plain: nn.Module, expected: dict, caplog) -> None:
    """Detectron2 reads a file into the plain detector: equal to the bit, one warning about the losses."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fvcore"):
        DetectionCheckpointer(plain).load(str(file))
    assert_same(dict(plain.state_dict()), expected)
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and PREFIX.rstrip(".") in warnings[0]
    assert not any(key in warnings[0] for key in ("backbone", "roi_heads", "missing"))


def test_the_state_dict_is_the_plain_detectors():
    model = adapting()
    state, plain = model.state_dict(), model.student.state_dict()
    assert list(of_student(state)) == list(plain)
    assert_same(of_student(state), dict(plain))
    losses = {key.removeprefix(PREFIX) for key in state if key.startswith(PREFIX)}
    assert losses == set(model.losses.state_dict())
    metadata = {k: v for k, v in state._metadata.items() if not k.startswith(PREFIX[:-1])}
    assert metadata == dict(plain._metadata)
    other = adapting(student=build(tiny_retinanet(), 5))
    assert not any(other.load_state_dict(state))
    assert_same(dict(other.state_dict()), dict(state))


def test_a_student_may_have_parts_that_are_called_as_a_distillers():
    model = make()
    model.student.losses = nn.Linear(2, 2)
    assert list(of_student(model.state_dict())) == list(model.student.state_dict())


def test_loading_leaves_the_callers_dict_as_it_needs_to_be():
    model, state = adapting(), adapting().state_dict()
    model.load_state_dict(state)
    sizes = len(state), len(state._metadata)
    for one in (model, copy.copy(model)):
        assert not any(one.load_state_dict(state))
    assert (len(state), len(state._metadata)) == sizes


def test_what_fits_a_plain_detector_fits_its_distiller():
    model, plain = adapting(), build(tiny_retinanet(), 5).state_dict()
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert not unexpected and missing and all(key.startswith(PREFIX) for key in missing)
    assert_same(dict(model.student.state_dict()), dict(plain))
    gone = plain.pop("head.cls_score.weight")
    plain |= {"zebra.weight": gone, PREFIX + "zebra": gone}
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert unexpected == ["zebra.weight", PREFIX + "zebra"] and "head.cls_score.weight" in missing
    with pytest.raises(RuntimeError, match="head.cls_score.weight"):
        model.load_state_dict(plain)


def test_a_weight_of_another_shape_is_named_as_in_a_plain_detector():
    state = {k: v.clone() for k, v in adapting().state_dict().items()}
    adapter = next(key for key in state if key.startswith(PREFIX))
    for key in ("head.cls_score.weight", adapter):
        state[key] = torch.zeros(1)
    model = adapting()
    found = DetectionCheckpointer(model)._load_model({"model": state})
    assert [key for key, *_ in found.incorrect_shapes] == ["head.cls_score.weight", adapter]


@pytest.mark.parametrize("make_loss", [ImitationLoss, TARLoss])
def test_its_file_is_a_teachers(tmp_path, make_loss):
    """Or that of a detector to evaluate; weights that are missing or unknown are still refused."""
    model = adapting(losses=DistillLosses(it=make_loss()))
    file = str(tmp_path / "model.pth")
    state = model.state_dict()
    assert any(key.startswith(PREFIX) for key in state)
    torch.save({"model": state}, file)
    teacher = Teacher(build(tiny_retinanet(), 5), file)
    assert_same(dict(teacher.detector.state_dict()), of_student(state))
    for change in (dict(zebra=torch.ones(1)), dict(distiller_losses_zebra=torch.ones(1))):
        torch.save({"model": state | change}, file)
        with pytest.raises(InputError, match="1 unexpected .such as .*zebra"):
            load_weights_strict(build(tiny_retinanet()), file)
    del state["head.cls_score.weight"]
    torch.save({"model": state}, file)
    with pytest.raises(InputError, match="1 missing .such as head.cls_score.weight"):
        load_weights_strict(build(tiny_retinanet()), file)


def test_inside_another_module_and_with_parts_of_a_subclass():
    class Averaging(Distiller):
        def __init__(self, **options):
            super().__init__(**options)
            self.average = nn.Linear(2, 2)

    model = make()
    model.__class__, model.average = Averaging, nn.Linear(2, 2)
    for outer, prefix in ((model, ""), (nn.Sequential(model), "0.")):
        state = outer.state_dict()
        assert f"{prefix}average.weight" in state
        assert f"{prefix}backbone.fpn_output3.weight" in state
        changed = {key: torch.zeros_like(value) for key, value in state.items()}
        assert not any(outer.load_state_dict(changed))
        assert not any(value.any() for value in outer.state_dict().values())
        missing, unexpected = outer.load_state_dict({f"{prefix}zebra": torch.ones(1)}, strict=False)
        assert unexpected == [f"{prefix}zebra"]
        assert f"{prefix}head.cls_score.weight" in missing


def test_a_part_of_the_weights_leaves_the_inherited_ones():
    """As a backbone's ImageNet weights do, to which Detectron2's base configs point."""
    model = make(inherit=["head."])
    source = {k: v.clone() for k, v in model.teacher.detector.state_dict().items()}
    part = {key: torch.zeros_like(v) for key, v in source.items() if "cls_score" not in key}
    model.load_state_dict(part, strict=False)
    for key, value in model.student.state_dict().items():
        expected = source[key] if key.startswith("head.") else torch.zeros_like(value)
        assert torch.equal(value, expected), key
    whole = {key: torch.zeros_like(v) for key, v in source.items()}
    model.load_state_dict(whole, strict=False)
    assert not any(value.any() for value in model.student.state_dict().values())


@pytest.mark.parametrize(
    "loss",
    [lambda: Tapped("head.cls_subnet.0"), TARLoss, ImitationLoss, lambda: ICDLoss(heads=4)],
    ids=["taps", "tar", "it", "icd"],
)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_models_of_their_own(loss, duplicate):
    model = adapting(losses=DistillLosses(it=loss())).train()
    twin = duplicate(model)
    assert_same(dict(twin.state_dict()), dict(model.state_dict()))
    results = []
    for one in (model, twin):
        losses = forward_losses(one, batch())
        sum(losses.values()).backward()
        results.append({key: value.item() for key, value in losses.items()})
    assert results[0] == pytest.approx(results[1])
    own, others = (
        {p.data_ptr() for part in (x, x.teacher.detector) for p in part.parameters()}
        for x in (model, twin)
    )
    assert not own & others
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:  # TorchScript rounds otherwise after its first calls
            torch.testing.assert_close(one.grad, other.grad)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert forward_losses(twin, batch()).keys() == losses.keys()


def test_a_plain_loop(tmp_path, caplog):
    """Interrupted after a step and continued from its file, it ends with the weights of one that was not."""

    def trained(first, last, model, optimizer):
        for i in range(first, last):
            torch.manual_seed(i)
            with EventStorage(start_iter=i):
                losses = model.train()(batch())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

    def made():
        torch.manual_seed(0)
        teacher = build(tiny_faster_rcnn(channels=24), 1)
        # ICD counts its draws, and does not distill in the first step.
        icd = ICDLoss(heads=4, start=0.1)
        losses = DistillLosses(tar=TARLoss(), it=ImitationLoss(), icd=icd)
        model = make(build(tiny_faster_rcnn()), teacher, losses)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    whole, optimizer = made()
    trained(0, 3, whole, optimizer)
    model, optimizer = made()
    trained(0, 1, model, optimizer)
    file = tmp_path / "model.pth"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert_plain(file, build(tiny_faster_rcnn(), 3), dict(model.student.state_dict()), caplog)

    model, optimizer = made()
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    trained(1, 3, model, optimizer)
    assert_same(dict(model.state_dict()), dict(whole.state_dict()))


def test_yacs_and_detectron2s_own_trainer(data, tmp_path, caplog):  # noqa: F811
    cfg = yacs(tmp_path, RECIPE.replace("tiny_faster_rcnn()", "tiny_faster_rcnn(channels=24)"))
    name = coco_dataset(f"yacs_{data}", str(data / "data.json"), str(data))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 1
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 1e-3, 1, 1
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    alone = cfg.clone()
    alone.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    plain = build_model(alone)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "plain.pth")

    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert_same(dict(trainer.model.student.state_dict()), dict(plain.state_dict()))
    trainer.train()
    left = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    stem = "backbone.fpn_output2.weight"
    assert not torch.equal(left[stem], plain.state_dict()[stem])
    assert_plain(tmp_path / "out/model_final.pth", plain, of_student(left), caplog)

    cfg.SOLVER.MAX_ITER = 2
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1
    assert_same(dict(trainer.model.state_dict()), left)
    trainer.train()
    assert not torch.equal(trainer.model.state_dict()[stem], left[stem])
