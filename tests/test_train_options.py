"""What a training run can be given: parts of a batch, average weights, statistics of all processes, a signal to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from d2kd.engine import Trainer, do_test
from d2kd.engine.ema import EMA
from d2kd.engine.train_step import sync_batchnorm
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.utils.errors import TrainingInterrupted

from .common import ROOT
from .resume_runs import OBJECTS, differences, run, saved
from .tiny_run import distiller, draw_data, recipe, without_evaluation, write_recipe
from .two_processes import in_two


@pytest.fixture
def data(tmp_path):
    draw_data(tmp_path / "data", OBJECTS)
    return tmp_path / "data"


# Gradient accumulation


def all_sampled(model):
    """Every anchor and proposal counts, so that nothing is drawn; means are over equally many of each image."""
    model.proposal_generator.batch_size_per_image = 10**6
    model.proposal_generator.positive_fraction = 1.0
    return model


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_batch_add_up_to_it(data, tmp_path, parts):
    """Where averages allow: imitation without a mask divides by cells, alike in each image."""
    model = distiller(
        losses=L(DistillLosses)(imitation=L(ImitationLoss)(mask="none", normalize=False))
    )
    moved, logged = [], []
    for accumulate in (1, parts):
        config = recipe(data, tmp_path / str(accumulate), model, max_iter=1, accumulate=accumulate)
        config.dataloader.train.total_batch_size = 4
        trainer = Trainer(without_evaluation(config))
        losses = trainer.model.losses
        before = [p.detach().clone() for p in losses.parameters()]
        trainer.train()
        moved.append([a.detach() - b for a, b in zip(losses.parameters(), before, strict=True)])
        logged.append(trainer.storage.latest()["distill/loss_imitation"][0])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    for whole, added in zip(*moved, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(added, whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_parts_need_less_memory_and_every_image_once(data, tmp_path):
    seen = []
    config = recipe(data, tmp_path / "out", max_iter=2, accumulate=2)
    config.dataloader.train.total_batch_size = 3
    trainer = Trainer(without_evaluation(config))
    trainer.model.register_forward_pre_hook(
        lambda _, inputs: seen.append([x["file_name"] for x in inputs[0]])
    )
    trainer.train()
    assert [len(part) for part in seen] == [1, 2, 1, 2]
    alone = Trainer(without_evaluation(recipe(data, tmp_path / "one", max_iter=2)))
    alone.cfg.dataloader.train.total_batch_size = 3
    batches = iter(Trainer.build_train_loader(alone.cfg))
    assert sum(seen, []) == [x["file_name"] for _ in range(2) for x in next(batches)]


def test_more_parts_than_images_are_refused(data, tmp_path, refuses):
    config = recipe(data, tmp_path / "out", accumulate=3)
    refuses(lambda: Trainer(config), "train.accumulate: 3; expected at most 2")


def test_a_run_of_parts_is_resumed_bit_for_bit(data, tmp_path):
    def config(folder):
        config = recipe(data, tmp_path / folder, max_iter=4, accumulate=2)
        config.train.checkpointer.period = 2
        return without_evaluation(config)

    run(config("whole"))
    run(config("resumed"), stop=2)
    run(config("resumed"), resume=True)
    finals = [saved(tmp_path / name / "model_final.pth") for name in ("whole", "resumed")]
    assert differences(*finals) == []


# Average weights


def test_an_average_is_between_its_weights_and_ends_at_constant_ones():
    torch.manual_seed(0)
    detector = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema, mean = EMA(detector, 0.9), None
    for step in range(30):
        with torch.no_grad():
            detector[0].weight.normal_()
            detector[1].num_batches_tracked += 1
        ema.update(detector)
        decay = min(0.9, step / (step + 9))
        value = detector[0].weight.detach().clone()
        mean = value if mean is None else decay * mean + (1 - decay) * value
        torch.testing.assert_close(ema.detector[0].weight, mean)
    assert ema.detector[1].num_batches_tracked == 30 and not ema.detector.training
    for _ in range(200):
        ema.update(detector)
    torch.testing.assert_close(ema.detector[0].weight, detector[0].weight.detach())
    assert not any(p.requires_grad for p in ema.detector.parameters())


def averaged(data, folder, **train):
    model = distiller(losses=L(DistillLosses)(imitation=L(ImitationLoss)()))
    train = dict(ema=dict(enabled=True, decay=0.5), eval_period=2, **train)
    return recipe(data, folder, model, **train)


def test_the_average_is_what_is_saved_evaluated_and_resumed(data, tmp_path):
    config = averaged(data, tmp_path / "whole", max_iter=4)
    trainer, _ = run(config)
    checkpoint = saved(tmp_path / "whole/model_final.pth")
    plain = dict(trainer.model.student.state_dict())
    assert differences(dict(checkpoint["model"]), dict(trainer.ema.detector.state_dict())) == []
    trained = {k: v for k, v in checkpoint["trained_model"].items()}
    assert differences(trained, plain) == [] and differences(dict(checkpoint["model"]), plain)
    assert checkpoint["model"].keys() == plain.keys()  # neither the teacher nor losses
    detector = instantiate(config.model.student)
    detector.load_state_dict(checkpoint["model"])
    results = do_test(trainer.cfg, detector.eval())
    assert results["bbox"]["AP"] == pytest.approx(
        trainer._last_eval_results["bbox"]["AP"], nan_ok=True
    )

    stopped = averaged(data, tmp_path / "resumed", max_iter=4, checkpointer=dict(period=2))
    run(stopped, stop=2)
    run(stopped, resume=True)
    assert differences(checkpoint, saved(tmp_path / "resumed/model_final.pth")) == []


def test_an_average_can_begin_and_end_with_a_resume(data, tmp_path, caplog):
    config = without_evaluation(averaged(data, tmp_path, max_iter=2))
    config.train.ema.enabled = False
    run(config)
    config.train.ema.enabled, config.train.max_iter = True, 3
    trainer, _ = run(config, resume=True)
    assert "has no average weights" in caplog.text and trainer.ema.steps == 1
    config.train.ema.enabled, config.train.max_iter = False, 4
    trainer, _ = run(config, resume=True)
    assert "are not used" in caplog.text and trainer.start_iter == 3
    assert "trained_model" not in saved(tmp_path / "model_final.pth")


def test_a_run_without_an_average_has_none(data, tmp_path):
    trainer, _ = run(without_evaluation(recipe(data, tmp_path, max_iter=1)))
    assert trainer.ema is None and "ema" not in saved(tmp_path / "model_final.pth")


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_out_of_range_is_refused(data, tmp_path, refuses, decay):
    config = recipe(data, tmp_path, ema=dict(enabled=True, decay=decay))
    refuses(lambda: Trainer(config), "train.ema.decay: .*; expected a number")


# Statistics of all processes


def norms(sync):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU())
    return sync_batchnorm(model, torch.device("cpu")) if sync else model


def test_a_synchronized_student_has_the_same_tensors(data, tmp_path):
    plain, synced = norms(False), norms(True)
    assert type(synced[1]) is NaiveSyncBatchNorm and synced[1].eps == 1e-3
    assert differences(dict(plain.state_dict()), dict(synced.state_dict())) == []
    model = norms(False)
    parameters = list(model.parameters())
    for a, b in zip(
        parameters, sync_batchnorm(model, torch.device("cpu")).parameters(), strict=True
    ):
        assert a is b


def _half_of_the_images(rank, folder):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(norms(True), broadcast_buffers=False)
    images = torch.load(folder / "images.pt")
    model(images[2 * rank : 2 * rank + 2]).square().mean().backward()
    state = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save([state, model.module.state_dict()], folder / f"{rank}.pt")


def test_statistics_and_gradients_are_those_of_the_whole_batch(tmp_path):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / "images.pt")
    assert in_two(_half_of_the_images, tmp_path) == [0, 0]
    model = norms(False)
    model(images).square().mean().backward()
    for rank in range(2):
        gradients, state = torch.load(tmp_path / f"{rank}.pt")
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state["1.running_mean"], model[1].running_mean)


def test_what_cannot_be_synchronized_is_refused(refuses):
    cpu = torch.device("cpu")
    refuses(lambda: sync_batchnorm(nn.Conv2d(1, 1, 1), cpu), "train.sync_batchnorm: no batch norm")
    refuses(
        lambda: sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), cpu), "0, a BatchNorm1d, on a cpu"
    )


# Signals


class Signals(HookBase):
    """Sends this process a signal during an iteration."""

    def __init__(self, at, number=signal.SIGTERM):
        self.at, self.number = at, number

    def before_step(self):
        if self.trainer.iter == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(data, tmp_path, number):
    def config(folder):
        return without_evaluation(recipe(data, tmp_path / folder, max_iter=6, log_period=20))

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingInterrupted) as stopped:
        run(config("stopped"), hooks=[Signals(2, number)])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    file = tmp_path / "stopped/model_0000003.pth"
    line = f"stopped by {number.name} after 4 of 6 iterations; --resume continues from {file}"
    assert str(stopped.value) == line and stopped.value.exit_code == 128 + number
    assert file.exists() and "Traceback" not in (tmp_path / "stopped/log.txt").read_text()
    assert run(config("stopped"), resume=True)[0].start_iter == 4
    run(config("whole"))
    finals = [saved(tmp_path / name / "model_final.pth") for name in ("whole", "stopped")]
    assert differences(*finals) == []


def test_a_signal_in_the_last_steps_does_not_matter(data, tmp_path):
    run(without_evaluation(recipe(data, tmp_path, max_iter=3)), hooks=[Signals(2)])
    assert (tmp_path / "model_final.pth").exists()


def _one_is_stopped(rank, folder):
    sys.stderr = open(folder / f"{rank}.txt", "w", buffering=1)
    config = without_evaluation(recipe(folder / "data", folder / "out", max_iter=50, log_period=20))
    run(config, hooks=[Signals(2)] if rank == 1 else [])


def test_all_processes_stop_at_the_same_iteration(data, tmp_path):
    assert in_two(_one_is_stopped, tmp_path) == [143, 143]
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    (line,) = [
        x for x in printed[0].splitlines() if x.startswith("stopped by SIGTERM after 4 of 50")
    ]
    assert line.endswith("model_0000003.pth") and "stopped" not in printed[1]
    assert len(saved(tmp_path / "out/model_0000003.pth")["processes"]) == 2


def test_ctrl_c_reaches_command_and_workers_alike(data, tmp_path):
    """As a terminal sends it, to the whole process group, in which loader workers are."""
    made = "recipe(_here / 'data', _here / 'out', max_iter=10**6, log_period=1)"
    more = "dataloader.train.num_workers = 1", "del dataloader.evaluator"
    file = write_recipe(tmp_path / "recipe.py", made, *more)
    command = [sys.executable, "-m", "d2kd", "train", "--config-file", str(file)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, process_group=0, **pipes)
    metrics, deadline = tmp_path / "out/metrics.json", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        errors.splitlines()[-1].startswith("stopped by SIGINT after ") and "Traceback" not in errors
    )
    assert list((tmp_path / "out").glob("model_*.pth"))


def test_a_second_signal_ends_at_once_but_not_an_echo_of_the_first(monkeypatch):
    from d2kd.engine import interruption

    now, killed = [0.0], []
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interruption.os, "kill", lambda *arguments: killed.append(arguments))
    signals = interruption.StopSignals()
    before = signal.getsignal(signal.SIGTERM)
    with signals.recorded():
        for now[0] in (0.0, 1.0, 3.0):
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
            assert signals.received == signal.SIGTERM
        assert killed == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) == before
