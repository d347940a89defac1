"""The page of COCO's recipes: none is forgotten; its estimate of their cost; the form for what users measure."""

import re

import pytest
import yaml

from d2kd.config import load

from . import coco_cost
from .common import HAS_VITDET, ROOT
from .pages import commands

PAGE = (ROOT / "docs/reproduce.md").read_text()
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("projects/*/configs/*.py")
    if not re.search("shapes|bccd|aquarium", path.name)
)


def test_every_recipe_for_coco_has_its_command():
    assert len(RECIPES) > 20
    shown = [word for words in commands() for word in words]
    for recipe in RECIPES:
        assert recipe in shown and f"--config-file {recipe}" in PAGE, recipe


@pytest.mark.sweep
def test_a_recipe_that_needs_another_comes_after_it():
    recipes = [recipe for recipe in RECIPES if HAS_VITDET or "vitdet" not in recipe]
    position = {recipe: PAGE.index(f"--config-file {recipe}") for recipe in recipes}
    position |= {
        recipe: PAGE.index(recipe) for recipe in re.findall(r"baselines/\w+_[23]x\.py", PAGE)
    }
    folders = {}
    for recipe in sorted(position, key=position.get):
        config = load(recipe)
        assert "coco_2017_train" in str(config.dataloader.train.dataset), recipe
        for weights in (
            config.train.init_checkpoint,
            config.model.get("teacher", {}).get("weights"),
        ):
            if weights and weights.startswith("output/"):
                assert weights in folders, f"{recipe} needs {weights}"
        folders[f"{config.train.output_dir}/model_final.pth"] = recipe
    assert len(folders) > 10


def test_every_row_of_the_estimate_is_on_the_page():
    rows = re.findall(
        r"^\| .*`(?:--distill )?(\w+)`.* \| \d+ \| \d+ \| [\d.]+ \| [\d.]+ \|$", PAGE, re.M
    )
    stems = [name.split("/")[-1].removesuffix(".py").split()[-1] for name in coco_cost.RECIPES]
    assert rows == stems


@pytest.mark.sweep
def test_a_teacher_costs_operations_and_memory(monkeypatch, capsys):
    words = ["coco_cost", "--image-size", "64x96", coco_cost.IMITATION]
    monkeypatch.setattr("sys.argv", words)
    coco_cost.main()
    (row,) = re.findall(r"^\| --distill imitation \| (.+) \|$", capsys.readouterr().out, re.M)
    alone = coco_cost.estimate(coco_cost.PLAIN["faster_rcnn"][0], (64, 96))
    operations, iterations, hours, memory = map(float, row.split(" | "))
    assert operations * 1e9 > alone.operations and memory * 1e9 > alone.memory
    expected = 90000 * 0.210 / 3600 * operations * 1e9 / alone.operations
    # The plain detector was measured twice: the same seed, the same cost.
    assert iterations == 90000 and hours == pytest.approx(expected, abs=0.06)


def test_the_form_has_what_the_page_needs():
    file = ROOT / ".github/ISSUE_TEMPLATE/my_coco_numbers.yml"
    assert str(file.relative_to(ROOT)) in PAGE
    form = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    expected = "recipe command student teacher alone seeds gpus hours memory versions log"
    assert list(fields) == expected.split()
    for name, part in fields.items():
        assert part["type"] in ("input", "textarea") and part["attributes"]["label"], name
        assert part["validations"]["required"] == (name != "log"), name
