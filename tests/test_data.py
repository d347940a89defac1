"""Data: the generated set is the same everywhere, loaders repeat themselves, bad input is named."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import polygons_to_bitmask
from detectron2.utils import comm
from omegaconf import OmegaConf
from PIL import Image

from d2kd.config import get_config, load
from d2kd.data import (
    build_test_loader,
    build_train_loader,
    check_dataset,
    coco_dataset,
    shapes,
    use_seeded_loaders,
)
from d2kd.engine.evaluation import check_test_data
from d2kd.utils.errors import InputError

from .common import ROOT, perfect

SMALL = {"seed": 3, "train": 6, "val": 2, "test": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "small", **SMALL)


@pytest.fixture
def registered(small):
    """shapes_* mean the small set; the default ones come back after."""
    shapes.register_shapes(small, **SMALL)
    yield
    shapes.register_shapes()


@pytest.fixture
def own(small, tmp_path):
    """The user's own data: a COCO file and its folder of images, free to be broken."""
    shutil.copytree(small / "train", tmp_path / "images")
    shutil.copy(small / "train.json", tmp_path / "own.json")
    return tmp_path / "own.json", tmp_path / "images"


def change(json_file, edit):
    content = json.loads(json_file.read_text())
    edit(content)
    json_file.write_text(json.dumps(content))


def test_same_json_and_pixels_everywhere(small):
    digest, outlines = hashlib.sha256(), hashlib.sha256()
    for split in shapes.SPLITS:
        content = json.loads((small / f"{split}.json").read_bytes())
        for one in content["annotations"]:
            outlines.update(json.dumps(one.pop("segmentation")).encode())
        # Without outlines it is version 2, to the byte: results of either are comparable.
        content["info"]["version"] = 2
        digest.update(json.dumps(content).encode())
        for file in sorted((small / split).iterdir()):
            digest.update(np.asarray(Image.open(file)).tobytes())
    expected = "8c00bf6838be687fa4efdb47391a1a3bfa3a84a2c7a941036692568d51b0d008"
    assert digest.hexdigest() == expected
    expected = "29f3cb7631df32fe3091b46460c088c689c163cdf247bba6698b243601ccfc1e"
    assert outlines.hexdigest() == expected


def test_outlines_are_those_of_the_drawn_pixels(monkeypatch):
    drawn, paint, add = [], shapes._Scene._paint, shapes._Scene.add

    def recorded(self, here, seen, *cover):
        self.pixels = np.zeros((shapes.SIZE, shapes.SIZE), bool)
        self.pixels[here] = seen
        paint(self, here, seen, *cover)

    def added(self, *figure):
        before = len(self.objects)
        add(self, *figure)
        if len(self.objects) > before:
            drawn.append((self.pixels, self.objects[-1]))

    monkeypatch.setattr(shapes._Scene, "_paint", recorded)
    monkeypatch.setattr(shapes._Scene, "add", added)
    for index in range(40):
        shapes.draw_image(0, "train", index)
    ious, outside = [], 0
    for pixels, one in drawn:
        points = np.array(one["segmentation"][0])
        outside += points.min() < 0 or points.max() > shapes.SIZE
        mask = polygons_to_bitmask([points], shapes.SIZE, shapes.SIZE)
        ious.append((mask & pixels).sum() / (mask | pixels).sum())
        # The box is that of the outline, as far as it is in the image.
        corners = np.clip(points.reshape(-1, 2), 0, shapes.SIZE)
        x, y, width, height = one["bbox"]
        assert [*corners.min(axis=0), *corners.max(axis=0)] == [x, y, x + width, y + height]
        assert pixels.sum() == one["area"]
    small = np.array([max(one["bbox"][2:]) < 16 for _, one in drawn])
    ious = np.array(ious)
    assert outside > 20 and ious[small].min() > 0.85 and ious[~small].min() > 0.94
    assert ious.mean() > 0.97


def test_a_set_without_outlines_is_not_taken_for_one(small, tmp_path):
    old = shutil.copytree(small, tmp_path / "old")
    change(old / "train.json", lambda content: content["info"].update(version=2))
    with pytest.raises(InputError, match="old: shapes of {'version': 2, .*expected .*'version': 3"):
        shapes.write_shapes(old, **SMALL)


def test_a_recipe_without_masks_is_trained_on_the_same_as_before(registered):
    """Its mapper drops outlines before it transforms."""
    records = DatasetCatalog.get("shapes_train")
    without = [
        {
            **r,
            "annotations": [
                {k: v for k, v in a.items() if k != "segmentation"} for a in r["annotations"]
            ],
        }
        for r in records
    ]
    assert any(a.get("segmentation") for r in records for a in r["annotations"])
    nodes = get_config("common/data/shapes.py").dataloader
    mapped = []
    for given in (records, without):
        np.random.seed(0)
        mapper = instantiate(nodes.train.mapper)
        mapped.append([mapper(record) for record in given])
    for a, b in zip(*mapped, strict=True):
        assert torch.equal(a["image"], b["image"])
        a, b = a["instances"].get_fields(), b["instances"].get_fields()
        assert a.keys() == b.keys() and "gt_masks" not in a
        assert torch.equal(a["gt_boxes"].tensor, b["gt_boxes"].tensor)
        assert torch.equal(a["gt_classes"], b["gt_classes"])


def test_an_image_depends_on_seed_split_and_index_only():
    image, objects = shapes.draw_image(5, "train", 7)
    again, objects_again = shapes.draw_image(5, "train", 7)
    assert np.array_equal(image, again) and objects == objects_again
    for other in ((6, "train", 7), (5, "val", 7), (5, "train", 8)):
        assert not np.array_equal(image, shapes.draw_image(*other)[0])


def test_boxes_are_inside_and_all_classes_and_sizes_occur():
    drawn = [shapes.draw_image(0, "train", index) for index in range(80)]
    objects = [one for _, many in drawn for one in many]
    boxes = np.array([one["bbox"] for one in objects])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= shapes.SIZE).all()
    assert boxes[:, 2:].min() >= 2 and boxes[:, 2:].max() <= 100
    assert (boxes[:, 2:].max(axis=1) < 16).mean() > 0.1  # small ones
    assert (boxes[:, 2:].max(axis=1) > 64).mean() > 0.1  # large ones
    assert {one["category_id"] for one in objects} == set(range(1, len(shapes.CLASSES) + 1))
    assert all(0 < one["area"] <= one["bbox"][2] * one["bbox"][3] * 1.2 for one in objects)
    assert any(not many for _, many in drawn)  # an image without any object


def test_polygons_are_filled_exactly():
    """A triangle against the definition, sample by sample."""
    points = np.array([(10, 3), (300, 120), (37, 411)])
    inside = shapes._fill(points)
    for row, column in np.random.RandomState(0).randint(0, inside.shape, (400, 2)):
        x, y = 16 * column + 8, 16 * row + 8
        edges = zip(points, np.roll(points, -1, axis=0))
        sides = {
            np.sign((bx - ax) * (y - ay) - (by - ay) * (x - ax)) for (ax, ay), (bx, by) in edges
        }
        assert inside[row, column] == (sides == {1}) or 0 in sides


def test_written_once_and_whole(small, tmp_path, monkeypatch):
    before = (small / "train.json").stat().st_mtime_ns
    shapes.write_shapes(small, **SMALL)
    assert (small / "train.json").stat().st_mtime_ns == before

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path / "new", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_else_a_folder_may_hold(small, tmp_path):
    with pytest.raises(InputError, match="small: shapes of .*'seed': 3.*expected.*'seed': 4"):
        shapes.write_shapes(small, **{**SMALL, "seed": 4})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=f"{tmp_path}: no readable train.json"):
        shapes.write_shapes(tmp_path, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    broken = shutil.copytree(small, tmp_path / "broken")
    (broken / "val" / "000001.png").unlink()
    with pytest.raises(InputError, match="broken/val: 1 images; expected 2"):
        shapes.write_shapes(broken, **SMALL)
    for key, value in (("train", 0), ("seed", -1), ("val", 2.5)):
        with pytest.raises(InputError, match=f"{key} of shapes: {value}; expected a whole number"):
            shapes.write_shapes(tmp_path / "wrong", **{**SMALL, key: value})


def test_two_processes_at_once(tmp_path):
    context, words = multiprocessing.get_context("fork"), (tmp_path / "set",)
    both = [context.Process(target=shapes.write_shapes, args=words, kwargs=SMALL) for _ in range(2)]
    for act in ("start", "join"):
        for process in both:
            getattr(process, act)()
    assert [process.exitcode for process in both] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert shapes.write_shapes(tmp_path / "set", **SMALL)


def test_the_default_place(monkeypatch, tmp_path):
    assert shapes.default_root().parts[0] == "datasets"
    monkeypatch.setenv("D2KD_DATASETS", str(tmp_path))
    assert shapes.default_root().parent == tmp_path
    assert shapes.default_root() != shapes.default_root(seed=1) != shapes.default_root(train=8)


def test_registered_without_drawing(tmp_path):
    try:
        shapes.register_shapes(tmp_path / "later", **SMALL)
        assert not list(tmp_path.iterdir())
        assert MetadataCatalog.get("shapes_val").thing_classes == list(shapes.CLASSES)
        assert check_dataset("shapes_test") == ["shapes_test"]
        assert (tmp_path / "later" / "test.json").is_file()
        assert len(DatasetCatalog.get("shapes_train")) == 6
    finally:
        shapes.register_shapes()


class Probe:
    """A mapper that reports what it was given and what it drew."""

    def __call__(self, record):
        draws = (np.random.rand(), random.random(), torch.rand(()).item())
        return {"index": record["index"], "draws": draws}


def records(n=7):
    return [{"index": i, "width": 2 + i % 3, "height": 3} for i in range(n)]


def stream(batches, start=0, seed=1, dataset=None, batch_size=4, **options):
    loader = build_train_loader(
        dataset or records(),
        mapper=Probe(),
        total_batch_size=batch_size,
        seed=seed,
        start=start,
        **{"aspect_ratio_grouping": False, **options},
    )
    iterator = iter(loader)
    return [[(one["index"], *one["draws"]) for one in next(iterator)] for _ in range(batches)]


@pytest.mark.parametrize("grouping", [False, True])
def test_same_draws_whatever_the_workers_and_the_random_state(grouping):
    """Resumed in the middle of an epoch as well; and the random state is left alone."""

    def state():
        return np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()

    before = state()
    expected = stream(9, aspect_ratio_grouping=grouping)
    assert state() == before
    torch.manual_seed(1)
    np.random.seed(1)
    for workers in (1, 2):
        assert stream(9, aspect_ratio_grouping=grouping, num_workers=workers) == expected
    assert stream(9, aspect_ratio_grouping=grouping, seed=2) != expected
    assert stream(4, start=5, aspect_ratio_grouping=grouping) == expected[5:]
    if grouping:
        wide = [[records()[index]["width"] > 3 for index, *_ in batch] for batch in expected]
        assert all(len(set(batch)) == 1 for batch in wide)


def test_an_epoch_sees_every_image_once_and_in_another_order():
    order = [one[0] for batch in stream(21, batch_size=4) for one in batch]
    epochs = [tuple(order[i : i + 7]) for i in range(0, 84, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 12
    draws = [one[1:] for batch in stream(21) for one in batch]
    assert len(set(draws)) == len(draws)


def test_processes_share_one_stream(monkeypatch):
    alone = stream(6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(stream(6))
    for batch, first, second in zip(alone, *shares):
        assert batch[0::2] == first and batch[1::2] == second
    with pytest.raises(
        InputError, match="total_batch_size: 3; expected a positive multiple of the 2"
    ):
        stream(1, batch_size=3)


def test_a_mapper_may_pass_an_image_over():
    class Even(Probe):
        def __call__(self, record):
            return super().__call__(record) if record["index"] % 2 == 0 else None

    loader = build_train_loader(records(), mapper=Even(), total_batch_size=7)
    assert {one["index"] for one in next(iter(loader))} == {0, 2, 4, 6}
    loader = build_train_loader(records(), mapper=lambda record: None, total_batch_size=7)
    with pytest.raises(InputError, match="the data set: no image that the mapper accepts"):
        next(iter(loader))


def fails(record):
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(own, workers):
    json_file, images = own
    name = coco_dataset("own", str(json_file), str(images))
    mapper = DatasetMapper(is_train=True, augmentations=[T.RandomFlip()], image_format="BGR")
    file = images / "000002.png"
    size = shapes.SIZE
    for content, found in (
        (b"no image at all", "cannot be decoded"),
        (file.read_bytes()[:9000], "cannot be decoded"),
        (None, f"{size} x 20 pixels; expected {size} x {size}"),
    ):
        if content is None:
            Image.new("RGB", (size, 20)).save(file)
        else:
            file.write_bytes(content)
        data = DatasetCatalog.get(name)
        train = build_train_loader(data, mapper=mapper, total_batch_size=2, num_workers=workers)
        for loader in (train, build_test_loader(data, mapper=mapper, num_workers=workers)):
            with pytest.raises(InputError, match=f"{file}: {found}"):
                for _ in zip(range(6), loader):
                    pass
    # Other errors stay what they are.
    loader = build_train_loader(data, mapper=fails, total_batch_size=1, num_workers=workers)
    with pytest.raises(ZeroDivisionError, match="mine"):
        next(iter(loader))


def test_the_shapes_config(registered):
    cfg = OmegaConf.create({"train": {"seed": 5}}, flags={"allow_objects": True})
    cfg.dataloader = get_config("common/data/shapes.py").dataloader
    assert instantiate(cfg.dataloader.train).dataset.seed == 5
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert [one["image"].shape for one in batch] == [(3, 160, 160)] * 8
    tests = list(instantiate(cfg.dataloader.test))
    assert [[one["image_id"] for one in batch] for batch in tests] == [[1, 2]]
    evaluator = instantiate(cfg.dataloader.evaluator)
    evaluator.reset()
    records = DatasetCatalog.get("shapes_val")
    evaluator.process(sum(tests, []), [{"instances": perfect(record)} for record in records])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_a_test_loader_gives_every_image_once_and_in_order(batch_size):
    data = [{"image_id": k} for k in range(7)]
    loader = build_test_loader(data, mapper=lambda record: record, batch_size=batch_size)
    batches = [[one["image_id"] for one in batch] for batch in loader]
    assert sum(batches, []) == list(range(7)) and len(loader) == len(batches)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_detectron2s_loaders_become_ours(registered):
    names = L(get_detection_dataset_dicts)(names="shapes_train", filter_empty=False)
    mapper = L(DatasetMapper)(is_train=True, augmentations=[], image_format="BGR")
    nodes = OmegaConf.create(
        {
            "train": L(build_detection_train_loader)(
                dataset=names, mapper=mapper, total_batch_size=2, num_workers=0, sampler=None
            ),
            "test": L(build_detection_test_loader)(dataset=names, mapper=mapper, num_workers=0),
        },
        flags={"allow_objects": True},
    )
    use_seeded_loaders(nodes, seed=9, start=4)
    assert nodes.train.seed == 9 and nodes.train.start == 4
    assert len(next(iter(instantiate(nodes.train)))) == 2
    assert len(list(instantiate(nodes.test))) == len(DatasetCatalog.get("shapes_train"))
    nodes.train.seed = 2
    use_seeded_loaders(nodes, seed=9, start=0)
    assert nodes.train.seed == 2 and nodes.train.start == 0  # the recipe's own seed stays

    ours = get_config("common/data/shapes.py").dataloader  # its seed refers to a missing train.seed
    use_seeded_loaders(ours, seed=7)
    assert ours.train.seed == 7

    nodes.train = L(build_detection_train_loader)(dataset=names, sampler="mine")
    use_seeded_loaders(nodes, seed=9)
    assert nodes.train._target_ is build_detection_train_loader and "seed" not in nodes.train


def test_own_data_is_registered_once(own, small):
    json_file, images = map(str, own)
    node = L(coco_dataset)(name="own", json_file=json_file, image_root=images)
    assert check_dataset(OmegaConf.create([node, "own"])) == ["own", "own"]
    assert coco_dataset("mine", json_file, images, classes=list(shapes.CLASSES)) == "mine"
    with pytest.raises(InputError, match="data set 'own': already registered as"):
        coco_dataset("own", json_file, str(small / "train"))
    with pytest.raises(InputError, match="data set 'shapes_val': already registered"):
        coco_dataset("shapes_val", json_file, images)
    assert len(instantiate(L(get_detection_dataset_dicts)(names=node, filter_empty=False))) == 6
    assert MetadataCatalog.get("own").thing_classes == list(shapes.CLASSES)


def test_paths_from_the_environment(own, monkeypatch, refuses):
    json_file, images = own
    node = L(coco_dataset)(
        name="own", json_file=f"$D2KD_HERE/{json_file.name}", image_root=f"$D2KD_HERE/{images.name}"
    )
    for value in (None, ""):
        monkeypatch.delenv("D2KD_HERE", raising=False)
        if value is not None:
            monkeypatch.setenv("D2KD_HERE", value)
        line = (
            r"error: D2KD_HERE: not set; expected the folder of own, to find \$D2KD_HERE/own.json"
        )
        refuses(lambda: check_dataset(node), line)
    node.json_file = str(json_file)
    refuses(lambda: check_dataset(node), r"D2KD_HERE: not set; .* to find \$D2KD_HERE/images")
    monkeypatch.setenv("D2KD_HERE", str(json_file.parent))
    assert check_dataset(node) == ["own"]
    # The same files, however they are named.
    assert coco_dataset("own", str(json_file), str(images)) == "own"
    assert len(DatasetCatalog.get("own")) == 6


aquarium_options = LazyConfig.load(str(ROOT / "configs/common/study.py"), "aquarium_options")
AQUARIUM = sorted(str(path) for path in ROOT.glob("configs/baselines/*_aquarium.py"))


@pytest.mark.parametrize("path", AQUARIUM)
def test_recipes_on_photographs_load_anywhere(path, monkeypatch):
    """Without the data; and landscape, upright and wide images are all halved."""
    monkeypatch.delenv("D2KD_AQUARIUM", raising=False)
    config = load(path)
    assert config.model.roi_heads.num_classes == 7
    test = aquarium_options(config)["test"]
    for names in (*(config.dataloader[part].dataset.names for part in ("train", "test")), test):
        with pytest.raises(InputError, match="^D2KD_AQUARIUM: not set; expected the folder of aqu"):
            check_dataset(names)
        assert len(names.classes) == 7
    assert test.json_file != config.dataloader.test.dataset.names.json_file
    resize = instantiate(config.dataloader.test.mapper).augmentations.augs[0]
    for height, width in ((384, 512), (512, 384), (288, 512), (512, 288)):
        image = np.zeros((height, width, 3), np.uint8)
        assert resize.get_transform(image).apply_image(image).shape == (height // 2, width // 2, 3)


@pytest.mark.skipif(not os.environ.get("D2KD_AQUARIUM"), reason="D2KD_AQUARIUM is not set")
def test_the_photographs():
    config = load("baselines/faster_rcnn_small_aquarium.py")
    names = [config.dataloader[part].dataset.names for part in ("train", "test")]
    found = check_dataset([*names, aquarium_options(config)["test"]])
    records = [DatasetCatalog.get(name) for name in found]
    assert [len(split) for split in records] == [400, 58, 180]
    boxes = [sum(len(record["annotations"]) for record in split) for split in records]
    assert boxes == [3095, 451, 1268]


def without(section, key):
    return lambda content: content[section][0].pop(key)


def value(section, key, value):
    return lambda content: content[section][0].update({key: value})


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda c: c.pop("images"), "own.json: no list 'images'"),
        (lambda c: c.update(annotations={}), "own.json: 'annotations' is a dict"),
        (lambda c: c.update(images=[], annotations=[]), "own.json: no images"),
        (lambda c: c["images"].append("x"), r"own.json: images\[6\]: 'x'"),
        (without("images", "file_name"), r"own.json: images\[0\] \(id 1\): no file_name"),
        (without("annotations", "bbox"), r"own.json: annotations\[0\] \(id 1\): no bbox"),
        (
            value("annotations", "category_id", 9),
            r"annotations\[0\] \(id 1\): category 9; .* one of 1",
        ),
        (value("annotations", "image_id", 99), r"own.json: annotations\[0\] \(id 1\): image 99"),
        (value("images", "file_name", "gone.png"), "images/gone.png: missing; expected every"),
        (value("images", "file_name", "no/such.png"), "images/no/such.png: missing"),
        (b'{"images": [\n  {"id": 1,]', "broken JSON at line 2, column 12"),
        (b"", "broken JSON at line 1, column 1"),
        (b"\xff\xfe\x00", "own.json: unreadable"),
        (b"[]", "own.json: a list"),
    ],
)
def test_wrong_content_is_named(own, refuses, edit, found):
    own[0].write_bytes(edit) if isinstance(edit, bytes) else change(own[0], edit)
    refuses(lambda: coco_dataset("own", *map(str, own)), found)
    assert "own" not in DatasetCatalog.list()


def _read_at_another_size(record):
    raise detection_utils.SizeMismatchError()


GONE = {"file_name": "gone.png", "width": 65, "height": 64}
BIRDS = ["bird", *shapes.CLASSES[1:]]


@pytest.mark.parametrize(
    "act, line",
    [
        (lambda: build_train_loader([], mapper=Probe(), total_batch_size=1), "training set: no im"),
        (
            lambda: build_test_loader([], mapper=Probe()),
            "the test set: no image; expected at least",
        ),
        (lambda: build_test_loader([{}], mapper=Probe(), batch_size=0), "batch_size: 0; expected"),
        (
            lambda: list(build_test_loader([GONE], mapper=_read_at_another_size)),
            "gone.png: another size; expected 65 x 64 as in the annotations",
        ),
        (
            lambda: stream(1, dataset=[{"index": 0, "width": 3}], aspect_ratio_grouping=True),
            "aspect_ratio_grouping: an image without 'height'",
        ),
        (
            lambda: shapes.write_shapes("own.json/shapes", **SMALL),
            "own.json/shapes: .*; expected a folder",
        ),
        (lambda: coco_dataset("own", "own.json", "nowhere"), "nowhere: no such folder"),
        (lambda: coco_dataset("own", "none.json", "images"), "none.json: no such file"),
        (lambda: coco_dataset("own", "images", "images"), "no such file"),
        (
            lambda: coco_dataset("own", "own.json", "images", classes=BIRDS),
            "own.json: no class 'bird'; classes not in the list: 'solid_",
        ),
        (
            lambda: check_dataset("shapes_trian"),
            "'shapes_trian': not registered; expected shapes_t",
        ),
        (lambda: check_dataset(["qqq"]), "expected a name registered with Detectron2"),
    ],
)
def test_what_is_refused_too(refuses, own, act, line):
    refuses(act, line)


def own_records(edit):
    records = [dict(r, annotations=r["annotations"][:]) for r in DatasetCatalog.get("shapes_train")]
    edit(records)
    return records


def edit_object(**values):
    def edit(records):
        record = next(r for r in records if r["annotations"])
        first = record["annotations"][0]
        record["annotations"][0] = {k: v for k, v in {**first, **values}.items() if v is not None}

    return edit


OBJECT = "png: object 0: "
ODD_RECORDS = {
    "no file": (lambda r: r[2].pop("file_name"), "image 2 of the data: file_name None; expected"),
    "no box": (edit_object(bbox=None), f"{OBJECT}no bbox; expected bbox, bbox_mode and category"),
    "an array": (edit_object(bbox=np.ones(4)), f"{OBJECT}bbox array.*; expected a list of 4"),
    "nan": (edit_object(bbox=[1, 2, float("nan"), 4]), f"{OBJECT}bbox .*; expected a list of 4 fin"),
    "three": (edit_object(bbox=[1, 2, 4]), f"{OBJECT}bbox .*; expected a list of 4 finite numbers"),
    "fractions": (edit_object(bbox_mode=2), f"{OBJECT}bbox_mode 2; expected BoxMode.XYXY_ABS"),
    "a class as text": (edit_object(category_id="1"), f"{OBJECT}category_id '1'; expected the index"),
    "class -1": (edit_object(category_id=-1), f"{OBJECT}category_id -1; expected the index"),
    "class 1.5": (edit_object(category_id=1.5), f"{OBJECT}category_id 1.5; expected the index"),
}  # fmt: skip


@pytest.mark.parametrize("edit, line", ODD_RECORDS.values(), ids=ODD_RECORDS)
def test_records_of_someone_elses_function(registered, refuses, edit, line):
    """They are checked where Detectron2's mapper reads them; a mapper of its own may read others."""
    records = own_records(edit)
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    options = dict(total_batch_size=1, aspect_ratio_grouping=False)
    refuses(lambda: build_train_loader(records, mapper=mapper, **options), line)
    refuses(lambda: build_test_loader(records, mapper=mapper), line)
    assert next(iter(build_train_loader(records, mapper=lambda record: {"own": 1}, **options)))


@pytest.mark.parametrize(
    "made, line",
    [
        (lambda: 1 / 0, "cannot be loaded .ZeroDivisionError.*; expected a function that returns"),
        (lambda: None, "a NoneType; expected a function that returns a list"),
        (lambda: iter([{}]), "a list_iterator; expected a function that returns a list"),
        (lambda: [{}, 5], "record 1 is a int; expected a function that returns a list"),
    ],
)
def test_functions_that_return_no_records(refuses, made, line):
    DatasetCatalog.register("of_someone", made)
    refuses(lambda: check_dataset("of_someone"), f"data set 'of_someone': {line}")


@pytest.mark.parametrize("module", [None, "d2kdata"])
def test_functions_of_any_module_are_understood(module):
    """A LazyConfig's functions have none."""

    def made():
        return [{"file_name": "a.png"}]

    made.__module__ = module
    DatasetCatalog.register("of_someone", made)
    assert check_dataset("of_someone") == ["of_someone"]


def test_what_the_evaluator_reads_is_there(registered, refuses):
    records = own_records(lambda records: records[1].pop("image_id"))
    DatasetCatalog.register("without_ids", lambda: records)
    config = OmegaConf.create({"dataloader": {"test": {"dataset": {"names": "without_ids"}}}})
    config.dataloader.evaluator = L(COCOEvaluator)(dataset_name="without_ids")
    line = "data set 'without_ids': image 1: no image_id; expected what COCOEvaluator reads"
    refuses(lambda: check_test_data(config), line)
