"""Aquarium: 638 photographs of fish, jellyfish, penguins, puffins, sharks, starfish and stingrays, at 256 pixels.

The data is not part of this project. D2KD_AQUARIUM is a folder of ``images/``, ``train.json``, ``val.json`` and
``test.json`` in COCO's format: Roboflow, *Aquarium*, https://public.roboflow.ai/object-detection/aquarium, licence
CC BY 4.0, with images of 512 x 384 or 512 x 288 pixels, many of them upright. They are halved. Recipes for other
sizes change ``short_edge_length`` and ``max_size`` alike.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from d2kd.data import coco_dataset

from .bccd import dataloader


def _split(split):
    return L(coco_dataset)(
        name=f"aquarium_{split}",
        json_file=f"$D2KD_AQUARIUM/{split}.json",
        image_root="$D2KD_AQUARIUM/images",
        classes=["fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"],
    )


dataloader.train.dataset.names, dataloader.test.dataset.names = _split("train"), _split("val")
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=192, max_size=256),
    L(T.RandomFlip)(),
]
dataloader.train.aspect_ratio_grouping = True  # most images are upright, the others are not
dataloader.train.num_workers = dataloader.test.num_workers = 1
