"""The generated shapes at their size of 160 pixels, with flips only. Images without objects are included."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from omegaconf import OmegaConf

from d2kd.data import build_test_loader, build_train_loader

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="shapes_train", filter_empty=False),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[L(T.RandomFlip)()],
        image_format="BGR",
    ),
    total_batch_size=8,
    num_workers=2,
    aspect_ratio_grouping=False,  # all images are square
    seed="${train.seed}",
    start=0,
)

dataloader.test = L(build_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="shapes_val", filter_empty=False),
    mapper=L(DatasetMapper)(
        is_train=False,
        augmentations=[],
        image_format="${...train.mapper.image_format}",
    ),
    batch_size=8,
    num_workers=2,
)

dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    use_fast_impl=False,  # the fast one needs Detectron2's C++ operators
)
