"""The generated set shapes_{train,val,test}, the user's own data, steps of any, and loaders that repeat themselves."""

from d2kd.data import shapes
from d2kd.data.datasets import check_dataset, coco_dataset, dataset_names
from d2kd.data.incremental import class_step, split_classes
from d2kd.data.loader import build_test_loader, build_train_loader, use_seeded_loaders
from d2kd.data.mapper import QuickMapper
from d2kd.data.priors import estimate_priors
from d2kd.data.scales import TwoScales
from d2kd.data.voc import register_voc
from d2kd.structures.instance_priors import InstancePriors

__all__ = [
    "InstancePriors",
    "QuickMapper",
    "TwoScales",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "class_step",
    "coco_dataset",
    "dataset_names",
    "estimate_priors",
    "register_voc",
    "shapes",
    "split_classes",
    "use_seeded_loaders",
]

shapes.register()  # names only; the images are drawn when first asked for
