"""What moves the parameters: the recipe's optimizer, or the student's and one of the losses' own beside it.

``train.loss_optimizer`` has, for the parameters of ``model.losses``, what a recipe has for all others:
``optimizer``, ``lr_multiplier`` and ``clip_gradients``. Without it all are trained alike.
"""

from __future__ import annotations

import copy

from detectron2.config import instantiate
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import LinearParamScheduler, ParamScheduler
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from ..modeling import Distiller
from ..utils.errors import InputError


class DistillerOptimizer(Optimizer):
    """The student's optimizer and the losses' own as one, for trainer, scaler and checkpoint.

    Attributes:
        param_groups: those of both, the student's first.
        student, losses: the two.

    Raises:
        ValueError: a parameter is in both.
    """

    def __init__(self, student: Optimizer, losses: Optimizer):
        # The groups themselves and no copies: what sets a learning rate here has set it there.
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
    """Detectron2's schedule, with a multiplier of their own for the losses' groups."""

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
        students = len(self.optimizer.student.param_groups)
        return super().get_lr()[:students] + [lr * multiplier for lr in self.base_lrs[students:]]


def build_optimizer(config: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer of a complete recipe for its model, or for the student of its model alone.

    Raises:
        InputError: it does not say where parameters go, or there are none.
    """
    own = config.train.loss_optimizer
    if own is None or not isinstance(model, Distiller):
        return _build("optimizer", config.optimizer, model)
    return DistillerOptimizer(
        _build("optimizer", config.optimizer, model.student),
        _build("train.loss_optimizer.optimizer", own.optimizer, model.losses),
    )


def _build(key: str, node: DictConfig, model: nn.Module) -> Optimizer:
    node = copy.deepcopy(node)
    if "params" not in node:
        raise InputError(key, "no params", "params=L(get_default_optimizer_params)(…)")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(key, "nothing that learns", "parameters to train, or no such optimizer")
    node.params.model = model
    optimizer = instantiate(node)
    for group in optimizer.param_groups:
        # Adam's betas arrive as omegaconf's list, which torch.load would not trust in a checkpoint.
        group.update({k: tuple(v) for k, v in group.items() if OmegaConf.is_list(v)})
    return optimizer


def build_lr_scheduler(config: DictConfig, optimizer: Optimizer) -> LRMultiplier:
    """The schedule of a complete recipe for what :func:`build_optimizer` gave."""
    multiplier, max_iter = _multiplier(config), config.train.max_iter
    if not isinstance(optimizer, DistillerOptimizer):
        return LRMultiplier(optimizer, multiplier, max_iter)
    return DistillerLRMultiplier(
        optimizer, multiplier, _multiplier(config.train.loss_optimizer), max_iter
    )


def _multiplier(node: DictConfig) -> ParamScheduler:
    multiplier = node.get("lr_multiplier")
    # fvcore's constant refuses the end of a run, where the trainer asks once more.
    return LinearParamScheduler(1.0, 1.0) if multiplier is None else instantiate(multiplier)


def students(optimizer: Optimizer) -> Optimizer:
    """The part that trains the student."""
    return optimizer.student if isinstance(optimizer, DistillerOptimizer) else optimizer


def clipping(optimizer: Optimizer, train: DictConfig) -> list[tuple[Optimizer, DictConfig]]:
    """Each optimizer whose gradients are measured and clipped apart, with its ``clip_gradients``."""
    clips = [(students(optimizer), train.clip_gradients)]
    if isinstance(optimizer, DistillerOptimizer):
        clips.append((optimizer.losses, train.loss_optimizer.clip_gradients))
    return clips
