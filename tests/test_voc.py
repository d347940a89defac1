"""VOC-style data: read as Detectron2 does, boxes without area aside; and the blood cells' recipes."""

import json
import logging
import os
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances, register_pascal_voc
from hypothesis import given, settings
from PIL import Image

from d2kd.config import load
from d2kd.data import check_dataset, register_voc
from d2kd.engine import Trainer, do_test
from d2kd.utils.errors import InputError

from . import tiny_run
from .common import CLASSES, ROOT, perfect
from .odd_files import VOC_EDITS, check_voc

NAMES = [f"class {k}" for k in range(CLASSES)]
SIZE = 64, 48  # width, height
# Per image its objects: (class, xmin, ymin, xmax, ymax), counted from 1.
SPLITS = {
    "train": [[(0, 1, 1, 64, 48), (1, 10, 10, 11, 30)], [], [(2, 5.5, 6, 30, 40)]],
    "val": [[(1, 3, 4, 33, 44), (0, 20, 1, 60, 20)], [(2, 1, 1, 20, 20)]],
    "one": [[(0, 2, 3, 40, 41)]],
}
WITHOUT_AREA = [
    (0, 10, 10, 10, 30),
    (1, 10, 30, 20, 30),
    (2, 10.3, 5, 10.3, 9),
    (0, 30, 10, 20, 40),
]
OUTSIDE = [(0, 65, 1, 70, 9), (1, 1, 49, 9, 60), (2, -9, 1, 0, 9), (0, 1, -9, 9, 0)]


def write_voc(root, splits=SPLITS, names=NAMES):
    """A set of random images; image k of a split is called ``<split><k>``."""
    random = np.random.RandomState(0)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for split, images in splits.items():
        stems = [f"{split}{k}" for k in range(len(images))]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for stem, objects in zip(stems, images):
            pixels = random.randint(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{stem}.jpg")
            text = "".join(
                f"<object><name>{names[k]}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
                f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
                for k, x0, y0, x1, y1 in objects
            )
            size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
            xml = root / "Annotations" / f"{stem}.xml"
            xml.write_text(f"<annotation>{size}{text}</annotation>")
    return root


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "voc")


def register(root, split, name="own"):
    return register_voc(name, str(root), split, NAMES)


def boxes(name="own"):
    return [[a["bbox"] for a in record["annotations"]] for record in DatasetCatalog.get(name)]


@pytest.mark.parametrize("split", ["train", "val"])  # it reads no list of one image
def test_what_detectron2_reads(voc, split, caplog):
    with caplog.at_level(logging.WARNING):
        register(voc, split)
    assert DatasetCatalog.get("own") == load_voc_instances(str(voc), split, NAMES)
    register_pascal_voc("plain", str(voc), split, 2007, NAMES)
    assert check_dataset(["plain", "own"]) == ["plain", "own"]
    assert MetadataCatalog.get("own").thing_classes == NAMES
    assert not caplog.records


def test_boxes_without_area_in_the_image_are_dropped_and_counted_once(tmp_path, caplog):
    good = [(0, 10, 10, 11, 11), (1, 1, 1, 64, 48), (0, 64, 48, 70, 60), (0, -9, -9, 1, 1)]
    images = [good + WITHOUT_AREA + OUTSIDE, WITHOUT_AREA[:1], good]
    root = write_voc(tmp_path / "voc", {"train": images})
    with caplog.at_level(logging.WARNING):
        register(root, "train")
        register(root, "train")
        check_dataset("own")
        shifted = [[9, 9, 11, 11], [0, 0, 64, 48], [63, 47, 70, 60], [-10, -10, 1, 1]]
        assert boxes() == [shifted, [], shifted]
    (record,) = caplog.records
    assert record.getMessage() == "own: 9 of 17 boxes left out: no area in the image"
    assert MetadataCatalog.get("own").oddities == ["9 of 17 boxes left out: no area in the image"]


def test_names_mean_one_thing(voc):
    assert register(voc, "train") == register(voc, "train") == "own"
    others = (voc, "val", NAMES), (voc, "train", NAMES[::-1]), (voc.parent, "train", NAMES)
    for root, split, classes in others:
        with pytest.raises(InputError, match="data set 'own': already registered as .*train.txt"):
            register_voc("own", str(root), split, classes)
    with pytest.raises(InputError, match="data set 'shapes_val': already registered; expected"):
        register(voc, "train", "shapes_val")
    for classes in ([], ["a", "b", "a"]):
        with pytest.raises(InputError, match="classes of new: .*expected different names"):
            register_voc("new", str(voc), "train", classes)


def test_a_root_from_the_environment(voc, monkeypatch):
    node = L(register_voc)(name="own", root="$D2KD_HERE/voc", split="one", classes=NAMES)
    for value in (None, ""):
        monkeypatch.delenv("D2KD_HERE", raising=False)
        if value is not None:
            monkeypatch.setenv("D2KD_HERE", value)
        with pytest.raises(InputError, match="^D2KD_HERE: not set; expected the folder of own: A"):
            check_dataset(node)
    monkeypatch.setenv("D2KD_HERE", str(voc.parent))
    assert check_dataset(node) == check_dataset([node, "own"])[:1] == ["own"]
    assert boxes() == [[[1, 2, 40, 41]]]


def edit(change):
    """An edit of train0's annotation."""

    def apply(root):
        file = root / "Annotations" / "train0.xml"
        tree = ET.parse(file)
        change(tree)
        tree.write(file)

    return apply


def text(path, value):
    return edit(lambda tree: setattr(tree.find(path), "text", value))


def without(parent, tag):
    def remove(tree):
        node = tree.find(parent)
        node.remove(node.find(tag))

    return edit(remove)


def written(path, content):
    return lambda root: (root / path).write_bytes(content)


def gone(path):
    return lambda root: (root / path).rename(root / "elsewhere")


def copied(path, suffix):
    return lambda root: (root / path).with_suffix(suffix).write_bytes((root / path).read_bytes())


SPLIT, XML, SECOND = "ImageSets/Main/train.txt", "Annotations/train0.xml", "object[2]"


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda root: root.rename(root.parent / "other"), "voc: no such folder; expected the"),
        (gone("Annotations"), "voc/Annotations: no such folder"),
        (gone("JPEGImages"), "voc/JPEGImages: no such folder"),
        (gone("ImageSets"), f"{SPLIT}: no such file; expected the names"),
        (gone(SPLIT), f"{SPLIT}: no such file; expected the names"),
        (written(SPLIT, b""), f"{SPLIT}: no image"),
        (written(SPLIT, b"\n# none\n"), f"{SPLIT}: no image"),
        (written(SPLIT, b"train0\ntrain1 -1\n"), f"{SPLIT}: line 2: train1 -1; expected an image"),
        (written(SPLIT, b"train0\ntrain1\ntrain0\n"), f"{SPLIT}: train0 twice"),
        (written(SPLIT, b"\xff\xfe"), f"{SPLIT}: unreadable"),
        (written(SPLIT, b"train0\nno9\nno8\n"), "no8.xml: missing, and 1 more .*listed in .*train"),
        (gone("JPEGImages/train2.jpg"), "JPEGImages/train2.jpg: missing; expected"),
        (gone(XML), f"{XML}: missing; expected"),
        (written(XML, b""), f"{XML}: broken XML"),
        (written(XML, b"<annotation><size>"), f"{XML}: broken XML"),
        (written(XML, b"\xff\xff"), f"{XML}: broken XML"),
        (written(XML, b"<annotation/>"), f"{XML}: no size/width; expected a whole number"),
        (without("size", "height"), f"{XML}: no size/height"),
        (text("size/width", "wide"), f"{XML}: size/width 'wide'"),
        (text("size/width", "0"), f"{XML}: size/width 0; expected at least 1 pixel"),
        (text("size/height", "-48"), f"{XML}: size/height -48; expected at least 1 pixel"),
        (text("size/width", None), f"{XML}: size/width ''"),
        (text(f"{SECOND}/name", "cat"), f"{XML}: object 2: class 'cat'; expected one of class 0"),
        (without(SECOND, "name"), f"{XML}: object 2: class None"),
        (without(SECOND, "bndbox"), f"{XML}: object 2: no bndbox/xmin; expected a number"),
        (without(f"{SECOND}/bndbox", "ymax"), f"{XML}: object 2: no bndbox/ymax"),
        (text(f"{SECOND}/bndbox/xmax", "x"), f"{XML}: object 2: bndbox/xmax 'x'"),
        (text(f"{SECOND}/bndbox/xmax", "nan"), f"{XML}: object 2: bndbox/xmax 'nan'"),
        (text(f"{SECOND}/bndbox/xmax", "1e300"), f"{XML}: object 2: bndbox/xmax '1e300'"),
        (text("size/width", "9" * 20), f"{XML}: size/width '9+'; expected a whole number"),
        (
            copied("JPEGImages/train0.jpg", ".png"),
            f"{XML}: images train0.jpg, train0.png; expected one",
        ),
    ],
)
def test_what_is_wrong_is_named(voc, spoil, found):
    spoil(voc)
    with pytest.raises(InputError, match=found) as error:
        register(voc, "train")
    assert "\n" not in str(error.value)
    assert "own" not in DatasetCatalog.list()
    # Registered with Detectron2 instead, which does not look: a check finds the same.
    register_pascal_voc("plain", str(voc), "train", 2007, NAMES)
    with pytest.raises(InputError, match=found):
        check_dataset("plain")


def registered_as_is(root, split="train"):
    return [
        [a["category_id"] for a in r["annotations"]]
        for r in DatasetCatalog.get(register(root, split))
    ]


EXPECTED = [[0, 1], [], [2]]


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".PNG", ".webp"])
def test_images_of_any_suffix(voc, suffix):
    for file in (voc / "JPEGImages").iterdir():
        image = Image.open(file)
        image.save(file.with_name(f"new{suffix}"))
        file.unlink()
        file.with_name(f"new{suffix}").rename(file.with_suffix(suffix))
    assert registered_as_is(voc) == EXPECTED
    assert all(os.path.isfile(r["file_name"]) for r in DatasetCatalog.get("own"))


def test_the_file_name_in_an_annotation_decides(voc):
    """Where the image's name does not."""
    edit(
        lambda tree: ET.SubElement(tree.getroot(), "filename").__setattr__(
            "text", " other name.jpg "
        )
    )(voc)
    folder = voc / "JPEGImages"
    (folder / "train0.jpg").rename(folder / "other name.jpg")
    assert registered_as_is(voc) == EXPECTED
    assert DatasetCatalog.get("own")[0]["file_name"].endswith("other name.jpg")


def test_images_and_annotations_in_folders_of_the_list(voc):
    for folder in ("Annotations", "JPEGImages"):
        (voc / folder / "a").mkdir()
        for file in (voc / folder).glob("train0.*"):
            file.rename(voc / folder / "a" / file.name)
    (voc / SPLIT).write_text("a/train0\r\ntrain1 \r\ntrain2.jpg\r\n")
    assert registered_as_is(voc) == EXPECTED
    assert os.path.isfile(DatasetCatalog.get("own")[0]["file_name"])
    file = voc / "Annotations/a/train0.xml"  # is read again
    file.write_text(file.read_text().replace("class 0", "class 2"))
    assert registered_as_is(voc)[0] == [2, 1]


@pytest.mark.parametrize(
    "old, new",
    [
        ("<annotation>", '<annotation xmlns="http://x">'),
        ("<object>", "<object><part><name>x</name><bndbox><xmin>1</xmin></bndbox></part>"),
        ("<object><name>class 0", "<objects/><object><name><![CDATA[ class 0\n]]>"),
        ("<bndbox>", "<difficult>Unspecified</difficult><!-- a --><bndbox>"),
        ("</annotation>", "<objects><object><name>class 2</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></objects></annotation>"),
    ],
)  # fmt: skip
def test_annotations_with_more_than_vocs_tags(voc, old, new):
    """No object is lost, wherever it is."""
    file = voc / XML
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    more = [2] * ("<objects><object>" in new)
    assert registered_as_is(voc) == [EXPECTED[0] + more, *EXPECTED[1:]]


@pytest.mark.parametrize("name", ["with spaces", "number #1", "Übung", "照片"])
def test_names_of_any_kind(voc, name):
    for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        (voc / folder / f"train0{suffix}").rename(voc / folder / f"{name}{suffix}")
    (voc / SPLIT).write_text(f"{name}  \ntrain1 # a comment\n\ntrain2\n", encoding="utf-8")
    assert registered_as_is(voc) == EXPECTED
    assert DatasetCatalog.get("own")[0]["image_id"] == name


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "utf-16", "latin-1", "utf-8-sig"])
def test_annotations_in_any_declared_encoding(voc, encoding):
    file = voc / XML
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    word = "été" if encoding == "latin-1" else "照片"
    text = file.read_text().replace("<annotation>", f"<annotation><folder>{word}</folder>")
    file.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>\n{text}'.encode(encoding))
    assert registered_as_is(voc) == EXPECTED
    if encoding == "gbk":
        file.write_bytes(text.encode(encoding))
        with pytest.raises(
            InputError, match="broken XML: .*expected .* the encoding that it declares"
        ):
            check_dataset("own")


def test_a_flat_folder_for_each_split(voc, tmp_path):
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    for stem in ("train0", "train1", "train2"):
        (voc / "Annotations" / f"{stem}.xml").rename(flat / f"{stem}.xml")
        (voc / "JPEGImages" / f"{stem}.jpg").rename(flat / f"{stem}.jpg")
    (flat / "._train0.xml").write_bytes(b"\0of a Mac")
    assert registered_as_is(flat.parent) == EXPECTED
    (flat / "train3.XML").write_text("")
    with pytest.raises(InputError, match="train3.xml: missing"):
        register(flat.parent, "train", "more")
    os.rename(flat / "train3.XML", os.fsencode(flat) + b"/\xe9.xml")
    with pytest.raises(InputError, match="the file name .*; expected file names in UTF-8"):
        register(flat.parent, "train", "more")
    (flat.parent / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no .xml file; expected one beside each image"):
        register(flat.parent, "empty", "other")


def test_corrected_annotations_are_read_again(voc, tmp_path):
    assert registered_as_is(voc) == EXPECTED
    text("object/name", "class 2")(voc)
    assert check_dataset("own") == ["own"]
    assert registered_as_is(voc) == [[2, 1], [], [2]]
    with open(MetadataCatalog.get("own").json_file) as file:
        assert [a["category_id"] for a in json.load(file)["annotations"]] == [2, 1, 2]


def test_a_picture_of_another_size_is_named(voc, tmp_path):
    text("size/width", "65")(voc)
    config = recipe(voc, tmp_path)
    with pytest.raises(InputError, match="train0.jpg: 64 x 48 pixels; expected 65 x 48"):
        Trainer(config).train()


def recipe(root, tmp_path, **options):
    config = tiny_run.without_evaluation(tiny_run.recipe(tmp_path, tmp_path / "run", **options))

    def data(split):
        return L(register_voc)(name=split, root=str(root), split=split, classes=NAMES)

    config.dataloader.train.dataset.names = data("train")
    config.dataloader.test.dataset.names = data("val")
    return config


def with_evaluation(config):
    config.dataloader.evaluator = {
        "_target_": "detectron2.evaluation.COCOEvaluator",
        "dataset_name": "${..test.dataset.names}",
    }
    return config


def oracle(batch):
    """A detector that knows the annotations."""
    records = {record["image_id"]: record for record in DatasetCatalog.get("val")}
    return [{"instances": perfect(records[one["image_id"]])} for one in batch]


def test_evaluation_agrees_with_the_annotations(voc, tmp_path):
    before = sorted(voc.rglob("*"))
    config = with_evaluation(recipe(voc, tmp_path))
    results = do_test(config, oracle, output_dir=tmp_path / "inference")["bbox"]
    assert [round(results[key]) for key in ("AP", "AP75", "AP-class 2")] == [100] * 3
    assert sorted(voc.rglob("*")) == before, "the data's folder is the user's"


def test_no_object_in_any_image(tmp_path):
    root = write_voc(tmp_path / "voc", {"train": [[]], "val": [WITHOUT_AREA, []]})
    config = with_evaluation(recipe(root, tmp_path))
    results = do_test(config, oracle, output_dir=tmp_path / "inference")
    assert not results["bbox"].get("AP", -1) >= 0


def test_equal_annotations_are_equal_files(voc, tmp_path):
    """A teacher's AP is remembered by the hash of this file."""

    def content(root, name):
        with open(MetadataCatalog.get(register(root, "train", name)).json_file, "rb") as file:
            return file.read()

    first = content(voc, "first")
    assert content(voc, "again") == first
    assert content(write_voc(tmp_path / "moved"), "moved") == first
    other = write_voc(tmp_path / "other")
    text("object/bndbox/xmax", "63")(other)
    assert content(other, "other") != first
    assert len(json.loads(first)["annotations"]) == 3


def test_a_distiller_learns_from_it(voc, tmp_path, monkeypatch):
    monkeypatch.setenv("D2KD_HERE", str(voc))
    model = tiny_run.distiller(tiny_run.teacher_weights(tmp_path))
    config = with_evaluation(recipe("$D2KD_HERE", tmp_path, model=model, max_iter=2))
    Trainer(config).train()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["teacher"]["dataset"] == ["val"]
    assert all(record["teacher"]["dataset_sha256"])
    assert "AP" in record["rows"][0]["results"]["bbox"]
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "$D2KD_HERE" in saved and str(voc) not in saved
    again = load(str(tmp_path / "run" / "config.yaml"))
    assert check_dataset(again.dataloader.train.dataset.names) == ["train"]


BLOOD = ["RBC", "WBC", "Platelets"]
CELLS = {"train": SPLITS["train"], "val": SPLITS["val"], "test": SPLITS["one"]}
RECIPES = [f"baselines/{path.name}" for path in sorted(ROOT.glob("configs/baselines/*_bccd.py"))]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_anywhere_and_say_what_they_miss(name, monkeypatch):
    monkeypatch.delenv("D2KD_BCCD", raising=False)
    config = load(name)
    for part in ("train", "test"):
        with pytest.raises(InputError, match="^D2KD_BCCD: not set; expected the folder of bccd_"):
            check_dataset(config.dataloader[part].dataset.names)
    with pytest.raises(InputError, match="^D2KD_BCCD: not set"):
        Trainer(config)


@pytest.mark.skipif(not os.environ.get("D2KD_BCCD"), reason="D2KD_BCCD names no blood cells")
def test_the_blood_cells(caplog):
    with caplog.at_level(logging.WARNING):
        for split in ("trainval", "test"):
            register_voc(f"cells_{split}", "$D2KD_BCCD", split, BLOOD)
    found = [len(b) for split in ("trainval", "test") for b in boxes(f"cells_{split}")]
    assert len(found) == 364 and sum(found) == 4886
    assert len(caplog.records) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(edits=VOC_EDITS)
def test_any_annotation_is_understood_or_refused(edits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    check_voc(edits, write_voc(folder / "voc"), folder)
