"""The command line that draws: teacher and student on data that a recipe describes."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from d2kd.config import load
from d2kd.tools.visualize import detectors_of

from .common import build, command, refusal, tiny_faster_rcnn
from .test_panels import panels_of
from .tiny_run import draw_data, teacher_weights

ROOT = Path(__file__).parent.parent
RECIPE = """
from pathlib import Path

from tests.tiny_run import distiller, recipe

_here = Path(__file__).parent
_cfg = recipe(_here / "data", _here / "out", distiller())
_cfg.dataloader.test.dataset.names.name = "mine_val"
model, dataloader, optimizer, train = _cfg.model, _cfg.dataloader, _cfg.optimizer, _cfg.train
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looking")
    draw_data(folder / "data")
    teacher_weights(folder)
    torch.save({"model": build(tiny_faster_rcnn()).state_dict()}, folder / "student.pth")
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def run_tool(name, *words):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, f"tools/{name}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def look(folder, dataset):
    words = ["--config-file", folder / "recipe.py", "--dataset", dataset]
    words += ["--weights", f"student={folder}/student.pth", f"teacher={folder}/teacher.pth"]
    return run_tool("visualize.py", *words, "--output", folder / "pictures", "--number", "2")


def test_data_of_the_recipe_is_found_by_its_name(folder):
    done = look(folder, "mine_val")
    assert done.returncode == 0, done.stderr
    assert "ground truth | teacher | student: 2 pictures" in done.stdout
    assert len(list((folder / "pictures").glob("*.png"))) == 2


def test_what_scores_below_the_threshold_is_not_drawn(folder, tmp_path):
    def panels(threshold):
        words = ["--config-file", folder / "recipe.py", "--dataset", "mine_val", "--number", 1]
        words += ["--weights", f"student={folder}/student.pth", f"teacher={folder}/teacher.pth"]
        words += ["--output", tmp_path / str(threshold), "--threshold", threshold]
        command("visualize")(words)
        [picture] = (tmp_path / str(threshold)).glob("*.png")
        return panels_of(np.asarray(Image.open(picture)), 3)

    truth, teacher, student = panels(1.0)
    assert np.array_equal(teacher, student) and (truth != teacher).any()  # the image alone
    same, *seen = panels(0.05)
    assert np.array_equal(truth, same)
    assert all((panel != teacher).any() for panel in seen)


def test_a_detector_is_drawn_with_the_names_in_its_file(folder, tmp_path):
    """Else with those of the recipe, else with the data's."""
    config = load(str(folder / "recipe.py"), ["train.device=cpu"])
    instantiate(config.dataloader.test.dataset.names)
    files = {"student": f"{tmp_path}/student.pth", "teacher": f"{folder}/teacher.pth"}
    content = torch.load(folder / "student.pth")
    own, its, data = ["x", "y", "z"], ["u", "v", "w"], [f"class {k}" for k in range(3)]
    for named, recipes, expected in ((own, its, own), (None, its, its), (None, None, data)):
        torch.save(content | ({"classes": named} if named else {}), files["student"])
        config.model.classes = recipes
        found = detectors_of(config, files, "mine_val")
        assert {who: list(names) for who, (_, names) in found.items()} == {
            "teacher": expected,
            "student": expected,
        }


def test_other_data_is_refused_in_one_line(folder):
    done = look(folder, "mine_vla")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: data set 'mine_vla'")


ICD_RECIPE = """
from pathlib import Path

from detectron2.config import LazyCall as L

from d2kd.data import estimate_priors
from d2kd.losses import DistillLosses, ICDLoss
from tests.tiny_run import distiller, recipe, without_evaluation

_here = Path(__file__).parent
_priors = L(estimate_priors)(names="${dataloader.train.dataset.names}")
_losses = L(DistillLosses)(icd=L(ICDLoss)(heads=4, priors=_priors))
_cfg = recipe(_here / "data", _here / "out", distiller(losses=_losses), max_iter=1)
_cfg = without_evaluation(_cfg)
_cfg.dataloader.test.dataset.names.name = "mine_val"
model, dataloader, optimizer, train = _cfg.model, _cfg.dataloader, _cfg.optimizer, _cfg.train
"""


def test_attention_of_a_run(folder, capfd):
    """What training leaves is enough; what leaves no decoder is refused in one line."""
    (folder / "icd.py").write_text(ICD_RECIPE)
    trained = run_tool(
        "train_net.py", "--config-file", folder / "icd.py", f"model.teacher.weights={folder}/teacher.pth"
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr

    given = ["--what", "attention", "--dataset", "mine_val", "--number", "2"]
    given += ["--output", folder / "attention", "--config-file"]
    done = run_tool("visualize.py", *given, folder / "out/config.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"attention, \d+% of it in boxes that cover \d+%: 2 pictures", done.stdout)
    assert len(list((folder / "attention").glob("*.png"))) == 2
    recipe = f"recipe.py --weights student={folder}/student.pth teacher={folder}/teacher.pth"
    for words, complaint in (
        (f"out/config.yaml --weights student={folder}/student.pth", "no losses.icd"),
        (recipe, "model.losses: no ICDLoss"),
    ):
        config, *more = words.split()
        assert complaint in refusal(command("visualize"), [*given, folder / config, *more], capfd)


@pytest.mark.parametrize(
    "words, line",
    [
        ("recipe.py --weights me=x", "--weights: me=x; expected student=FILE or teacher=FILE"),
        ("recipe.py --number 0", "--number: 0; expected at least 1"),
        ("recipe.py dataloader.test.mapper=null", "recipe.py: no dataloader.test.mapper; expected"),
        ("recipe.py train.output_dir=gone", "--weights: no student, and no gone/model_final.pth; "),
        (
            "plain.py --what attention",
            "--what attention: a plain recipe; expected one that distils",
        ),
        ("recipe.py --what selection", "--weights: no teacher, and none in the recipe; expected"),
        (
            "recipe.py --what selection --weights teacher={folder}/teacher.pth",
            "--what selection: a recipe without it; expected one that distils by ERD",
        ),
        (
            "plain.py --weights student=x teacher=y",
            "--weights: teacher=, and the recipe has none; expected a distillation recipe",
        ),
    ],
)
def test_refused_in_one_line(folder, refuses, words, line):
    (folder / "plain.py").write_text(RECIPE.replace("distiller())", "None)"))
    config, *more = words.format(folder=folder).split()
    given = ["--config-file", folder / config, "--dataset", "mine_val", "--output", "pictures"]
    refuses(lambda: command("visualize")([*given, *more]), line)
