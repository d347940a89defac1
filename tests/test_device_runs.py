"""Runs, comparisons, pictures and benchmarks on a device other than the CPU give what they give on the CPU."""

import json

import pytest

from d2kd.comparison.comparison import Options, compare
from d2kd.comparison.detectors import load_data
from d2kd.data import coco_dataset
from d2kd.engine import launch
from d2kd.testing import DETECTORS
from d2kd.utils.compat import read_checkpoint
from d2kd.utils.io import read_metrics

from . import resume_runs
from .common import command
from .resume_runs import CASES, OBJECTS, STOP
from .stand_in_device import DEVICE, StandIn
from .test_comparison import pair
from .tiny_run import draw_data, teacher_weights

pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw_data(folder, OBJECTS)
    return folder


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setattr(launch, "DEVICE_TYPES", (*launch.DEVICE_TYPES, DEVICE.type))


@pytest.fixture
def device():
    with StandIn() as device:
        yield device


@pytest.mark.parametrize(
    "cases",
    [["alone"], ["imitation"], ["tar, points"], ["icd"], ["first step", "erd"]],
    ids=lambda cases: cases[-1],
)
def test_a_run_stopped_and_resumed(cases, data, tmp_path):
    """With evaluation, where the case has one, and drawing."""

    def config(name, device):
        made = CASES[name](data, tmp_path / name / "resumed")
        made.train.device, made.train.checkpointer.period = str(device), STOP
        made.train.draw_period, made.train.draw_images = STOP, 2
        return made

    for name in cases:
        output = tmp_path / name / "resumed"
        _, expected = resume_runs.run(config(name, "cpu"))
        ap = [x.get("bbox/AP") for x in read_metrics(output)]
        with StandIn() as device:
            _, found = resume_runs.run(config(name, DEVICE), stop=STOP)
            trainer, more = resume_runs.run(config(name, DEVICE), resume=True)
        assert trainer.start_iter == STOP and device.waits
        assert {p.device for p in trainer.model.parameters()} == {DEVICE}
        assert (found | more).keys() == expected.keys()
        for step, losses in (found | more).items():
            assert losses == pytest.approx(expected[step], rel=1e-3, abs=1e-5), step
        assert [x.get("bbox/AP") for x in read_metrics(output)] == pytest.approx(ap)
        # The checkpoint is read where there is no such device.
        state = read_checkpoint(str(output / "model_final.pth"))["model"]
        for key, value in trainer.checkpointer.model.state_dict().items():
            assert state[key].device.type == "cpu" and state[key].equal(value.cpu())


@pytest.mark.parametrize("family", ["faster_rcnn", "gfl"])
def test_a_comparison(family, data, tmp_path, device):
    node = DETECTORS[family]()
    if "roi_heads" not in node:  # untrained, it would find nothing
        node.test_score_thresh = 0.0
    detectors = pair(tmp_path, data, node=node)
    names = coco_dataset(f"tiny_{data}", str(data / "data.json"), str(data))
    found = [
        compare(detectors, load_data(names), tmp_path / kind, Options(resamples=20, device=kind))
        for kind in ("cpu", str(DEVICE))
    ]
    on_cpu, on_device = (x.gain("other", "one").metrics["AP"] for x in found)
    assert on_device["gain"] == pytest.approx(on_cpu["gain"])
    assert on_device["interval"] == pytest.approx(on_cpu["interval"])
    on_cpu, on_device = (x.observation.regions for x in found)
    assert on_device["rows"] == on_cpu["rows"] > 0
    assert device.waits


def configured(folder, name, data):
    """A run's folder with its config, and a checkpoint of it."""
    output = folder / name / "resumed"
    config = CASES[name](data, output)
    config.train.max_iter = 1
    if name == "erd":
        configured(folder, "first step", data)
    resume_runs.run(config)
    return output


@pytest.mark.parametrize(
    "name, what", [("imitation", "detections"), ("icd", "attention"), ("erd", "selection")]
)
def test_pictures(name, what, data, tmp_path, device, capsys):
    run = configured(tmp_path, name, data)
    words = ["--what", what, "--number", "2", "--config-file", run / "config.yaml"]
    words += ["--dataset", f"tiny_{data}"]
    if what != "selection":
        words += ["--weights", f"teacher={teacher_weights(tmp_path)}"]
    drawn = {}
    for kind in ("cpu", str(DEVICE)):
        output = tmp_path / kind
        command("visualize")([*words, "--output", output, f"train.device='{kind}'"])
        drawn[kind] = {file.name: file.read_bytes() for file in sorted(output.glob("*.png"))}
    assert len(drawn["cpu"]) == 2 and drawn["cpu"] == drawn[str(DEVICE)]
    assert device.waits


def test_a_benchmark(data, tmp_path, device, capsys):
    run = configured(tmp_path, "tar", data)
    file = tmp_path / "result.json"
    words = ["--config-file", run / "config.yaml", "--json", file, "--image-size", "64"]
    words += ["--rounds", "2", "--no-memory"]
    losses = []
    for kind in ("cpu", str(DEVICE)):
        command("benchmark")([*words, "--device", kind])
        result = json.loads(file.read_text())
        losses.append(result["recipes"][0]["losses"])
        assert result["device"] == kind and len(result["rows"]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert device.waits
