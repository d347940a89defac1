"""Detectron2's mapper, on faster libraries."""

from __future__ import annotations

import copy

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetMapper, detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

RESIZES = (T.Resize, T.ResizeShortestEdge)


class QuickMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, which OpenCV decodes for and torch resizes for, in place of Pillow.

    Its arguments, its samples and its random draws are ``DatasetMapper``'s; a recipe takes it by
    ``dataloader.train.mapper._target_=d2kd.data.QuickMapper``. JPEG files decode to the same pixels where both
    libraries come with libjpeg-turbo, as their wheels do; resized pixels differ by 1 of 255 at most, for both
    filter with a triangle as wide as the scale and round elsewhere. What OpenCV cannot decode, images in other formats
    than BGR and RGB, maps for semantic segmentation and precomputed proposals go Detectron2's way, as do resizes
    other than a bilinear ``Resize`` or ``ResizeShortestEdge`` that stands in the list of augmentations itself.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        quick = [_Quick(a) if type(a) in RESIZES else a for a in self.augmentations.augs]
        self.augmentations = T.AugmentationList(quick)

    def __call__(self, dataset_dict: dict) -> dict:
        if self.proposal_topk is not None or "sem_seg_file_name" in dataset_dict:
            return super().__call__(dataset_dict)
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        detection_utils.check_image_size(record, image)
        seen = T.AugInput(image)
        transforms = self.augmentations(seen)
        record["image"] = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, seen.image.shape[:2])
        return record


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """As ``detectron2.data.detection_utils.read_image``, by OpenCV where that can.

    Returns:
        ``(H, W, C)``, turned as the file's EXIF orientation says; uint8 of BGR or RGB.
    """
    image = None
    if image_format in ("BGR", "RGB"):
        with PathManager.open(file_name, "rb") as file:
            content = np.frombuffer(file.read(), np.uint8)
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None:  # Pillow reads it, or says why not
        return detection_utils.read_image(file_name, format=image_format)
    return image if image_format == "BGR" else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class _Quick(T.Augmentation):
    """A resize whose transform is a :class:`_QuickResize`."""

    def __init__(self, resize: T.Augmentation):
        self.resize = resize

    def __repr__(self) -> str:
        return repr(self.resize)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = self.resize.get_transform(image)
        if type(transform) is not T.ResizeTransform or transform.interp != Image.BILINEAR:
            return transform
        return _QuickResize(*(getattr(transform, name) for name in ("h", "w", "new_h", "new_w", "interp")))  # fmt: skip


class _QuickResize(T.ResizeTransform):
    """Resizes images of bytes by torch's kernel for them."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        how = self.interp if interp is None else interp  # NEAREST is 0
        if img.dtype != np.uint8 or img.ndim != 3 or how != Image.BILINEAR:
            return super().apply_image(img, interp)
        pixels = torch.from_numpy(np.ascontiguousarray(img)).permute(2, 0, 1)[None]
        size = self.new_h, self.new_w
        resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()
