"""The command line: what it runs, what it refuses in one line, and two processes on a CPU."""

import argparse
import hashlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from d2kd import engine
from d2kd.config import distill, load, method
from d2kd.modeling import Teacher
from d2kd.tools.train import add_arguments, main_worker, recipe
from d2kd.utils.errors import InputError

from .common import CLASSES, ROOT, build, command, refusal, tiny_faster_rcnn
from .tiny_run import draw_data, teacher_weights

RECIPE = """
from pathlib import Path

from tests.tiny_run import distiller, recipe, without_evaluation

_here = Path(__file__).parent
globals().update(recipe(_here / "data", _here / "out", {model}, max_iter=2).items())
"""

train = command("train")


@pytest.fixture
def folder(tmp_path):
    """Data, a plain recipe, one with a teacher, and the teacher's weights."""
    draw_data(tmp_path / "data")
    weights = teacher_weights(tmp_path)
    (tmp_path / "plain.py").write_text(RECIPE.format(model="None"))
    (tmp_path / "distilled.py").write_text(RECIPE.format(model=f"distiller({weights!r})"))
    teacher = "from tests.common import tiny_faster_rcnn\nmodel = tiny_faster_rcnn(channels=24)\n"
    (tmp_path / "teacher.py").write_text(teacher)
    return tmp_path


def test_train_resume_evaluate(folder, monkeypatch, caplog):
    recipe = str(folder / "distilled.py")
    train(["--config-file", recipe])
    assert (folder / "out/model_final.pth").exists()
    train(["--config-file", recipe, "--resume", "train.max_iter=3"])
    rows = json.loads((folder / "out/run.json").read_text())["rows"]
    assert [(row["start_iter"], row["iterations"]) for row in rows] == [(0, 2), (2, 3)]

    def never(*_, **__):
        raise AssertionError("a teacher was built")

    monkeypatch.setattr(Teacher, "__init__", never)
    measured = []
    do_test = engine.do_test

    def received(config, model, **options):
        measured.append(model.state_dict())
        results = do_test(config, model, **options)
        assert "AP" in results["bbox"]
        return results

    monkeypatch.setattr(engine, "do_test", received)
    final = torch.load(folder / "out/model_final.pth")["model"]
    given = {key: value + 1 for key, value in final.items()}
    torch.save({"model": given}, folder / "given.pth")
    named = f"train.init_checkpoint={folder / 'given.pth'}"
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    # The run's own without a file named, and where the run is to be resumed; else the file.
    for words, expected, file in (
        ([], final, "out/model_final.pth"),
        ([named], given, "given.pth"),
        (["--resume", named], final, "out/model_final.pth"),
    ):
        caplog.clear()
        train(["--config-file", recipe, "--eval-only", *words])
        assert f"Evaluating {folder / file} on tiny_{folder / 'data'}" in caplog.text
        unused = f"train.init_checkpoint, {folder / 'given.pth'}, is not evaluated"
        assert (unused in caplog.text) == ("--resume" in words)
        content = json.loads((folder / "out/evaluation/results.json").read_text())
        assert (content["schema"], content["weights"]) == (1, str(folder / file))
        sha256 = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert content["weights_sha256"] == sha256
        found = content["results"]["bbox"]
        assert "AP" in found
        if expected is final:  # the other weights find nothing
            assert all(f"AP-class {k}" in found for k in range(CLASSES))
            assert "Per-category bbox AP" in caplog.text
        state = measured.pop()
        assert not measured and state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected), words
    assert {path: path.read_bytes() for path in before} == before  # of the run


def test_a_checkpoint_of_other_classes_is_not_measured(folder, capfd, monkeypatch):
    """As many classes are not the same: by the test data class k of the file would be another."""
    names = [f"class {k}" for k in range(CLASSES)]
    measured = []
    monkeypatch.setattr(engine, "do_test", lambda *args, **_: measured.append(args) or {})
    words = ["--config-file", str(folder / "plain.py"), "--eval-only"]
    words += [f"train.init_checkpoint={folder / 'weights.pth'}"]
    content = {"model": build(tiny_faster_rcnn()).state_dict()}
    for named in ({}, {"classes": names}):
        torch.save(content | named, folder / "weights.pth")
        train(words)
    assert len(measured) == 2
    torch.save(content | {"classes": names[::-1]}, folder / "weights.pth")
    capfd.readouterr()
    error = refusal(train, words, capfd)
    assert "its classes are class 2, class 1, class 0; expected the classes class 0" in error
    assert len(measured) == 2


def test_distill_makes_a_plain_recipe_one_with_a_teacher(folder):
    words = ["--config-file", folder / "plain.py", "--distill", "imitation", "--teacher"]
    words += [folder / "teacher.py", folder / "teacher.pth", "train.max_iter=1"]
    train([*map(str, words), "model.losses.imitation.weight=0.5"])
    metrics = [
        json.loads(line)
        for line in (folder / "out_imitation/metrics.json").read_text().splitlines()
    ]
    assert metrics[0]["distill/weight_imitation"] == 0.5
    assert metrics[0]["distill/loss_imitation"] > 0
    assert not (folder / "out").exists()  # the folder of the student alone


def test_a_teacher_from_the_zoo_in_one_word(folder):
    """As in Python; the words after it are overrides."""
    parser, name = argparse.ArgumentParser(), "zoo:COCO-Detection/faster_rcnn_R_101_FPN_3x"
    add_arguments(parser)
    head = ["--config-file", str(folder / "plain.py"), "--distill", "tar"]
    tail = ["train.max_iter=7", "model.teacher.dtype=bfloat16"]
    for words in (
        [*head, "--teacher", name, *tail],
        ["--teacher", name, *head, *tail],
        [*tail, *head, "--teacher", name],
    ):
        made = recipe(parser.parse_args(words))
        assert (made.train.max_iter, made.model.teacher.pop("dtype")) == (7, "bfloat16"), words
        base = load(str(folder / "plain.py"))
        same = distill(base, teacher=name, **method("tar")).model
        assert OmegaConf.to_container(made.model) == OmegaConf.to_container(same)
        assert made.model.teacher.classes == "coco_2017_train"


def test_a_teacher_of_timm_in_one_word(folder):
    pytest.importorskip("timm")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--config-file", str(folder / "plain.py"), "--distill", "pkd"]
    made = recipe(parser.parse_args([*words, "--teacher", "timm:test_vit", "train.max_iter=7"]))
    assert made.train.max_iter == 7
    assert made.model.teacher.detector.backbone.name == "test_vit"


def _spoil(folder: Path) -> None:
    """Files to be refused."""
    (folder / "half.pth").write_bytes((folder / "teacher.pth").read_bytes()[:3000])
    torch.save({"model": {"conv.weight": torch.zeros(2)}}, folder / "foreign.pth")
    torch.save({"model": build(tiny_faster_rcnn()).state_dict()}, folder / "other.pth")
    (folder / "broken.py").write_text("model = (\n")
    (folder / "recipe.yaml").write_text("MODEL: {}\n")


TEACH = "--distill imitation --teacher {folder}/teacher.py {folder}/"
REFUSED = {
    "missing config": ("--config-file {folder}/gone.py", "gone.py: no such config"),
    "broken config": ("--config-file {folder}/broken.py", "broken.py: does not load"),
    "yacs recipe": ("--config-file {folder}/recipe.yaml", "recipe.yaml: a yacs config"),
    "unknown key": ("{plain} train.max_itr=3", "train.max_itr: no 'max_itr'"),
    "no value": ("{plain} train.max_iter", "train.max_iter: no value"),
    "device": ("{plain} train.device=abacus", "train.device: abacus"),
    "half precision": ("{plain} train.amp.enabled=True", "train.amp.dtype: float16"),
    "missing weights": ("{plain} train.init_checkpoint={folder}/gone.pth", "no such file"),
    "truncated weights": ("{plain} train.init_checkpoint={folder}/half.pth", "cannot be read"),
    "foreign weights": (
        "{plain} train.init_checkpoint={folder}/foreign.pth",
        "none of its tensors",
    ),
    "foreign to evaluate": (
        "{plain} --eval-only train.init_checkpoint={folder}/foreign.pth",
        "foreign.pth: ",
    ),
    "nothing to evaluate": ("{plain} --eval-only", "--eval-only: no checkpoint in"),
    "half a teacher": ("{plain} --distill tar", "one of them; expected both"),
    "no weights": ("{plain} --distill tar --teacher a.py", "a.py alone; expected CONFIG WEIGHTS"),
    "not in the zoo": (
        "{plain} --distill tar --teacher zoo:retinanet_R_50_FPN train.max_iter=3",
        "model zoo; expected zoo:COCO-Detection/retinanet_R_50_FPN_3x, or",
    ),
    "missing teacher": ("{plain} " + TEACH + "gone.pth", "gone.pth: no such file"),
    "truncated teacher": ("{plain} " + TEACH + "half.pth", "half.pth: cannot be read"),
    "foreign teacher": ("{plain} " + TEACH + "foreign.pth", "missing"),
    "another teacher": ("{plain} " + TEACH + "other.pth", "misshapen"),
    "no such level": (
        "{plain} " + TEACH + "teacher.pth model.losses.imitation.levels=[p2,p9]",
        "losses.imitation",
    ),
    "too many GPUs": ("{plain} --num-gpus 99", "--num-gpus: 99"),
    "nowhere to meet": (
        "{plain} --num-machines 2",
        "--dist-url: not given; expected where the machines meet",
    ),
}


@pytest.mark.parametrize("arguments, complaint", REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line_before_anything_is_written(folder, capfd, arguments, complaint):
    _spoil(folder)
    plain = f"--config-file {folder}/plain.py"
    words = arguments.format(plain=plain, folder=folder).split()
    assert complaint in refusal(train, words, capfd)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda data: (data / "data.json").unlink(), "data.json: no such file"),
        (lambda data: (data / "data.json").write_text("{"), "data.json: broken JSON"),
        (lambda data: (data / "3.png").unlink(), "3.png: missing"),
        (lambda data: [f.write_bytes(b"x") for f in data.glob("*.png")], "cannot be decoded"),
    ],
)
def test_data_that_is_broken(folder, capfd, spoil, complaint):
    spoil(folder / "data")
    assert complaint in refusal(train, ["--config-file", folder / "plain.py"], capfd)
    assert not (folder / "out").exists()


def test_debug_shows_the_traceback(folder):
    with pytest.raises(InputError, match="gone.py: no such config"):
        train(["--debug", "--config-file", str(folder / "gone.py")])


def test_several_gpus_get_the_same_command(monkeypatch):
    """What each process shall do reaches it by pickle."""
    given = []
    monkeypatch.setattr("d2kd.engine.launch.launch", lambda *all: given.append(pickle.dumps(all)))
    train(["--config-file", "some.py", "--num-gpus", "2", "train.max_iter=3"])
    function, args = pickle.loads(given.pop())
    assert function is main_worker
    assert (args.config_file, args.num_gpus, args.opts) == ("some.py", 2, ["train.max_iter=3"])


def test_two_processes_one_without_ground_truth(folder):
    """Each has one image of two, of which one is empty; two optimizers run on gradients that both share."""
    draw_data(folder / "data", objects=(2, 0))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += ["tools/train_net.py", "--config-file", str(folder / "plain.py"), "--distill", "icd"]
    words += ["--teacher", str(folder / "teacher.py"), str(folder / "teacher.pth")]
    words += ["train.max_iter=3", "model.losses.icd.start=0.4", "train.draw_period=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    done = subprocess.run(words, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = torch.load(folder / "out_icd/model_final.pth")
    optimizers = checkpoint["trainer"]["_trainer"]["optimizer"]
    assert int(checkpoint["losses"]["by_name.icd._extra_state"][0]) == 3
    assert len(checkpoint["processes"]) == 2
    assert all(len(optimizers[part]["state"]) > 10 for part in ("student", "losses"))
    assert all(float(s["step"]) == 3 for s in optimizers["losses"]["state"].values())
    assert all(torch.isfinite(value).all() for value in checkpoint["losses"].values())
    metrics = [
        json.loads(line) for line in (folder / "out_icd/metrics.json").read_text().splitlines()
    ]
    terms = ("identification", "localization", "distillation")
    assert {f"distill/loss_icd_{term}" for term in terms} <= metrics[0].keys()
    row = json.loads((folder / "out_icd/run.json").read_text())["rows"][0]
    assert row["processes"] == 2 and row["iterations"] == 3
    if importlib.util.find_spec("tensorboard"):
        [events] = (folder / "out_icd").glob("events.out.tfevents.*")
        drawn = b"detections/01_0", b"detections/02_1"
        assert [events.read_bytes().count(name) for name in drawn] == [2, 2]
