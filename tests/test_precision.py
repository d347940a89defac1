"""Half precision says what float32 says, and extreme inputs stay finite."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from d2kd.engine import Trainer
from d2kd.engine.train_step import build_amp
from d2kd.losses import DistillLosses, ImitationLoss, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.testing import edge_case_batches, tiny_gfl
from d2kd.utils.compat import decode_in_float32

from . import fuzz
from .common import (
    DETECTORS,
    batch,
    build,
    lively,
    tiny_faster_rcnn,
    tiny_fcos,
    tiny_retinanet,
)
from .fuzz import CHECKS, DTYPES, FUNCTIONS, check_function
from .recorded import LOSSES, Recorded, relative
from .tiny_run import draw_data, recipe

# Of value and gradients, by norm. The losses themselves compute in float32; adapters do not.
TOLERANCE = {torch.float16: 0.005, torch.bfloat16: 0.03}


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_float32_within_its_own(name):
    recorded = Recorded(name)
    images = [0, 1, 2, 3]
    for dtype, bound in TOLERANCE.items():
        # The same inputs: what half precision can hold.
        exact, gradients = recorded.loss(images, lambda x, d=dtype: x.to(d).float())
        # Scaled, or float16 would lose the smallest gradients, as it does without its scaler.
        half, others = recorded.loss(images, lambda x, d=dtype: x.to(d), dtype=dtype, scale=4096)
        assert half.dtype == torch.float32 and exact > 0
        assert relative(half, exact) <= bound
        assert gradients.keys() == others.keys()
        for key, gradient in gradients.items():
            if gradient.norm() > 1e-6:
                assert relative(others[key], gradient) <= bound, key


@pytest.mark.parametrize("name", CHECKS)
def test_extreme_inputs_are_finite(name):
    """Many more: ``python -m tests.fuzz``."""
    examples = 40 if name in FUNCTIONS else 12
    assert fuzz.fuzz(name, examples) >= examples / 2


def test_the_check_can_fail(monkeypatch):
    monkeypatch.setitem(
        fuzz.FUNCTIONS, "bad", lambda draw: draw.answer(2, 2).float().exp().square().sum()
    )
    monkeypatch.setitem(CHECKS, "bad", lambda data: check_function("bad", data))
    assert torch.float16 in DTYPES
    with pytest.raises(AssertionError, match="bad.* is not finite"):
        fuzz.fuzz("bad", 100)


def test_a_precision_that_is_none(refuses):
    amp = OmegaConf.create({"enabled": True, "dtype": "int8"})
    refuses(
        lambda: build_amp(amp, torch.device("cpu")), "train.amp.dtype: int8; expected float16 or"
    )


DETECTORS_AND_GIOU = {
    **DETECTORS,
    "gfl": tiny_gfl,
    "retinanet, GIoU": lambda: _with_giou(tiny_retinanet(), "box_reg_loss_type"),
    "RPN, GIoU": lambda: _with_giou(tiny_faster_rcnn(), "proposal_generator.box_reg_loss_type"),
    "box head, GIoU": lambda: _with_giou(
        tiny_faster_rcnn(), "roi_heads.box_predictor.box_reg_loss_type"
    ),
}


def _with_giou(node, key):
    OmegaConf.update(node, key, "giou")
    return node


def _losses(model, dtype, examples):
    """A training step's losses and whether all gradients are finite."""
    model.train().zero_grad()
    torch.manual_seed(0)
    with EventStorage(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses = model(examples)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return {name: value.detach() for name, value in losses.items()}


@pytest.mark.parametrize("family", DETECTORS_AND_GIOU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_family_trains_with_mixed_precision(family, dtype):
    """As student and as teacher, with and without ground truth; the dense ones' losses are float32's, nearly."""
    node = DETECTORS_AND_GIOU[family]()
    losses = DistillLosses(features=ImitationLoss(), tar=TARLoss())
    model = Distiller(student=build(node), teacher=Teacher(build(node, 3), None), losses=losses, max_iter=2)  # fmt: skip
    model.measure_features([batch()])
    exact, half = (_losses(model, kind, batch()) for kind in (torch.float32, dtype))
    if not hasattr(model.student, "roi_heads"):  # whose samples differ with the proposals
        for name, value in exact.items():
            torch.testing.assert_close(half[name].float(), value, rtol=0.05, atol=0.02)
    assert all(value.isfinite() for value in half.values())
    _losses(model, dtype, edge_case_batches()["no ground truth"])
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        (boxes, *_) = (x["instances"].pred_boxes for x in lively(model.student).eval()(batch()))
        (others, *_) = (x["instances"].pred_boxes for x in model.teacher.detect(batch()))
    assert boxes.tensor.isfinite().all() and others.tensor.isfinite().all()


def test_an_fcos_in_float32_is_detectron2s_own():
    """To the last bit: losses, gradients and boxes."""
    own, changed = build(tiny_fcos()), build(tiny_fcos())
    decode_in_float32(changed)
    assert type(own.box2box_transform) is not type(changed.box2box_transform)
    found = [_losses(model, torch.float32, batch()) for model in (own, changed)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    for a, b in zip(own.parameters(), changed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    with torch.no_grad():
        boxes = [lively(x).eval()(batch())[0]["instances"].pred_boxes for x in (own, changed)]
    assert len(boxes[0]) and torch.equal(boxes[0].tensor, boxes[1].tensor)
    assert own.state_dict().keys() == changed.state_dict().keys()


def test_an_fcos_decodes_pixels_that_half_precision_cannot_hold():
    detector = build(tiny_fcos())
    decode_in_float32(detector)
    anchors = torch.tensor([[2001.0, 0.0, 2009.0, 8.0]])
    for dtype in (torch.float16, torch.bfloat16):
        boxes = detector.box2box_transform.apply_deltas(torch.ones(1, 4, dtype=dtype), anchors)
        assert boxes.dtype == torch.float32 and boxes[0, 0] == 1997.0


def test_a_run_of_an_fcos_with_mixed_precision(tmp_path):
    """By itself and with a teacher, from a recipe."""
    draw_data(tmp_path / "data")
    taught = L(Distiller)(
        student=tiny_fcos(),
        teacher=L(Teacher)(detector=tiny_fcos(), weights=None),
        losses=L(DistillLosses)(features=L(ImitationLoss)()),
        max_iter=2,
    )
    for name, model in (("plain", tiny_fcos()), ("taught", taught)):
        config = recipe(tmp_path / "data", tmp_path / name, model, max_iter=2)
        config.train.amp = {"enabled": True, "dtype": "bfloat16"}
        Trainer(config).train()
        assert (tmp_path / name / "model_final.pth").is_file()
