"""The command line that draws: teacher and student on data that a recipe describes."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2kd.config import load
from d2kd.tools.visualize import detectors_of

from .common import ROOT, build, command, refusal, tiny_faster_rcnn
from .test_panels import panels_of
from .tiny_run import draw_data, teacher_weights, write_recipe

RECIPE = "recipe(_here / 'data', _here / 'out', distiller())"
NAMED = "dataloader.test.dataset.names.name = 'mine_val'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looking")
    draw_data(folder / "data")
    teacher_weights(folder)
    torch.save({"model": build(tiny_faster_rcnn()).state_dict()}, folder / "student.pth")
    write_recipe(folder / "recipe.py", RECIPE, NAMED)
    write_recipe(folder / "plain.py", RECIPE.replace("distiller()", "None"), NAMED)
    return folder


def run_tool(name, *words):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, f"tools/{name}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def words_of(folder, dataset="mine_val"):
    words = ["--config-file", folder / "recipe.py", "--dataset", dataset]
    return [*words, "--weights", *(f"{who}={folder}/{who}.pth" for who in ("student", "teacher"))]


def test_what_scores_below_the_threshold_is_not_drawn(folder, tmp_path, capsys):
    """Data of the recipe are found by their name."""

    def panels(threshold):
        words = ["--output", tmp_path / str(threshold), "--threshold", threshold, "--number", 1]
        command("visualize")([*words_of(folder), *words])
        assert "ground truth | teacher | student: 1 pictures" in capsys.readouterr().out
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
        assert {who: list(names) for who, (_, names) in found.items()} == dict.fromkeys(
            ("teacher", "student"), expected
        )


def test_other_data_is_refused_in_one_line(folder):
    done = run_tool("visualize.py", *words_of(folder, "mine_vla"), "--output", folder / "pictures")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: data set 'mine_vla'")


ICD = """
from detectron2.config import LazyCall as L
from d2kd.data import estimate_priors
from d2kd.losses import ICDLoss
del model.losses["imitation"]
_priors = L(estimate_priors)(names="${dataloader.train.dataset.names}")
model.losses.icd = L(ICDLoss)(heads=4, priors=_priors)
""".split("\n")


def test_attention_of_a_run(folder, capfd):
    """What training leaves is enough; what leaves no decoder is refused in one line."""
    icd = write_recipe(folder / "icd.py", f"without_evaluation({RECIPE})", NAMED, *ICD)
    weights = f"model.teacher.weights={folder}/teacher.pth"
    command("train")(["--config-file", icd, weights, "train.max_iter=1"])
    DatasetCatalog.remove("mine_val")  # which drawing finds in the run's config
    MetadataCatalog.pop("mine_val")
    capfd.readouterr()

    given = ["--what", "attention", "--dataset", "mine_val", "--number", "2"]
    given += ["--output", folder / "attention", "--config-file"]
    command("visualize")([*given, folder / "out/config.yaml"])
    printed = capfd.readouterr().out
    assert re.search(r"attention, \d+% of it in boxes that cover \d+%: 2 pictures", printed)
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
        ("plain.py --what attention", "--what attention: a plain recipe; expected one that"),
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
    config, *more = words.format(folder=folder).split()
    given = ["--config-file", folder / config, "--dataset", "mine_val", "--output", "pictures"]
    refuses(lambda: command("visualize")([*given, *more]), line)
