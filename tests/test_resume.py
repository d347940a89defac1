"""Nothing is lost: runs that are stopped, killed, or out of room go on as if nothing had been."""

import contextlib
import errno
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

import d2kd.engine.trainer as trainer_module
from d2kd.config import get_config, load
from d2kd.data import build_train_loader, estimate_priors
from d2kd.engine.checkpoint import LOSS_NORMALIZER, StudentCheckpointer, to_builtin_types
from d2kd.engine.train_step import TrainStep
from d2kd.engine.trainer import Trainer
from d2kd.losses import DistillLosses, ICDLoss, ImitationLoss, MGDLoss
from d2kd.modeling.weights import load_checkpoint
from d2kd.utils.errors import InputError, report_input_errors
from d2kd.utils.io import read_metrics, report_full_disk, write_text

from . import resume_runs
from .common import build, tiny_faster_rcnn, tiny_retinanet
from .kill_runs import kill
from .resume_runs import OBJECTS, Stopped, compare, differences, in_a_process, run, saved
from .tiny_run import distiller, draw_data, recipe, teacher_weights, without_evaluation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw_data(folder, OBJECTS)
    return folder


def plain_recipe(data, output, **train):
    config = without_evaluation(recipe(data, output, max_iter=4, **train))
    config.train.checkpointer.period = 1
    return config


def cut_short(file):
    """A checkpoint that is not whole, as old as before."""
    status = file.stat()
    os.truncate(file, 1000)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("cases", [["alone"], ["icd, one-stage"], ["first step", "erd, bfloat16"]])
def test_stopped_and_resumed_is_uninterrupted(data, tmp_path, cases):
    """All cases: ``python -m tests.resume_runs``."""
    for name in cases:
        assert compare(name, data, tmp_path) == []


def test_killed_and_resumed_is_uninterrupted(data, tmp_path):
    """Many more kills: ``python -m tests.kill_runs``."""
    outcome = kill(3, 0, data, tmp_path, end=6, say=lambda line: None)
    assert outcome.faults == [] and outcome.finished >= 1 and sum(outcome.kills.values()) == 3


def test_a_truncated_last_checkpoint_is_named_and_the_one_before_used(data, tmp_path):
    config = plain_recipe(data, tmp_path)
    run(config)
    whole = saved(tmp_path / "model_final.pth")
    # Of an earlier run in this folder: a number in between, and older.
    (tmp_path / "model_0000002.pth").write_bytes((tmp_path / "model_0000000.pth").read_bytes())
    os.utime(tmp_path / "model_0000002.pth", (0, 0))
    for name in ("model_final.pth", "model_0000003.pth"):
        cut_short(tmp_path / name)
    trainer, _ = run(config, resume=True)
    assert trainer.start_iter == 2
    log = (tmp_path / "log.txt").read_text()
    for name in ("model_final.pth", "model_0000003.pth"):
        assert f"{name}: cannot be read" in log
    assert differences(saved(tmp_path / "model_final.pth"), whole) == []

    for file in tmp_path.glob("model_*.pth"):
        os.truncate(file, 1000)
    with pytest.raises(InputError, match="final.pth: cannot be read, nor is there one before"):
        run(config, resume=True)


def test_a_run_that_begins_anew_does_not_go_on_from_a_former_one(data, tmp_path):
    config = plain_recipe(data, tmp_path)
    run(config)
    (tmp_path / "model_best.json").write_text("{}")
    config.train.seed = 5
    config.train.checkpointer.period = 2
    run(config, stop=1)  # before its first checkpoint
    assert not (tmp_path / "model_best.json").exists()
    assert (tmp_path / "model_final.pth").exists()  # the user may still want its weights
    trainer, _ = run(config, resume=True, stop=2)
    assert trainer.start_iter == 0
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    cut_short(tmp_path / "model_0000001.pth")
    # Of the former run there are whole ones, one with a lower number and two with higher ones.
    with pytest.raises(InputError, match="model_0000001.pth: cannot be read, nor is there one"):
        run(config, resume=True)


def test_all_processes_go_on_from_one_checkpoint(data, tmp_path, monkeypatch):
    config = plain_recipe(data, tmp_path)
    run(config, stop=2)
    seen = ["model_0000000.pth", "no checkpoint"]
    for other in seen:
        monkeypatch.setattr(comm, "all_gather", lambda mine, other=other: [mine, other])
        with pytest.raises(InputError, match=f"model_0000001.pth in process 0, {other} in"):
            Trainer(config).resume_or_load(True)


def test_a_moved_checkpoint_knows_what_was_best(data, tmp_path, monkeypatch):
    scores = iter([30.0, 20.0, 10.0, 25.0])
    metrics = ("AP", "AP50")
    monkeypatch.setattr(
        trainer_module, "do_test", lambda *_, **__: {"bbox": dict.fromkeys(metrics, next(scores))}
    )
    config = recipe(data, tmp_path / "old", max_iter=4, eval_period=1)
    config.train.checkpointer.period = 1
    run(config, stop=3)
    (tmp_path / "new").mkdir()
    for name in ("model_0000002.pth", "last_checkpoint", "metrics.json"):
        shutil.copy(tmp_path / "old" / name, tmp_path / "new" / name)
    config.train.output_dir = str(tmp_path / "new")
    run(config, resume=True)
    assert not (tmp_path / "new/model_best.pth").exists()  # 25 is less than 30
    # Where it is, also a state that was better than its checkpoint, which came before, could know.
    config.train.output_dir = str(tmp_path / "there")
    scores = iter([10.0, 30.0, 20.0, 25.0])
    run(config, stop=2)
    run(config, resume=True)
    assert saved(tmp_path / "there/model_best.pth")["iteration"] == 1
    # The best AP, 30, says nothing of another metric.
    config.train.best_checkpoint, config.train.max_iter = "bbox/AP50", 5
    scores = iter([20.0, 28.0])  # the evaluation after the last iteration was of a shorter run
    run(config, resume=True)
    assert saved(tmp_path / "there/model_best.pth")["iteration"] == 4


def test_batches_of_another_size_go_on_where_the_stream_was(data, tmp_path, caplog):
    def images(config, resume):
        received = []
        trainer = Trainer(config)
        trainer.resume_or_load(resume)
        trainer.model.register_forward_pre_hook(
            lambda _, args: received.extend(x["image_id"] for x in args[0])
        )
        trainer.train()
        return received

    config = plain_recipe(data, tmp_path / "whole")
    config.dataloader.train.aspect_ratio_grouping = False
    whole = images(config, False)
    config.train.output_dir = str(tmp_path / "parts")
    config.train.max_iter = 2
    first = images(config, False)
    config.train.max_iter, config.dataloader.train.total_batch_size = 6, 1
    rest = images(config, True)
    assert first + rest == whole and len(whole) == 8
    assert "total_batch_size is 1 and was another: the data continue at image 4" in caplog.text
    caplog.clear()
    config.train.max_iter = 7  # what was logged once is known
    config.dataloader.train.total_batch_size = 2
    images(config, True)
    assert "the data continue at image 8" in caplog.text


def test_another_teacher_and_another_seed_are_named(data, tmp_path, caplog):
    one, other = (teacher_weights(tmp_path / name, seed) for name, seed in (("1", 1), ("2", 2)))
    config = without_evaluation(recipe(data, tmp_path / "out", distiller(one), max_iter=2))
    run(config)
    seed, config.train.max_iter = config.train.seed, 3
    run(config, resume=True)
    line = f"train.seed is {seed + 1} and was {seed}: the data continue in another order"
    assert "the teacher's weights are" not in caplog.text and "train.seed" not in caplog.text
    trainer = Trainer(config)
    Path(one).unlink()  # while it runs
    assert trainer.state_dict()["teacher_sha256"]
    config.model.teacher.weights, config.train.seed = other, seed + 1
    Trainer(config).resume_or_load(True)
    assert "the teacher's weights are" in caplog.text and line in caplog.text


def _with_little_room(config, printed):
    """A run whose disk takes no file larger than 100 kB; its stderr is kept in a file."""
    with open(printed, "w") as file:
        sys.stderr = file
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with report_input_errors():
            run(config, resume=True)


def test_out_of_room(data, tmp_path):
    out, printed = tmp_path / "out", tmp_path / "printed.txt"
    config = plain_recipe(data, out)
    run(config, stop=1)
    name = "model_0000000.pth"
    before = (out / name).read_bytes()
    assert len(before) > 100_000
    assert in_a_process(_with_little_room, config, printed) == 2
    # The lines of the run's log are for stdout and its file.
    lines = [line for line in printed.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed.read_text()
    assert "model_0000001.pth: cannot be written (File too large)" in lines[0]
    assert (out / name).read_bytes() == before and (out / "last_checkpoint").read_text() == name
    assert not [*out.glob(".*")]
    assert json.loads((out / "run.json").read_text())["rows"][-1]["iterations"] == 1
    assert run(config, resume=True)[0].start_iter == 1


def test_a_full_disk_is_the_users_to_mend(data, tmp_path, monkeypatch):
    """Whatever was being written: the error is one line, and the first thing that failed is what it names."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_, **__):
        raise full

    for what in ("trainer.do_test", "run_info.RunMetadata.end"):
        with monkeypatch.context() as patch:
            patch.setattr(f"d2kd.engine.{what}", refuse)
            with pytest.raises(InputError, match="No space left on device.*; expected room") as it:
                run(recipe(data, tmp_path / what, max_iter=1))
        assert len(str(it.value).splitlines()) == 1
        assert "Traceback" not in (tmp_path / what / "log.txt").read_text()
    with pytest.raises(InputError, match="No space left"), report_full_disk("x"):
        try:
            refuse()
        finally:
            raise RuntimeError("another, while the first is handled")
    with pytest.raises(RuntimeError, match="other"), report_full_disk("x"):
        raise RuntimeError("other")
    with pytest.raises(PermissionError), report_full_disk("x"):
        raise PermissionError(errno.EACCES, "no")


def test_an_evaluation_that_a_run_did_not_come_to_is_made_up_for(data, tmp_path, monkeypatch):
    scores = {"whole": iter([10.0, 30.0, 20.0]), "parts": iter([10.0, Stopped(), 30.0, 20.0])}
    best = []
    for name in scores:

        def measure(*_, name=name, **__):
            score = next(scores[name])
            if isinstance(score, Stopped):
                raise score
            return {"bbox": {"AP": score}}

        monkeypatch.setattr(trainer_module, "do_test", measure)
        config = recipe(data, tmp_path / name, max_iter=6, eval_period=2)
        config.train.checkpointer.period = 2
        for _ in range(2 if name == "parts" else 1):
            run(config, resume=True)
        best.append(saved(tmp_path / name / "model_best.pth"))
        rows = map(json.loads, (tmp_path / name / "metrics.json").read_text().splitlines())
        found = [(row["iteration"], row["bbox/AP"]) for row in rows if "bbox/AP" in row]
        assert found == [(1, 10.0), (3, 30.0), (6, 20.0)]
    assert best[0]["iteration"] == 3
    assert differences(*best) == []


def test_a_run_that_ended_before_its_final_file_is_given_it(data, tmp_path):
    config = plain_recipe(data, tmp_path)
    trainer, _ = run(config)
    final = tmp_path / "model_final.pth"
    expected = saved(final)
    final.unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    resumed, received = run(config, resume=True)
    assert received == {} and differences(saved(final), expected) == []
    assert not trainer.finished and not resumed.finished
    assert run(config, resume=True)[0].finished


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_records_of_a_finished_run_stay_as_they_are(data, tmp_path, caplog, monkeypatch):
    config = recipe(data, tmp_path, max_iter=2, eval_period=1)
    ended, _ = run(config)
    before, times = contents(tmp_path), {path: path.stat() for path in contents(tmp_path)}
    config.optimizer.lr, config.train.log_period = 0.5, 3
    trainer, received = run(config, resume=True)
    assert trainer.finished and received == {}
    assert contents(tmp_path) == before
    assert {path: path.stat() for path in before} == times
    assert "The run is finished; no effect has: optimizer.lr, train.log_period" in caplog.text
    bbox = {key: value for key, value in ended._last_eval_results["bbox"].items() if value == value}
    assert bbox and bbox.items() <= trainer.train()["bbox"].items()
    config.train.max_iter = 3
    assert run(config, resume=True)[0].start_iter == 2
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["finished"] for row in rows] == [True, True]


def test_a_run_is_finished_after_its_last_evaluation(data, tmp_path, monkeypatch):
    config = recipe(data, tmp_path, max_iter=1)

    def fail(*_, **__):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "do_test", fail)
        run(config)
    assert (tmp_path / "model_final.pth").is_file()
    assert not json.loads((tmp_path / "run.json").read_text())["rows"][-1]["finished"]
    trainer, received = run(config, resume=True)
    assert trainer.finished and received == {}
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["finished"] for row in rows] == [False, True] and "bbox" in rows[1]["results"]


def with_two_optimizers(data, output):
    """Of a student and of the losses' adapters."""
    model = distiller(losses=L(DistillLosses)(imitation=L(ImitationLoss)()))
    config = without_evaluation(recipe(data, output, model, max_iter=4))
    optimizer = L(torch.optim.AdamW)(params=L(get_default_optimizer_params)(), lr=0.01)
    config.train.loss_optimizer = {"optimizer": optimizer}
    config.train.checkpointer.period = 2
    return config


def test_changed_optimizers_take_effect_and_are_named(data, tmp_path, caplog):
    run(with_two_optimizers(data, tmp_path), stop=2)
    trainer, _ = run(with_two_optimizers(data, tmp_path), resume=True, stop=3)
    assert "takes effect" not in caplog.text and "no effect" not in caplog.text
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    config = with_two_optimizers(data, tmp_path)
    config.optimizer.lr, config.optimizer.momentum = 0.001, 0.5
    config.train.loss_optimizer.optimizer.lr = 0.03
    config.lr_multiplier.end_value = 0.5
    trainer = Trainer(config)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 2
    student, losses = trainer.optimizer.student.param_groups, trainer.optimizer.losses.param_groups
    assert {group["lr"] for group in student} == {0.001 * 0.75}  # half way from 1 to 0.5
    assert {group["momentum"] for group in student} == {0.5}
    assert {group["lr"] for group in losses} == {0.03}
    for line in (
        "optimizer.lr is 0.001 and was 0.005: it takes effect now",
        "optimizer.momentum is 0.5 and was 0.9: it takes effect now",
        "train.loss_optimizer.optimizer.lr is 0.03 and was 0.01: it takes effect now",
        "lr_multiplier.end_value is 0.5 and was 0.1: it takes effect now",
    ):
        assert line in caplog.text
    assert caplog.text.count("takes effect") == 4 and "no effect" not in caplog.text
    trainer.train()
    [row] = [row for row in read_metrics(tmp_path / "metrics.json") if row["iteration"] == 3]
    assert row["lr"] == pytest.approx(0.001 * 0.625)
    assert load(str(tmp_path / "config.yaml")).optimizer.lr == 0.001


def test_what_only_a_new_run_reads_is_named_and_recorded_as_it_was(data, tmp_path, caplog):
    first, other = (str(tmp_path / name) for name in ("first.pth", "other.pth"))
    for file in (first, other):
        torch.save({"model": build(tiny_faster_rcnn()).state_dict()}, file)

    def config(start):
        model = distiller(teacher_weights(tmp_path))
        made = recipe(data, tmp_path / "out", model, max_iter=3, init_checkpoint=start)
        made.train.checkpointer.period = 1
        return without_evaluation(made)

    run(config(first), stop=1)
    caplog.clear()
    run(config(first), resume=True, stop=2)
    assert f"train.init_checkpoint, {first}, is not loaded again" in caplog.text
    changed = config(other)
    changed.model.inherit = ["roi_heads.box_predictor."]
    caplog.clear()
    run(changed, resume=True)
    effect = "no effect, the weights are those of the checkpoint"
    assert f"train.init_checkpoint is {other} and was {first}: {effect}" in caplog.text
    assert "model.inherit is [roi_heads.box_predictor.] and was nothing: no effect" in caplog.text
    assert load(str(tmp_path / "out/config.yaml")).train.init_checkpoint == first


def test_another_class_of_optimizer_is_refused(data, tmp_path):
    config = plain_recipe(data, tmp_path)
    run(config, stop=1)
    config.optimizer._target_ = torch.optim.RMSprop
    line = "optimizer._target_: torch.optim.*RMSprop, and was torch.optim.*SGD; expected the same"
    with pytest.raises(InputError, match=line):
        Trainer(config).resume_or_load(True)


PRIORS = L(estimate_priors)(names="${dataloader.train.dataset.names}")
SEEDED = L(ICDLoss)(heads=4, start=0.0, priors=PRIORS, seed="${train.seed}")


@pytest.mark.parametrize("loss", [L(MGDLoss)(seed="${train.seed}"), SEEDED], ids=["mgd", "icd"])
def test_a_drawn_seed_goes_on(data, tmp_path, loss):
    model = distiller(teacher_weights(tmp_path), L(DistillLosses)(loss=loss))

    def config(folder, seed):
        made = recipe(data, tmp_path / folder, model, max_iter=4, seed=seed, eval_teacher=False)
        made.train.checkpointer.period = 2
        return without_evaluation(made)

    trainer, _ = run(config("drawn", -1), stop=2)
    seed = trainer.cfg.train.seed
    resumed, _ = run(config("drawn", -1), resume=True)
    assert resumed.cfg.train.seed == seed
    run(config("chosen", seed))
    one, other = (saved(tmp_path / name / "model_final.pth") for name in ("drawn", "chosen"))
    assert differences(one, other) == []


def test_old_checkpoints_count_after_a_resume_but_for_an_unreadable_one(data, tmp_path):
    config = plain_recipe(data, tmp_path)
    config.train.checkpointer.max_to_keep = 2
    run(config, stop=3)
    names = [f"model_000000{i}.pth" for i in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("model_*")) == names
    os.truncate(tmp_path / names[1], 1000)
    for stop, kept in ((3, ["0000001", "0000002"]), (None, ["0000002", "0000003", "final"])):
        run(config, resume=True, stop=stop)
        files = sorted(tmp_path.glob("model_*.pth"))
        assert [file.stem.removeprefix("model_") for file in files] == kept
        assert all(saved(file) for file in files)


def test_a_dense_detector_goes_on_in_another_number_of_processes(data, tmp_path, caplog):
    """Together they divide by what they did: one keeps the mean of what two counted in its images."""
    config = plain_recipe(data, tmp_path)
    config.model = tiny_retinanet()
    trainer, _ = run(config, stop=1)
    alone = trainer.model.loss_normalizer
    file = tmp_path / "model_0000000.pth"
    checkpoint = torch.load(file, weights_only=True)
    [state] = checkpoint["processes"]
    checkpoint["processes"] = [state | {LOSS_NORMALIZER: share * alone} for share in (0.25, 0.75)]
    torch.save(checkpoint, file)
    trainer = trainer_module.Trainer(config)
    trainer.resume_or_load()
    assert trainer.start_iter == 1 and trainer.model.loss_normalizer == pytest.approx(alone)
    assert "no random state for this many processes; its loss_normalizer is" in caplog.text


class Parameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight * batch}


def test_the_scalers_state_goes_on(tmp_path):
    """Two overflows, then growth: stopped anywhere, the scale and what is counted toward it are the same."""
    batches = [1.0, 3e38, 1.0, 3e38, 1.0, 1.0, 1.0]

    def step(state=None, start=0):
        model = Parameter()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        train = get_config("common/train.py").train
        made = TrainStep(model, batches[start:], optimizer, (contextlib.nullcontext, scaler), train)
        if state is not None:
            model.load_state_dict(state["model"])
            made.load_state_dict(state["trainer"])
        return made

    def states(made, count):
        found = []
        for _ in range(count):
            made.run_step()
            state = {"model": made.model.state_dict(), "trainer": made.state_dict()}
            torch.save(to_builtin_types(state), tmp_path / "state.pth")
            found.append(torch.load(tmp_path / "state.pth", weights_only=True))
        return found

    with EventStorage():
        whole = states(step(), len(batches))
        scales = [state["trainer"]["grad_scaler"]["scale"] for state in whole]
        assert scales == [1024, 512, 512, 256, 256, 512, 512]
        for k in range(1, len(batches)):
            rest = states(step(whole[k - 1], k), len(batches) - k)
            assert differences(whole[k:], rest) == []


@pytest.mark.parametrize("world", [1, 2])
def test_with_grouping_every_sample_is_seen_once(monkeypatch, world):
    """Wide and tall images, stopped after each of the first batches, while others wait for their like."""
    monkeypatch.setattr("d2kd.data.loader.comm.get_world_size", lambda: world)
    dataset = [{"width": 2 + i % 3, "height": 3, "i": i} for i in range(7)]
    for rank in range(world):
        monkeypatch.setattr("d2kd.data.loader.comm.get_rank", lambda rank=rank: rank)

        def stream(start, count):
            loader = build_train_loader(
                dataset, mapper=lambda x: x, total_batch_size=2 * world, seed=5, start=start
            )
            batches = iter(loader.batch_sampler)
            return [next(batches) for _ in range(count)]

        whole = stream(0, 14)
        for k in range(1, 14):
            assert whole[:k] + stream(k, 14 - k) == whole
        positions = [position for batch in whole for position, _ in batch]
        assert len(set(positions)) == len(positions)
        every = range(rank, max(positions) + 1, world)
        late = sorted(set(every) - set(positions))
        assert len(late) <= 1, "more than one sample waits for its like"
        assert all(position % world == rank for position in positions)


def test_a_checkpoint_is_plain(tmp_path):
    class Holds:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

    holds = Holds((np.float64(0.5), [np.int64(3)], {"a": np.bool_(True)}))
    checkpointer = StudentCheckpointer(nn.BatchNorm2d(2), str(tmp_path), holds=holds)
    checkpointer.save("good", iteration=np.int64(1))
    read = torch.load(tmp_path / "good.pth", weights_only=True)
    assert read["holds"] == {"value": (0.5, [3], {"a": True})}
    assert type(read["iteration"]) is int and type(read["holds"]["value"][0]) is float
    assert read["model"]._metadata, "the modules' versions are lost"
    holds.value = [{"x": Path("x")}]
    with pytest.raises(InputError, match="checkpoint.holds.value.0.x: a PosixPath; expected ten"):
        checkpointer.save("bad")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.pth", "last_checkpoint"]


class RunsCode:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


def test_reading_weights_runs_no_code(tmp_path):
    content = {"model": {"weight": torch.ones(1)}, "more": RunsCode(tmp_path / "ran")}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match="x.pth: holds .*pathlib.Path"):
        load_checkpoint(str(tmp_path / "x.pth"))
    assert not (tmp_path / "ran").exists()


def test_two_equal_states_are_told_from_two_that_differ():
    one = {"a": [torch.ones(2), 1, {"b": 2.0}]}
    assert differences(one, {"a": [torch.ones(2), 1, {"b": 2.0}]}) == []
    for other in ([torch.ones(2) + 1e-6, 1, {"b": 2.0}], [torch.ones(2), 1.0, {"b": 2.0}], [], [1]):
        assert differences(one, {"a": other})
    assert set(resume_runs.CASES) >= {"imitation", "tar", "icd", "erd", "lwf"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a loss of power could leave an empty checkpoint under its final name."""
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, call=call: (calls.append(name), call(*args))
        )
    write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the folder, too
