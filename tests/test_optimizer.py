"""Two optimizers in one step: each as it would be alone, saved together, stopped together."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import nn

from d2kd.config import apply_overrides, get_config, with_defaults
from d2kd.data import estimate_priors
from d2kd.engine import Trainer, params_with_backbone_lr
from d2kd.engine.optimizer import DistillerOptimizer, build_optimizer
from d2kd.engine.train_step import TrainStep
from d2kd.losses import DistillLosses, ICDLoss
from d2kd.utils.errors import InputError

from .test_trainer import assert_same, data, lines, run, saved  # noqa: F401  (one is a fixture)
from .tiny_run import distiller, recipe, without_evaluation


def two(data, output, **train):  # noqa: F811
    """A recipe whose losses have the published optimizer, and whose student's gradients are clipped, too."""
    priors = L(estimate_priors)(names="${dataloader.train.dataset.names}")
    losses = L(DistillLosses)(icd=L(ICDLoss)(heads=4, start=0.25, priors=priors))
    clip = {"enabled": True, "clip_value": 0.5}
    config = recipe(data, output, distiller(losses=losses), clip_gradients=clip, **train)
    config.train.loss_optimizer = get_config("common/icd.py").loss_optimizer
    return without_evaluation(config)


def test_each_part_is_trained_as_it_would_be_alone(data, tmp_path):  # noqa: F811
    config = two(data, tmp_path, max_iter=4, seed=3)
    trainer = run(config)

    seed_all_rng(3)
    model = instantiate(config.model).train()
    seed_all_rng(3)
    batches = iter(instantiate(config.dataloader.train))
    parts = [model.student, model.losses]
    groups = get_default_optimizer_params(model.student, weight_decay_norm=0.0)
    sgd = torch.optim.SGD(groups, lr=0.005, momentum=0.9, weight_decay=1e-4)
    adamw = torch.optim.AdamW(model.losses.parameters(), lr=1e-4, weight_decay=1e-4)
    norms = []
    seed_all_rng(3)
    for step in range(4):
        sgd.param_groups[0]["lr"] = 0.005 * (1 - 0.9 * step / 4)
        adamw.param_groups[0]["lr"] = 1e-4 * (1 + math.cos(math.pi * step / 4)) / 2
        with EventStorage(start_iter=step):
            losses = model(next(batches))
        for optimizer in (sgd, adamw):
            optimizer.zero_grad()
        sum(losses.values()).backward()
        clips = zip(parts, (0.5, 0.01))
        norms.append([nn.utils.clip_grad_norm_(p.parameters(), clip) for p, clip in clips])
        for optimizer in (sgd, adamw):
            optimizer.step()
    assert all(student > 0.5 and own > 0.01 for student, own in norms), "nothing was clipped"
    for name, part in zip(("student", "losses"), parts):
        found = dict(getattr(trainer.model, name).state_dict())
        assert found.keys() == part.state_dict().keys()
        for key, value in part.state_dict().items():
            torch.testing.assert_close(found[key], value, msg=f"{name}.{key}")
    logged = [line["lr"] for line in lines(tmp_path / "metrics.json")]
    assert logged == pytest.approx([0.005 * (1 - 0.9 * step / 4) for step in range(4)])


@pytest.mark.parametrize("distilled", [False, True])
def test_the_backbones_own_learning_rate(tmp_path, distilled):
    """Each parameter is trained once, with the weight decay it has without; the rate follows overrides."""
    config = recipe(tmp_path, tmp_path, distiller() if distilled else None)
    plain = build_optimizer(config, model := instantiate(config.model))
    config.optimizer.params = L(params_with_backbone_lr)(
        base_lr="${..lr}", backbone_lr_multiplier=0.1, weight_decay_norm=0.0
    )
    config = apply_overrides(config, ["optimizer.lr=0.02"])
    own = build_optimizer(config, model)

    def by_parameter(optimizer, key):
        values = [(p, group[key]) for group in optimizer.param_groups for p in group["params"]]
        assert len(values) == len(dict(values))
        return dict(values)

    assert by_parameter(own, "weight_decay") == by_parameter(plain, "weight_decay")
    detector = model.student if distilled else model
    bottom_up = set(detector.backbone.bottom_up.parameters())
    rates = by_parameter(own, "lr")
    assert len(set(rates.values())) == 2
    for parameter, rate in rates.items():
        assert rate == pytest.approx(0.002 if parameter in bottom_up else 0.02)


def test_the_losses_have_no_backbone(data, tmp_path, refuses):  # noqa: F811
    config = two(data, tmp_path)
    config.train.loss_optimizer.optimizer.params = L(params_with_backbone_lr)(
        base_lr="${..lr}", backbone_lr_multiplier=0.1
    )
    line = "optimizer.params: params_with_backbone_lr of a DistillLosses, which has no backbone"
    refuses(lambda: Trainer(config), line)


def test_a_checkpoint_of_one_optimizer_is_not_resumed_with_two(data, tmp_path):  # noqa: F811
    config = two(data, tmp_path, max_iter=1)
    own = config.train.pop("loss_optimizer")
    run(config)
    config.train.loss_optimizer = own
    for line in (
        "train.loss_optimizer.optimizer._target_: .*AdamW.*expected the same optimizer",
        "its 'trainer' does not fit.*a checkpoint of this recipe",  # where the former recipe is unknown
    ):
        with pytest.raises(InputError, match=line):
            Trainer(config).resume_or_load(True)
        Path(config.train.output_dir, "config.yaml").unlink(missing_ok=True)


@pytest.mark.parametrize("part", ["student", "losses", "backbone"])
def test_gradients_that_are_not_finite_stop_all(data, tmp_path, part):  # noqa: F811
    """Also where there is one optimizer and no distillation."""
    config = two(data, tmp_path)
    if part == "backbone":
        config = without_evaluation(recipe(data, tmp_path))
    trainer = Trainer(config)
    weight = next(p for p in getattr(trainer.model, part).parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match="the gradient at iteration 0: (nan|inf); expected"):
        trainer.train()
    assert not list(tmp_path.rglob("model_*.pth"))


class Pair(nn.Module):
    """Student and losses of a parameter each."""

    def __init__(self, gradient_of_losses=2.0):
        super().__init__()
        self.student, self.losses = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for part in (self.student, self.losses):
            nn.init.ones_(part.weight)
        self.gradient = gradient_of_losses

    def forward(self, batch):
        return {"a": 3 * self.student.weight.sum(), "b": self.gradient * self.losses.weight.sum()}


def scaled_step(model, scale):
    """One step of SGD, rate 1, and SGD, rate 10, each clipped at 1, under a gradient scaler."""
    optimizer = DistillerOptimizer(
        torch.optim.SGD(model.student.parameters(), lr=1.0),
        torch.optim.SGD(model.losses.parameters(), lr=10.0),
    )
    train = get_config("common/train.py").train
    train.clip_gradients.enabled = True
    train.loss_optimizer = {"clip_gradients": train.clip_gradients}
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    with EventStorage():
        TrainStep(model, [[]], optimizer, (contextlib.nullcontext, scaler), train).run_step()
    return [p.item() for p in model.parameters()], scaler.get_scale()


def test_the_scaler_sees_both_once():
    for scale in (1, 2**16):
        assert scaled_step(Pair(), scale)[0] == pytest.approx([0.0, -9.0], abs=1e-5)
    # An overflow of one, too, is a step that nobody takes.
    values, scale = scaled_step(Pair(gradient_of_losses=3e38), 2**16)
    assert values == [1.0, 1.0] and scale == 2**15


def test_overrides_and_defaults(data, tmp_path):  # noqa: F811
    words = ["train.loss_optimizer.optimizer.lr=0.002", "optimizer.lr=0.004"]
    config = apply_overrides(two(data, tmp_path, max_iter=2), words)
    config.train.loss_optimizer.lr_multiplier = L(ConstantParamScheduler)(value=0.5)
    optimizer = Trainer(config)._trainer.optimizer
    assert optimizer.student.param_groups[0]["lr"] == 0.004
    assert optimizer.losses.param_groups[0]["lr"] == 0.001
    assert with_defaults(config).train.loss_optimizer.clip_gradients.norm_type == 2.0
    for key in ("lr_multiplier", "clip_gradients"):
        del config.train.loss_optimizer[key]
    del config["lr_multiplier"]
    trainer = run(config)  # without a schedule the rates stay
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.004, 0.002]
    assert not trainer.cfg.train.loss_optimizer.clip_gradients.enabled
    with pytest.raises(InputError, match="loss_optimizer.rate: no 'rate' in train.loss_optimizer"):
        apply_overrides(config, ["train.loss_optimizer.rate=0.25"])


BAD = {
    "train.loss_optimizer: no Distiller": lambda c: c.update(model=c.model.student),
    "loss_optimizer.rate: no such key; expected one of optimizer, lr_mul": lambda c: (
        c.train.loss_optimizer.update(rate=1)
    ),
    "train.loss_optimizer: no optimizer; expected": lambda c: c.train.update(loss_optimizer={}),
    "clip_gradients.clip_type: hard": lambda c: c.train.loss_optimizer.update(
        clip_gradients={"clip_type": "hard"}
    ),
    "train.loss_optimizer.optimizer: nothing that learns": lambda c: c.model.update(
        losses=L(DistillLosses)()
    ),
    "loss_optimizer.optimizer: no params": lambda c: c.train.loss_optimizer.optimizer.pop("params"),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(data, tmp_path, line):  # noqa: F811
    config = two(data, tmp_path / "out")
    BAD[line](config)
    with pytest.raises(InputError, match=line) as error:
        Trainer(config)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
