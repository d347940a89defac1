"""The generated data set shapes_{train,val,test}, custom and incremental data sets, and reproducible loaders."""

from d2kd.data import shapes
from d2kd.data.datasets import check_dataset, coco_dataset, dataset_names
from d2kd.data.incremental import incremental_split, split_classes
from d2kd.data.loader import build_test_loader, build_train_loader, use_seeded_loaders
from d2kd.data.mapper import OpenCVDatasetMapper
from d2kd.data.priors import estimate_priors
from d2kd.data.scales import DownscaledStudentMapper
from d2kd.data.voc import register_voc
from d2kd.structures.instance_priors import InstancePriors

__all__ = [
    "InstancePriors",
    "OpenCVDatasetMapper",
    "DownscaledStudentMapper",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "incremental_split",
    "coco_dataset",
    "dataset_names",
    "estimate_priors",
    "register_voc",
    "shapes",
    "split_classes",
    "use_seeded_loaders",
]

shapes.register()  # names only; the images are drawn when the set is first loaded
