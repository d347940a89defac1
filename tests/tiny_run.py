"""A recipe that trains in a second: tiny detectors on a handful of images drawn at random."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import LinearParamScheduler
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from d2kd.config import get_config
from d2kd.data import build_test_loader, build_train_loader, coco_dataset
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Distiller, Teacher

from .common import CLASSES, build, tiny_faster_rcnn

_DEFAULTS = get_config("common/train.py").train


def draw_data(folder: Path, objects=(1, 2, 0, 1, 2, 1)) -> None:
    """``data.json`` and its images, image i with ``objects[i]`` boxes."""
    random = np.random.RandomState(0)
    images, annotations = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for i, count in enumerate(objects):
        Image.fromarray(random.randint(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        for _ in range(count):
            x, y, w, h = random.randint(8, 32, 4).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "bbox": [x, y, w, h]}
                | {"category_id": random.randint(CLASSES) + 1, "area": w * h, "iscrowd": 0}
            )
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))


def recipe(data: Path, output: Path, model: DictConfig | None = None, **train) -> DictConfig:
    """A whole recipe on the images of :func:`draw_data`, of a Faster R-CNN unless told otherwise."""
    names = L(coco_dataset)(
        name=f"tiny_{data}", json_file=str(data / "data.json"), image_root=str(data)
    )
    dataloader = OmegaConf.create()
    dataloader.train = L(build_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names=names, filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=True, augmentations=[L(T.RandomFlip)()], image_format="BGR"
        ),
        total_batch_size=2,
        seed="${train.seed}",
    )
    dataloader.test = L(build_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names=names, filter_empty=False),
        mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="BGR"),
    )
    dataloader.evaluator = L(COCOEvaluator)(dataset_name=names)
    optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
        lr=0.005,
        momentum=0.9,
        weight_decay=1e-4,
    )
    ours = {"output_dir": str(output), "max_iter": 4, "device": "cpu", "log_period": 1}
    return DictConfig(
        {
            "model": tiny_faster_rcnn() if model is None else model,
            "dataloader": dataloader,
            "optimizer": optimizer,
            "lr_multiplier": L(LinearParamScheduler)(start_value=1.0, end_value=0.1),
            "train": OmegaConf.merge(_DEFAULTS, ours, train),
        },
        flags={"allow_objects": True},
    )


def write_recipe(file: Path, made: str, *more: str) -> Path:
    """A file of the recipe that this expression makes, of functions of this module; further lines may change it."""
    names = "from tests.tiny_run import distiller, recipe, without_evaluation"
    head = ["from pathlib import Path", names, "_here = Path(__file__).parent"]
    file.write_text("\n".join([*head, f"globals().update({made})", *more, ""]))
    return file


def without_evaluation(config: DictConfig) -> DictConfig:
    del config.dataloader["evaluator"]
    return config


def distiller(weights: str | None = None, losses: DictConfig | None = None) -> DictConfig:
    """A tiny Faster R-CNN beside a wider teacher; by default every loss has weight 0."""
    return L(Distiller)(
        student=tiny_faster_rcnn(),
        teacher=L(Teacher)(detector=tiny_faster_rcnn(channels=24), weights=weights),
        losses=losses or L(DistillLosses)(imitation=L(ImitationLoss)(weight=0.0)),
        max_iter="${train.max_iter}",
    )


def teacher_weights(folder: Path, seed: int = 7) -> str:
    """A checkpoint of the distiller's teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "teacher.pth"
    torch.save({"model": build(tiny_faster_rcnn(channels=24), seed=seed).state_dict()}, file)
    return str(file)
