"""Aquarium: 638 photographs of fish, jellyfish, penguins, puffins, sharks, starfish and stingrays, at 256 pixels.

The data is not part of this project. D2KD_AQUARIUM is a folder of ``images/``, ``train.json``, ``val.json`` and
``test.json`` in COCO's format: Roboflow, *Aquarium*, https://public.roboflow.ai/object-detection/aquarium, licence
CC BY 4.0, with images of 512 x 384 or 512 x 288 pixels, many of them upright. They are halved. Recipes for other
sizes change ``short_edge_length`` and ``max_size`` alike.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from omegaconf import OmegaConf

from d2kd.data import OpenCVDatasetMapper, build_test_loader, build_train_loader, coco_dataset


def _split(split):
    return L(coco_dataset)(
        name=f"aquarium_{split}",
        json_file=f"$D2KD_AQUARIUM/{split}.json",
        image_root="$D2KD_AQUARIUM/images",
        classes=["fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"],
    )


dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names=_split("train"), filter_empty=False),
    mapper=L(OpenCVDatasetMapper)(  # the same samples as DatasetMapper
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(short_edge_length=192, max_size=256),
            L(T.RandomFlip)(),
        ],
        image_format="BGR",
    ),
    total_batch_size=4,
    num_workers=1,
    aspect_ratio_grouping=True,  # most images are upright, the others are not
    seed="${train.seed}",
    start=0,
)

dataloader.test = L(build_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names=_split("val"), filter_empty=False),
    mapper=L(OpenCVDatasetMapper)(
        is_train=False,
        augmentations=["${....train.mapper.augmentations.0}"],
        image_format="${...train.mapper.image_format}",
    ),
    batch_size=8,
    num_workers=1,
)

dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    use_fast_impl=False,  # the fast one needs Detectron2's C++ operators
)
