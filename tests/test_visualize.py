"""The command line that draws: teacher and student on data that a recipe describes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .common import build, tiny_faster_rcnn
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


def look(folder, dataset):
    command = [sys.executable, "tools/visualize.py", "--config-file", folder / "recipe.py"]
    command += ["--weights", f"student={folder}/student.pth", f"teacher={folder}/teacher.pth"]
    command += ["--dataset", dataset, "--output", folder / "pictures", "--number", "2"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_data_of_the_recipe_is_found_by_its_name(folder):
    done = look(folder, "mine_val")
    assert done.returncode == 0, done.stderr
    assert "ground truth | teacher | student: 2 pictures" in done.stdout
    assert len(list((folder / "pictures").glob("*.png"))) == 2


def test_other_data_is_refused_in_one_line(folder):
    done = look(folder, "mine_vla")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: data set 'mine_vla'")
