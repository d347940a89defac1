"""A case for every place that refuses bad input.

A case is given a folder, writes there what it needs, and returns what must be refused. Its name says the place: the
module, the function and, where a function refuses several things, words of the error as they stand in the source.

    python -m tests.bad_input

prints each place with its line and a closing line with counts; exit code 1 if one does anything else than refuse.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Like
from typing import NamedTuple
from unittest import mock

import torch
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import RotatedAnchorGenerator
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2kd import attention_maps, benchmark, classes, config, deployment, export
from d2kd.data import InstancePriors, TwoScales, catalog, estimate_priors, loader, shapes, steps
from d2kd.data.datasets import check_dataset, coco_dataset
from d2kd.data.voc import register_voc
from d2kd.engine import checkpoint, launch, optimizer, step, trainer
from d2kd.engine.run_info import LOGGERS, save_config
from d2kd.errors import InputError, reporting
from d2kd.evaluation import comparison, detections, detectors
from d2kd.layers import adapter, attention
from d2kd.losses import (
    DistillLoss,
    DistillLosses,
    ERDLoss,
    ICDLoss,
    ImitationLoss,
    TARLoss,
    base,
    erd,
)
from d2kd.losses.icd import _width
from d2kd.modeling import Distiller, Teacher, TorchvisionBackbone, backbone, outputs, weights
from d2kd.modeling.distiller import class_map_of, grown_classes, inherit_weights
from d2kd.study import plan
from d2kd.testing import tiny_fcos, tiny_gfl, tiny_mask_rcnn
from d2kd.tools import install_detectron2, train, visualize

from . import common, tiny_run
from .common import CLASSES, ROOT, build, tiny_faster_rcnn
from .old_raise_sites import plain_quotes, recorded, sites
from .test_voc import gone, text, write_voc, written
from .tiny_run import distiller, draw_data, without_evaluation

NAMES = [f"class {k}" for k in range(CLASSES)]
Case = Callable[[Path], Callable[[], object]]


def call(function: Callable, *arguments, **named) -> Case:
    """A case that needs no file."""
    return lambda folder: lambda: function(*arguments, **named)


# ----------------------------------------------------------------------------- what cases are made of


def coco(change: Callable[[dict], object] = lambda content: None, **options) -> Case:
    """COCO-style data with its annotations changed."""

    def case(folder):
        draw_data(folder)
        file = folder / "data.json"
        content = json.loads(file.read_text())
        content = change(content) or content
        file.write_text(json.dumps(content))
        return lambda: coco_dataset(f"bad_{folder}", str(file), str(folder), **options)

    return case


def coco_file(content: bytes | None) -> Case:
    def case(folder):
        draw_data(folder)
        file = folder / "data.json"
        file.unlink() if content is None else file.write_bytes(content)
        return lambda: coco_dataset(f"bad_{folder}", str(file), str(folder))

    return case


def first(key: str, **changes) -> Callable[[dict], None]:
    return lambda content: content[key][0].update(changes)


def without(key: str, name: str) -> Callable[[dict], None]:
    return lambda content: content[key][0].pop(name) and None


def drawn(folder: Path, objects=(1, 2, 0, 1, 2, 1)) -> str:
    """The name of sound data."""
    draw_data(folder, objects)
    return coco_dataset(f"sound_{folder}", str(folder / "data.json"), str(folder))


def voc(spoil: Callable[[Path], object] = lambda root: None, names=NAMES) -> Case:
    def case(folder):
        root = write_voc(folder / "voc")
        spoil(root)
        return lambda: register_voc(f"bad_{folder}", str(root), "train", names)

    return case


def file_with(content: str | bytes, name: str, act: Callable[[str], object]) -> Case:
    def case(folder):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return lambda: act(str(path))

    return case


def saved(content: object, act: Callable[[str], object]) -> Case:
    def case(folder):
        torch.save(content, folder / "weights.pth")
        return lambda: act(str(folder / "weights.pth"))

    return case


def refused(error: InputError | None) -> None:
    """For what hands its error on instead of raising it."""
    assert error is not None
    raise error


def command(name: str, words: str) -> Case:
    """A command line; ``{folder}`` and ``{recipe}``, a plain one, stand for paths."""

    def case(folder):
        (folder / "recipe.py").write_text("model = dataloader = optimizer = train = {}\n")
        filled = words.format(folder=folder, recipe=folder / "recipe.py").split()
        return lambda: common.command(name)([*filled, "--debug"])

    return case


def look(what: str = "detections", **changes) -> argparse.Namespace:
    given = {"config_file": "", "opts": [], "weights": [], "number": 1, "dataset": "", "what": what}
    return argparse.Namespace(**given | {"output": Path("nowhere"), "threshold": 0.5} | changes)


def plain_recipe(folder: Path, **train):
    return tiny_run.recipe(folder / "data", folder / "out", **train)


def shapes_of(**strides) -> Like:
    """A backbone, as far as levels are concerned."""
    found = {name: ShapeSpec(stride=s, channels=8) for name, s in strides.items()}
    return Like(output_shape=lambda: found)


def keypoint_rcnn():
    """A Mask R-CNN whose heads would find keypoints, too."""
    detector = build(tiny_mask_rcnn())
    detector.roi_heads.keypoint_on = True
    return detector


def anchored(cells: int) -> Like:
    """A dense detector, as far as anchors are concerned."""
    pyramid = Like(output_shape=lambda: {"p3": ShapeSpec(stride=8)}, size_divisibility=32)
    generator = Like(cell_anchors=[torch.zeros(cells, 4)])
    return Like(anchor_generator=generator, backbone=pyramid, head_in_features=["p3"])


class Odd(DistillLoss):
    """Refuses its detectors, or reads a level that is not there."""

    def bind(self, student, teacher):
        raise InputError("levels", "none", "one")

    def forward(self, student, teacher):
        return outputs.Maps(student)["p9"]


class Split(DistillLoss):
    """Has one term."""

    def __init__(self, term: str):
        super().__init__()
        self.term = term

    def bind(self, student, teacher):
        pass

    def forward(self, student, teacher):
        return {self.term: torch.ones(())}


def study(**changes) -> dict:
    runs = {"alone": {"config": {"train": {"max_iter": 1}}}}
    return {"study": {"test": "none", "baseline": "alone", **changes}, "runs": runs}


def runs(**nodes) -> dict:
    whole = {name: {"config": {"train": {"max_iter": 1}}, **node} for name, node in nodes.items()}
    return {"study": {"test": "none", "baseline": next(iter(nodes))}, "runs": whole}


# ------------------------------------------------------------------------------------------ d2kd/data


def _registered_otherwise(folder):
    name = drawn(folder)
    return lambda: coco_dataset(name, str(folder / "data.json"), str(folder), NAMES)


def _missing_image(folder):
    draw_data(folder)
    (folder / "3.png").unlink()
    return lambda: coco_dataset(f"bad_{folder}", str(folder / "data.json"), str(folder))


def _no_root(folder):
    draw_data(folder)
    return lambda: coco_dataset("bad", str(folder / "data.json"), str(folder / "gone"))


def _record(act: Callable[[dict], object]) -> Case:
    def case(folder):
        draw_data(folder)
        sized = {"width": 65, "height": 64}
        return lambda: act({"file_name": str(folder / "0.png"), **sized})

    return case


def _other_size(record):
    error = detection_utils.SizeMismatchError()
    refused(loader._blame_image(record, error))


def _gone_meanwhile(record):
    error = detection_utils.SizeMismatchError()
    refused(loader._blame_image({**record, "file_name": "gone.png"}, error))


def _undecodable(record):
    refused(loader._blame_image({**record, "file_name": __file__}, ValueError()))


def _loaded(dataset, **options):
    return loader.build_train_loader(
        dataset, **{"mapper": lambda x: x, "total_batch_size": 1, **options}
    )


def _unmapped():
    found = loader.build_test_loader([{}], mapper=lambda record: None)
    return next(iter(found))


def _too_few_classes(folder):
    name = drawn(folder)
    return lambda: estimate_priors(name, num_classes=1)


def _nothing_to_measure(folder):
    name = drawn(folder, (0, 0))
    return lambda: estimate_priors(name)


def _shapes_elsewhere(spoil: Callable[[Path], object]) -> Case:
    def case(folder):
        root = folder / "shapes"
        shapes.write(root, train=1, val=1, test=1)
        spoil(root)
        return lambda: shapes.write(root, train=1, val=1, test=1)

    return case


def _unwritable(folder):
    (folder / "file").write_text("")
    return lambda: shapes.write(folder / "file" / "shapes", train=1, val=1, test=1)


def _empty_step(folder):
    def only_first(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]
        content["annotations"] += [{**content["annotations"][0], "id": 99}]

    coco(only_first)(folder)()
    name = steps.class_step(f"bad_{folder}", "2+1", 2)
    return lambda: DatasetCatalog.get(name)


def _old_step(folder):
    name = steps.class_step(drawn(folder), "2+1", 1)
    return lambda: steps.check_objects([name], CLASSES, 1)


def _old_objects(folder):
    name = drawn(folder)
    return lambda: steps.check_objects([name], CLASSES, CLASSES)


def _other_count(folder):
    name = drawn(folder)
    return lambda: steps.check_objects([name], CLASSES + 1)


def _no_step(folder):
    name = drawn(folder)
    return lambda: steps.class_step(name, "2+1", 3)


DATA: dict[str, Case] = {
    "data/catalog is_registered": _registered_otherwise,
    "data/catalog check_files": call(catalog.check_files, ["gone.png"], str(ROOT), "it"),
    "data/datasets check_dataset": call(check_dataset, "no_such_data"),
    "data/datasets _check_coco: 'no such folder'": _no_root,
    "data/datasets _check_coco: 'no images or": coco(lambda c: {**c, "images": []}),
    "data/datasets _check_coco: '; '.join": coco(classes=["bird"]),
    "data/datasets _check_coco: f'classes of": coco(classes=NAMES[::-1]),
    'data/datasets _check_coco: f"category': coco(first("annotations", category_id=9)),
    "data/datasets _check_coco: culprit, found": coco(lambda c: {**c, "d2kd_step": ["bird"]}),
    'data/datasets _check_coco: f"image': coco(first("annotations", image_id=99)),
    'data/datasets _check_coco: f"bbox': coco(first("annotations", bbox=[1, 2, -3, 4])),
    "data/datasets _read: 'no such file'": coco_file(None),
    "data/datasets _read: f'broken JSON": coco_file(b"{"),
    "data/datasets _read: f'unreadable": coco_file(b"\xff\xfe"),
    "data/datasets _read: f'a {type": coco_file(b"[]"),
    "data/datasets _read: f'no list": coco(lambda c: c.pop("images") and None),
    "data/datasets _read: repr(record)": coco(lambda c: c["images"].append(3)),
    "data/datasets _read: f\"no {', '": coco(without("annotations", "bbox")),
    'data/datasets _read: f"id {': coco(first("annotations", id=2)),
    "data/datasets _check_coco: ids from 1": coco(first("annotations", id=0)),
    "data/loader build_train_loader: total_batch_size": call(_loaded, [{}], total_batch_size=0),
    "data/loader build_train_loader: 'no image'": call(_loaded, []),
    "data/loader build_test_loader: 'no image'": call(loader.build_test_loader, [], mapper=None),
    "data/loader build_test_loader: batch_size": call(
        loader.build_test_loader, [{}], mapper=None, batch_size=0
    ),
    "data/loader _Mapped.__getitem__": call(_unmapped),
    "data/loader _blame_image: 'another size'": _record(_gone_meanwhile),
    "data/loader _blame_image: f'{width}": _record(_other_size),
    "data/loader _blame_image: f'cannot be decoded": _record(_undecodable),
    "data/loader _orientations": call(_loaded, [{"height": 3}]),
    "data/priors InstancePriors.__post_init__: found": call(
        InstancePriors, [1.0], [[1.0]], [[1.0]]
    ),
    "data/priors InstancePriors.__post_init__: 'not finite": call(
        InstancePriors, [-1.0], [[1.0, 1.0]], [[1.0, 1.0]]
    ),
    "data/priors InstancePriors.__post_init__: '0 for every": call(
        InstancePriors, [0.0], [[1.0, 1.0]], [[1.0, 1.0]]
    ),
    "data/priors InstancePriors.load: 'no such file'": call(InstancePriors.load, "gone.json"),
    "data/priors InstancePriors.load: type(error)": file_with("{", "p.json", InstancePriors.load),
    "data/priors InstancePriors.load: error.culprit": file_with(
        '{"rows": [{"class": 0, "frequency": -1, "mean": [1, 1], "std": [1, 1]}]}',
        "p.json",
        InstancePriors.load,
    ),
    "data/priors estimate_priors: found": _too_few_classes,
    "data/priors estimate_priors: 'no annotated": _nothing_to_measure,
    "data/shapes _present: no readable": _shapes_elsewhere(
        lambda root: (root / "val.json").unlink()
    ),
    "data/shapes _present: shapes of": _shapes_elsewhere(
        lambda root: (root / "train.json").write_text('{"info": {"seed": 9}}')
    ),
    "data/shapes _present: images": _shapes_elsewhere(
        lambda root: next((root / "train").glob("*.png")).unlink()
    ),
    "data/shapes write: of shapes": call(shapes.write, "nowhere", train=0),
    "data/shapes write: strerror": _unwritable,
    "data/steps split_classes: repr(split)": call(steps.split_classes, NAMES, "two"),
    "data/steps split_classes: sum(sizes)": call(steps.split_classes, NAMES, "2+2"),
    "data/steps split_classes: 'a step without": call(steps.split_classes, NAMES, [[], NAMES]),
    "data/steps split_classes: unknown class": call(steps.split_classes, NAMES, [["bird"]]),
    "data/steps split_classes: in step": call(steps.split_classes, NAMES, [NAMES, NAMES]),
    "data/steps class_step": _no_step,
    "data/steps ClassStep.load": _empty_step,
    "data/steps check_objects: {c!r}": _old_step,
    "data/steps check_objects: file_name": _old_objects,
    "data/steps check_count": _other_count,
    "data/voc register_voc": voc(names=["a", "a"]),
    "data/voc check_voc": voc(gone("JPEGImages")),
    "data/voc _expanded": call(register_voc, "bad", "$D2KD_NO_SUCH/x", "train", NAMES),
    "data/voc _names: 'no such file'": voc(gone("ImageSets/Main/train.txt")),
    "data/voc _names: line.strip()": voc(written("ImageSets/Main/train.txt", b"a b\n")),
    "data/voc _names: unreadable": voc(written("ImageSets/Main/train.txt", b"\xff\xfe")),
    "data/voc _names: 'no image'": voc(written("ImageSets/Main/train.txt", b"")),
    "data/voc _names: twice": voc(written("ImageSets/Main/train.txt", b"train0\ntrain0\n")),
    "data/voc _check_xml: broken XML": voc(written("Annotations/train0.xml", b"<")),
    "data/voc _check_xml: at least 1 pixel": voc(text("size/height", "0")),
    "data/voc _check_xml: culprit, found": voc(text("object[2]/name", "bird")),
    "data/voc _check_number": voc(text("size/width", "wide")),
}


# ------------------------------------------------------------------------------- d2kd/engine and recipes


def _restored(content: dict) -> Case:
    def case(folder):
        module = nn.Linear(1, 1)
        state = {"model": module.state_dict(), **content}
        torch.save(state, folder / "weights.pth")
        other = Like(load_state_dict=lambda state: {}[state], state_dict=dict)
        keeper = checkpoint.StudentCheckpointer(module, trainer=other)
        path = str(folder / "weights.pth")
        return lambda: keeper.restore(path, weights.read(path))

    return case


def _cuda(name: str) -> None:
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=1),
    ):
        launch.pick_device(name)


def _other_names(folder):
    """Classes that the recipe names otherwise than its data."""
    draw_data(folder / "data")
    node = without_evaluation(plain_recipe(folder, model=distiller()))
    node.model.teacher.classes = node.model.classes = [NAMES[1], NAMES[0], *NAMES[2:]]
    return lambda: trainer.Trainer(node)


def _apart() -> None:
    with mock.patch.object(trainer.comm, "all_gather", lambda own: [own, "model_0000009.pth"]):
        trainer._check_agreed(None)


def _no_cuda() -> None:
    with mock.patch("torch.cuda.is_available", return_value=False):
        launch.pick_device("cuda")


def _completed(change: Callable) -> Case:
    def case(folder):
        node = plain_recipe(folder)
        change(node)
        return lambda: config.with_defaults(node)

    return case


def _undrawable(folder):
    draw_data(folder / "data")
    node = without_evaluation(plain_recipe(folder, draw_period=1))
    del node.dataloader.test["mapper"]
    return lambda: trainer.Trainer(node)


def _nothing_to_ask_about(folder):
    name = drawn(folder, (0, 0))
    return lambda: attention_maps.draw_attention(folder / "out", name, None, None, None, 1)


def _overridden(text: str) -> Case:
    return call(config.override, OmegaConf.create({"train": {"max_iter": 1}}), [text])


def _two_sets(folder):
    base = config.load("baselines/gfl_small_shapes.py")
    base.dataloader.test.dataset.names = ["shapes_val", "shapes_test"]
    return lambda: config.increment(base, split="4+4", step=1)


ENGINE: dict[str, Case] = {
    "engine/checkpoint plain": call(checkpoint.plain, {"it": object()}),
    "engine/checkpoint StudentCheckpointer.load_initial": saved(
        {"model": {"foreign": torch.zeros(1)}},
        lambda path: checkpoint.StudentCheckpointer(nn.Linear(1, 1)).load_initial(path),
    ),
    "engine/checkpoint StudentCheckpointer.restore: unmet[0]": _restored({"model": {}}),
    "engine/checkpoint StudentCheckpointer.restore: does not fit": _restored({"trainer": "x"}),
    "engine/launch pick_device: name, 'auto": call(launch.pick_device, "abacus"),
    "engine/launch pick_device: no CUDA here": call(_no_cuda),
    "engine/launch pick_device: found": call(_cuda, "cuda:7"),
    "engine/launch launch: '--num-gpus'": call(
        launch.launch, print, argparse.Namespace(num_gpus=99, num_machines=1)
    ),
    "engine/optimizer _build: 'no params'": call(
        optimizer._build, "optimizer", OmegaConf.create({}), nn.Linear(1, 1)
    ),
    "engine/optimizer _build: 'nothing that": call(
        optimizer._build, "optimizer", OmegaConf.create({"params": {}}), nn.Identity()
    ),
    "config/train with_defaults: 'no Distiller": _completed(
        lambda node: node.train.update(loss_optimizer={"optimizer": {}})
    ),
    "config/train with_defaults: 'no optimizer'": _completed(
        lambda node: [node.update(model=distiller()), node.train.update(loss_optimizer={})]
    ),
    "config/train _explained: 'no such key'": _completed(lambda node: node.train.update(max_itr=1)),
    "config/train _explained: found, expected": _completed(
        lambda node: node.train.update(max_iter="many")
    ),
    "config/train with_defaults: a node": _completed(lambda node: node.update(optimizer=3)),
    "config/train check_train: a mapping": _completed(lambda node: node.update(train=3)),
    "config/train check_train: a value": _completed(
        lambda node: node.train.update(best_checkpoint=False)
    ),
    "config/train _check_values: above": _completed(
        lambda node: node.train.clip_gradients.update(clip_value=-1.0)
    ),
    "config/train _check_values: below": _completed(lambda node: node.train.update(seed=2**40)),
    "config/train _check_values: expected": _completed(
        lambda node: node.train.update(draw_period=-1)
    ),
    "config/train _check_values: choices": _completed(
        lambda node: node.train.clip_gradients.update(clip_type="hard")
    ),
    "engine/step precision: amp.dtype, ' or": call(
        step.precision, OmegaConf.create({"enabled": True, "dtype": "int8"}), torch.device("cpu")
    ),
    "engine/step precision: float16 on": call(
        step.precision, OmegaConf.create({"enabled": True, "dtype": "float16"}), torch.device("cpu")
    ),
    "engine/hooks DrawDetections.from_config": _undrawable,
    "engine/trainer _check_agreed": call(_apart),
    "engine/trainer Trainer._check_classes": _other_names,
    "attention_maps load_icd: 'no ICDLoss'": call(
        attention_maps.load_icd, L(Distiller)(losses=L(DistillLosses)()), None, None, "none"
    ),
    "attention_maps draw_attention": _nothing_to_ask_about,
    "benchmark/bench Setup.__post_init__: 'image sizes'": call(
        benchmark.Setup, "it", "none", image_sizes=()
    ),
    "benchmark/bench Setup.__post_init__: at least": call(
        benchmark.Setup, "it", "none", image_sizes=((0, 9),)
    ),
    "benchmark/bench Setup.recipe": call(
        lambda: benchmark.Setup("it", "baselines/retinanet_small_shapes.py").recipe()
    ),
    "benchmark/costs benchmark: at least": call(
        benchmark.benchmark, [benchmark.Setup("it", "none")], rounds=0
    ),
    "benchmark/costs benchmark: 'label'": call(
        benchmark.benchmark, [benchmark.Setup("it", "none"), benchmark.Setup("it", "other")]
    ),
    "benchmark/costs benchmark: 'train.cudnn_benchmark'": call(
        benchmark.benchmark,
        [
            benchmark.Setup(
                value, "projects/TAR/configs/tar_shapes.py", (f"train.cudnn_benchmark={value}",)
            )
            for value in ("true", "false")
        ],
    ),
    "classes class_names: repr(given)": call(classes.class_names, "no_such_data"),
    "classes class_names: 'no class'": call(classes.class_names, []),
    "classes renamed": call(classes.renamed, ["a"], {"b": "c"}),
    "classes _numbers": call(classes.ClassMap.by_name, ["a", "a"], ["a"]),
    "deployment _names": saved(
        {"model": {}},
        lambda path: deployment._names(
            OmegaConf.create({"dataloader": {}}), Like(num_classes=3), path
        ),
    ),
    "deployment first_images": call(
        deployment.first_images, OmegaConf.create({"dataloader": {}}), 1
    ),
    "config/files config_file": call(config.config_file, "nowhere.py"),
    "config/files _find": call(config.load, "nowhere.py"),
    "config/files load: 'a yacs config'": call(
        config.load, "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    ),
    "config/files _read: does not load": file_with("model = (", "r.py", config.recipe_of),
    "config/files _read: defines no": file_with("other = dict(a=1)", "r.py", config.detector),
    "config/train with_defaults: culprit": file_with("model = dict(a=1)", "r.py", config.load),
    "config/files override": _overridden("train.max_iter=[3"),
    "config/files _check_override: 'no value'": _overridden("train.max_iter"),
    "config/files _check_override: has no keys": _overridden("train.max_iter.a=1"),
    "config/files _check_override: no {part": _overridden("train.maxiter=1"),
    "config/files detector": file_with("MODEL: [1", "d.yaml", config.detector),
    "config/recipes method": call(config.method, "magic"),
    "config/recipes increment: 'increment'": lambda folder: (
        lambda: config.increment(plain_recipe(folder), split="2+1", step=1)
    ),
    "config/recipes increment: data sets": _two_sets,
    "config/recipes increment: step": call(
        config.increment, "baselines/gfl_small_shapes.py", split="4+4", step=3
    ),
    "export exportable": call(lambda: export.exportable(keypoint_rcnn())),
    "export imported": call(export.imported, "no_such_package"),
    "export ExportedDetector.__init__": call(export.ExportedDetector, "gone.ts"),
}


# ---------------------------------------------------------------------------- d2kd/layers, losses, models


def _summed(**losses: DistillLoss) -> None:
    with EventStorage():
        DistillLosses(**losses)({}, {})


def _sigmoids() -> None:
    predictor = Like(use_sigmoid_ce=True)
    detector = Like(roi_heads=Like(num_classes=2, box_head=None, box_predictor=predictor))
    TARLoss(feature_weight=0).bind(detector, detector)


def _rotated() -> None:
    detector = nn.Module()
    detector.anchor_generator = RotatedAnchorGenerator(
        sizes=[[32]], aspect_ratios=[[1.0]], strides=[8], angles=[[0, 45]]
    )
    outputs.outputs_of(detector)


def _no_stem() -> None:
    detector = nn.Module()
    detector.backbone = nn.Conv2d(1, 1, 1)
    inherit_weights(detector, detector, [""], flip_channels=True)


def _unrelated() -> None:
    loss = Like(class_map=classes.ClassMap.by_name(["a"], ["b"]))
    erd.check_old_classes(loss, Like(num_classes=2), Like(num_classes=2))


def _two_widths() -> None:
    found = {"p3": ShapeSpec(channels=8), "p4": ShapeSpec(channels=9)}
    _width("student", Like(output_shape=lambda: found), found)


def _unfetched() -> None:
    with mock.patch.object(weights.PathManager, "get_local_path", side_effect=OSError("no route")):
        weights.local_path("http://nowhere/weights.pth")


def _unloaded() -> None:
    fetch = "torchvision.models.WeightsEnum.get_state_dict"
    with mock.patch(fetch, side_effect=OSError("no route")):
        TorchvisionBackbone("resnet18", weights="DEFAULT")


def _two_orders(folder):
    recipe = tiny_run.distiller()
    recipe.max_iter = 1
    recipe.teacher.image_format = "RGB"
    save_config(DictConfig({"model": recipe}, flags={"allow_objects": True}), folder / "it.yaml")
    cfg = get_cfg()
    config.add_d2kd_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "Distiller"
    cfg.MODEL.DISTILLER.CONFIG = str(folder / "it.yaml")
    return lambda: build_model(cfg)


def _both() -> None:
    detector = build(tiny_fcos())
    Distiller(
        student=detector, teacher=Teacher(detector, None), losses=None, max_iter=1, share="both"
    )


def _tapped() -> None:
    loss = ImitationLoss()
    loss.taps = ("head.nothing",)
    student = build(tiny_fcos())
    Distiller(
        student=student,
        teacher=Teacher(build(tiny_fcos()), None),
        losses=DistillLosses(it=loss),
        max_iter=1,
    )


def _grown() -> None:
    node = tiny_gfl()
    node.num_old_classes = CLASSES
    build(node)


def _without_rpn() -> None:
    teacher = Teacher(build(tiny_faster_rcnn()), None)
    teacher.detector.proposal_generator = None
    student = build(tiny_faster_rcnn())
    Distiller(student=student, teacher=teacher, losses=DistillLosses(), max_iter=1, share="both")


def _across(scale: int, **changes) -> Distiller:
    return Distiller(
        student=build(tiny_faster_rcnn()),
        teacher=Teacher(build(tiny_faster_rcnn()), None, scale=scale),
        losses=DistillLosses(),
        max_iter=1,
        **changes,
    )


def _bitmaps() -> None:
    instances = Instances((4, 4))
    instances.gt_masks = BitMasks(torch.ones(1, 4, 4))
    TwoScales(lambda _: {"image": torch.ones(3, 4, 4), "instances": instances}, 2)({})


MODELS: dict[str, Case] = {
    "data/scales TwoScales.__init__": call(TwoScales, None, 1),
    "data/scales reduce_instances": call(_bitmaps),
    "losses/base check_anchors: times larger": call(base.check_anchors, Like(), Like(), 2),
    "modeling/distiller Distiller.__init__: no RPN": call(_without_rpn),
    "modeling/distiller Distiller.__init__: times the size": call(lambda: _across(2, share="both")),
    "modeling/teacher Teacher.__init__: 'teacher.dtype'": call(Teacher, None, None, dtype="float8"),
    "modeling/teacher Teacher.__init__: 'teacher.aliases'": call(
        lambda: Teacher(build(tiny_faster_rcnn()), None, aliases={"a": "b"})
    ),
    "modeling/teacher Teacher.__init__: 'teacher.scale'": call(lambda: _across(0)),
    "modeling/teacher Teacher.own_inputs": call(
        lambda: _across(2).teacher.ask([{"image": torch.ones(3, 4, 4)}])
    ),
    "modeling/teacher Teacher.ask": call(
        lambda: _across(2).teacher.ask(
            [{"image": torch.ones(3, 4, 4), "teacher_image": torch.ones(3, 4, 4)}]
        )
    ),
    "layers/adapter match_levels: 'levels', found": call(
        adapter.match_levels, shapes_of(p3=8), shapes_of(p3=4), ["p3"]
    ),
    "layers/adapter match_levels: one, of": call(
        adapter.match_levels, shapes_of(p3=8), shapes_of(p3=8), ["p3"], 2
    ),
    "layers/adapter match_levels: backbone has no": call(
        adapter.match_levels, shapes_of(p3=8), shapes_of(p3=8), ["p9"]
    ),
    "layers/adapter match_levels: share none": call(
        adapter.match_levels, shapes_of(p3=8), shapes_of(p4=16)
    ),
    "layers/adapter FeatureAdapter.__init__: 'adapter', kind": call(
        adapter.FeatureAdapter, {}, {}, {}, "5x5"
    ),
    "layers/adapter FeatureAdapter.__init__: none, but": call(
        adapter.FeatureAdapter,
        {"p3": ShapeSpec(channels=8)},
        {"p3": ShapeSpec(channels=9)},
        {"p3": "p3"},
        "none",
    ),
    "layers/attention InstanceDecoderLayer.__init__": call(attention.InstanceDecoderLayer, 24, 5),
    "losses/imitation ImitationLoss.__init__": call(ImitationLoss, mask="disc"),
    "losses/base EpochDecay.__init__": call(base.EpochDecay, 0),
    "losses/base DistillLosses.__init__": call(DistillLosses, it=nn.Linear(1, 1)),
    "losses/base DistillLosses.bind": call(lambda: DistillLosses(odd=Odd()).bind(None, None)),
    "losses/base DistillLosses.forward: error": call(lambda: _summed(odd=Odd())),
    "losses/base DistillLosses.forward: a second": call(
        lambda: _summed(one=Split("of_it"), one_of=Split("it"))
    ),
    "losses/base check_anchors: kinds[0]": call(base.check_anchors, Like(), Like()),
    "losses/base check_anchors: what": call(base.check_anchors, anchored(1), anchored(2)),
    "losses/erd ERDLoss.__init__": call(ERDLoss, class_pool="mean"),
    "losses/erd ERDLoss.bind": call(lambda: ERDLoss().bind(Like(), Like())),
    "losses/erd check_old_classes: 'num_classes'": call(
        erd.check_old_classes, Like(class_map=None), Like(num_classes=2), Like(num_classes=3)
    ),
    "losses/erd check_old_classes: 'classes'": call(_unrelated),
    "losses/icd ICDLoss.__init__: known": call(ICDLoss, weights="none"),
    "losses/icd ICDLoss.__init__: culprit, given, expected": call(ICDLoss, layers=0),
    "losses/icd ICDLoss.build": call(
        lambda: ICDLoss(priors=InstancePriors.unknown(2)).build(3, 8, 8)
    ),
    "losses/icd _width": call(_two_widths),
    "losses/tar TARLoss.__init__": call(TARLoss, cls_gate="ever"),
    "losses/tar TARLoss.bind: use_sigmoid_ce": call(_sigmoids),
    "losses/tar TARLoss.bind: both with regions": call(
        lambda: TARLoss(feature_weight=0).bind(Like(roi_heads=None), Like())
    ),
    "losses/tar TARLoss.bind: 'num_classes'": call(
        lambda: TARLoss(feature_weight=0).bind(Like(num_classes=2), Like(num_classes=3))
    ),
    "losses/tar _ramp": call(TARLoss, feature_ramp=2),
    "modeling/backbone TorchvisionBackbone.__init__: 'norm'": call(
        TorchvisionBackbone, "none", norm="GN"
    ),
    "modeling/backbone TorchvisionBackbone.__init__: no feature": call(
        TorchvisionBackbone, "mobilenet_v3_small", out_features=["res6"]
    ),
    "modeling/backbone TorchvisionBackbone.__init__: gives": call(
        TorchvisionBackbone, "mobilenet_v3_small", nodes={"classifier.0": "res3"}
    ),
    "modeling/backbone _classifier: no such classifier": call(TorchvisionBackbone, "none"),
    "modeling/backbone _classifier: cannot be fetched": call(_unloaded),
    "modeling/backbone _checkpoint: error.found": call(
        backbone._checkpoint, "resnet18", "nowhere.pth"
    ),
    "modeling/backbone _last_blocks": call(backbone._last_blocks, nn.Linear(5, 5), "linear"),
    "modeling/backbone _extractor": call(
        TorchvisionBackbone, "mobilenet_v3_small", nodes={"features.99": "res3"}
    ),
    "modeling/distiller Distiller.__init__: 'max_iter'": call(
        Distiller, student=None, teacher=None, losses=None, max_iter=0
    ),
    "modeling/distiller Distiller.__init__: 'share', share": call(
        Distiller, student=None, teacher=None, losses=None, max_iter=1, share="all"
    ),
    "modeling/distiller Distiller.__init__: both, of": call(_both),
    "modeling/distiller Distiller._tapped": call(_tapped),
    "modeling/distiller Distiller.from_config": _two_orders,
    "modeling/distiller grown_classes": call(
        grown_classes, Like(num_classes=3, num_old_classes=2), Like(num_classes=1), None
    ),
    "modeling/distiller inherit_weights": call(_no_stem),
    "modeling/distiller class_map_of": call(class_map_of, None, Like(classes=("a",)), None),
    "modeling/gfl GFL.__init__": call(_grown),
    "modeling/outputs check_classes": call(
        outputs.check_classes, "student", Like(num_classes=2), ["a"]
    ),
    "modeling/outputs outputs_of: whose outputs": call(outputs.outputs_of, nn.Linear(1, 1)),
    "modeling/outputs outputs_of: rotated": call(_rotated),
    "modeling/weights local_path: cannot be fetched": call(_unfetched),
    "modeling/weights local_path: 'no such file'": call(weights.local_path, "gone.pth"),
    "modeling/weights read: cannot be read": file_with(b"PK\x03\x04 no", "w.pth", weights.read),
    "modeling/weights read: 'holds no": saved({"model": 3}, weights.read),
    "modeling/weights read: f'holds": saved({"model": {}, "by": Path()}, weights.read),
    "modeling/weights read: f'its": saved({"state_dict": {}}, weights.read),
    "modeling/weights check_names": call(
        weights.check_names, {"classes": ["a"]}, "weights.pth", ["b"]
    ),
    "modeling/weights fit": call(weights.fit, nn.Linear(1, 1), {"model": {}}, "weights.pth"),
}


# ---------------------------------------------------------------------------- d2kd/evaluation


def _data(folder: Path) -> detectors.Data:
    return detectors.load_data(drawn(folder / "data"))


def _results(content: str) -> Case:
    def case(folder):
        data = _data(folder)
        (folder / "results.json").write_text(content)
        return lambda: detectors.read_results(folder / "results.json", data)

    return case


def _other_ap(folder):
    data = _data(folder)
    (folder / "results.json").write_text("[]")
    detector = detectors.Detector("it", "none", "none", DictConfig({}), expected_AP=50.0)
    return lambda: detections._known(folder / "results.json", detector, data)


def _with_classes(*names: str) -> Case:
    """A detector of three classes, by these names."""

    def case(folder):
        data = _data(folder)
        path = folder / "weights.pth"
        torch.save({"model": build(tiny_faster_rcnn()).state_dict()}, path)
        detector = detectors.Detector("it", "none", str(path), tiny_faster_rcnn(), classes=names)
        return lambda: detectors.build(detector, data, torch.device("cpu"))

    return case


def _knows(name: str, own: int) -> Like:
    return Like(detector=Like(name=name), map=Like(of_student=[own]))


def _unmeasured(folder):
    node = plain_recipe(folder)
    del node.dataloader["test"]
    save_config(node, folder / "config.yaml")
    torch.save({"model": {}}, folder / "model_final.pth")
    return lambda: detectors.detectors_of_run(folder)


def _comparing(*words: str) -> Case:
    return call(common.command("compare"), [*words, "--debug"])


EVALUATION: dict[str, Case] = {
    "evaluation/comparison Comparison.load": file_with(
        "{}", "report.json", comparison.Comparison.load
    ),
    "evaluation/comparison _check_names: 'none'": call(comparison._check_names, []),
    "evaluation/comparison _check_names: 'a name'": call(comparison._check_names, ["."]),
    "evaluation/comparison _check_names: 'other names'": call(
        comparison._check_names, ["it", "it"]
    ),
    "evaluation/comparison _shared": call(
        comparison._shared, [_knows("one", 0), _knows("other", 1)], Like(name="some data")
    ),
    "evaluation/detections _known": _other_ap,
    "evaluation/detectors read_results: found, f'detections on": _results(
        '[{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]'
    ),
    "evaluation/detectors read_results: found, 'a COCO results file": _results("[1"),
    "evaluation/detectors read_results: not finite": _results(
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, NaN], "score": 1}]'
    ),
    "evaluation/detectors read_results: boxes outside": _results(
        '[{"image_id": 1, "category_id": 1, "bbox": [65, 0, 1, 1], "score": 1}]'
    ),
    "evaluation/detectors build: found, expected": _with_classes("one"),
    "evaluation/detectors build: none of the classes": _with_classes("x", "y", "z"),
    "evaluation/detectors study_of": file_with(
        "{}", "results.json", lambda path: detectors.study_of(Path(path).parent)
    ),
    "evaluation/detectors detectors_of_run: no such file": call(
        detectors.detectors_of_run, Path("nowhere")
    ),
    "evaluation/detectors detectors_of_run: --dataset NAME": _unmeasured,
    "evaluation/detectors _full_images": call(
        detectors._full_images, DictConfig({"_target_": "a.Mapper"}), 2, Path("config.yaml")
    ),
    "evaluation/detectors detectors_of_study": call(
        detectors.detectors_of_study, Path("nowhere"), []
    ),
    "evaluation/detectors same_mapper": call(
        detectors.same_mapper, [detectors.Detector("it", "none", "none", DictConfig({}))]
    ),
    "tools/compare run: f'--{name}'": _comparing("nowhere", "--observe", "0"),
    "tools/compare run: 'what to compare'": _comparing(),
    "tools/compare run: '--output'": _comparing("--detector", "a=b,c"),
    "tools/compare given: '--dataset'": _comparing("--detector", "a=b,c", "--output", "nowhere"),
    "tools/compare given: '--detector'": _comparing(
        "--detector", "a", "--output", "nowhere", "--dataset", "some"
    ),
}


# ---------------------------------------------------------------------------- d2kd/study and tools


def _circle() -> None:
    content = runs(a={"starts_from": "b"}, b={"starts_from": "a"})
    content["study"]["baseline"] = "b"
    plan.parse(content).plan(seeds=[0])


def _seeing(act: str, model, given=None, *more: str) -> Case:
    def case(folder):
        node = OmegaConf.create(
            {"model": model, "train": {"device": "cpu", "output_dir": str(folder)}},
            flags={"allow_objects": True},
        )
        return lambda: getattr(visualize, act)(node, dict(given or {}), *more)

    return case


def _no_mapper(folder):
    lines = "model = optimizer = train = {}\ndataloader = {'train': {}, 'test': {}}\n"
    (folder / "recipe.py").write_text(lines)
    return lambda: visualize.run(look(config_file=str(folder / "recipe.py")))


def _unpacked(folder):
    tarfile.open(folder / "empty.tar.gz", "w:gz").close()
    return lambda: install_detectron2.build(folder / "empty.tar.gz", folder)


def _selecting(folder):
    node = OmegaConf.create(
        {"model": distiller(), "train": {"device": "cpu", "max_iter": 2}},
        flags={"allow_objects": True},
    )
    torch.save({"model": build(tiny_faster_rcnn(channels=24)).state_dict()}, folder / "t.pth")
    return lambda: visualize.erd_of(node, {"teacher": str(folder / "t.pth")})


def _evaluated(folder):
    node = plain_recipe(folder)
    return lambda: train.evaluate(node, resume=False)


TOOLS: dict[str, Case] = {
    "study/plan Study.plan.visit: circle": call(_circle),
    "study/plan load": file_with("study = (", "s.py", plan.load),
    "study/plan parse: no dict named": call(plan.parse, {}),
    "study/plan parse: f'no {key": call(plan.parse, {"study": {}, "runs": {}}),
    "study/plan parse: step": call(plan.parse, runs(a={"step": 1})),
    "study/plan parse: 'no config'": call(plan.parse, runs(a={"config": None})),
    "study/plan parse: has no teacher": call(plan.parse, runs(a={"steps_like": "b"}, b={})),
    "study/plan parse: is made per seed": call(
        plan.parse, runs(a={"once": True, "teacher": "b"}, b={})
    ),
    "study/plan _known": call(plan.parse, study(colour="red")),
    "tools/benchmark run": command("benchmark", "--config-file {recipe} --json {folder}"),
    "tools/benchmark image_size": command("benchmark", "--config-file x --image-size 8x8x8"),
    "tools/doctor run: f'--{name}'": command("doctor", "--config-file {recipe} --images -1"),
    "tools/doctor run: '--target'": command("doctor", "--config-file {recipe} --target 0"),
    "tools/doctor run: '--json'": command("doctor", "--config-file {recipe} --json {folder}"),
    "tools/export run: '--output'": command(
        "export", "--config-file {recipe} --weights none --output {recipe}"
    ),
    "tools/export run: '--images'": command(
        "export", "--config-file {recipe} --weights none --output {folder} --images -1"
    ),
    "tools/export run: '--baseline'": command(
        "export", "--config-file {recipe} --weights none --output {folder} --baseline x"
    ),
    "tools/install_detectron2 repair: found": call(install_detectron2.repair, Path()),
    "tools/install_detectron2 build: 'holds no folder": _unpacked,
    "tools/study run": command("study", "none.py --jobs 0"),
    "tools/train recipe": command("train", "--config-file none --distill tar"),
    "tools/train run": command("train", "--config-file none --num-machines 2"),
    "tools/train evaluate": _evaluated,
    "tools/visualize run: given": call(lambda: visualize.run(look(weights=["me=x"]))),
    "tools/visualize run: '--number'": call(lambda: visualize.run(look(number=0))),
    "tools/visualize run: args.config_file": _no_mapper,
    "tools/visualize left_by_training": _seeing("left_by_training", {}),
    "tools/visualize give_teacher: 'a plain recipe'": _seeing("icd_of", {}),
    "tools/visualize give_teacher: 'no teacher": _seeing("erd_of", distiller()),
    "tools/visualize erd_of: 'a recipe without it'": _selecting,
    "tools/visualize detectors_of": _seeing(
        "detectors_of", {}, {"student": "x", "teacher": "y"}, "none"
    ),
}

CASES = DATA | ENGINE | MODELS | EVALUATION | TOOLS

ELSEWHERE = {
    "attention_maps load_icd: no losses.": "test_attention_maps.test_what_is_no_run_with_icd",
    "benchmark/bench Bench._training.step": "test_benchmark.test_a_loss_that_is_not_finite",
    "benchmark/bench Bench.__init__": "test_bad_input.test_an_untrained_detector_that_explodes",
    "benchmark/step_cost step_cost": "test_step_cost.test_too_few_pairs",
    "benchmark/step_cost _step": "test_step_cost.test_a_loss_that_is_not_finite",
    "engine/checkpoint StudentCheckpointer.read_last": "test_resume.test_a_truncated_last_checkpoint_is_named_and_the_one_before_used",
    "engine/launch explaining_lost_process": "test_processes.test_a_process_that_dies_ends_the_other_with_a_clear_message",
    "engine/launch launch: ended by": "test_processes.test_launch_ends_all_and_says_why",
    "engine/run_info explaining_full_disk": "test_resume.test_a_full_disk_is_the_users_to_mend",
    "engine/run_info save_config": "test_config_yaml.test_a_recipe_that_cannot_be_written_says_so",
    "engine/trainer Trainer._keep_last_good_state": "test_trainer.test_a_loss_that_is_not_finite_is_named_and_the_state_before_it_kept",
    "layers/queries make_queries": "test_icd.test_a_class_that_the_student_does_not_have",
    "modeling/gfl GFL._check_classes": "test_erd.test_old_objects_are_refused",
    "tools/__init__ main": "test_install.test_what_a_user_finds_without_detectron2",
    "tools/install_detectron2 repair: 'exists'": "test_install.test_a_repair_without_its_text_is_an_error",
    "tools/install_detectron2 download: 'not installed'": "test_install.test_what_a_user_finds_without_detectron2",
    "tools/install_detectron2 download: SHA256": "test_install.test_a_wrong_hash_is_one_error_line",
    "tools/install_detectron2 download: f'cannot be downloaded": "test_install.test_no_network_is_one_error_line",
    "tools/install_detectron2 build: f'the wheel": "test_install.test_a_wheel_that_cannot_be_built_or_kept_is_one_error_line",
    "tools/install_detectron2 install": "test_install.test_nothing_is_installed_when_a_requirement_is_missing",
    "tools/install_detectron2 run": "test_install.test_a_wheel_that_cannot_be_built_or_kept_is_one_error_line",
}
"""Places whose case needs a whole run or a whole detector, and has a test of its own."""


@contextlib.contextmanager
def forgotten():
    """What is registered inside is gone afterwards."""
    names = set(DatasetCatalog.list())
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


# ----------------------------------------------------------------------------- what becomes of them


class Outcome(NamedTuple):
    """What became of a case: empty ``faults`` if it is refused as it must be."""

    line: str
    faults: list[str]


def places(name: str) -> list[str]:
    """The keys of the sites that a name of the table means."""
    where, _, words = plain_quotes(name).partition(": ")
    module, function = where.split(" ")
    head = f"d2kd/{module}.py {function}: "
    keys = {site.key for site in sites()}
    return [key for key in keys if key.startswith(head) and words in key.removeprefix(head)]


def outcome(case: Case, place: str, folder: Path) -> Outcome:
    """Run a case in an empty folder, which is the working directory.

    Refused is what ends with exit code 2 and ``error: <culprit>: <found>; expected <…>``, at its place, and leaves all
    files as they were.
    """
    (folder / "case").mkdir()
    (folder / "keepsake.txt").write_text("written before")
    with forgotten(), contextlib.redirect_stderr(io.StringIO()) as said:
        act = case(folder / "case")
        before = _contents(folder)
        code = None
        with recorded() as met:
            try:
                with reporting():
                    act()
            except SystemExit as exit:
                code = exit.code
    line = next(reversed(said.getvalue().splitlines()), "")
    begin, expected = line.partition("; expected ")[::2]
    faults = {
        f"exit code {code}": code != 2,
        f"refused elsewhere: {list(met)}": list(met)[-1:] != [place],
        "not its own words": line != f"error: {met.get(place)}",
        "not all parts": not all(begin.removeprefix("error: ").partition(": ")) or not expected,
        "files changed": _contents(folder) != before,
    }
    return Outcome(line, [fault for fault, found in faults.items() if found])


def _contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def main() -> int:
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.disable(logging.CRITICAL)
    broken = 0
    for name, case in CASES.items():
        (place,) = places(name)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            with contextlib.redirect_stdout(io.StringIO()):
                line, faults = outcome(case, place, Path(folder))
            shown = line.replace(folder, "…")
        broken += bool(faults)
        print(f"{name}\n    {shown}", *(f"    fault: {x}" for x in faults), sep="\n", flush=True)
    met = {place for name in (*CASES, *ELSEWHERE) for place in places(name)}
    print(
        f"\n{len(CASES) - broken} of {len(CASES)} cases are refused in one line, with exit code 2, and change nothing; "
        f"{len(ELSEWHERE)} places have a test of their own, {len({x.key for x in sites()} - met)} have none"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
