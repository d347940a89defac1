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
from detectron2.structures import Boxes, BoxMode, Instances

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

from .common import build
from .test_voc import NAMES, write_voc
from .tiny_run import draw_data, recipe, without_evaluation

ORDER = list(shapes.CLASSES)


@pytest.fixture(autouse=True)
def few_shapes(tmp_path):
    shapes.register(tmp_path / "shapes", train=20, val=8, test=3)
    yield
    shapes.register()


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


@pytest.mark.parametrize(
    "split, line",
    [
        ("40+40", "split 40+40: 80 classes; expected 8 in all"),
        ("4+0+4", "split 4+0+4"),
        ("half", "split: 'half'; expected numbers of classes"),
        ([ORDER[:2], ["hexagon"]], "split: unknown class 'hexagon'; expected of solid_triangle"),
        (
            [ORDER[:2], ORDER[1:3]],
            "'striped_triangle' in increment 1 and 2; expected increments that do not",
        ),
        ([ORDER[:2], []], "split: an increment without a class"),
    ],
)
def test_bad_splits(split, line):
    with pytest.raises(InputError, match=re.escape(line)):
        incremental_split("shapes_train", split, 1)


def test_bad_increments():
    with pytest.raises(InputError, match="increment: 3; expected from 1 to 2"):
        incremental_split("shapes_train", "4+4", 3)
    with pytest.raises(InputError, match="dataset: 'shape_train'"):
        incremental_split("shape_train", "4+4", 1)
    incremental_split("shapes_train", "4+4", 1, name="taken")
    with pytest.raises(InputError, match="data set 'taken': already registered as increment 1 of"):
        incremental_split("shapes_train", "4+4", 2, name="taken")


def test_the_filter_rule():
    """Annotations of the increment, images that have one, global numbers; an image may be in two increments."""
    every = {r["image_id"]: r["annotations"] for r in DatasetCatalog.get("shapes_train")}
    increments = [
        {
            r["image_id"]: r
            for r in DatasetCatalog.get(incremental_split("shapes_train", "3+4+1", i))
        }
        for i in (1, 2, 3)
    ]
    bounds = [range(0, 3), range(3, 7), range(7, 8)]
    for increment, numbers in zip(increments, bounds):
        expected = {
            i: [a for a in annotations if a["category_id"] in numbers]
            for i, annotations in every.items()
        }
        assert {i: r["annotations"] for i, r in increment.items()} == {
            k: v for k, v in expected.items() if v
        }
    assert len(increments[0]) < 20 and increments[0].keys() & increments[1].keys()
    seen = DatasetCatalog.get(incremental_split("shapes_train", "3+4+1", 2, cumulative=True))
    known = {i: [a for a in each if a["category_id"] < 7] for i, each in every.items()}
    assert {r["image_id"]: r["annotations"] for r in seen} == {k: v for k, v in known.items() if v}
    assert known != every
    last = DatasetCatalog.get(incremental_split("shapes_train", "3+4+1", 3, cumulative=True))
    assert [(r["image_id"], r["annotations"]) for r in last] == list(every.items())


def test_counts_are_logged(caplog):
    records = DatasetCatalog.get("shapes_train")
    of = [{a["category_id"] // 4 for a in r["annotations"]} for r in records]
    boxes = sum(a["category_id"] >= 4 for r in records for a in r["annotations"])
    images, both = (
        sum(1 in increments for increments in of),
        sum(increments == {0, 1} for increments in of),
    )
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
        assert (
            class_names(name)
            == tuple(split[0])
            == MetadataCatalog.get(name).incremental_split.classes
        )
        assert incremental_split("shapes_val", split, 1) == name
    assert incremental_split("shapes_val", "4+4", 1) == names[0] == "shapes_val_4+4_increment1"


def perfect(evaluator, name):
    """What an evaluator says of a detector that sees every annotation of a data set."""
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = Instances((record["height"], record["width"]))
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]]).long()
        found.scores = torch.ones(len(found.pred_classes))
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize(
    "split", ["4+4", [ORDER[4:], ORDER[:4]], [["solid_circle"], ["solid_square"]]]
)
def test_evaluation_follows_the_increment(split, tmp_path):
    for increment, cumulative in ((1, False), (2, False), (2, True)):
        name = incremental_split("shapes_train", split, increment, cumulative=cumulative)
        records = DatasetCatalog.get(name)
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
        part = MetadataCatalog.get(name).incremental_split
        content = evaluator._coco_api.dataset
        assert content["d2kd_increment"] == list(part.classes)
        assert len(content["categories"]) == len(part.order)
        assert {one["id"] for one in content["images"]} == {r["image_id"] for r in records}
        assert len(content["annotations"]) == sum(len(r["annotations"]) for r in records)
        found = perfect(evaluator, name)
        measured = {c for c in part.order if found[f"AP-{c}"] == found[f"AP-{c}"]}
        assert measured <= set(part.classes) and measured
        assert all(found[f"AP-{c}"] == pytest.approx(100) for c in measured)


def test_voc_style_data(tmp_path):
    write_voc(tmp_path)
    name = register_voc(f"voc_{tmp_path}", str(tmp_path), "train", list(NAMES))
    every = DatasetCatalog.get(name)
    split = [NAMES[::-1][:1], NAMES[::-1][1:]]
    for increment in (1, 2):
        part = incremental_split(name, split, increment)
        check_dataset(part)
        expected = [
            [
                NAMES[a["category_id"]]
                for a in r["annotations"]
                if NAMES[a["category_id"]] in split[increment - 1]
            ]
            for r in every
        ]
        order = MetadataCatalog.get(part).thing_classes
        kept = [
            [order[a["category_id"]] for a in r["annotations"]] for r in DatasetCatalog.get(part)
        ]
        assert kept == [names for names in expected if names] and kept
        evaluator = COCOEvaluator(part, output_dir=str(tmp_path / "out"), use_fast_impl=False)
        assert perfect(evaluator, part)["AP"] == pytest.approx(100)


def test_an_increment_without_images(tmp_path):
    draw_data(tmp_path)
    file = tmp_path / "data.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 2]
    file.write_text(json.dumps(content))
    source = coco_dataset(f"few_{tmp_path}", str(file), str(tmp_path))
    name = incremental_split(source, [["class 0"], ["class 1"]], 2)
    assert check_dataset(name) == [name]
    with pytest.raises(InputError, match="no object of class 1; expected at least one"):
        DatasetCatalog.get(name)


def test_a_file_that_says_its_increment(tmp_path):
    draw_data(tmp_path)
    file = tmp_path / "data.json"
    content = json.loads(file.read_text())
    first = content["annotations"][0]["category_id"] - 1
    content["d2kd_increment"] = [f"class {k}" for k in range(3) if k != first]
    file.write_text(json.dumps(content))
    line = f"annotation 1: class 'class {first}', outside the increment; expected one of class"
    with pytest.raises(InputError, match=line):
        coco_dataset(f"increment_{tmp_path}", str(file), str(tmp_path))


# In a run


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
    with pytest.raises(
        InputError, match="data set '.*': has 'class 0', an old class; expected new"
    ):
        config = increment(tmp_path)
        config.dataloader.train.dataset.names.cumulative = True
        Trainer(config)
    with pytest.raises(InputError, match=r"\.png: an object of 'class 0', an old class; expected"):
        config = increment(tmp_path)
        config.dataloader.train.dataset.names = config.dataloader.train.dataset.names.dataset
        Trainer(config)
    file = tmp_path / "old.pth"
    torch.save({**torch.load(file), "classes": ["class 9"]}, file)
    with pytest.raises(InputError, match="its classes are class 9; expected the classes class 0"):
        Trainer(increment(tmp_path))
    assert not (tmp_path / "out").exists()


def test_crowds_and_unlabelled_data_are_no_old_objects():
    name = "d2kd_test_crowd"
    crowd = {"category_id": 0, "iscrowd": 1}
    DatasetCatalog.register(
        name, lambda: [{"file_name": "a", "annotations": [crowd]}, {"file_name": "b"}]
    )
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    try:
        check_annotated_classes([name], 2, 1)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_objects_of_classes_that_a_detector_lacks(tmp_path):
    """What it cannot learn, it would learn as background."""
    draw_data(tmp_path)
    whole = coco_dataset(f"all_{tmp_path}", str(tmp_path / "data.json"), str(tmp_path))
    split = [["class 1"], ["class 0"], ["class 2"]]
    for increment, counts in ((1, [1, 2, 3]), (2, [2, 3]), (3, [3])):
        part = incremental_split(whole, split, increment)
        for count in range(1, 5):
            if count in counts:
                check_annotated_classes([part], count)
            else:
                expected = "3" if counts == [3] else f"from {counts[0]} to 3"
                with pytest.raises(
                    InputError, match=f"{count} of the student; expected {expected}"
                ):
                    check_annotated_classes([part], count)
    check_annotated_classes([whole], 3)
    for count in (2, 4):
        with pytest.raises(
            InputError, match=f"num_classes: {count} of the student; expected 3, as"
        ):
            check_annotated_classes([whole], count)


@pytest.mark.parametrize("named", [False, True])
def test_objects_of_data_without_a_file(named):
    name = "d2kd_test_listed"
    objects = [{"file_name": "a", "annotations": [{"category_id": k} for k in (0, 2, 3)]}]
    DatasetCatalog.register(name, lambda: objects)
    if named:
        MetadataCatalog.get(name).thing_classes = ["a", "b", "c"]
    try:
        with pytest.raises(InputError, match="a: an object of class 3, which the detector lacks"):
            check_annotated_classes([name], 3)
        del objects[0]["annotations"][2]
        check_annotated_classes([name], 3)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "split, increments",
    [("40_40", 2), ("50_30", 2), ("60_20", 2), ("70_10", 2), ("40_20_20", 3), ("40_10x4", 5)],
)
def test_published_steps_begin_where_the_one_before_ended(split, increments):
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
