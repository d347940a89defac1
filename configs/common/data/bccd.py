"""BCCD: 364 microscope images of red blood cells, white blood cells and platelets, at half of their 640 x 480 pixels.

The data is not part of this project. D2KD_BCCD is the path of ``BCCD`` in github.com/Shenggan/BCCD_Dataset.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from omegaconf import OmegaConf

from d2kd.data import OpenCVDatasetMapper, build_test_loader, build_train_loader, register_voc


def _split(split):
    return L(register_voc)(
        name=f"bccd_{split}",
        root="$D2KD_BCCD",
        split=split,
        classes=["RBC", "WBC", "Platelets"],
    )


dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names=_split("train"), filter_empty=False),
    mapper=L(OpenCVDatasetMapper)(  # the same samples as DatasetMapper
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(short_edge_length=240),
            L(T.RandomFlip)(),
            L(T.RandomFlip)(horizontal=False, vertical=True),  # smears have no orientation
        ],
        image_format="BGR",
    ),
    total_batch_size=4,
    num_workers=2,
    aspect_ratio_grouping=False,  # all images have the same size
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
    num_workers=2,
)

dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    use_fast_impl=False,  # the fast one needs Detectron2's C++ operators
)
