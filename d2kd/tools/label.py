"""Write the detections of a detector as labels, to train another detector with them (pseudo-labels).

    d2kd label --config-file RECIPE --weights FILE --dataset mine_train --output labels.json --min-score 0.5
    d2kd label --config-file RECIPE --weights FILE --dataset photographs/ --output labels.json

The images are those of a data set that is registered or in the recipe, whose annotations are not used; or all images in
a folder. RECIPE is a LazyConfig (its student, if it has a teacher), a yacs YAML or a model zoo name. The output is a
COCO-style file for d2kd.data.coco_dataset; its classes are those of the data set, or of the detector for a folder.
Images without a detection are in it, too. A higher --min-score leaves out more objects, a lower one has more errors.
"""

import argparse
import sys
from pathlib import Path

from ..utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="the detector")
    parser.add_argument("--weights", required=True, help="its checkpoint")
    parser.add_argument("--dataset", required=True, help="a data set, or a folder of images")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--min-score", type=float, default=0.5, help="minimum score of detections")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def run(args: argparse.Namespace) -> None:
    from detectron2.data import DatasetCatalog

    from ..comparison.detectors import detector_from_config
    from ..comparison.labels import UnlabelledImages, check_min_score, count_labels, write_labels
    from ..config import load_recipe_or_none
    from ..data.catalog import register_from_config
    from ..engine.launch import pick_device
    from ..utils.console import ProgressBar, suppress_output

    check_min_score("--min-score", args.min_score)
    if args.output.is_dir():
        raise InputError("--output", f"{args.output} is a folder", "the file to write")
    recipe = load_recipe_or_none(args.config_file)
    if recipe is not None:
        register_from_config(recipe, args.dataset)
    detector = detector_from_config(args.weights, args.config_file, args.weights)
    bar = ProgressBar(f"  {args.dataset}", sys.stdout)
    with suppress_output():
        if args.dataset not in DatasetCatalog.list() and Path(args.dataset).is_dir():
            images = UnlabelledImages.from_folder(Path(args.dataset))
        else:
            images = UnlabelledImages.from_dataset(args.dataset)
        device = pick_device(args.device)
        content = write_labels(args.output, detector, images, args.min_score, device, bar)
    bar.close()
    print(f"{args.output}: {count_labels(content)}; its image_root is {images.root}")
