"""Detectron2's dataset mapper with faster image libraries."""

from __future__ import annotations

import copy

import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetMapper, detection_utils
from PIL import Image

from .images import read_image

RESIZES = (T.Resize, T.ResizeShortestEdge)


class OpenCVDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, but OpenCV decodes and torch resizes, instead of Pillow.

    Arguments, outputs and random numbers are those of ``DatasetMapper``. To use it in a recipe:
    ``dataloader.train.mapper._target_=d2kd.data.OpenCVDatasetMapper``. JPEG files decode to the same pixels if both
    libraries use libjpeg-turbo, as their wheels do. Resized pixels differ by at most 1 of 255: both libraries use the
    same triangle filter, but round differently. ``DatasetMapper``'s code is used for files that OpenCV cannot
    decode, formats other than BGR and RGB, semantic segmentation, precomputed proposals, and resizes other than a
    bilinear ``Resize`` or ``ResizeShortestEdge`` directly in the list of augmentations.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        quick = [
            _ResizeAugmentation(a) if type(a) in RESIZES else a for a in self.augmentations.augs
        ]
        self.augmentations = T.AugmentationList(quick)

    def __call__(self, dataset_dict: dict) -> dict:
        if self.proposal_topk is not None or "sem_seg_file_name" in dataset_dict:
            return super().__call__(dataset_dict)
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        detection_utils.check_image_size(record, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        record["image"] = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, aug_input.image.shape[:2])
        return record


class _ResizeAugmentation(T.Augmentation):
    """A resize augmentation that returns a :class:`_TorchResize`."""

    def __init__(self, resize: T.Augmentation):
        self.resize = resize

    def __repr__(self) -> str:
        return repr(self.resize)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = self.resize.get_transform(image)
        if type(transform) is not T.ResizeTransform or transform.interp != Image.BILINEAR:
            return transform
        return _TorchResize(*(getattr(transform, name) for name in ("h", "w", "new_h", "new_w", "interp")))  # fmt: skip


class _TorchResize(T.ResizeTransform):
    """A bilinear resize by torch, for uint8 images."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        method = self.interp if interp is None else interp  # NEAREST is 0
        if img.dtype != np.uint8 or img.ndim != 3 or method != Image.BILINEAR:
            return super().apply_image(img, interp)
        pixels = torch.from_numpy(np.ascontiguousarray(img)).permute(2, 0, 1)[None]
        size = self.new_h, self.new_w
        resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()
