"""The cost of a distilled step is that of a whole run, whatever its schedules, and measured on equal steps."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import (
    LinearParamScheduler,
    MultiStepParamScheduler,
    StepParamScheduler,
)
from torch import nn

from d2kd.benchmark.costs import median_interval
from d2kd.benchmark.step_cost import StepCost, _estimate, _points, step_cost
from d2kd.engine.train_step import NonFiniteError, TrainStep
from d2kd.losses import DistillLosses, ICDLoss, ImitationLoss, TARLoss
from d2kd.losses.base import get_weight
from d2kd.modeling import Distiller
from d2kd.utils.errors import InputError
from d2kd.utils.random_state import random_state

from .resume_runs import differences
from .tiny_run import distiller, draw_data, recipe, teacher_weights

MODULE = "d2kd.benchmark.step_cost"


def off_from(fraction, before=1.0):
    """1 until this fraction of the run, then 0; with ``before=0`` the other way round."""
    return MultiStepParamScheduler([before, 1.0 - before], 1000, [round(1000 * fraction)])


def model_with(**losses):
    model = nn.Module()
    model.losses = DistillLosses(**losses)
    return model


@pytest.fixture
def faked(monkeypatch):
    """step_cost on a clock that only steps move, and the steps in order."""
    steps, now, noise = [], [0.0], np.random.default_rng(0)

    class Fake:
        device = torch.device("cpu")

        def __init__(self, config):
            self.config, self.max_iter, self.model = config, config.max_iter, config.model
            optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
            step = dict(run_step=self.run_step, read_metrics=lambda: None)
            self._trainer = SimpleNamespace(optimizer=optimizer, **step)

        def resume_or_load(self, resume):
            assert not resume

        def run_step(self):
            iteration = get_event_storage().iter
            steps.append((self.config.name, iteration, torch.rand(()).item()))
            cost = 1.0
            for name, loss in self.model.losses.by_name.items():
                on = get_weight(loss.weight, iteration / self.max_iter) != 0
                cost += on * self.config.costs[name]
            now[0] += cost * (1 + self.config.noise * noise.normal())

    monkeypatch.setattr(f"{MODULE}.Trainer", Fake)
    monkeypatch.setattr(f"{MODULE}.time", SimpleNamespace(process_time=lambda: now[0]))

    def measure(costs, pairs=12, noise=0.0, max_iter=1000, report=None, **weights):
        losses = {name: ImitationLoss(weight=weight) for name, weight in weights.items()}
        models = {"distilled": model_with(**losses), "plain": model_with()}
        common = dict(train=Train(), noise=noise, max_iter=max_iter, costs=costs)
        recipes = [SimpleNamespace(name=n, model=m, **common) for n, m in models.items()]
        return step_cost(*recipes, pairs, report)

    measure.steps = steps
    return measure


class Train(SimpleNamespace):
    seed = 3

    def get(self, key):
        return getattr(self, key)


def test_a_constant_loss_has_the_ratio_of_its_step(faked):
    about = pytest.approx(1.5)
    assert faked({"a": 0.5}, a=1.0) == StepCost(about, about, about, 12, "cpu seconds")
    assert faked({"a": 0.5}, a=0.0).ratio == pytest.approx(1.0)


@pytest.mark.parametrize(
    "share, weight",
    [
        (0.6, off_from(0.6)),
        (0.6, off_from(0.4, before=0.0)),
        (0.3, off_from(0.3)),
        (1.0, LinearParamScheduler(1.0, 0.0)),
        (0.25, StepParamScheduler(1000, [0.0, 1.0, 0.0, 0.0])),  # on at none of 0, 1/2 and 1
    ],
)
def test_a_loss_counts_for_the_share_of_the_run_in_which_it_is_on(faked, share, weight):
    assert faked({"a": 0.8}, a=weight).ratio == pytest.approx(1 + 0.8 * share, abs=2e-3)


def test_each_set_of_losses_is_measured(faked):
    """Of two losses that take turns in thirds with a time when both are off."""
    weights = {"a": off_from(0.3), "b": off_from(0.7, before=0.0)}
    assert faked({"a": 1.0, "b": 2.0}, **weights).ratio == pytest.approx(1 + 0.3 + 0.6, abs=4e-3)


def test_pairs_take_turns_on_equal_draws(faked):
    reported = []
    found = faked({"a": 0.5}, 12, a=1.0, report=lambda *steps: reported.append(steps))
    assert found.pairs == 12
    steps = [faked.steps[i : i + 2] for i in range(0, len(faked.steps), 2)]
    assert len(steps) == 3 * (1 + 4)  # one to warm up at each of three points
    for k, pair in enumerate(steps):
        names = ["distilled", "plain"]
        assert [name for name, *_ in pair] == (names if k % 2 == 0 else names[::-1])
        assert pair[0][1:] == pair[1][1:]  # iteration and random draw
    assert sorted({iteration for _, iteration, _ in faked.steps}) == [0, 500, 999]
    assert reported == [(k, 15) for k in range(16)]
    assert faked({"a": 0.5}, 13, a=1.0).pairs == 13
    faked.steps.clear()  # few pairs where few iterations are
    assert faked({"a": 0.5}, 40, a=off_from(0.9)).pairs >= 40
    points = Counter(iteration for _, iteration, _ in faked.steps)
    assert points[999] < points[0] < points[500]
    assert faked({"a": 0.5}, 12, max_iter=1, a=1.0).pairs == 12


def test_first_steps_do_not_count(faked, monkeypatch):
    """Although they take long, as where something is compiled."""
    seen = set()

    def timed(call, trainer, iteration, number):
        call(trainer, iteration, number)
        key = (trainer.config.name, iteration)
        cost = {"plain": 1.0, "distilled": 1.5}[trainer.config.name]
        cost += 0 if key in seen else 100 * cost**2
        seen.add(key)
        return cost

    monkeypatch.setattr(f"{MODULE}._clock", lambda device: ("cuda events", timed))
    found = faked({"a": 0.5}, a=1.0)
    assert (found.low, found.ratio, found.high) == pytest.approx([1.5] * 3)
    assert found.clock == "cuda events"


def test_the_interval_covers_the_ratio(faked):
    found = [faked({"a": 0.5}, 12 * n, noise=0.05, a=off_from(0.6)) for n in (1, 1, 1, 1, 8)]
    for cost in found:
        assert cost.low <= cost.ratio <= cost.high
        assert cost.low < 1.3 < cost.high
    assert found[-1].high - found[-1].low < min(c.high - c.low for c in found[:-1])
    assert faked({"a": 0.5}, noise=0.0, a=1.0) == faked({"a": 0.5}, noise=0.0, a=1.0)
    # Of a single point it is the benchmark's, which holds 95 of 100.
    values = np.random.default_rng(0).lognormal(size=15)
    found = dict(zip(("median", "low", "high"), _estimate([1.0], [values])))
    assert found == median_interval(values)


@pytest.mark.parametrize("max_iter", [1, 2, 3, 7, 90_000])
@pytest.mark.parametrize("loss", [TARLoss, ImitationLoss, ICDLoss])
def test_the_points_stand_for_the_whole_run(loss, max_iter):
    weights = _points(model_with(it=loss()), max_iter)
    assert {0, max_iter - 1} <= set(weights) <= set(range(max_iter))
    assert sum(weights.values()) == pytest.approx(1.0)
    if max_iter == 90_000:  # the first iteration of ICD and TAR computes less, and stands for few
        expected = 0.25 if loss is ImitationLoss else 0.01
        assert weights[0] == pytest.approx(expected, abs=0.01)


def test_too_few_pairs(faked):
    with pytest.raises(InputError, match="pairs: 11; expected at least 12"):
        faked({}, 11)
    assert not faked.steps


@pytest.fixture
def recipes(tmp_path):
    draw_data(tmp_path / "data")
    model = distiller(teacher_weights(tmp_path), L(DistillLosses)(tar=L(TARLoss)()))
    folders = tmp_path / "data", tmp_path / "out"
    return recipe(*folders, model, max_iter=8), recipe(*folders, max_iter=11, seed=5)


def test_steps_of_recipes(recipes, tmp_path, monkeypatch):
    """Both see the same batches, learn nothing and leave nothing."""
    seen, before, forward = {True: [], False: []}, {}, TrainStep._forward

    def watched(self, batch):
        now = get_event_storage().iter
        images = [(x["file_name"], x["image"].sum().item(), now) for x in batch]
        seen[isinstance(self.model, Distiller)].append(images)
        weights = [p.detach().clone() for p in self.model.parameters()]
        former = before.setdefault(self, weights)
        assert all(a.equal(b) for a, b in zip(weights, former, strict=True))
        return forward(self, batch)

    monkeypatch.setattr(TrainStep, "_forward", watched)
    registered = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    files = set(tmp_path.rglob("*"))
    np.random.seed(9)
    state = random_state()
    found = step_cost(*recipes, pairs=12)
    assert differences(state, random_state()) == []
    assert seen[True] == seen[False] and len(seen[True]) == found.pairs + len({0, 4, 7})
    assert len({image for batch in seen[True] for image, *_ in batch}) == 6
    assert 0 < found.low <= found.ratio <= found.high and 12 <= found.pairs < 16
    assert set(tmp_path.rglob("*")) == files
    assert (set(DatasetCatalog.list()), set(MetadataCatalog.list())) == registered
    assert torch.backends.cudnn.benchmark
    assert recipes[1].train.seed == 5


def test_a_loss_that_is_not_finite(recipes, monkeypatch):
    def run_step(self):
        raise NonFiniteError("distill/loss_tar", float("nan"), 0)

    monkeypatch.setattr(TrainStep, "run_step", run_step)
    with pytest.raises(InputError, match="distill/loss_tar: nan"):
        step_cost(*recipes)
