"""``config.yaml`` of a run builds the very training that wrote it, in any process."""

import json
import os
import subprocess
import sys
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from fvcore.common.param_scheduler import LinearParamScheduler
from omegaconf import DictConfig, OmegaConf

from d2kd.config import load
from d2kd.config.saving import changed_values, save_config
from d2kd.utils.env import config_hash
from d2kd.utils.errors import InputError

from .common import ROOT
from .test_configs import RECIPES


def written(content, folder):
    config = DictConfig(content, flags={"allow_objects": True})
    save_config(config, folder / "config.yaml")
    return config, LazyConfig.load(str(folder / "config.yaml"))


def same_order(one, other):
    """Nodes are built in the order of their keys, and each draws its weights as it is built."""
    if OmegaConf.is_dict(one):
        return list(one) == list(other) and all(
            OmegaConf.is_interpolation(one, key) or same_order(one[key], other[key]) for key in one
        )
    return not OmegaConf.is_list(one) or all(map(same_order, one, other))


# Of each kind one: ICD has an optimizer of its own, a later increment of ERD registers its data.
OFTEN = ["TAR/configs/tar_shapes", "ICD/configs/icd_bccd_retinanet"]
OFTEN += ["ERD/configs/erd_gfl_R_50_40_40_1x", "configs/baselines/gfl_small_shapes"]
OFTEN = [path for path in RECIPES if path.removeprefix("projects/").removesuffix(".py") in OFTEN]
SELDOM = [pytest.param(path, marks=pytest.mark.sweep) for path in RECIPES if path not in OFTEN]
assert len(OFTEN) == 4


@pytest.mark.parametrize("path", [*OFTEN, *SELDOM])
def test_every_recipe_is_the_same_when_read_back(path, tmp_path):
    recipe = load(str(ROOT / path))
    save_config(recipe, tmp_path / "config.yaml")
    again = load(str(tmp_path / "config.yaml"))
    assert config_hash(again) == config_hash(recipe)
    assert same_order(recipe, again)
    assert "pickle" not in (tmp_path / "config.yaml").read_text()  # a person can read it


COMMON = """
def doubled(x):
    return Twice()(x)

class Twice:
    def __call__(self, x):
        return 2 * x
"""
RECIPE = """
from enum import Enum
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from .common import Twice, doubled

FACTOR = 3
class Kind(Enum):
    one, two = 1, 2

def times(x):
    return FACTOR * x

class Held:
    def __init__(self, function, twice=Twice, kind=Kind.two):
        self.value = function(7)
        self.twice = twice

def is_held(held):
    return isinstance(held, Held) and held.twice is Twice

def images(count=2):
    return [{"image_id": k} for k in range(count)]

DatasetCatalog.register("mine_in_yaml", images)
DatasetCatalog.register("mine_too_in_yaml", lambda: images(5))

model = dict(
    lambda_=L(Held)(function=lambda x: x + 1),
    function=L(Held)(function=times, kind=Kind.one),
    imported=L(Held)(function=doubled),
    held=L(is_held)(held=L(Held)(function=times)),
)
train = dict(max_iter=3)
optimizer = dict()
dataloader = dict(train=dict(dataset=dict(names="mine_in_yaml")), test=dict(names=["mine_too_in_yaml"]))
"""
READ = """
import json, sys
from d2kd.config import load
from d2kd.utils.env import config_hash
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
config = load(sys.argv[1])
built = {key: instantiate(node) for key, node in config.model.items()}
values = {key: getattr(made, "value", made) for key, made in built.items()}
values["sets"] = [len(DatasetCatalog.get(n)) for n in ("mine_in_yaml", "mine_too_in_yaml")]
print(json.dumps([config_hash(config), values]))
"""


def test_what_a_recipe_defines_itself_is_read_in_another_process(tmp_path):
    """Classes, functions and lambdas of its file and of one beside it, and the data sets it registers."""
    (tmp_path / "common.py").write_text(COMMON)
    (tmp_path / "recipe.py").write_text(RECIPE)
    recipe = load(str(tmp_path / "recipe.py"))
    file = tmp_path / "run" / "config.yaml"
    save_config(recipe, file)
    (tmp_path / "elsewhere").mkdir()
    words, options = [sys.executable, "-c", READ, str(file)], dict(cwd=tmp_path / "elsewhere")
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    sha256, values = json.loads(subprocess.check_output(words, text=True, **options))
    assert sha256 == config_hash(recipe)
    assert values == dict(lambda_=8, function=21, imported=14, held=True, sets=[2, 5])
    # What was read back can be written once more, as a run does with the config a study wrote.
    again = load(str(file))
    save_config(again, file)
    assert config_hash(load(str(file))) == sha256


class Colour(Enum):
    red = 1


def test_values_of_any_kind(tmp_path):
    shared = np.arange(3)
    given = dict(
        name=torch.float32, path=Path("a b"), colour=Colour.red, function=partial(max, 3),
        scheduler=LinearParamScheduler(1.0, 0.1), tensor=torch.ones(2), odd="1e-3", no="no",
        small=1e-5, nothing=None, missing="???", other="${small}", nested=[[1], {"a": ["x"]}],
        one=shared, same=shared, infinite=float("inf"), built_in=len, method=Path.cwd,
        method_of_a_class=Colour.__reduce_ex__, text="café: {x}",
    )  # fmt: skip
    config, again = written(given, tmp_path)
    assert list(config) == list(again)
    one, other = (OmegaConf.to_container(c, resolve=False) for c in (config, again))
    for key in ("name", "path", "colour", "odd", "no", "small", "nothing", "missing", "other",
                "nested", "infinite", "built_in", "method", "method_of_a_class", "text"):  # fmt: skip
        assert one[key] == other[key] and type(one[key]) is type(other[key]), key
    assert other["function"](1) == 3 and other["scheduler"](0.5) == config.scheduler(0.5)
    assert torch.equal(other["tensor"], torch.ones(2))
    assert np.array_equal(other["one"], shared) and other["one"] is other["same"]


def test_a_recipe_that_cannot_be_written_says_so(tmp_path):
    class Stubborn:
        def __reduce__(self):
            raise TypeError("not to be pickled")

    with pytest.raises(InputError, match="config.yaml: cannot be written .not to be pickled"):
        written(dict(x=Stubborn()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_hashes_are_of_content():
    class Held:
        def __init__(self, value):
            self.value = value

    def hashed(value, **more):
        return config_hash(DictConfig(dict(x=value, **more), flags={"allow_objects": True}))

    assert hashed(Held(1)) == hashed(Held(1)) != hashed(Held(2))
    assert hashed(torch.optim.SGD) == hashed("torch.optim.SGD") != hashed(torch.optim.Adam)
    assert hashed(1, y=2) == config_hash({"y": 2, "x": 1})
    assert hashed("${y}", y=1) == hashed(1, y=1)


def test_what_has_changed_is_found_without_executing_anything(tmp_path):
    config = load("projects/ICD/configs/icd_shapes.py", ["train.user.f=1"])
    config.train.user.f = lambda: 1  # is pickled
    file = tmp_path / "config.yaml"
    save_config(config, file)
    assert changed_values(config, file) == {}
    config.optimizer.lr = 3.0
    config.model.student.backbone.bottom_up.norm = None
    config.model.inherit = ["a", "b"]
    config.dataloader.test._target_ = Path
    del config.train["seed"]
    config.train.user = {}
    before = load("projects/ICD/configs/icd_shapes.py")
    assert changed_values(config, file) == {
        "optimizer.lr": (str(before.optimizer.lr), "3.0"),
        "model.student.backbone.bottom_up.norm": ("BN", "null"),
        "model.inherit": (f"[{', '.join(before.model.inherit)}]", "[a, b]"),
        "dataloader.test._target_": ("d2kd.data.build_test_loader", "pathlib.Path"),
        "train.seed": (str(before.train.seed), "nothing"),
        "train.user.f": ("an object", "nothing"),
        "train.user": ("nothing", "{}"),
    }
    file.write_text("a: !!python/object/apply:os.mkdir [ran]\nb: [")
    assert changed_values(config, file) == {} == changed_values(config, tmp_path / "gone.yaml")
    file.write_text(f"train: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    assert changed_values(config, file)["train"][0] == str(tmp_path / "ran")
    assert not (tmp_path / "ran").exists()
