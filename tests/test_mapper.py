"""OpenCVDatasetMapper gives DatasetMapper's samples, sooner."""

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetMapper, detection_utils
from detectron2.structures import BoxMode
from PIL import Image

from d2kd.data import OpenCVDatasetMapper, build_train_loader
from d2kd.data.images import read_image
from d2kd.data.mapper import _TorchResize
from d2kd.utils.errors import InputError

SIZE = 60, 90


def picture(height, width, seed=0):
    """Smooth colours with some noise, as photographs have them."""
    random = np.random.default_rng(seed)
    coarse = random.integers(256, size=(4, 5, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + random.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def record(tmp_path):
    file = tmp_path / "photo.jpg"
    Image.fromarray(picture(*SIZE)).save(file, quality=90)
    one = {"bbox": [10, 5, 50, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    one["segmentation"] = [[10, 5, 50, 5, 50, 40, 10, 40]]
    record = {"file_name": str(file), "height": SIZE[0], "width": SIZE[1], "image_id": 7}
    return {**record, "annotations": [one, {**one, "bbox": [0, 0, 5, 5], "iscrowd": 1}]}


def both(record, augmentations, **options):
    """What either mapper makes of a record, from the same random state."""
    options = {"is_train": True, "image_format": "BGR"} | options
    samples = []
    for mapper in (DatasetMapper, OpenCVDatasetMapper):
        np.random.seed(3)
        samples.append(mapper(augmentations=augmentations, **options)(record))
    return samples


def assert_alike(theirs, ours, tolerance):
    assert theirs.keys() == ours.keys()
    assert theirs["image"].dtype == ours["image"].dtype and ours["image"].is_contiguous()
    difference = (theirs["image"].int() - ours["image"].int()).abs().max()
    assert difference <= tolerance
    for key in ("file_name", "height", "width", "image_id"):
        assert theirs[key] == ours[key]
    if "instances" in theirs:
        a, b = theirs["instances"], ours["instances"]
        assert a.image_size == b.image_size and len(a) == len(b) == 1
        assert a.gt_boxes.tensor.equal(b.gt_boxes.tensor) and a.gt_classes.equal(b.gt_classes)


AUGMENTATIONS = {  # and by how much pixels may differ
    "none": ([], 0),
    "flip": ([T.RandomFlip(1.0)], 0),
    "smaller": ([T.ResizeShortestEdge(30)], 1),
    "some": ([T.ResizeShortestEdge([31, 47, 80, 133], sample_style="choice"), T.RandomFlip()], 1),
    "flipped, larger": ([T.RandomFlip(1.0), T.Resize((45, 140))], 1),
    "cropped": ([T.RandomCrop("relative_range", (0.5, 0.5)), T.ResizeShortestEdge(100)], 1),
    "nearest": ([T.ResizeShortestEdge(30, interp=Image.NEAREST)], 0),
    "inside another": ([T.RandomApply(T.Resize((45, 140)), 1.0)], 0),
    "of floats": ([T.RandomBrightness(0.9, 1.1), T.Resize((45, 140))], 1),
}


@pytest.mark.parametrize(
    ("augmentations", "tolerance"), AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys()
)
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_samples_are_detectron2s(record, augmentations, tolerance, image_format):
    before = repr(record)
    theirs, ours = both(record, augmentations, image_format=image_format)
    assert_alike(theirs, ours, tolerance)
    assert ours["image"].float().std() > 10 and repr(record) == before


def test_another_interpolation_is_the_one_that_is_asked_for():
    steps = np.repeat(np.uint8([0, 255]), 12).reshape(1, 24, 1).repeat(9, 0).repeat(3, 2)
    transform = T.ResizeTransform(9, 24, 7, 17, Image.BILINEAR)
    quick = _TorchResize(9, 24, 7, 17, Image.BILINEAR)
    for interp in (Image.NEAREST, Image.BICUBIC):
        wanted = transform.apply_image(steps, interp)
        assert np.array_equal(quick.apply_image(steps, interp), wanted)


def test_masks_and_annotations_follow(tmp_path, record):
    labels = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    augmentations = [T.Resize((30, 45)), T.RandomFlip(1.0)]
    theirs, ours = both(record, augmentations, use_instance_mask=True)
    assert_alike(theirs, ours, 1)
    (a,), (b,) = theirs["instances"].gt_masks.polygons, ours["instances"].gt_masks.polygons
    assert np.array_equal(a, b) and theirs["sem_seg"].equal(ours["sem_seg"])
    theirs, ours = both(record, augmentations, is_train=False)
    assert_alike(theirs, ours, 1)
    assert "instances" not in ours and "annotations" not in ours
    _, ours = both({**record, "annotations": []}, augmentations)
    assert len(ours["instances"]) == 0
    del record["annotations"]
    _, ours = both(record, [])
    assert "instances" not in ours


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_they_say(tmp_path, orientation):
    image, exif = Image.fromarray(picture(40, 56)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    file = str(tmp_path / "turned.jpg")
    expected = detection_utils.read_image(file, "BGR")
    assert expected.shape[:2] == ((40, 56) if orientation < 5 else (56, 40))
    assert np.array_equal(read_image(file, "BGR"), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
def test_images_of_other_kinds_become_what_is_asked_for(tmp_path, mode, image_format):
    file = str(tmp_path / "image.png")
    Image.fromarray(picture(20, 30)).convert(mode).save(file)
    expected = detection_utils.read_image(file, image_format)
    assert np.array_equal(read_image(file, image_format), expected)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_what_cannot_be_decoded_is_refused_like_any_other(tmp_path, record, content):
    broken = tmp_path / "broken.jpg"
    whole = (tmp_path / "photo.jpg").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content is None else content)
    record["file_name"] = str(broken)
    mapper = OpenCVDatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    loader = build_train_loader([record], mapper=mapper, total_batch_size=1)
    with pytest.raises(InputError, match="cannot be decoded") as refused:
        next(iter(loader))
    assert refused.value.culprit == str(broken)


def test_a_recipe_and_a_yacs_config_make_it(record):
    options = dict(is_train=True, augmentations=[L(T.Resize)(shape=(30, 45))], image_format="BGR")
    node = L(DatasetMapper)(**options)
    node["_target_"] = "d2kd.data.OpenCVDatasetMapper"
    assert instantiate(node)(record)["image"].shape == (3, 30, 45)
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (45,)
    for is_train in (True, False):
        sample = OpenCVDatasetMapper(cfg, is_train=is_train)(record)
        assert sample["image"].shape[0] == 3 and ("instances" in sample) == is_train
