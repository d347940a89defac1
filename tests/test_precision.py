"""Half precision says what float32 says, and extreme inputs stay finite."""

import pytest
import torch
from omegaconf import OmegaConf

from d2kd.engine.train_step import build_amp

from . import fuzz
from .fuzz import CHECKS, DTYPES, FUNCTIONS, check_function
from .recorded import LOSSES, Recorded, relative

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
