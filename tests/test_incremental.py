"""Classes in increments: what is kept of a data set, how classes are numbered, and what is refused."""

import json
import logging
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from d2kd.config import load
from d2kd.data import (
    check_dataset,
    coco_dataset,
    incremental_split,
    register_voc,
    shapes,
    split_classes,
)
from d2kd.data.incremental import ERD_SPLITS, check_annotated_classes
from d2kd.engine import Trainer
from d2kd.losses import DistillLosses, ERDLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.structures.class_map import class_names
from d2kd.testing import tiny_gfl
from d2kd.utils.errors import InputError

from . import common
from .common import build, perfect
from .test_voc import NAMES, write_voc
from .tiny_run import draw_data, recipe, without_evaluation

ORDER = list(shapes.CLASSES)


few_shapes = common.few_shapes(train=20, val=8, test=3)


@pytest.mark.parametrize("split", ERD_SPLITS)
def test_published_splits(split):
    increments = split_classes("coco_2017_val", split)
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    assert [name for increment in increments for name in increment] == names
    ends = {"40+40": "bottle", "50+30": "orange", "60+20": "bed", "70+10": "oven"}
    assert increments[0][-1] == ends.get(split, "bottle")
    sizes = {"40+20+20": [40, 20, 20], "40+10x4": [40, 10, 10, 10, 10]}
    expected = sizes[split] if split in sizes else [int(n) for n in split.split("+")]
    assert [len(increment) for increment in increments] == expected


def taken():
    incremental_split("shapes_train", "4+4", 1, name="taken")
    incremental_split("shapes_train", "4+4", 2, name="taken")


def shapes_in(split, increment=1):
    return lambda: incremental_split("shapes_train", split, increment)


@pytest.mark.parametrize(
    "act, line",
    [
        (lambda: incremental_split("coco_2017_val", "4+4", 1), "split 4+4: 8 classes; expected 80"),
        (shapes_in("4+0+4"), "split 4+0+4"),
        (shapes_in("half"), "split: 'half'; expected numbers of classes"),
        (shapes_in([ORDER[:2], ["hexagon"]]), "split: unknown class 'hexagon'; expected of solid_"),
        (
            shapes_in([ORDER[:2], ORDER[1:3]]),
            "'striped_triangle' in increment 1 and 2; expected in",
        ),
        (shapes_in([ORDER[:2], []]), "split: an increment without a class"),
        (shapes_in("4+4", 3), "increment: 3; expected from 1 to 2"),
        (lambda: incremental_split("shape_train", "4+4", 1), "dataset: 'shape_train'"),
        (taken, "data set 'taken': already registered as increment 1 of"),
    ],
)
def test_what_is_refused(act, line):
    with pytest.raises(InputError, match=re.escape(line)):
        act()


def test_the_filter_rule():
    """Annotations of the increment, images that have one, global numbers; an image may be in two increments."""
    every = {r["image_id"]: r["annotations"] for r in DatasetCatalog.get("shapes_train")}

    def kept(increment, **options):
        name = incremental_split("shapes_train", "3+4+1", increment, **options)
        return {r["image_id"]: r["annotations"] for r in DatasetCatalog.get(name)}

    def of(numbers):
        chosen = {i: [a for a in all if a["category_id"] in numbers] for i, all in every.items()}
        return {i: annotations for i, annotations in chosen.items() if annotations}

    first, second = kept(1), kept(2)
    assert (first, second, kept(3)) == (of(range(3)), of(range(3, 7)), of([7]))
    assert len(first) < 20 and first.keys() & second.keys()
    assert kept(2, cumulative=True) == of(range(7)) != every
    assert list(kept(3, cumulative=True).items()) == list(every.items())


def test_counts_are_logged(caplog):
    records = DatasetCatalog.get("shapes_train")
    of = [{a["category_id"] // 4 for a in r["annotations"]} for r in records]
    boxes = sum(a["category_id"] >= 4 for r in records for a in r["annotations"])
    images, both = sum(1 in those for those in of), sum(those == {0, 1} for those in of)
    with caplog.at_level(logging.INFO, "d2kd"):
        DatasetCatalog.get(incremental_split("shapes_train", "4+4", 2))
    text = f"increment 2 of 2, 4 classes: {images} images, {boxes} boxes; of these images {both} in increment 1"
    assert text in caplog.text and 0 < both <= images


def test_any_order_of_names():
    """Class k is the k-th name of the split, whatever the data set calls it; other classes are left out."""
    split = [["striped_circle"], ["solid_triangle", "solid_circle"]]
    name = incremental_split("shapes_val", split, 2, cumulative=True)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["striped_circle", "solid_triangle", "solid_circle"]
    assert class_names(incremental_split("shapes_val", split, 1)) == ("striped_circle",)
    theirs = {r["image_id"]: r["annotations"] for r in DatasetCatalog.get("shapes_val")}
    for record in DatasetCatalog.get(name):
        named = [metadata.thing_classes[a["category_id"]] for a in record["annotations"]]
        original = [ORDER[a["category_id"]] for a in theirs[record["image_id"]]]
        assert named == [c for c in original if c in metadata.thing_classes]


def test_splits_of_equal_counts_are_data_sets_of_their_own():
    splits = [[ORDER[:4], ORDER[4:]], [ORDER[4:], ORDER[:4]], [ORDER[3::-1], ORDER[4:]]]
    names = [incremental_split("shapes_val", split, 1) for split in splits]
    assert len(set(names)) == 3
    for split, name in zip(splits, names):
        assert class_names(name) == tuple(split[0])
        assert MetadataCatalog.get(name).incremental_split.classes == tuple(split[0])
        assert incremental_split("shapes_val", split, 1) == name
    assert incremental_split("shapes_val", "4+4", 1) == names[0] == "shapes_val_4+4_increment1"


@pytest.mark.parametrize(
    "data, split",
    [
        ("shapes_train", "4+4"),
        ("shapes_train", [ORDER[4:], ORDER[:4]]),
        ("shapes_train", [["solid_circle"], ["solid_square"]]),
        ("voc", [NAMES[::-1][:1], NAMES[::-1][1:]]),
    ],
)
def test_evaluation_follows_the_increment(data, split, tmp_path):
    if data == "voc":
        write_voc(tmp_path)
        register_voc(data, str(tmp_path), "train", list(NAMES))
    source = MetadataCatalog.get(data).thing_classes
    for increment, cumulative in ((1, False), (2, False), (2, True)):
        name = incremental_split(data, split, increment, cumulative=cumulative)
        assert check_dataset(name) == [name]
        records = DatasetCatalog.get(name)
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
        part = MetadataCatalog.get(name).incremental_split
        content = evaluator._coco_api.dataset
        assert content["d2kd_increment"] == list(part.classes)
        assert len(content["categories"]) == len(part.order)
        assert {one["id"] for one in content["images"]} == {r["image_id"] for r in records}
        assert len(content["annotations"]) == sum(len(r["annotations"]) for r in records)
        evaluator.reset()
        evaluator.process(records, [{"instances": perfect(record)} for record in records])
        found = evaluator.evaluate()["bbox"]
        measured = {c for c in part.order if found[f"AP-{c}"] == found[f"AP-{c}"]}
        assert measured <= set(part.classes) and measured
        assert all(found[f"AP-{c}"] == pytest.approx(100) for c in measured)
        kept = [[part.order[a["category_id"]] for a in r["annotations"]] for r in records]
        kept = [classes for classes in kept if classes]
        given = [
            [source[a["category_id"]] for a in r["annotations"]] for r in DatasetCatalog.get(data)
        ]
        assert kept == [one for all in given if (one := [c for c in all if c in part.classes])]


def rewritten(folder, change):
    """The data of :func:`draw_data` with another content of its file."""
    draw_data(folder)
    content = json.loads((folder / "data.json").read_text())
    change(content)
    (folder / "data.json").write_text(json.dumps(content))
    return coco_dataset(f"other_{folder}", str(folder / "data.json"), str(folder))


def test_an_increment_without_images(tmp_path):
    def without_a_class(content):
        kept = [a for a in content["annotations"] if a["category_id"] != 2]
        content["annotations"] = kept

    source = rewritten(tmp_path, without_a_class)
    name = incremental_split(source, [["class 0"], ["class 1"]], 2)
    assert check_dataset(name) == [name]
    with pytest.raises(InputError, match="no object of class 1; expected at least one"):
        DatasetCatalog.get(name)


def test_a_file_that_names_its_increment(tmp_path):
    def of_other_classes(content):
        first = content["annotations"][0]["category_id"] - 1
        content["d2kd_increment"] = [f"class {k}" for k in range(3) if k != first]

    line = r"annotations\[0\] \(id 1\): class 'class \d', outside the increment, and \d more; expected one of class"
    with pytest.raises(InputError, match=line):
        rewritten(tmp_path, of_other_classes)


def increment(tmp_path, data=None, **train):
    """A tiny GFL of one class that learns two more; its recipe, and the old detector's file."""
    draw_data(tmp_path / "data")
    student, old = tiny_gfl(), tiny_gfl(classes=1)
    student.num_old_classes = 1
    weights = tmp_path / "old.pth"
    if not weights.exists():
        torch.save({"model": build(old, 3).state_dict(), "classes": ["class 0"]}, weights)
    model = L(Distiller)(
        student=student,
        teacher=L(Teacher)(detector=old, weights=str(weights), classes=["class 0"]),
        losses=L(DistillLosses)(erd=L(ERDLoss)()),
        max_iter="${train.max_iter}",
        inherit=[""],
        classes=["class 0", "class 1", "class 2"],
    )
    config = without_evaluation(recipe(tmp_path / "data", tmp_path / "out", model, **train))
    whole = config.dataloader.train.dataset.names
    config.dataloader.train.dataset.names = L(incremental_split)(
        dataset=whole, split=data or [["class 0"], ["class 1", "class 2"]], increment=2
    )
    return config


def test_names_travel_in_the_checkpoint(tmp_path):
    config = increment(tmp_path)
    trainer = Trainer(config)
    trainer.resume_or_load(False)
    trainer.train()
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)
    assert saved["classes"] == ["class 0", "class 1", "class 2"]
    assert not any("teacher" in key for key in saved["model"])
    # Stock Detectron2 reads it.
    plain = build(tiny_gfl(), 9)
    DetectionCheckpointer(plain).load(str(tmp_path / "out" / "model_final.pth"))
    for key, value in trainer.model.student.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    # It goes on, but not as another's.
    trainer = Trainer(increment(tmp_path, max_iter=5))
    trainer.resume_or_load(True)
    assert trainer.start_iter == 4
    other = increment(tmp_path)
    other.model.classes = ["class 0", "class 2", "class 1"]
    other.dataloader.train.dataset.names.split = [["class 0"], ["class 2"], ["class 1"]]
    other.dataloader.train.dataset.names.increment = 3
    with pytest.raises(
        InputError, match="class 1 is 'class 1', not 'class 2'; expected the classes"
    ):
        Trainer(other)
    del other.dataloader.test
    with pytest.raises(InputError, match="its classes are class 0, class 1, class 2; expected the"):
        Trainer(other).resume_or_load(True)


def test_old_weights_outlast_every_initialization(tmp_path):
    other = tmp_path / "backbone.pth"
    torch.save({"model": build(tiny_gfl(), 7).state_dict()}, other)
    trainer = Trainer(increment(tmp_path, init_checkpoint=str(other)))
    trainer.resume_or_load(False)
    student, old = trainer.model.student, trainer.model.teacher.detector
    for key, value in old.state_dict().items():
        own = student.state_dict()[key]
        assert torch.equal(own[:1] if key.startswith("head.cls_score.") else own, value), key


def test_bad_input_is_refused_before_training(tmp_path):
    config = increment(tmp_path)
    dataset = config.dataloader.train.dataset
    dataset.names.cumulative = True
    with pytest.raises(
        InputError, match="data set '.*': has 'class 0', an old class; expected new"
    ):
        Trainer(config)
    dataset.names = dataset.names.dataset
    with pytest.raises(InputError, match=r"\.png: an object of 'class 0', an old class; expected"):
        Trainer(config)
    file = tmp_path / "old.pth"
    torch.save({**torch.load(file), "classes": ["class 9"]}, file)
    with pytest.raises(InputError, match="its classes are class 9; expected the classes class 0"):
        Trainer(increment(tmp_path))
    assert not (tmp_path / "out").exists()


def test_objects_of_classes_that_a_detector_lacks(tmp_path):
    """What it cannot learn, it would learn as background."""
    draw_data(tmp_path)
    whole = coco_dataset(f"all_{tmp_path}", str(tmp_path / "data.json"), str(tmp_path))
    split = [["class 1"], ["class 0"], ["class 2"]]
    parts = [incremental_split(whole, split, increment) for increment in (1, 2, 3)]
    ranges = ("from 1 to 3", "from 2 to 3", "3")
    for part, first, expected in zip([*parts, whole], (1, 2, 3, 3), [*ranges, "3, as"]):
        for count in range(1, 5):
            if first <= count <= 3:
                check_annotated_classes([part], count)
                continue
            with pytest.raises(InputError, match=f": {count} of the student; expected {expected}"):
                check_annotated_classes([part], count)


@pytest.mark.parametrize("named", [False, True])
def test_objects_of_data_without_a_file(named):
    """Neither a crowd nor an image without annotations is an old object."""
    objects = [{"file_name": "a", "annotations": [{"category_id": k} for k in (1, 2, 3)]}]
    crowd = {"file_name": "b", "annotations": [{"category_id": 0, "iscrowd": 1}]}
    DatasetCatalog.register("listed", lambda: [*objects, crowd, {"file_name": "c"}])
    if named:
        MetadataCatalog.get("listed").thing_classes = ["a", "b", "c"]
    with pytest.raises(InputError, match="a: an object of class 3, which the detector lacks"):
        check_annotated_classes(["listed"], 3)
    del objects[0]["annotations"][2]
    check_annotated_classes(["listed"], 3, 1)


@pytest.mark.parametrize(
    "split, increments",
    [("40_40", 2), ("50_30", 2), ("60_20", 2), ("70_10", 2), ("40_20_20", 3), ("40_10x4", 5)],
)
def test_published_increments_begin_where_the_one_before_ended(split, increments):
    folder = "projects/ERD/configs"
    before = load(f"{folder}/gfl_R_50_first_{split[:2]}_1x.py")
    for increment in range(2, increments + 1):
        name = f"erd_gfl_R_50_{split}" + (f"_increment{increment}" if increments > 2 else "")
        recipe = load(f"{folder}/{name}_1x.py")
        assert recipe.model.teacher.weights == f"{before.train.output_dir}/model_final.pth"
        before = recipe
    for recipe, length in ((load(f"{folder}/gfl_R_50_first_40_1x.py"), 72890), (before, 40945)):
        assert recipe.train.max_iter == length
        assert recipe.lr_multiplier.warmup_length * length == pytest.approx(500)
        assert list(recipe.lr_multiplier.scheduler.milestones) == [8, 11, 12]
