"""Annotation files of many tools: understood in the same way by every reader, or refused in one line."""

import copy
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from hypothesis import given, settings

from d2kd.data import build_train_loader, check_dataset, coco_dataset, subset
from d2kd.data import coco_file as reader
from d2kd.data.datasets import check_has_objects, check_masks, check_same_classes, shared_images
from d2kd.doctor.data_checks import check_data
from d2kd.utils.errors import InputError

from .odd_files import COCO_EDITS, ap_of_oracle, check_coco, objects_learned, register
from .tiny_run import draw_data, recipe

RLE = {"size": [64, 64], "counts": [70, 5, 59, 5, 3957]}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw_data(folder)
    return folder


@pytest.fixture
def content(images):
    """A file with objects of two classes in the first image; free to be changed."""
    return json.loads((images / "data.json").read_text())


def edit_all(section, **values):
    return lambda content: [one.update(values) for one in content[section]]


def edit_first(section, **values):
    return lambda content: content[section][0].update(values)


def without(section, *keys):
    return lambda content: [one.pop(key) for one in content[section] for key in keys]


def together(*edits):
    return lambda content: [edit(content) for edit in edits]


def text_ids(content):
    for one in content["images"]:
        one["id"] = f"image {one['id']}"
    for one in content["annotations"]:
        one["image_id"] = f"image {one['image_id']}"


def whole_floats(content):
    """As a table writes whole numbers of a column in which one is missing."""
    for one in content["images"]:
        one.update(width=64.0, height=64.0, id=float(one["id"]))
    for one in content["annotations"]:
        for key in ("id", "image_id", "category_id", "iscrowd"):
            one[key] = float(one[key])


ODD_BUT_CLEAR = {
    "as it is": lambda content: None,
    "no area": without("annotations", "area"),
    "no iscrowd": without("annotations", "iscrowd"),
    "no ids of annotations": without("annotations", "id"),
    "iscrowd null": edit_all("annotations", iscrowd=None),
    "iscrowd false": edit_all("annotations", iscrowd=False),
    "area null": edit_all("annotations", area=None),
    "area 0": edit_all("annotations", area=0),
    "ids from 0": lambda content: [a.update(id=k) for k, a in enumerate(content["annotations"])],
    "ids of texts": lambda content: [a.update(id=f"a{k}") for k, a in enumerate(content["annotations"])],
    "one id null": edit_first("annotations", id=None),
    "images with ids of texts": text_ids,
    "whole numbers with a point": whole_floats,
    "empty polygon": edit_all("annotations", segmentation=[[]]),
    "no polygon": edit_all("annotations", segmentation=[]),
    "segmentation null": edit_all("annotations", segmentation=None),
    "polygon of two points": edit_all("annotations", segmentation=[[1, 2, 3, 4]]),
    "polygon": edit_all("annotations", segmentation=[[1, 1, 9, 1, 9, 9]]),
    "uncompressed RLE": edit_all("annotations", segmentation=RLE),
    "keys of other tools": edit_all("annotations", attributes={"occluded": False}, ignore=0, score=None),
    "ignore false": edit_all("annotations", ignore=False),
    "no supercategory, and more": edit_all("categories", supercategory=None, keypoints=[]),
    "info and licenses": lambda content: content.update(info=None, licenses=[{"id": 0}]),
    "a class without an object": lambda content: content["categories"].append({"id": 0, "name": "all"}),
    "ids of classes with gaps": lambda content: content["categories"].append({"id": 90, "name": "z"}),
    "classes in another order": lambda content: content["categories"].reverse(),
    "images in another order": lambda content: content["images"].reverse(),
    "a box of fractions": edit_first("annotations", bbox=[1.25, 2.5, 10.125, 3.75]),
    "a box that begins outside": edit_first("annotations", bbox=[-5, -5, 20, 90]),
    "empty RLE": edit_all("annotations", segmentation={"size": [64, 64], "counts": ""}),
    "ids of any size": lambda c: [one.update(id=one["id"] + 2**70) for one in c["annotations"]],
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_BUT_CLEAR)
def test_what_is_odd_but_clear_is_understood(kind, content, images, tmp_path):
    """All objects are learned, and an oracle has an AP of 100, by the evaluator and in a comparison."""
    count = len(content["annotations"])
    ODD_BUT_CLEAR[kind](content)
    name = register(content, images)
    assert objects_learned(name) == count
    assert ap_of_oracle(name, tmp_path) == pytest.approx(100)
    assert check_dataset(name) == [name]


def test_records_of_a_standard_file_are_detectron2s(content, images):
    edit_first("annotations", segmentation=[[1, 1, 9, 1, 9, 9]], iscrowd=1)(content)
    content["annotations"][1].update(segmentation=RLE, keypoints=[5, 6, 2, 0, 0, 0])
    name = register(content, images)
    metadata = MetadataCatalog.get(name)
    assert metadata.json_file.endswith(".json")  # the file itself
    ours, theirs = DatasetCatalog.get(name), load_coco_json(metadata.json_file, str(images), "d2")
    assert ours == theirs
    other = MetadataCatalog.get("d2")
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert getattr(metadata, key) == getattr(other, key)


def test_sets_that_detectron2_registered_are_understood_too(content, images, tmp_path):
    edit_all("annotations", iscrowd=None)(content)
    file = tmp_path / "registered.json"
    file.write_text(json.dumps(content))
    name = f"of_detectron2_{tmp_path}"
    register_coco_instances(name, {"thing_colors": [1]}, str(file), str(images))
    assert check_dataset(name) == [name]
    assert objects_learned(name) == len(content["annotations"])
    assert ap_of_oracle(name, tmp_path) == pytest.approx(100)
    assert MetadataCatalog.get(name).thing_colors == [1]


@pytest.mark.parametrize(
    "box", [[1, 2, 3, 0], [70, 2, 5, 5], [-9, 2, 9, 5], [1, 1, 1e-9, 9], [64, 64, 9, 9]]
)
def test_boxes_without_area_are_left_out_everywhere(content, images, tmp_path, caplog, box):
    edit_first("annotations", bbox=box)(content)
    name = register(content, images)
    assert "1 of 7 boxes left out: no width or no height in the image" in caplog.text
    assert objects_learned(name) == len(content["annotations"]) - 1
    assert ap_of_oracle(name, tmp_path) == pytest.approx(100)


def test_the_doctor_counts_boxes_that_are_left_out(content, images, tmp_path):
    edit_first("annotations", bbox=[500, 2, 5, 5])(content)
    config = recipe(images, tmp_path)
    config.dataloader.train.dataset.names = register(content, images)
    found = {one.subject: one for one in check_data(config, 1)}
    assert found["train data, file"].state == "warning"
    left_out = found["train data, boxes left out"]
    assert left_out.state == "error" and left_out.found.startswith("1 of 7 are left out: no area")
    assert "test data, boxes left out" not in found


def test_an_object_that_is_there_twice_is_named(content, images, caplog):
    content["annotations"].append(dict(content["annotations"][0], id=100))
    register(content, images)
    assert "1 objects are there twice: same image, class and box" in caplog.text


REFUSED = {
    "iscrowd as text": (edit_first("annotations", iscrowd="0"), r"\[0\] \(id 1\): iscrowd '0'; expected 0 or 1"),
    "iscrowd 2": (edit_all("annotations", iscrowd=2), r"iscrowd 2, and 6 more; expected 0 or 1"),
    "area as text": (edit_first("annotations", area="12.5"), "area '12.5'; expected a number of pixels"),
    "negative area": (edit_first("annotations", area=-1), "area -1; expected"),
    "infinite area": (edit_first("annotations", area=float("inf")), "area inf; expected"),
    "ignore": (edit_first("annotations", ignore=1), "ignore 1; expected 0: mark .* by iscrowd 1"),
    "ignore true": (edit_all("annotations", ignore=True), "ignore True, and 6 more; expected 0: mark"),
    "huge area": (edit_first("annotations", area=1e300), r"area 1e\+300; expected a number of pixels"),
    "huge box": (edit_first("annotations", bbox=[0, 0, 1e308, 4]), r"bbox \[0, 0, 1e\+308, 4\]; expected"),
    "huge image": (edit_first("images", width=2**40), "width 1099511627776; expected a whole number"),
    "a box in base64": (edit_first("annotations", bbox="A" * 999), r"bbox 'A{78}…; expected"),
    "three numbers": (edit_all("annotations", bbox=[1, 2, 3]), r"bbox \[1, 2, 3\], and 6 more; expected \[x"),
    "nan": (edit_first("annotations", bbox=[1, 2, 3, float("nan")]), r"bbox \[1, 2, 3, nan\]"),
    "negative": (edit_first("annotations", bbox=[1, 2, -3, 4]), r"bbox \[1, 2, -3, 4\]"),
    "corners as a dict": (edit_first("annotations", bbox={"x": 1}), "bbox {'x': 1}"),
    "no bbox": (without("annotations", "bbox"), r"annotations\[0\] \(id 1\): no bbox, and 6 more"),
    "a polygon of texts": (edit_first("annotations", segmentation=[["1", "2"]]), "segmentation: .*; expected poly"),
    "an RLE without a size": (edit_first("annotations", segmentation={"counts": "a"}), "segmentation: .*size"),
    "mask as a number": (edit_first("annotations", segmentation=5), "segmentation: "),
    "a polygon with nan": (edit_first("annotations", segmentation=[[float("nan")] * 6]), "segmentation .*; expected polygons"),
    "a damaged RLE": (edit_first("annotations", segmentation={"size": [64, 64], "counts": "!!"}), "RLE damaged, .*; expected RLE"),
    "half a number": (edit_first("annotations", segmentation={"size": [64, 64], "counts": "01o"}), "RLE damaged"),
    "a number of RLE without end": (edit_first("annotations", segmentation={"size": [64, 64], "counts": "o" * 20 + "0"}), "RLE damaged"),
    "a short RLE": (edit_all("annotations", segmentation={"size": [64, 64], "counts": [70, 5]}), r"RLE of 75 pixels, size \[64, 64\], and 6 more"),
    "an RLE of another size": (edit_first("annotations", segmentation={"size": [48, 64], "counts": [3072]}), r"expected RLE of the image's size \[64, 64\]"),
    "an RLE of negative counts": (edit_first("annotations", segmentation={"size": [64, 64], "counts": [-1, 4097]}), "segmentation: .*>= 0"),
    "keypoints of texts": (edit_first("annotations", keypoints=["a"]), "keypoints .*; expected x, y and visibility"),
    "keypoints of two numbers": (edit_first("annotations", keypoints=[1, 2]), "keypoints of 2 numbers; expected x, y"),
    "half a character": (edit_first("categories", name="\ud800"), "name .*; expected a text"),
    "half a character in a file's name": (edit_first("images", file_name="\udce9.jpg"), "file_name .*; expected a text"),
    "one file twice, with a dot": (edit_first("images", file_name="./1.png"), r"images\[1\]: file_name '1.png' once more"),
    "another tool's file": (lambda c: [c.pop(k) for k in list(c)] and c.update(shapes=[], imagePath="a"), "no list 'categories'; its keys are 'shapes', 'imagePath'; expected"),
    "a class that is a number": (edit_first("categories", name=7), r"categories\[0\] \(id 1\): name 7; expected a text"),
    "a class without a name": (edit_first("categories", name=""), "name ''; expected a text"),
    "two classes of one name": (edit_all("categories", name="a"), r"\[1\]: name 'a' once more, and 1 more"),
    "two classes of one id": (edit_all("categories", id=1), "id 1 once more"),
    "width null": (edit_first("images", width=None), r"images\[0\] \(id 0\): width None; expected a whole number"),
    "width as text": (edit_first("images", width="64"), "width '64'"),
    "width 0": (edit_first("images", width=0), "width 0"),
    "a file name that is a number": (edit_first("images", file_name=5), "file_name 5; expected a text"),
    "one file twice": (edit_first("images", file_name="1.png"), r"images\[1\]: file_name '1.png' once more"),
    "one image id twice": (edit_first("images", id=1), "id 1 once more"),
    "texts and numbers as image ids": (edit_first("images", id="x"), "1 of 6 image ids are texts"),
    "category as text": (edit_first("annotations", category_id="1"), "category_id '1'"),
    "one annotation id twice": (edit_all("annotations", id=3), "id 3 once more, and 5 more"),
    "increment that is no list": (lambda c: c.update(d2kd_increment=5), "d2kd_increment: "),
    "images by id": (lambda c: c.update(images={i["id"]: i for i in c["images"]}), "'images' is a dict; expected the lists"),
    "a list of texts": (lambda c: c.update(categories=["cat"]), r"categories\[0\]: 'cat'; expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_meant_is_refused(kind, content, images, refuses):
    edit, line = REFUSED[kind]
    edit(content)
    refuses(lambda: register(content, images), line)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_any_encoding_of_unicode(content, images, tmp_path, encoding):
    """In the evaluation, too, which reads UTF-8 alone."""
    edit_first("categories", name="干净 🙂")(content)
    text = json.dumps(content, ensure_ascii=False)
    name = register(text.encode(encoding), images)
    assert MetadataCatalog.get(name).thing_classes[0] == "干净 🙂"
    assert ap_of_oracle(name, tmp_path) == pytest.approx(100)


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"info": ' + "[" * 5000 + "]" * 5000 + "}", "unreadable: .*recursion"),
        ('{"images": ' + "9" * 5000 + "}", "unreadable: .*digits"),
        ("é".encode("latin-1"), "unreadable: .*codec"),
        ("[" * 9, "broken JSON at line 1, column 10"),
        ("[]", "a list; expected an object of categories"),
    ],
)
def test_what_is_no_json_is_refused(text, line, images, refuses):
    refuses(lambda: register(text, images), line)


def test_counts_of_a_compressed_mask_are_read_as_by_pycocotools():
    random = np.random.RandomState(0)
    for density in (0, 0.01, 0.5, 0.99, 1):
        mask = (random.rand(*random.randint(1, 300, 2)) < density).astype(np.uint8)
        rle = mask_util.encode(np.asfortranarray(mask))
        assert reader._RLE(mask.shape, rle["counts"].decode()).pixels() == mask.size


def test_a_file_that_cannot_be_opened(content, images, refuses, monkeypatch):
    def fail(*_, **__):
        raise OSError("no rights")

    name = register(content, images)
    monkeypatch.setattr(reader.PathManager, "open", fail)
    refuses(lambda: check_dataset(name), r"\d+.json: unreadable: no rights; expected a JSON file")


def test_a_corrected_file_is_read_again(content, images, tmp_path):
    """In one process, as in a notebook: classes, objects and the evaluation are those of the new content."""
    file = tmp_path / "mine.json"
    whole = copy.deepcopy(content)
    content["annotations"][0]["category_id"] = 9
    file.write_text(json.dumps(content))
    make = lambda: coco_dataset(f"corrected_{tmp_path}", str(file), str(images))  # noqa: E731
    with pytest.raises(InputError, match="category 9"):
        make()
    file.write_text(json.dumps(whole))
    name = make()
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 1
    whole["categories"].append({"id": 9, "name": "new"})
    whole["annotations"][0].update(category_id=9, iscrowd=None)
    file.write_text(json.dumps(whole))
    assert make() == name
    assert ap_of_oracle(name, tmp_path) == pytest.approx(100)
    assert MetadataCatalog.get(name).thing_classes[-1] == "new"
    whole["annotations"][1:] = []
    file.write_text(json.dumps(whole))
    assert ap_of_oracle(name, tmp_path / "again") == pytest.approx(100)
    assert objects_learned(name) == 1


def test_classes_follow_their_names(content, images, tmp_path):
    """Two files with the classes in another order, and one without a class, have the same class indices."""
    classes = ["class 2", "class 0", "class 1"]
    names = [register(content, images, classes)]
    content["categories"].reverse()
    for one in content["categories"]:
        one["id"] = {"class 2": 0, "class 1": 7, "class 0": 3}[one["name"]]
    for one in content["annotations"]:
        one["category_id"] = {3: 0, 2: 7, 1: 3}[one["category_id"]]
    names.append(register(content, images, classes))
    first, second = map(DatasetCatalog.get, names)
    assert first == second
    check_same_classes(names[:1], names[1:])
    for k, name in enumerate(names):
        assert MetadataCatalog.get(name).thing_classes == classes
        assert ap_of_oracle(name, tmp_path / str(k)) == pytest.approx(100)
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] != 7]
    content["categories"] = [one for one in content["categories"] if one["id"] != 7]
    name = register(content, images, classes)
    check_same_classes(names, [name])
    assert ap_of_oracle(name, tmp_path / "lacking") == pytest.approx(100)


@pytest.mark.parametrize(
    "edit, line",
    [
        (lambda c: c["categories"].append({"id": 0, "name": "background"}), "further classes 'background'"),
        (lambda c: c["categories"].pop(), "no class 'class 2'; .* with classes="),
        (lambda c: c["categories"][2].update(name="class 2 "), "no class 'class 2', but 'class 2 '; expected"),
        (lambda c: [c["categories"][k].update(name=f"class {2 - k}") for k in range(3)], "class 0 is 'class 2', not 'class 0'"),
    ],
)  # fmt: skip
def test_classes_of_two_sets_are_compared_by_name(edit, line, content, images, refuses):
    train = register(content, images)
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 3]
    edit(content)
    test = register(content, images)
    refuses(lambda: check_same_classes([train], [test]), line)
    refuses(lambda: check_same_classes([train, test], []), line)
    check_same_classes([train], [train])
    check_same_classes([], [test])


@pytest.mark.parametrize(
    "edit",
    [
        edit_all("annotations", iscrowd=1),
        edit_all("annotations", bbox=[1, 1, 0, 5]),
        lambda content: content.update(annotations=[]),
    ],
)
def test_training_data_need_an_object(edit, content, images, refuses):
    whole = register(content, images)
    edit(content)
    name = register(content, images)
    refuses(lambda: check_has_objects([name]), "no object to learn from")
    check_has_objects([name, whole])
    check_has_objects([])
    empty = subset(whole, images=1, seed=1)  # of the six images, one has no object
    for seed in range(2, 50):
        if not any(len(r["annotations"]) for r in DatasetCatalog.get(empty)):
            break
        empty = subset(whole, images=1, seed=seed)
    refuses(lambda: check_has_objects([empty]), "no object to learn from")


def test_a_file_is_decoded_once(content, images, monkeypatch):
    decoded = []
    original = reader._decode
    monkeypatch.setattr(
        reader, "_decode", lambda *given: decoded.append(given[0]) or original(*given)
    )
    content["info"] = {"description": "decoded once"}
    name = register(content, images)
    check_dataset([name, name])
    assert len(DatasetCatalog.get(name)) == 6
    check_dataset(name)
    assert len(decoded) == 1


def mask_loader(name, **options):
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR", **options)
    records = DatasetCatalog.get(name)
    return build_train_loader(
        records, mapper=mapper, total_batch_size=1, aspect_ratio_grouping=False
    )


def test_every_object_has_a_mask_where_masks_are_read(content, images, refuses):
    masks = dict(use_instance_mask=True)
    polygon = [[1, 1, 9, 1, 9, 9]]
    name = register(content, images)
    check_masks(mask_loader(name))  # no masks are read
    line = "0.png: 7 objects of the data have no mask; expected a mask for each"
    refuses(lambda: check_masks(mask_loader(name, **masks)), line)
    edit_all("annotations", segmentation=polygon)(content)
    check_masks(mask_loader(register(content, images), **masks))
    content["annotations"][3].update(segmentation=RLE)
    name = register(content, images)
    line = "1 masks of the data are RLE; expected polygons; or .*instance_mask_format=bitmask"
    refuses(lambda: check_masks(mask_loader(name, **masks)), line)
    check_masks(mask_loader(name, **masks, instance_mask_format="bitmask"))
    content["annotations"][3].update(iscrowd=1)  # as in COCO's own files
    check_masks(mask_loader(register(content, images), **masks))
    check_masks([])


def test_images_of_both_sets_are_named(content, images):
    train = register(content, images)
    content["images"] = content["images"][2:4]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in (2, 3)]
    test = register(content, images)
    assert [path.rsplit("/")[-1] for path in shared_images([train], [test])] == ["2.png", "3.png"]
    assert shared_images([train], [train]) == shared_images([], [test]) == []
    assert len(shared_images([train], [subset(train, images=3)])) == 3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(edits=COCO_EDITS)
def test_any_content_is_understood_or_refused(edits, tmp_path_factory, images):
    check_coco(edits, images, tmp_path_factory.mktemp("any"))
