"""Optimizers of a run: one for all parameters, or one for the student and one for the losses.

``train.loss_optimizer`` has ``optimizer``, ``lr_multiplier`` and ``clip_gradients`` for the parameters of
``model.losses``, as the recipe has for the student's. Without it, the recipe's are used for all parameters.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from detectron2.solver import LRMultiplier
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import LinearParamScheduler, ParamScheduler
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from ..config import build_part
from ..modeling import Distiller
from ..utils.errors import InputError
from .checkpoint import get_student

logger = logging.getLogger(__name__)


class DistillerOptimizer(Optimizer):
    """The optimizers of the student and of the losses as one, for trainer, GradScaler and checkpoint.

    Attributes:
        param_groups: the groups of both, the student's first.
        student, losses: the two optimizers.

    Raises:
        ValueError: a parameter is in both.
    """

    def __init__(self, student: Optimizer, losses: Optimizer):
        # The same dicts, not copies, so that a learning rate that is set here is also set in the two optimizers.
        super().__init__([*student.param_groups, *losses.param_groups], {})
        self.student, self.losses = student, losses

    def step(self) -> None:
        self.student.step()
        self.losses.step()

    def state_dict(self) -> dict:
        return {"student": self.student.state_dict(), "losses": self.losses.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.student.load_state_dict(state_dict["student"])
        self.losses.load_state_dict(state_dict["losses"])
        self.param_groups = [*self.student.param_groups, *self.losses.param_groups]


class DistillerLRMultiplier(LRMultiplier):
    """Detectron2's LRMultiplier, with another multiplier for the parameter groups of the losses."""

    def __init__(
        self,
        optimizer: DistillerOptimizer,
        multiplier: ParamScheduler,
        losses_multiplier: ParamScheduler,
        max_iter: int,
    ):
        self._losses_multiplier = losses_multiplier
        super().__init__(optimizer, multiplier, max_iter)

    def get_lr(self) -> list[float]:
        multiplier = self._losses_multiplier(self.last_epoch / self._max_iter)
        count = len(self.optimizer.student.param_groups)
        return super().get_lr()[:count] + [lr * multiplier for lr in self.base_lrs[count:]]


def build_optimizer(config: DictConfig, model: nn.Module) -> Optimizer:
    """Build the optimizer of a recipe with defaults for its model.

    Raises:
        InputError: an optimizer's config has no ``params``, or it has no trainable parameters.
    """
    loss_optimizer = config.train.loss_optimizer
    if loss_optimizer is None or not isinstance(model, Distiller):
        return _build("optimizer", config.optimizer, model)
    return DistillerOptimizer(
        _build("optimizer", config.optimizer, model.student),
        _build("train.loss_optimizer.optimizer", loss_optimizer.optimizer, model.losses),
    )


def params_with_backbone_lr(
    model: nn.Module, base_lr: float, backbone_lr_multiplier: float, **options: Any
) -> list[dict]:
    """Return Detectron2's default parameter groups with another learning rate for the bottom-up network.

    A pretrained backbone often needs a lower rate than new layers. In a config::

        optimizer.params = L(params_with_backbone_lr)(
            base_lr="${..lr}", backbone_lr_multiplier=0.1, weight_decay_norm=0.0
        )

    Args:
        model: a detector, or the Distiller of one.
        base_lr: learning rate of all other parameters.
        backbone_lr_multiplier: multiple of it for the bottom-up network, or for a backbone without an FPN.
        options: of Detectron2's ``get_default_optimizer_params``.

    Raises:
        InputError: the model has no backbone. In ``train.loss_optimizer``, it is the losses.
    """
    backbone = getattr(get_student(model), "backbone", None)
    if backbone is None:
        found = f"params_with_backbone_lr of a {type(model).__name__}, which has no backbone"
        raise InputError("optimizer.params", found, "L(get_default_optimizer_params)(…)")
    inside = {id(p) for p in getattr(backbone, "bottom_up", backbone).parameters()}
    groups = []
    for group in get_default_optimizer_params(model, base_lr, **options):
        for in_backbone in (False, True):
            params = [p for p in group["params"] if (id(p) in inside) == in_backbone]
            lr = group["lr"] * (backbone_lr_multiplier if in_backbone else 1)
            if params:
                groups.append({**group, "params": params, "lr": lr})
    return groups


def _build(key: str, node: DictConfig, model: nn.Module) -> Optimizer:
    node = copy.deepcopy(node)
    if "params" not in node:
        raise InputError(key, "no params", "params=L(get_default_optimizer_params)(…)")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(key, "nothing that learns", "parameters to train, or no such optimizer")
    node.params.model = model
    optimizer = build_part(key, node)
    for group in optimizer.param_groups:
        # Adam's betas are a ListConfig, which torch.load(weights_only=True) would not read from a checkpoint.
        group.update({k: tuple(v) for k, v in group.items() if OmegaConf.is_list(v)})
    return optimizer


def build_lr_scheduler(config: DictConfig, optimizer: Optimizer) -> LRMultiplier:
    """Build the learning rate schedule of a recipe with defaults for the output of :func:`build_optimizer`."""
    multiplier, max_iter = _multiplier(config), config.train.max_iter
    if not isinstance(optimizer, DistillerOptimizer):
        return LRMultiplier(optimizer, multiplier, max_iter)
    return DistillerLRMultiplier(
        optimizer, multiplier, _multiplier(config.train.loss_optimizer), max_iter
    )


def _multiplier(node: DictConfig) -> ParamScheduler:
    multiplier = node.get("lr_multiplier")
    if multiplier is None and "train" in node:
        logger.warning("the recipe has no lr_multiplier: the learning rate is constant")
    # fvcore's ConstantParamScheduler raises at the end of the schedule, where the trainer calls it once more.
    return (
        LinearParamScheduler(1.0, 1.0)
        if multiplier is None
        else build_part("lr_multiplier", multiplier)
    )


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return a copy of each parameter group without its parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def set_hyperparameters(
    optimizer: Optimizer, scheduler: LRMultiplier, values: list[dict[str, Any]]
) -> None:
    """Set the hyperparameters of each group, and learning rates at the schedule's position.

    Loading a checkpoint replaces hyperparameters by those of the checkpoint. If none has changed, this changes nothing.

    Args:
        values: :func:`hyperparameters` of an optimizer of the same groups, before the checkpoint was loaded.
    """
    for group, own in zip(optimizer.param_groups, values, strict=True):
        group.update(own)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, scheduler.get_lr()):
        group["lr"] = lr


def student_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer of the student's parameters."""
    return optimizer.student if isinstance(optimizer, DistillerOptimizer) else optimizer


def optimizers_to_clip(
    optimizer: Optimizer, train: DictConfig
) -> list[tuple[Optimizer, DictConfig]]:
    """Return the optimizers whose gradients are clipped separately, each with its ``clip_gradients``."""
    clips = [(student_optimizer(optimizer), train.clip_gradients)]
    if isinstance(optimizer, DistillerOptimizer):
        clips.append((optimizer.losses, train.loss_optimizer.clip_gradients))
    return clips
