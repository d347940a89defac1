"""The training step, with mixed precision, gradient clipping and checks for values that are not finite."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from ..utils.errors import InputError
from ..utils.random_state import random_state, set_random_state
from .checkpoint import LOSS_NORMALIZER, get_student
from .optimizer import optimizers_to_clip

logger = logging.getLogger(__name__)


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite; the step has changed nothing."""

    def __init__(self, culprit: str, value: float):
        super().__init__(culprit, value)
        self.culprit, self.value = culprit, value


class TrainStep(SimpleTrainer):
    """A ``SimpleTrainer`` with mixed precision, gradient clipping and checks for values that are not finite.

    In full precision without clipping, its results are those of ``SimpleTrainer``, bit for bit. If a loss or
    gradient is not finite in one process, all raise :class:`NonFiniteError` and restore the state before the step.

    Args:
        model: the detector or :class:`Distiller`, possibly in DDP.
        data_loader: the training loader.
        optimizer: output of :func:`d2kd.engine.optimizer.build_optimizer`. Gradients of a separate optimizer of
            the losses are clipped separately.
        precision: output of :func:`build_amp`.
        train: the node ``train`` of a recipe with defaults, for its ``clip_gradients``.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        precision: tuple[Callable[[], Any], torch.amp.GradScaler],
        train: DictConfig,
    ):
        super().__init__(model, (), optimizer)
        self.reset_data_loader(data_loader)
        self._autocast, self.grad_scaler = precision
        self._clipping = optimizers_to_clip(optimizer, train)
        self._device = next(model.parameters()).device
        # Running statistics and counters, which a forward changes.
        self._buffers = [
            buffer
            for module in model.modules()
            for buffer in module.buffers(recurse=False)
            if not buffer.is_floating_point()
            or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats)
        ]
        self._extra_state_modules = [
            module
            for module in model.modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]

    def reset_data_loader(self, data_loader: Iterable) -> None:
        """Use another loader from now on."""
        self.data_loader, self._batches = data_loader, _endless(data_loader, iter(data_loader))

    def run_step(self) -> None:
        assert self.model.training, "the model was put in eval mode"
        restore = self._snapshot()
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        try:
            losses = self._forward(batch)
            self._write_metrics(losses, data_time)
            self.optimizer.zero_grad()
            with record_function("d2kd/backward"):
                self.grad_scaler.scale(sum(losses.values())).backward()
            self.grad_scaler.unscale_(self.optimizer)
            self._clip_gradients()
        except NonFiniteError:
            restore()
            raise
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _snapshot(self) -> Callable[[], None]:
        """Copy all state that a forward changes, and return a function that restores it."""
        student = get_student(self.model)
        buffers, random = [buffer.clone() for buffer in self._buffers], random_state()
        extra_states = [module.get_extra_state() for module in self._extra_state_modules]
        normalizer = getattr(student, LOSS_NORMALIZER, None)

        def restore() -> None:
            for buffer, before in zip(self._buffers, buffers):
                buffer.copy_(before)
            for module, before in zip(self._extra_state_modules, extra_states):
                module.set_extra_state(before)
            set_random_state(random)
            if normalizer is not None:
                setattr(student, LOSS_NORMALIZER, normalizer)
            elif hasattr(student, LOSS_NORMALIZER):  # the failed step was the first
                delattr(student, LOSS_NORMALIZER)

        return restore

    def _forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        try:
            with (
                record_function("d2kd/forward"),
                self._autocast(),
                _unoptimized_torchscript(self._device),
            ):
                losses = self.model(batch)
        except FloatingPointError:  # raised by Detectron2 for proposals that are not finite
            return {"the student's predictions": torch.tensor(math.nan)}
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _write_metrics(self, losses: dict[str, torch.Tensor], data_time: float) -> None:
        values = torch.stack([value.detach().double().mean() for value in losses.values()]).tolist()
        # Every process checks the values of all, so that all stop together. If only one process stopped, the
        # others would wait for its gradients forever.
        all_metrics = comm.all_gather((dict(zip(losses, values)), data_time))
        for metrics, _ in all_metrics:
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise NonFiniteError(name, value)
        if not comm.is_main_process():
            return
        means = {name: sum(x[name] for x, _ in all_metrics) / len(all_metrics) for name in losses}
        storage = get_event_storage()
        storage.put_scalar("data_time", max(data_time for _, data_time in all_metrics))
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)

    def _clip_gradients(self) -> None:
        for optimizer, clip in self._clipping:
            parameters = [
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            norm = nn.utils.get_total_norm([p.grad for p in parameters], clip.norm_type)
            # An enabled GradScaler itself skips such a step, and reduces its scale.
            if not self.grad_scaler.is_enabled() and not torch.isfinite(norm):
                raise NonFiniteError("the gradient", norm.item())
            if not clip.enabled:
                continue
            if clip.clip_type == "full_model":
                nn.utils.clip_grads_with_norm_(parameters, clip.clip_value, norm)
            elif clip.clip_type == "norm":
                for parameter in parameters:
                    nn.utils.clip_grad_norm_(parameter, clip.clip_value, clip.norm_type)
            else:
                nn.utils.clip_grad_value_(parameters, clip.clip_value)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if state_dict["grad_scaler"] and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _unoptimized_torchscript(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which TorchScript does not optimize its functions on a CPU.

    Its optimization starts after the first calls in a process and changes rounding. Therefore the same steps of a
    resumed and of an uninterrupted run would round differently.
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    return torch.jit.optimized_execution(False)


def wrap_ddp(model: nn.Module, device: torch.device, options: DictConfig) -> nn.Module:
    """Return the model in DDP if there are several processes, otherwise the model itself."""
    if comm.get_world_size() == 1:
        return model
    options = dict(options)
    compress = options.pop("fp16_compression", False)
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(model, device_ids=ids, **options)
    if compress:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        model.register_comm_hook(state=None, hook=default_hooks.fp16_compress_hook)
    return model


def build_amp(
    amp: DictConfig, device: torch.device
) -> tuple[Callable[[], Any], torch.amp.GradScaler]:
    """Return (function that returns the context of a forward, GradScaler) for ``train.amp``.

    Raises:
        InputError: the device does not support the precision.
    """
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if amp.dtype not in dtypes:
        raise InputError("train.amp.dtype", amp.dtype, " or ".join(dtypes))
    if amp.enabled and amp.dtype == "float16" and device.type != "cuda":
        raise InputError("train.amp.dtype", f"float16 on {device.type}", "bfloat16")
    scaler = torch.amp.GradScaler(device.type, enabled=amp.enabled and amp.dtype == "float16")
    if not amp.enabled:
        return contextlib.nullcontext, scaler
    return lambda: torch.autocast(device.type, dtypes[amp.dtype]), scaler


def _endless(loader: Iterable, batches: Iterator) -> Iterator:
    """Iterate over the batches of a loader, and over the loader again when they end; Detectron2's never end.

    Raises:
        InputError: it has no batch, or has no second pass.
    """
    passes = 0
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            found = "no second pass over its batches" if passes else "no batch"
            raise InputError("dataloader.train", found, "a loader of endless batches")
        passes += 1
        if passes == 1:
            logger.warning("dataloader.train ended after %d batches: it starts again", count)
        batches = iter(loader)
