"""Images per second of ``d2kd label`` beside those of its detector alone, over the same loader, in pairs.

    python -m tests.label_throughput --images 200 --rounds 5

The detector is the small Faster R-CNN of the generated shapes, with the first weights of a seed. It keeps every detection, so
each image has up to 100 labels. Prints a line for each round, which takes both in turn, and the medians of their ratios; exit
code 1 if that of the CPU seconds is below 0.9, which do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from detectron2.config import instantiate

from d2kd.comparison.detectors import (
    LoadedDetector,
    build_loader,
    detector_from_config,
    load_detector_for_classes,
)
from d2kd.comparison.labels import UnlabelledImages, given_thresholds, write_labels
from d2kd.config import load
from d2kd.config.saving import save_config
from d2kd.data import shapes
from d2kd.utils.console import suppress_output
from d2kd.utils.io import read_json

from .common import lively

RECIPE = "baselines/faster_rcnn_small_shapes.py"
LEAST = 0.9


def prepare(folder: Path, count: int) -> tuple[LoadedDetector, UnlabelledImages]:
    """The detector and its images, drawn into the folder."""
    shapes.register_shapes(folder / "shapes", train=count, val=1, test=1)
    config = load(RECIPE)
    config.model.roi_heads.box_predictor.test_score_thresh = 0.0
    save_config(config, folder / "config.yaml")
    torch.manual_seed(0)
    state = lively(instantiate(config.model)).state_dict()
    torch.save({"model": state, "classes": tuple(shapes.CLASSES)}, folder / "model.pth")
    detector = detector_from_config("it", str(folder / "config.yaml"), str(folder / "model.pth"))
    images = UnlabelledImages.from_dataset("shapes_train")
    device = torch.device("cpu")
    return load_detector_for_classes(detector, images.name, images.classes, device), images


def measure(ready: LoadedDetector, images: UnlabelledImages, file: Path) -> dict[str, Callable]:
    """What is timed: the detector alone, and the whole of writing the labels."""
    thresholds = given_thresholds(ready.class_map.student, 0.0)

    def alone() -> None:
        for batch in build_loader(ready.detector, images.records):
            ready.detect(batch)

    def labels() -> None:
        write_labels(file, ready, images, thresholds, lambda done, total: None)

    return {"alone": alone, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ratios = {"images/s": [], "images per CPU second": []}
    with tempfile.TemporaryDirectory() as folder:
        with suppress_output():
            ready, images = prepare(Path(folder), args.images)
            works = measure(ready, images, file := Path(folder, "labels.json"))
            works["labels"]()  # to warm up
        boxes = len(read_json(file)["annotations"])
        print(f"{args.images} images, {boxes} labels")
        for number in range(args.rounds):
            speed, cpu = {}, {}
            for name in sorted(works, reverse=number % 2 == 1):  # in turn the first of the two
                start, begin = time.perf_counter(), time.process_time()
                with suppress_output():
                    works[name]()
                cpu[name] = time.process_time() - begin
                speed[name] = args.images / (time.perf_counter() - start)
            ratios["images/s"].append(speed["labels"] / speed["alone"])
            ratios["images per CPU second"].append(cpu["alone"] / cpu["labels"])
            print(
                f"round {number}: detector alone {speed['alone']:.1f} images/s, "
                f"d2kd label {speed['labels']:.1f}; ratio {ratios['images/s'][-1]:.3f}, "
                f"of CPU seconds {ratios['images per CPU second'][-1]:.3f}"
            )
    for name, values in ratios.items():
        print(f"{name}: median ratio {median(values):.3f}, {min(values):.3f} to {max(values):.3f}")
    sys.exit(int(median(ratios["images per CPU second"]) < LEAST))


if __name__ == "__main__":
    main()
