"""One training step, in any precision, on any device, in one process or many."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
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
from .checkpoint import NORMALIZER, student_of
from .optimizer import clipping


class NotFinite(Exception):
    """A step came to a number that no training survives; nothing was updated."""

    def __init__(self, culprit: str, value: float):
        super().__init__(culprit, value)
        self.culprit, self.value = culprit, value


class Step(SimpleTrainer):
    """One training step in any precision on any device.

    With precision full and clipping off it is ``SimpleTrainer``'s, bit for bit. A loss or gradient that is
    not finite stops it, in all processes alike, and leaves all as it was before.

    Args:
        optimizer: what :func:`d2kd.engine.optimizer.build_optimizer` gives; the student's gradients and those
            of an optimizer of the losses' own are clipped apart.
        precision: what :func:`precision` gives.
        train: of a complete recipe, for its ``clip_gradients``.
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
        self.feed(data_loader)
        self._autocast, self.grad_scaler = precision
        self._clipping = clipping(optimizer, train)
        self._device = next(model.parameters()).device
        # Statistics and counters.
        self._running = [
            buffer
            for module in model.modules()
            for buffer in module.buffers(recurse=False)
            if not buffer.is_floating_point()
            or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats)
        ]
        self._counting = [
            module
            for module in model.modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]

    def feed(self, data_loader: Iterable) -> None:
        """Take batches from another loader from now on."""
        self.data_loader, self._batches = data_loader, iter(data_loader)

    def run_step(self) -> None:
        assert self.model.training, "the model was put in eval mode"
        put_back = self._what_a_forward_moves()
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        try:
            losses = self._forward(batch)
            self._record(losses, data_time)
            self.optimizer.zero_grad()
            with record_function("d2kd/backward"):
                self.grad_scaler.scale(sum(losses.values())).backward()
            self.grad_scaler.unscale_(self.optimizer)
            self._clip_gradients()
        except NotFinite:
            put_back()
            raise
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _what_a_forward_moves(self) -> Callable[[], None]:
        """Keep what changes before a step is known to be good; called, what it returns puts it back."""
        student = student_of(self.model)
        running, random = [buffer.clone() for buffer in self._running], random_state()
        counts = [module.get_extra_state() for module in self._counting]
        normalizer = getattr(student, NORMALIZER, None)

        def put_back() -> None:
            for buffer, before in zip(self._running, running):
                buffer.copy_(before)
            for module, before in zip(self._counting, counts):
                module.set_extra_state(before)
            set_random_state(random)
            if normalizer is not None:
                setattr(student, NORMALIZER, normalizer)
            elif hasattr(student, NORMALIZER):  # it was the first step
                delattr(student, NORMALIZER)

        return put_back

    def _forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        try:
            with (
                record_function("d2kd/forward"),
                self._autocast(),
                _scripts_as_written(self._device),
            ):
                losses = self.model(batch)
        except FloatingPointError:  # Detectron2's, of proposals that are not finite
            return {"the student's predictions": torch.tensor(math.nan)}
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _record(self, losses: dict[str, torch.Tensor], data_time: float) -> None:
        values = torch.stack([value.detach().double().mean() for value in losses.values()]).tolist()
        # All see the values of all, for all to stop together: one that stopped alone would leave the
        # others waiting for its gradients.
        everyones = comm.all_gather((dict(zip(losses, values)), data_time))
        for named, _ in everyones:
            for name, value in named.items():
                if not math.isfinite(value):
                    raise NotFinite(name, value)
        if not comm.is_main_process():
            return
        means = {
            name: sum(named[name] for named, _ in everyones) / len(everyones) for name in losses
        }
        storage = get_event_storage()
        storage.put_scalar("data_time", max(data_time for _, data_time in everyones))
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)

    def _clip_gradients(self) -> None:
        for optimizer, clip in self._clipping:
            parameters = [
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            norm = nn.utils.get_total_norm([p.grad for p in parameters], clip.norm_type)
            # An enabled scaler skips such a step by itself, and scales less in the next.
            if not self.grad_scaler.is_enabled() and not torch.isfinite(norm):
                raise NotFinite("the gradient", norm.item())
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


def _scripts_as_written(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, inside, TorchScript does not optimize what it runs.

    It would look at the first calls of a process and compute the later ones in another order: those of a
    resumed run would round differently from the same ones of an uninterrupted run.
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    return torch.jit.optimized_execution(False)


def distributed(model: nn.Module, device: torch.device, options: DictConfig) -> nn.Module:
    """The model in DDP if there is more than one process, on CUDA or on the CPU."""
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


def precision(
    amp: DictConfig, device: torch.device
) -> tuple[Callable[[], Any], torch.amp.GradScaler]:
    """The context of a forward pass, and the scaler of its gradients, for ``train.amp``.

    Raises:
        InputError: the device has no such precision.
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
