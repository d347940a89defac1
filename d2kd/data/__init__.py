"""The generated data set shapes_{train,val,test}, custom and incremental data sets, and reproducible loaders."""

from ..structures.instance_priors import InstancePriors
from . import shapes
from .datasets import check_dataset, coco_dataset, dataset_names, image_folder, training_records
from .incremental import incremental_split, split_classes
from .loader import build_test_loader, build_train_loader, use_seeded_loaders
from .mapper import OpenCVDatasetMapper
from .priors import estimate_priors
from .scales import DownscaledStudentMapper
from .subset import subset
from .voc import register_voc

__all__ = [
    "InstancePriors",
    "OpenCVDatasetMapper",
    "DownscaledStudentMapper",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "image_folder",
    "incremental_split",
    "coco_dataset",
    "dataset_names",
    "estimate_priors",
    "register_voc",
    "shapes",
    "split_classes",
    "subset",
    "training_records",
    "use_seeded_loaders",
]

shapes.register_shapes()  # names only; the images are drawn when the set is first loaded
