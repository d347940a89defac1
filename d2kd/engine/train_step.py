"""The training step, with mixed precision, gradient clipping and checks for values that are not finite."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from ..utils.errors import InputError
from ..utils.metrics import HostCopy, collect_metrics
from .interruption import StopSignals
from .optimizer import optimizers_to_clip

logger = logging.getLogger(__name__)


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite.

    Attributes:
        culprit: name of the loss, or "the gradient".
        value: its value.
        iteration: of the step. Its update of the weights, and those of later steps, are lost.
    """

    def __init__(self, culprit: str, value: float, iteration: int):
        super().__init__(culprit, value, iteration)
        self.culprit, self.value, self.iteration = culprit, value, iteration


class TrainStep(SimpleTrainer):
    """A ``SimpleTrainer`` with mixed precision, gradient clipping and checks for values that are not finite.

    In full precision without clipping, its results are those of ``SimpleTrainer``, bit for bit.

    The metrics of a step stay on the device until the next step, which logs them with their iteration, so that the host
    never waits for the step that it has just begun. If a loss or gradient of any process is not finite, all raise
    :class:`NonFiniteError`, one step late. What depends on the last step calls :meth:`read_metrics` first.

    Args:
        model: the detector or :class:`Distiller`, possibly in DDP.
        data_loader: the training loader.
        optimizer: output of :func:`d2kd.engine.optimizer.build_optimizer`. Gradients of a separate optimizer of
            the losses are clipped separately.
        precision: output of :func:`build_amp`.
        train: the node ``train`` of a recipe with defaults, for its ``clip_gradients`` and ``accumulate``.

    Attributes:
        stop_signals: signals that this process has received.
        stopped_by: the first signal of any process, once all know it; 0: none.
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
        self._accumulate = train.accumulate
        self._unread: _StepMetrics | None = None
        self.stop_signals, self.stopped_by = StopSignals(), 0

    def reset_data_loader(self, data_loader: Iterable) -> None:
        """Use another loader from now on."""
        self.data_loader, self._batches = data_loader, _endless(data_loader, iter(data_loader))

    def run_step(self) -> None:
        assert self.model.training, "the model was put in eval mode"
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        try:
            with collect_metrics() as metrics:
                losses = self._accumulate_gradients(batch)
        except Exception:
            self.read_metrics()  # the cause may be in the step before, whose values were not finite
            raise
        self.grad_scaler.unscale_(self.optimizer)
        norms = self._clip_gradients()
        unread = _StepMetrics(losses, norms, metrics, data_time, self.stop_signals.received)
        self.read_metrics()
        self._unread = unread
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def read_metrics(self) -> None:
        """Check and log the metrics of the last step, if they were not read before.

        Raises:
            NonFiniteError: a loss or gradient is not finite.
        """
        unread, self._unread = self._unread, None
        if unread is not None:
            self.stopped_by = unread.read() or self.stopped_by

    def _accumulate_gradients(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """Compute losses and gradients, part by part of the batch; return the losses."""
        if self._accumulate == 1:
            losses = self._forward(batch)
            self._backward(losses)
            return losses
        totals: dict[str, torch.Tensor] = {}
        parts = min(self._accumulate, len(batch))
        bounds = [k * len(batch) // parts for k in range(parts + 1)]
        for k, (first, end) in enumerate(zip(bounds, bounds[1:])):
            share = (end - first) / len(batch)
            with self._no_sync(k + 1 < parts):
                losses = {key: share * x for key, x in self._forward(batch[first:end]).items()}
                self._backward(losses)
            for key, value in losses.items():
                totals[key] = totals.get(key, 0) + value.detach()
        return totals

    def _backward(self, losses: dict[str, torch.Tensor]) -> None:
        with record_function("d2kd/backward"):
            self.grad_scaler.scale(sum(losses.values())).backward()

    def _no_sync(self, more: bool) -> contextlib.AbstractContextManager:
        """Return a context in which DDP sends no gradients, if there are more to be added."""
        is_ddp = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if more and is_ddp else contextlib.nullcontext()

    def _forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        try:
            with (
                record_function("d2kd/forward"),
                self._autocast(),
                _unoptimized_torchscript(self._device),
            ):
                losses = self.model(batch)
        except FloatingPointError:  # raised by Detectron2 for proposals that are not finite
            iteration = get_event_storage().iter
            raise NonFiniteError("the student's predictions", math.nan, iteration) from None
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _clip_gradients(self) -> list[torch.Tensor]:
        """Clip the gradients, and return the norms that must be finite."""
        norms = []
        for optimizer, clip in self._clipping:
            parameters = [
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            norm = nn.utils.get_total_norm([p.grad for p in parameters], clip.norm_type)
            # An enabled GradScaler itself skips a step that is not finite, and reduces its scale.
            if not self.grad_scaler.is_enabled():
                norms.append(norm)
            if not clip.enabled:
                continue
            if clip.clip_type == "full_model":
                nn.utils.clip_grads_with_norm_(parameters, clip.clip_value, norm)
            elif clip.clip_type == "norm":
                for parameter in parameters:
                    nn.utils.clip_grad_norm_(parameter, clip.clip_value, clip.norm_type)
            else:
                nn.utils.clip_grad_value_(parameters, clip.clip_value)
        return norms

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if state_dict["grad_scaler"] and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class _StepMetrics:
    """The metrics of a step, on their way from the device to the host.

    Args:
        losses: by name, equal names in all processes.
        norms: of the gradients.
        metrics: further metrics, those of this process.
        data_time: seconds of waiting for the batch.
        signal: number of a signal to stop; 0: none.
    """

    def __init__(
        self,
        losses: dict[str, torch.Tensor],
        norms: list[torch.Tensor],
        metrics: dict[str, torch.Tensor],
        data_time: float,
        signal: int,
    ):
        self._iteration = get_event_storage().iter
        self._losses, self._metrics, self._norms = list(losses), list(metrics), len(norms)
        means = [value.detach().mean() for value in losses.values()]
        row = torch.stack([x.double() for x in (*means, *norms)])
        row = torch.cat([row, row.new_full((1,), data_time), row.new_full((1,), signal)])
        # Every process checks the values of all, so that all stop together. If only one process stopped, the
        # others would wait for its gradients forever.
        rows = [row]
        if comm.get_world_size() > 1:
            rows = [torch.empty_like(row) for _ in range(comm.get_world_size())]
            dist.all_gather(rows, row)
        own = [value.double().to(row.device) for value in metrics.values()]
        self._values = HostCopy(torch.cat([*rows, *(x.reshape(1) for x in own)]))

    def read(self) -> int:
        """Check and log the values, as soon as the host has them; see :meth:`TrainStep.read_metrics`.

        Returns:
            the number of a signal to stop that a process has received; 0: none.
        """
        values, width = self._values.tolist(), len(self._losses) + self._norms + 2
        own = values[len(values) - len(self._metrics) :]
        rows = [values[k * width : (k + 1) * width] for k in range(comm.get_world_size())]
        names = [*self._losses, *["the gradient"] * self._norms]
        for row in rows:
            for name, value in zip(names, row):
                if not math.isfinite(value):
                    raise NonFiniteError(name, value, self._iteration)
        signal = int(max(row[-1] for row in rows))
        if not comm.is_main_process():
            return signal
        columns = list(zip(*rows))
        means = {name: sum(column) / len(rows) for name, column in zip(self._losses, columns)}
        storage = get_event_storage()
        now, storage.iter = storage.iter, self._iteration
        storage.put_scalar("data_time", max(columns[-2]))
        # A total of its own where the student has no losses, so that none is an average of both.
        labelled = any(not name.startswith("distill/") for name in means)
        total = "total_loss" if labelled else "total_loss_unlabelled"
        storage.put_scalar(total, sum(means.values()))
        storage.put_scalars(**dict(zip(self._metrics, own)))
        if len(means) > 1 or not labelled:
            storage.put_scalars(**means)
        storage.iter = now
        return signal


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


def sync_batchnorm(detector: nn.Module, device: torch.device) -> nn.Module:
    """Return a detector whose batch norms have the statistics of all processes: torch's on CUDA, Detectron2's on a CPU.

    Detectron2's gives all processes the same weight, also where their images are padded to different sizes.

    Raises:
        InputError: it has none, or another kind of batch norm on a CPU.
    """
    norms = [x for x in detector.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise InputError("train.sync_batchnorm", "no batch norm in the student", "False")
    if device.type == "cuda":
        if any(type(norm).__module__.startswith("timm.") for norm in norms):
            from timm.layers import convert_sync_batchnorm  # of norms with an activation in them

            return convert_sync_batchnorm(detector)
        return nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    for name, norm in list(detector.named_modules()):
        if norm not in norms:
            continue
        if type(norm) is not nn.BatchNorm2d:
            found = f"{name}, a {type(norm).__name__}, on a {device.type}"
            raise InputError("train.sync_batchnorm", found, "BatchNorm2d, or CUDA")
        options = dict(eps=norm.eps, momentum=norm.momentum, affine=norm.affine)
        synced = NaiveSyncBatchNorm(norm.num_features, **options).train(norm.training)
        # The same tensors, which an optimizer may have.
        synced._parameters, synced._buffers = norm._parameters, norm._buffers
        detector.set_submodule(name, synced)
    return detector


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
