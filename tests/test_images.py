"""Photographs: one rule for orientation and bit depth, whoever reads them."""

import logging
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetMapper, detection_utils
from detectron2.structures import BoxMode
from PIL import Image

from d2kd.data import DownscaledStudentMapper, OpenCVDatasetMapper, build_test_loader
from d2kd.data import images as module
from d2kd.data.images import check_image, read_image
from d2kd.doctor.data_checks import (
    _check_annotations,
    _check_copies,
    _check_images,
    _other_format,
)
from d2kd.utils.errors import InputError

MAPPERS = [DatasetMapper, OpenCVDatasetMapper]


def photo(path, orientation=None, mode="RGB", **options):
    """An image of 20 x 30 pixels, no two corners of which are alike."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :15], pixels[:10, 15:], pixels[10:, :15] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    image = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif, **options)
    return str(path)


def record_of(file, width=30, height=20):
    return {"file_name": file, "width": width, "height": height, "image_id": 1, "annotations": []}


def sample(mapper, record):
    [[found]] = build_test_loader([record], mapper=mapper)
    return found["image"].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_an_orientation_is_applied_by_all(tmp_path, suffix, orientation):
    file = photo(tmp_path / f"a.{suffix}", orientation)
    assert check_image(file) == (orientation or 1)
    expected = detection_utils.read_image(file, "BGR")
    assert expected.shape[:2] == ((30, 20) if (orientation or 1) > 4 else (20, 30))
    assert np.abs(read_image(file, "BGR").astype(int) - expected).max() <= 1
    record = record_of(file, *expected.shape[1::-1])
    for kind in MAPPERS:
        mapper = kind(is_train=False, augmentations=[], image_format="BGR")
        assert np.abs(sample(mapper, record).astype(int) - expected).max() <= 1


def test_a_process_names_the_first_of_them(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "_warned", False)
    files = [photo(tmp_path / f"{k}.jpg", k) for k in (1, 3, 3)]
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    with caplog.at_level(logging.WARNING):
        list(build_test_loader([record_of(file) for file in files], mapper=mapper))
    (said,) = (one.getMessage() for one in caplog.records if "EXIF" in one.getMessage())
    assert said.startswith(f"{files[1]} and maybe others have an EXIF orientation")


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("kind", MAPPERS)
def test_deep_grey_images_are_refused(tmp_path, mode, kind):
    """Pillow would make them white, or black."""
    values = np.full((20, 30), 3000 if mode != "F" else 0.5)
    file = tmp_path / ("a.png" if mode == "I;16" else "a.tif")
    Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(
        file
    )
    mapper = kind(is_train=True, augmentations=[], image_format="BGR")
    for wrapped in (mapper, DownscaledStudentMapper(mapper, 2)):
        with pytest.raises(InputError, match="a.(png|tif): .*; expected an image of 8 bits"):
            sample(wrapped, record_of(str(file)))
    with pytest.raises(InputError, match="expected an image of 8 bits"):
        read_image(str(file), "RGB")


def test_a_mapper_that_reads_by_itself_is_left_alone(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.full((20, 30), 3000, np.uint16)).save(file)

    class Deep(DatasetMapper):
        def __call__(self, record):
            pixels = np.asarray(Image.open(record["file_name"])) // 256
            return {"image": np.repeat(pixels[None], 3, axis=0)}

    mapper = Deep(is_train=True, augmentations=[], image_format="BGR")
    [[found]] = build_test_loader([record_of(str(file))], mapper=mapper)
    assert found["image"].max() == 11


def test_tiffs_of_other_colours_are_read_as_by_detectron2(tmp_path):
    file = tmp_path / "a.tif"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 9, 3), np.uint8), "LAB").save(file)
    assert np.array_equal(
        read_image(str(file), "BGR"), detection_utils.read_image(str(file), "BGR")
    )


@pytest.mark.parametrize(
    "content, found",
    [(b"", "an empty file"), (b"\0\0\0\x18ftypheic", "damaged, or of no kind that Pillow reads")],
)
def test_what_is_no_image(tmp_path, content, found):
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_image(str(file), "BGR")
    assert error.value.found == f"cannot be decoded ({found})"


def test_turned_tiffs_are_refused(tmp_path):
    assert check_image(photo(tmp_path / "upright.tif")) == 1
    file = photo(tmp_path / "turned.tif", 3)
    with pytest.raises(InputError, match="turned.tif: a TIFF with EXIF orientation 3; expected up"):
        check_image(file)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK"])
def test_other_modes_are_read_as_by_detectron2(tmp_path, mode):
    file = photo(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode=mode)
    assert check_image(file) == 1
    expected = detection_utils.read_image(file, "BGR")
    assert np.abs(read_image(file, "BGR").astype(int) - expected).max() <= 1


def test_a_size_that_an_orientation_changes_is_explained(tmp_path):
    file = photo(tmp_path / "a.jpg", 6)
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    with pytest.raises(
        InputError, match="20 x 30 pixels after its EXIF orientation; expected 30 x 20"
    ):
        sample(mapper, record_of(file))


def test_the_doctor_counts_orientations_and_empty_images(tmp_path):
    Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / "grey.png")
    (tmp_path / "no.png").write_text("no image")
    Image.fromarray(np.full((20, 30), 3000, np.uint16)).save(tmp_path / "deep.png")
    files = [photo(tmp_path / "a.jpg", 3), photo(tmp_path / "b.jpg")]
    files += [str(tmp_path / f"{name}.png") for name in ("grey", "no", "deep")]
    found = {one.subject: one for one in _check_images("images", list(map(record_of, files)), 0)}
    assert found["images"].state == "error" and "2 of 5 cannot be used" in found["images"].found
    assert "1 of 5 have an EXIF orientation" in found["images, orientation"].found
    assert "1 of 5 are of nearly one colour, such as" in found["images, content"].found
    assert {one.state for key, one in found.items() if key != "images"} == {"warning"}


BOXES = np.array(
    [[10, 10, 30, 40], [50, 60, 90, 95], [2, 3, 98, 70]], dtype=float
)  # XYXY of 100 x 100


@pytest.mark.parametrize(
    "boxes, meant",
    [
        (BOXES, None),
        (np.concatenate([BOXES[:, :2], BOXES[:, :2] + BOXES[:, 2:]], axis=1), "two corners"),
        (BOXES / 100, "fractions"),
        (np.array([[0.8, 0.9, 1.2, 1.4]]), "fractions"),  # around a centre
    ],
)
def test_boxes_of_another_format_are_recognised(boxes, meant):
    found = _other_format(np.tile(boxes, (4, 1)), np.full((12, 2), 100.0))
    assert (found is None) == (meant is None) and (meant or "") in (found or "")


def test_boxes_of_a_smaller_image_are_recognised():
    def found(factor, count):
        record = {"file_name": "a", "width": 100, "height": 100, "annotations": []}
        for box in np.tile(BOXES * factor, (4, 1))[:count]:
            one = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
            record["annotations"].append(one)
        return {f.subject: f for f in _check_annotations("it", [record], {0: "a"})}["it, boxes"]

    assert found(0.5, 12).state == "warning" and "beyond 55% of its image" in found(0.5, 12).found
    assert found(1, 12).state == found(0.5, 9).state == "ok"
    assert found(0.04, 9).found == "3 boxes are less than a pixel wide or high"


def test_image_files_with_the_same_content_are_found(tmp_path, monkeypatch):
    contents = {"train/a": "a", "train/b": "a", "train/c": "c", "train/e": "", "test/c": "c"}
    contents |= {"test/d": "d", "test/d2": "d", "test/e": "", "test/other": "longer"}
    files = {name: str(tmp_path / name.replace("/", "_")) for name in contents}
    for name, content in contents.items():
        Path(files[name]).write_text(content)
    train, test = (
        [f for n, f in files.items() if n.startswith(part)] for part in ("train", "test")
    )
    test.append("https://nowhere/a.jpg")
    within, between = _check_copies(train, test)
    pair = f"{files['train/b']} and {files['train/a']}"
    assert within.found == f"1 training images are copies of others, such as {pair}"
    pair = f"{files['test/c']} and {files['train/c']}"
    assert between.found == f"1 test images are copies of training images, such as {pair}"
    assert within.state == between.state == "warning"
    (none,) = _check_copies(train[1:], train[1:])  # the same set, on purpose
    assert none.state == "ok" and none.found == "none"
    monkeypatch.setattr("d2kd.doctor.data_checks.COPY_SECONDS", -1)
    (none,) = _check_copies(train, test)
    assert none.found.startswith("none, as far as -1 s allow: 0 of 6 files of equal size were read")


def test_boxes_around_a_centre_are_recognised():
    sides = BOXES[:, 2:] - BOXES[:, :2]
    centre = (BOXES[:, :2] + BOXES[:, 2:]) / 2
    read = np.concatenate(
        [centre, centre + sides], axis=1
    )  # [centre, sides] read as [corner, sides]
    assert "centre" in _other_format(np.tile(read, (4, 1)), np.full((12, 2), 100.0))
    assert _other_format(read, np.full((3, 2), 100.0)) is None  # too few to tell
