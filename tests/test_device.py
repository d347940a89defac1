"""Detectors and losses on a device other than the CPU: nothing is mixed, results are the CPU's, and waits are few."""

import itertools
from collections import Counter
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.utils.events import EventStorage

import d2kd
from d2kd.testing import DETECTORS, batch, edge_case_batches
from d2kd.utils.errors import InputError
from d2kd.utils.metrics import collect_metrics, put_metric

from .device_waits import LOSSES, PLAIN, STEPS, build_model, train_on_both
from .stand_in_device import AUTOGRAD, D2KD, DETECTRON2, DEVICE, OTHER, StandIn

MOST_WAITS = {loss: (1, 1, 2) for loss in LOSSES} | {"TAR": (1, 2, 3), "ERD": (0, 0, 4)}
"""Waits of d2kd's code in a training step, its backward included, with a two-stage student, another and a GFL.

One is the training step's, for the metrics of the step before, which the device has long computed. GFL waits for the number of foreground anchors. TAR does so for one-stage students. ERD waits for the indices of the
selected locations and for their number in each image, and Detectron2's non-maximum suppression once for each image.
"""
QUICK = [
    (PLAIN, "gfl"),
    ("imitation", "faster_rcnn"),
    ("TAR", "cascade_rcnn"),
    ("TAR", "retinanet"),
    ("ICD", "fcos"),
    ("LwF", "retinanet"),
    ("ERD", "gfl"),
]


@pytest.fixture
def device():
    with StandIn() as device:
        yield device


def test_values_and_gradients_are_those_of_the_cpu():
    def compute(x, weight):
        y = torch.nn.functional.conv2d(x, weight).sin()
        y = y + 1
        y[:, 0] *= 2
        picked = y.flatten()[torch.arange(3, device=x.device)]
        (picked.logsumexp(0) + y.mean()).backward()
        return y.detach(), weight.grad

    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    expected = compute(x, weight.clone().requires_grad_())
    with StandIn():
        found = compute(x.to(DEVICE), weight.to(DEVICE).requires_grad_())
        assert {value.device for value in found} == {DEVICE}
        assert [value.cpu().tolist() for value in found] == [value.tolist() for value in expected]


def test_an_operation_in_place_changes_its_input(device):
    x = torch.arange(3.0, device=DEVICE)
    assert x.add_(1) is x and x.unsqueeze_(0) is x
    assert x.shape == (1, 3) and (x + 1).tolist() == [[2, 3, 4]]


def test_random_numbers_are_those_of_the_cpu(device):
    torch.manual_seed(3)
    expected = torch.rand(4), torch.randperm(9)
    torch.manual_seed(3)
    found = torch.rand(4, device=DEVICE), torch.randperm(9, device=DEVICE)
    assert [x.cpu().tolist() for x in found] == [x.tolist() for x in expected]


def test_it_exists_inside_the_block_alone():
    with StandIn():
        x = torch.ones(2, device=DEVICE)
    assert (x + 1).device == DEVICE  # what is there stays
    with pytest.raises(NotImplementedError):
        torch.ones(2, device=DEVICE)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y + x[0],
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.stack([x[0], y[0]]),
        lambda x, y: torch.where(y > 0, x, x),
        lambda x, y: x.index_select(0, y.long()),
        lambda x, y: x.gather(0, y.long()),
        lambda x, y: y[x.long()],
        lambda x, y: x.clone().index_put_((torch.arange(2),), y),
        lambda x, y: y.add_(x),
        lambda x, y: y[0].add_(x[1]),
        lambda x, y: torch.nn.functional.mse_loss(x, y),
        lambda x, y: x @ y,
    ],
)
def test_mixed_tensors_fail_as_on_cuda(device, mix):
    x, y = torch.ones(2, device=DEVICE), torch.ones(2)
    mix(x, x)  # of one device
    with pytest.raises((RuntimeError, IndexError), match="device"):
        mix(x, y)


def test_scalars_and_indices_may_be_on_the_cpu(device):
    x, scalar = torch.arange(3.0, device=DEVICE), torch.tensor(2.0)
    made = [x * scalar, scalar - x, x.clone().add_(scalar), torch.where(x > 1, x, scalar)]
    made += [x.masked_fill(x > 1, scalar), x.clamp(min=scalar), x[torch.tensor([0, 2])]]
    x[0] = scalar
    x[torch.tensor([True, False, False])] = 5
    assert {value.device for value in made} == {DEVICE}
    assert x.tolist() == [5, 1, 2]


def test_numpy_takes_no_tensor_of_the_device(device):
    with pytest.raises(TypeError, match="privateuseone"):
        torch.ones(2, device=DEVICE).numpy()


WAITS = {
    "value": [
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: int(x.sum()),
        lambda x: torch.equal(x, x),
    ],
    "shape": [
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.index_put_((x > 0,), torch.zeros_like(x[1:])),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
    ],
    "to the CPU": [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to("cpu", non_blocking=True),  # to memory that is not pinned
        lambda x: torch.zeros(3).copy_(x),
    ],
    "from the CPU": [
        lambda x: torch.tensor([1, 2], device=DEVICE),
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.as_tensor([1, 2], device=DEVICE),
        lambda x: torch.zeros(3).to(DEVICE),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x[torch.tensor([0])],
    ],
}


@pytest.mark.parametrize("kind", WAITS)
def test_each_wait_has_its_kind_and_its_line(device, kind):
    for act in WAITS[kind]:
        x = torch.arange(3.0, device=DEVICE)
        device.waits.clear()
        act(x)
        found = device.waits[-1]
        line = f"test_device.py:{act.__code__.co_firstlineno}"
        assert (found.kind, found.code, found.line) == (kind, OTHER, line)


def test_other_operations_wait_for_nothing(device):
    x = torch.arange(3.0, device=DEVICE)
    x[x > 1] = 0  # a fill by a mask
    x[0] = 3
    x[torch.arange(2, device=DEVICE)] = torch.zeros_like(x[:2])
    x.masked_fill(x > 0, 1.0).sort()
    torch.full((2,), 5.0, device=DEVICE)
    x.to(DEVICE).to(torch.float64).repeat_interleave(2)
    x.repeat_interleave(torch.ones(3, dtype=torch.long, device=DEVICE), output_size=3)
    torch.ones(3).to(DEVICE, non_blocking=True)
    torch.ones(3).tolist()
    assert device.waits == []


def test_printing_waits(device):
    assert "5" in repr(torch.full((1,), 5.0, device=DEVICE)) and device.waits


def test_the_wait_of_a_backward_has_the_line_of_its_forward(device):
    x = torch.arange(3.0, device=DEVICE).requires_grad_()
    picked = x[x > 1]
    device.waits.clear()
    picked.sum().backward()
    (wait,) = device.waits
    line = test_the_wait_of_a_backward_has_the_line_of_its_forward.__code__.co_firstlineno + 2
    assert (wait.kind, wait.line, wait.in_backward) == ("shape", f"test_device.py:{line}", True)
    assert x.grad.tolist() == [0, 0, 1]


@pytest.mark.parametrize("package, code", [(d2kd, D2KD), (detectron2, DETECTRON2)])
def test_the_package_that_waits_is_the_innermost(device, package, code):
    def within(package, source):
        file = Path(package.__file__).with_name("made_here.py")
        return eval(compile(source, file, "eval"))

    wait = within(package, "lambda x: x.item()")
    within(d2kd, "lambda wait, x: wait(x)")(wait, torch.ones((), device=DEVICE))
    (found,) = device.waits
    assert (found.code, found.line) == (code, f"{package.__name__}/made_here.py:1")


def test_metrics_that_are_collected_wait_for_nothing(device):
    def scalar(value):
        return torch.full((), value, device=DEVICE)

    with EventStorage() as storage:
        put_metric("at once", scalar(1.0))
        assert len(device.waits) == 1 and storage.latest() == {"at once": (1, 0)}
        with collect_metrics() as outer:
            put_metric("one", scalar(2.5).reshape(1))
            with collect_metrics() as inner:
                put_metric("two", scalar(3.0).requires_grad_())
            put_metric("three", scalar(4))
        assert list(outer) == ["one", "three"] and list(inner) == ["two"]
        assert all(not x.requires_grad and not x.dim() for x in (*outer.values(), *inner.values()))
        with pytest.raises(ZeroDivisionError), collect_metrics():
            raise ZeroDivisionError
        assert len(device.waits) == 1
        put_metric("four", scalar(5.0))
    assert list(storage.latest()) == ["at once", "four"]


def compare(model, examples=None):
    """Train on both devices, and return the waits of the last step."""
    on_cpu, on_device = train_on_both(model, batch() if examples is None else examples)
    assert len(on_device.metrics) == STEPS
    for found, expected in zip(on_device.metrics, on_cpu.metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for what in ("gradients", "parameters"):
        torch.testing.assert_close(
            getattr(on_device, what), getattr(on_cpu, what), rtol=1e-3, atol=1e-5
        )
    return on_device.waits[-1]


def assert_few_waits(waits, loss: str, family: str):
    kind = 0 if "rcnn" in family else 2 if family == "gfl" else 1
    lines = Counter(wait.line for wait in waits if wait.code in (D2KD, AUTOGRAD))
    assert lines.total() <= MOST_WAITS[loss][kind], lines


EACH = [
    pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.sweep)
    for pair in itertools.product(LOSSES, DETECTORS)
]


@pytest.mark.parametrize("loss, family", EACH)
def test_a_step_is_that_of_the_cpu_and_rarely_waits(loss, family):
    try:
        model = build_model(loss, family)
    except InputError:
        pytest.skip("the loss does not support this family")
    assert_few_waits(compare(model), loss, family)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "loss, family",
    [("TAR", "faster_rcnn"), ("TAR", "fcos"), ("LwF", "retinanet"), ("ICD", "gfl"), ("ERD", "gfl")],
)
def test_a_teacher_of_other_classes_costs_no_wait(loss, family):
    names = ["class 0", "class 1", "class 2"], ["class 2", "other", "class 0"]
    assert_few_waits(compare(build_model(loss, family, names)), loss, family)


@pytest.mark.sweep
@pytest.mark.parametrize("loss, family", QUICK)
def test_unusual_batches_mix_nothing(loss, family):
    for examples in edge_case_batches().values():
        compare(build_model(loss, family), examples)
