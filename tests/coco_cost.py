"""What a training on COCO costs: an estimate without a GPU, as a table in Markdown.

    python -m tests.coco_cost [--image-size 800x1333] [RECIPE …]

One step of each recipe is run on the CPU, on one generated image, with untrained detectors. Two things are counted that
do not depend on the device: operations of convolutions and matrix products, forward and backward, and the largest size
of all tensors at a time. From them:

* hours: iterations x seconds x operations / operations of the plain detector whose seconds Detectron2's zoo publishes;
* memory of a GPU with two images: weights and momentum, and what the step holds for one image, twice.

``d2kd benchmark`` measures both on your GPU.
"""

from __future__ import annotations

import argparse
import weakref
from dataclasses import dataclass

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from d2kd.benchmark.untrained import measure_norm_statistics, random_batch
from d2kd.config import distill, load, method, with_defaults, without_priors, without_weights
from d2kd.modeling import Distiller

PLAIN = {
    "faster_rcnn": ("baselines/faster_rcnn_R_50_FPN_1x.py", 0.210),
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", 0.261),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.py", 0.205),
}
"""Plain recipes, and seconds of an iteration of 16 images on 8 V100: MODEL_ZOO.md of Detectron2, commit d54c674."""

IMITATION = "--distill imitation"
RECIPES = [
    *(recipe for recipe, _ in PLAIN.values()),
    IMITATION,
    "projects/TAR/configs/tar_faster_rcnn_R_50_from_R_101_1x.py",
    "projects/TAR/configs/tar_faster_rcnn_mobilenet_v3_from_R_50_1x.py",
    "projects/TAR/configs/tar_mask_rcnn_R_50_from_R_101_1x.py",
    "projects/TAR/configs/tar_retinanet_R_50_from_R_101_1x.py",
    "projects/ICD/configs/icd_faster_rcnn_R_50_from_R_101_1x.py",
    "projects/ICD/configs/icd_faster_rcnn_mobilenet_v3_from_R_101_1x.py",
    "projects/ICD/configs/icd_mask_rcnn_R_50_from_R_101_1x.py",
    "projects/ICD/configs/icd_retinanet_R_50_from_R_101_1x.py",
    "projects/ICD/configs/icd_fcos_R_50_from_R_101_1x.py",
    "baselines/fcos_R_101_FPN_3x.py",
    "projects/ICD/configs/icd_cascade_rcnn_R_50_from_R_101_1x.py",
    "baselines/cascade_rcnn_R_101_FPN_3x.py",
    "projects/ERD/configs/gfl_R_50_first_40_1x.py",
    "projects/ERD/configs/fine_tuning_gfl_R_50_40_40_1x.py",
    "projects/ERD/configs/lwf_gfl_R_50_40_40_1x.py",
    "projects/ERD/configs/erd_gfl_R_50_40_40_1x.py",
]


class LargestSize(TorchDispatchMode):
    """The largest size in bytes of all tensors at a time, without those that are there before.

    Attributes:
        bytes: the largest size so far.
    """

    def __init__(self, before: list[torch.Tensor]):
        super().__init__()
        self.bytes = self._now = 0
        self._seen = WeakIdKeyDictionary({x.untyped_storage(): True for x in before})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen[storage] = True
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self._now += size
        self.bytes = max(self.bytes, self._now)


@dataclass
class Cost:
    """Of a training step.

    Attributes:
        operations: for an image; a multiplication with its addition counts as two.
        memory: bytes with two images.
        iterations: of the training.
    """

    operations: int
    memory: int
    iterations: int


def recipe_of(name: str) -> DictConfig:
    """Load a recipe that needs neither weights nor data."""
    if name == IMITATION:
        teacher = "zoo:COCO-Detection/faster_rcnn_R_101_FPN_3x"
        plain = "baselines/faster_rcnn_R_50_FPN_1x.py"
        config = with_defaults(distill(plain, teacher=teacher, **method("imitation")))
    else:
        config = load(name)
    config.model = without_weights(config.model)
    if "losses" in config.model:
        config.model.teacher.weights, config.model.inherit = None, []
        without_priors(config.model.losses)
    return config


def estimate(name: str, image_size: tuple[int, int]) -> Cost:
    """Run one step of a recipe, at half its length, and count."""
    torch.manual_seed(0)
    config = recipe_of(name)
    model = instantiate(config.model).train()
    detectors = [model]
    if isinstance(model, Distiller):
        detectors = [model.student, model.teacher.detector]
    for detector in detectors:
        measure_norm_statistics(detector, [random_batch(detector, (192, 192), 1, seed=0)])
    batch = random_batch(detectors[0], image_size, 1, seed=0)
    modules = nn.ModuleList([model, *detectors])  # a Distiller's teacher is no submodule of it
    fixed = [*modules.parameters(), *modules.buffers()]
    counter, largest = FlopCounterMode(display=False), LargestSize(fixed)
    torch.manual_seed(0)  # as many regions are sampled with a teacher as without
    with EventStorage(start_iter=config.train.max_iter // 2), largest, counter:
        losses = model(batch)
        sum(value for key, value in losses.items() if "loss" in key).backward()
    momentum = [x for x in model.parameters() if x.requires_grad]
    constant = sum(x.numel() * x.element_size() for x in [*fixed, *momentum])
    return Cost(counter.get_total_flops(), constant + 2 * largest.bytes, config.train.max_iter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image-size", default="800x1333", help="height x width in pixels")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", default=RECIPES)
    args = parser.parse_args()
    size = tuple(map(int, args.image_size.split("x")))

    known: dict[str, Cost] = {}

    def cost(name: str) -> Cost:
        if name not in known:
            known[name] = estimate(name, size)
        return known[name]

    print("| recipe | GFLOP of an image | iterations | hours on 8 V100 | GB of a GPU |")
    print("|---|---|---|---|---|", flush=True)
    for name in args.recipes:
        one_stage = any(word in name for word in ("retinanet", "fcos", "gfl"))
        kind = "mask_rcnn" if "mask_rcnn" in name else "faster_rcnn"
        plain, seconds = PLAIN["retinanet" if one_stage else kind]
        found = cost(name)
        seconds *= found.operations / cost(plain).operations
        cells = [
            name.split("/")[-1].removesuffix(".py"),
            f"{found.operations / 1e9:.0f}",
            found.iterations,
            f"{found.iterations * seconds / 3600:.1f}",
            f"{found.memory / 1e9:.1f}",
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
