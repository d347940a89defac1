"""Subsets: which images, with the metadata of the whole set, wherever a data set is used."""

import subprocess
import sys

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator

from d2kd.config.saving import save_config
from d2kd.data import check_dataset, incremental_split, register_voc, shapes, subset
from d2kd.data.catalog import register_from_config
from d2kd.doctor.data_checks import check_data
from d2kd.engine import Trainer
from d2kd.structures.class_map import class_names
from d2kd.utils.errors import InputError

from . import common
from .common import perfect
from .test_voc import NAMES, write_voc
from .tiny_run import draw_data, recipe

few_shapes = common.few_shapes(train=20, val=8, test=3)


def ids(name):
    return [record["image_id"] for record in DatasetCatalog.get(name)]


def test_subsets_are_nested_random_and_in_order():
    every = ids("shapes_train")
    small, large = ids(subset("shapes_train", 5)), ids(subset("shapes_train", 12))
    assert len(small) == 5 and len(large) == 12 and set(small) < set(large)
    assert [i for i in every if i in large] == large != every[:12]
    rest = ids(subset("shapes_train", 5, complement=True))
    assert sorted(small + rest) == every and [i for i in every if i in rest] == rest
    assert ids(subset("shapes_train", 20)) == every
    other = ids(subset("shapes_train", 5, seed=1))
    assert len(other) == 5 and other != small
    names = {"shapes_train_5_images", "shapes_train_without_5_images"}
    assert names | {"shapes_train_5_images_seed1"} <= set(DatasetCatalog.list())


def test_records_are_those_of_the_whole_set():
    whole = {record["image_id"]: record for record in DatasetCatalog.get("shapes_train")}
    records = DatasetCatalog.get(subset("shapes_train", 3, name="mine"))
    assert [whole[record["image_id"]] for record in records] == records
    assert subset("shapes_train", 3, name="mine") == "mine"
    assert class_names("mine") == class_names("shapes_train")


def taken():
    subset("shapes_train", 3, name="taken")
    subset("shapes_train", 4, name="taken")


@pytest.mark.parametrize(
    "act, line",
    [
        (lambda: subset("shape_train", 5), "dataset of subset: 'shape_train'; expected a reg"),
        (lambda: subset("shapes_train", 0), "images of subset: 0; expected a whole number from 1"),
        (lambda: subset("shapes_train", 0.2), "images of subset: 0.2"),
        (lambda: subset("shapes_train", True), "images of subset: True"),
        (lambda: subset("shapes_train", 5, seed=-1), "seed of subset: -1; expected a whole number"),
        (taken, "data set 'taken': already registered as 3 images, seed 0, in shapes_train; exp"),
    ],
)
def test_what_is_refused(refuses, act, line):
    refuses(act, line)


@pytest.mark.parametrize("images, complement, most", [(21, False, 20), (20, True, 19)])
def test_too_many_images_are_refused_when_the_set_is_checked(images, complement, most):
    name = subset("shapes_train", images, complement=complement)
    line = f"subset of 'shapes_train': {images} images; expected at most {most}, since"
    for act in (check_dataset, DatasetCatalog.get):
        with pytest.raises(InputError, match=line):
            act(name)


@pytest.mark.parametrize("data", ["shapes_val", "voc", "increment", "part of it"])
def test_evaluation_follows_the_subset(data, tmp_path):
    if data == "voc":
        write_voc(tmp_path)
        register_voc(data, str(tmp_path), "train", list(NAMES))
    if data == "increment":
        data = incremental_split("shapes_val", "4+4", 2)
    name = subset("shapes_val" if data == "part of it" else data, 2, complement=data == "voc")
    if data == "part of it":
        name = incremental_split(name, "4+4", 1)
    assert check_dataset(name) == [name]
    records = DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
    content = evaluator._coco_api.dataset
    assert {one["id"] for one in content["images"]} == {r["image_id"] for r in records}
    assert len(content["annotations"]) == sum(len(r["annotations"]) for r in records) > 0
    evaluator.reset()
    evaluator.process(records, [{"instances": perfect(record)} for record in records])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_a_set_that_gets_its_classes_while_it_is_loaded():
    def load():
        MetadataCatalog.get("late").thing_classes = ["a", "b"]
        return [{"file_name": f"{i}.png", "image_id": i, "annotations": []} for i in range(9)]

    DatasetCatalog.register("late", load)
    name = subset("late", 4)
    assert MetadataCatalog.get(name).get("thing_classes") is None
    assert len(get_detection_dataset_dicts(name, filter_empty=False)) == 4
    assert MetadataCatalog.get(name).thing_classes == ["a", "b"]


def test_a_set_that_gets_its_classes_while_it_is_checked(tmp_path):
    """As one that Detectron2 registers; a Distiller looks for the names before anything is loaded."""
    draw_data(tmp_path)
    register_coco_instances("stock", {}, str(tmp_path / "data.json"), str(tmp_path))
    name = subset("stock", 4)
    assert check_dataset(name) == [name]
    assert class_names(name) == class_names("stock") == ("class 0", "class 1", "class 2")


def test_annotations_follow_a_set_that_is_drawn_anew(tmp_path):
    name = subset("shapes_val", 2)
    before = COCOEvaluator(name, output_dir=str(tmp_path))._coco_api.getImgIds()
    shapes.register_shapes(tmp_path / "other", train=2, val=30, test=2)
    after = COCOEvaluator(name, output_dir=str(tmp_path))._coco_api.getImgIds()
    assert sorted(after) == ids(name) and set(before) != set(after)


@pytest.fixture
def training(tmp_path):
    """A recipe whose data are four of six images, which no process knows before it reads the recipe."""
    draw_data(tmp_path / "data")
    config = recipe(tmp_path / "data", tmp_path / "run", max_iter=2)
    whole = config.dataloader.train.dataset.names
    config.dataloader.train.dataset.names = L(subset)(dataset=whole, images=4)
    config.dataloader.test.dataset.names = L(subset)(dataset=whole, images=4, complement=True)
    config.dataloader.evaluator.dataset_name = "${..test.dataset.names}"
    return config


def test_training_doctor_and_resume(training):
    findings = list(check_data(training, images=0))
    assert "error" not in {finding.state for finding in findings}
    assert [f.found[:8] for f in findings if f.subject.endswith(" data")] == [
        "4 images",
        "2 images",
    ]
    for steps, start in ((2, 0), (4, 2)):
        training.train.max_iter = steps
        trainer = Trainer(training)
        trainer.resume_or_load(resume=start > 0)
        assert trainer.start_iter == start and len(trainer.data_loader.dataset) == 4
        trainer.train()


def test_a_process_with_fresh_registries(training, tmp_path):
    save_config(training, tmp_path / "config.yaml")
    code = (
        "import sys; from d2kd.config import load; from d2kd.data import check_dataset\n"
        "from detectron2.data import DatasetCatalog\n"
        "[name] = check_dataset(load(sys.argv[1]).dataloader.train.dataset.names)\n"
        "print([record['image_id'] for record in DatasetCatalog.get(name)])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name = instantiate(training.dataloader.train.dataset.names)
    assert printed == f"{ids(name)}\n"


def test_commands_find_a_subset_of_a_recipe(training):
    name = f"{training.dataloader.test.dataset.names.dataset.name}_without_4_images"
    register_from_config(training, name)
    assert len(ids(name)) == 2
