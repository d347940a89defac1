"""The COCO recipes from beginning to end, without COCO: data and weights have the names and forms of the real ones.

A folder is laid out as COCO 2017, with a few drawn images of all 80 classes. A stub of ``detectron2://`` writes the
files that a recipe fetches: detectors as the model zoo's, and ImageNet weights with Caffe2's or torchvision's names,
all untrained. Each of :data:`FAMILIES` is trained for two steps, evaluated and exported by the commands of a user, with
:data:`SMALL` alone changed. ``pytest tests/test_rehearsal.py --collect-only -q`` lists them, and runs them without
``--collect-only``. Recipes with a backbone of torchvision are not among them: their weights have no such address.
"""

import json
import math
import pickle
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, _get_builtin_metadata
from detectron2.utils.file_io import Detectron2Handler, PathHandler, PathManager
from PIL import Image

from d2kd.config import (
    get_detector_config,
    is_distiller,
    load,
    student_node,
    zoo_detector,
)

from .common import command

TAR, ICD, ERD = (f"projects/{name}/configs/" for name in ("TAR", "ICD", "ERD"))

FAMILIES = {
    "TAR by --distill, Faster R-CNN": ["baselines/faster_rcnn_R_50_FPN_1x.py"],
    "TAR, Faster R-CNN": [f"{TAR}tar_faster_rcnn_R_50_from_R_101_1x.py"],
    "TAR, RetinaNet": [f"{TAR}tar_retinanet_R_50_from_R_101_1x.py"],
    "TAR, Mask R-CNN": [f"{TAR}tar_mask_rcnn_R_50_from_R_101_1x.py"],
    "ICD, Faster R-CNN": [f"{ICD}icd_faster_rcnn_R_50_from_R_101_1x.py"],
    "ICD, RetinaNet": [f"{ICD}icd_retinanet_R_50_from_R_101_1x.py"],
    "ICD, Mask R-CNN": [f"{ICD}icd_mask_rcnn_R_50_from_R_101_1x.py"],
    "ICD, FCOS": [
        "baselines/fcos_R_101_FPN_3x.py",
        f"{ICD}icd_fcos_R_50_from_R_101_1x.py",
    ],
    "ICD, Cascade R-CNN": [
        "baselines/cascade_rcnn_R_101_FPN_3x.py",
        f"{ICD}icd_cascade_rcnn_R_50_from_R_101_1x.py",
    ],
    "ERD, GFL": [f"{ERD}gfl_R_50_first_40_1x.py", f"{ERD}erd_gfl_R_50_40_40_1x.py"],
}
"""Family -> recipes, each of which is trained; an earlier one trains the teacher of a later one."""

TEACHERS = {"TAR by --distill, Faster R-CNN": "zoo:COCO-Detection/faster_rcnn_R_50_FPN_3x"}

SMALL = [
    "train.max_iter=2",
    "train.log_period=1",
    "train.device=cpu",
    "train.best_checkpoint=null",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=96",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
]
"""The overrides of every recipe."""


def draw_coco(folder: Path, images: int = 4) -> None:
    """Draw ``coco/{train,val}2017`` and their annotations: rectangles of all classes, from both halves in each image."""
    random = np.random.RandomState(0)
    classes = [one for one in COCO_CATEGORIES if one["isthing"]]
    categories = [{"id": one["id"], "name": one["name"]} for one in classes]
    (folder / "coco/annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        records, annotations = [], []
        (folder / "coco" / split).mkdir()
        for i in range(images):
            name = f"{i:012d}.jpg"
            picture = random.randint(0, 256, (96, 128, 3), np.uint8)
            Image.fromarray(picture).save(folder / "coco" / split / name)
            records.append({"id": i, "file_name": name, "width": 128, "height": 96})
            for category in categories[i :: 2 * images]:
                x, y, w, h = random.randint(8, 48, 4).tolist()
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": category["id"]}
                    | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [corners]}
                )
        content = {"images": records, "annotations": annotations, "categories": categories}
        (folder / f"coco/annotations/instances_{split}.json").write_text(json.dumps(content))


def untrained(config: str) -> dict[str, np.ndarray]:
    """Random weights of a detector, with its names. Norms keep activations as small as trained ones do."""
    torch.manual_seed(0)
    state = instantiate(get_detector_config(config)).state_dict()
    for name, value in state.items():
        if name.endswith(("stem.conv1.norm.weight", "conv3.norm.weight")):
            value.fill_(0.02)
    return {name: value.numpy() for name, value in state.items()}


def imagenet(source: str, depth: str) -> dict:
    """ImageNet weights of a ResNet: MSRA's with Caffe2's names, torchvision's with Detectron2's."""
    state = untrained(f"COCO-Detection/retinanet_R_{depth}_FPN_3x.yaml")
    part = "backbone.bottom_up."
    state = {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
    if source == "torchvision":
        return {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    # Caffe2's norms have no statistics; they are part of scale and offset.
    return {caffe2_name(k): v for k, v in state.items() if "running" not in k}


def caffe2_name(name: str) -> str:
    """``res2.0.conv1.norm.weight`` -> ``res2_0_branch2a_bn_s``."""
    if name.startswith("stem"):
        name = name.replace("stem.conv1.norm", "res.conv1.bn").replace("stem.", "")
    else:
        branches = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}
        name = re.sub(r"(shortcut|conv\d)", lambda layer: f"branch{branches[layer[0]]}", name)
    name = re.sub(r"(norm|bn)\.weight$", "bn.s", name).replace("norm.bias", "bn.b")
    return re.sub("bias$", "b", re.sub("weight$", "w", name)).replace(".", "_")


class Zoo(PathHandler):
    """``detectron2://``, whose files are written when they are first read."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def _get_supported_prefixes(self):
        return [Detectron2Handler.PREFIX]

    def _get_local_path(self, path, **_):
        name = path.removeprefix(Detectron2Handler.PREFIX)
        file = self._folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            if found := re.fullmatch(r"ImageNetPretrained/(\w+)/R-(\d+)\.pkl", name):
                content = imagenet(*found.groups())
            else:
                config, weights, _ = zoo_detector("zoo:" + "/".join(name.split("/")[:2]))
                assert weights == path
                content = {"model": untrained(config), "__author__": "Detectron2 Model Zoo"}
            file.write_bytes(pickle.dumps(content))
        return str(file)


@pytest.fixture(scope="module")
def coco():
    """A folder with COCO, its two data sets registered there, and the stub; it is 1 GB and deleted at the end."""
    before = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw_coco(folder)
        for split in ("train", "val"):
            name, metadata = f"coco_2017_{split}", _get_builtin_metadata("coco")
            before[name] = DatasetCatalog.pop(name), MetadataCatalog.pop(name)
            annotations = folder / f"coco/annotations/instances_{split}2017.json"
            images = folder / f"coco/{split}2017"
            register_coco_instances(name, metadata, str(annotations), str(images))
        PathManager.register_handler(Zoo(folder / "zoo"), allow_override=True)
        yield folder
        PathManager.register_handler(Detectron2Handler(), allow_override=True)
        for name, (function, metadata) in before.items():
            DatasetCatalog.pop(name), MetadataCatalog.pop(name)
            DatasetCatalog.register(name, function)
            MetadataCatalog[name] = metadata


def families() -> list:
    first, *others = FAMILIES
    return [first, *(pytest.param(name, marks=pytest.mark.sweep) for name in others)]


@pytest.mark.parametrize("family", families())
def test_two_steps_an_evaluation_and_an_export(coco, family, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)  # recipes write to "output", and read their teachers there
        for recipe in FAMILIES[family]:
            words, teacher, config = ["--config-file", recipe], [], load(recipe)
            if family in TEACHERS:
                teacher = ["--distill", "tar", "--teacher", TEACHERS[family]]
                teacher.append(f"train.output_dir={config.train.output_dir}")
            distilled = bool(teacher) or is_distiller(config.model)
            command("train")([*words, *teacher, *SMALL, all_scores(config, distilled)])
            check_run(config, distilled)
        output = Path(config.train.output_dir)
        command("export")(
            [*words, "--weights", output / "model_final.pth", "--output", output / "exported"]
            + ["--images", "1", *SMALL]
        )
        assert [file.name for file in (output / "exported").iterdir()] == ["model.onnx"]


def all_scores(config, distilled: bool) -> str:
    """The override with which an untrained student has detections to evaluate."""
    key, heads = "model.student" if distilled else "model", roi_heads(config)
    if "box_predictor" in heads:
        key += ".roi_heads.box_predictor"
    elif "box_predictors" in heads:
        key += ".roi_heads.box_predictors.2"
    return f"{key}.test_score_thresh=0.0"


def roi_heads(config) -> dict:
    return student_node(config.model).get("roi_heads", {})


def check_run(config, distilled: bool) -> None:
    """All losses are there and finite, all weights were loaded, and the student was evaluated."""
    output = Path(config.train.output_dir)
    steps = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    steps = [step for step in steps if "total_loss" in step]
    assert [step["iteration"] for step in steps] == [0, 1]
    losses = {key for step in steps for key in step if "loss" in key}  # a ramp may start at 0
    assert all(math.isfinite(step.get(key, 0.0)) for step in steps for key in losses), steps
    assert any(key.startswith("distill/loss") for key in losses) == distilled
    run = json.loads((output / "run.json").read_text())
    results = run["rows"][-1]["results"]
    assert results["bbox"]["AP"] >= 0 and ("segm" in results) == ("mask_head" in roi_heads(config))
    assert (run["teacher"] is not None) == distilled
    log = (output / "log.txt").read_text()
    assert (re.search(r"all \d+ tensors loaded", log) is not None) == distilled
    loaded = re.findall(r"R-(\d+).pkl: (\d+) of \d+ parameters loaded", log)
    convolutions = {"50": "53", "101": "104"}  # the norms are buffers
    assert len(loaded) == bool(config.train.init_checkpoint)
    assert all(convolutions[depth] == number for depth, number in loaded)
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    assert not [key for key in checkpoint["model"] if key.startswith(("student", "teacher"))]
