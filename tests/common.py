"""Small detectors and batches that every test may use, see :mod:`d2kd.testing`; and the commands as functions."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from d2kd.data import shapes
from d2kd.testing import (  # noqa: F401  (handed on to the tests)
    CLASSES,
    DETECTORS,
    batch,
    build,
    tiny_faster_rcnn,
    tiny_fcos,
    tiny_retinanet,
)
from d2kd.tools import main
from d2kd.utils.errors import report_input_errors

ROOT = Path(__file__).parent.parent
HAS_VITDET = find_spec("detectron2.modeling.backbone.vit") is not None  # after 0.6


def command(name: str) -> Callable[[list], None]:
    """``d2kd NAME`` as a function of its words."""
    return lambda words: main([name, *map(str, words)])


def lively(model: nn.Module) -> nn.Module:
    """The detector, or what holds one, detecting whatever its score: untrained, dense ones find nothing else."""
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = 0.0
    return model


def perfect(record: dict) -> Instances:
    """What a detector finds that knows the annotations of an image."""
    given, found = record["annotations"], Instances((record["height"], record["width"]))
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in given]
    found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
    found.pred_classes = torch.tensor([a["category_id"] for a in given]).long()
    found.scores = torch.ones(len(given))
    return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """What is computed inside is equal to the last bit to what another process with one thread computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def refusal(act: Callable[..., object], words: Sequence | None, capture) -> str:
    """What is said by a command that refuses its words, or by other code that refuses its input.

    As all must, in one line, ``error: <culprit>: <found>; expected <…>``, and with exit code 2.

    Args:
        words: of a command, as :func:`command` gives it; None: `act` takes nothing.
        capture: pytest's ``capfd`` or ``capsys``.
    """
    with pytest.raises(SystemExit) as exit, report_input_errors():
        act() if words is None else act(words)
    assert exit.value.code == 2
    error = capture.readouterr().err
    assert re.fullmatch(r"error: .+: .+; expected .+\n", error), error
    return error


def interrupted_in(method: str) -> Callable:
    """Training as a study does it, interrupted after the first step of this method's runs."""
    from d2kd.study import train

    def train_a_step(config, test, report):
        def stop(step, steps):
            report(step, steps)
            if step == 1 and method in config.train.output_dir:
                raise KeyboardInterrupt

        return train(config, test, stop)

    return train_a_step


def few_shapes(**counts: int) -> Callable:
    """A fixture for every test of a module: the generated sets have so few images."""

    @pytest.fixture(autouse=True)
    def fixture(tmp_path):
        shapes.register_shapes(tmp_path / "shapes", **counts)
        yield
        shapes.register_shapes()

    return fixture
