"""Photographs: one rule for orientation and bit depth, for training, the doctor, pictures and messages.

* A file's EXIF orientation is applied, as Detectron2 does. Boxes are those of the turned image.
* Pixels have 8 bits a channel, or 16 in a colour PNG, of which the upper 8 are taken. Grey images of 16 or 32 bits and of
  floating point numbers are refused, since they have no common white: Pillow would make most of their pixels white.
* A TIFF with an orientation is refused: whether a library has already applied it depends on its version.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetMapper, detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..utils.errors import InputError

logger = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files in a folder, in lower case."""

_ORIENTATION = 0x0112  # EXIF's tag
_FORMATS = ("BGR", "RGB", "YUV-BT.601", "L", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
"""Of Detectron2's mappers, which hand all but two of them on to Pillow."""
_DEEP_MODES = {"F": "floating point numbers", "I": "32 bits a pixel"}


def check_image(file_name: str) -> int:
    """Check the header of an image, without decoding it.

    Returns:
        int: the EXIF orientation; 1 is upright.

    Raises:
        InputError: the file is no image, or of a kind that this module's rules refuse.
    """
    return _check_header(file_name)[0]


def image_size(file_name: str) -> tuple[int, int]:
    """Return (width, height) in pixels, after the EXIF orientation; raise InputError as :func:`check_image` does."""
    orientation, (width, height) = _check_header(file_name)
    return (width, height) if orientation < 5 else (height, width)


def find_images(folder: Path) -> list[Path]:
    """Return the images in a folder and the folders in it, by their suffixes, sorted."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())


def _check_header(file_name: str) -> tuple[int, tuple[int, int]]:
    """Return the EXIF orientation, and (width, height) as stored; see :func:`check_image`."""
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            mode, kind, size = image.mode, image.format, image.size
    except UnidentifiedImageError as error:
        empty = not os.path.getsize(PathManager.get_local_path(file_name))
        found = "an empty file" if empty else "damaged, or of no kind that Pillow reads"
        raise InputError(file_name, f"cannot be decoded ({found})", "a readable image") from error
    except Exception as error:  # Pillow raises many types
        raise InputError(file_name, f"cannot be decoded ({error})", "a readable image") from error
    if mode in _DEEP_MODES or mode.startswith("I;"):
        found = _DEEP_MODES.get(mode, "16 bits a pixel")
        raise InputError(file_name, found, "an image of 8 bits a channel: convert it")
    if orientation not in range(1, 9):
        orientation = 1
    if kind == "TIFF" and orientation != 1:
        found = f"a TIFF with EXIF orientation {orientation}"
        raise InputError(file_name, found, "upright pixels: turn the image and remove the tag")
    return orientation, size


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Read an image as ``detectron2.data.detection_utils.read_image`` does, with OpenCV if it can.

    Returns:
        np.ndarray: (H, W, 3) uint8 for BGR or RGB, turned by the file's EXIF orientation.

    Raises:
        InputError: see :func:`check_image`.
    """
    image = None
    if image_format in ("BGR", "RGB"):
        with PathManager.open(file_name, "rb") as file:
            content = np.frombuffer(file.read(), np.uint8)
        # Both libraries read the same orientation and bit depth from JPEG files; from TIFF files not even all colours.
        start = content[:3].tobytes()
        tiff = start[:2] in (b"II", b"MM")
        if start == b"\xff\xd8\xff" or (check_image(file_name) == 1 and not tiff):
            image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None:  # Pillow reads it, or raises an informative error
        check_image(file_name)
        return detection_utils.read_image(file_name, format=image_format)
    return image if image_format == "BGR" else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def reading_mapper(mapper):
    """Return the mapper inside another one, such as a ``DownscaledStudentMapper``, which reads the image; else itself."""
    return getattr(mapper, "mapper", mapper)


def reads_by_these_rules(mapper) -> bool:
    """Return whether a mapper, or one inside it, is Detectron2's, with a ``__call__`` of its own or of this package."""
    mapper = reading_mapper(mapper)
    if not isinstance(mapper, DatasetMapper):
        return False
    kind = type(mapper)
    return kind.__call__ is DatasetMapper.__call__ or str(kind.__module__).startswith("d2kd.")


def check_image_format(mapper) -> None:
    """Check that a mapper's ``image_format`` is one that Detectron2 and Pillow know, if it reads by these rules.

    Raises:
        InputError: it is another.
    """
    order = reads_by_these_rules(mapper) and reading_mapper(mapper).image_format
    if order and order not in _FORMATS:
        raise InputError("mapper.image_format", order, "BGR or RGB")


def check_record(record: dict) -> None:
    """Check the image of a dataset dict. A process names the first one with an EXIF orientation in a warning."""
    global _warned
    if "file_name" in record and check_image(record["file_name"]) != 1 and not _warned:
        _warned = True
        logger.warning(
            "%s and maybe others have an EXIF orientation, which is applied: boxes must be those of the turned image",
            record["file_name"],
        )


_warned = False
