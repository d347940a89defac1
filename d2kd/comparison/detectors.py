"""The detectors of a comparison and its data set: found from configs, from a run's folder, from a study's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from ..config import (
    builds,
    is_distiller,
    load,
    reading_mapper,
    recipe_of,
    student_of,
    test_mapper,
    without_weights,
)
from ..config import detector as model_of
from ..data import TwoScales, build_test_loader, check_dataset
from ..data.datasets import dataset_names
from ..modeling import Teacher
from ..modeling.weights import CLASSES, read, sha256
from ..structures.class_map import ClassMap, class_names, num_classes_of, renamed
from ..utils.env import config_hash
from ..utils.errors import InputError
from ..utils.io import read_json
from .matching import Detections, Truth

FEW = 32
"""Images for which no other process is worth starting."""


@dataclass(frozen=True)
class Data:
    """A registered data set.

    Attributes:
        name: as registered.
        records: Detectron2's dataset dicts.
        truth: their objects.
        category_ids: of its classes, in their order.
        sha256: of all that detections depend on: names, sizes and times of the images' files, objects, classes.
    """

    name: str
    records: list[dict]
    truth: Truth
    category_ids: tuple[int, ...]
    sha256: str

    @cached_property
    def place(self) -> dict[Any, int]:
        """Image id -> place in ``truth``."""
        return {image_id: i for i, image_id in enumerate(self.truth.image_ids)}


def load_data(name: str) -> Data:
    """A registered data set and its objects, as COCOEvaluator reads them.

    Raises:
        InputError: it is not registered, or its files cannot be used.
    """
    check_dataset(name)
    records = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        content = json.loads(Path(PathManager.get_local_path(metadata.json_file)).read_text())
    else:
        content = convert_to_coco_dict(name)
    number_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if number_of is None:
        ids = sorted(category["id"] for category in content["categories"])
        number_of = {category: k for k, category in enumerate(ids)}
    category_ids = tuple(sorted(number_of, key=number_of.get))
    truth = Truth.from_coco(content, category_ids)
    digest = hashlib.sha256(repr((truth.classes, truth.image_ids)).encode())
    for values in (truth.image, truth.label, truth.box, truth.area, truth.crowd):
        digest.update(np.ascontiguousarray(values))
    digest.update("\n".join(_version(str(record["file_name"])) for record in records).encode())
    return Data(name, records, truth, category_ids, digest.hexdigest())


def _version(file: str) -> str:
    """An image by its name, and by what tells that another has taken its place."""
    try:
        stat = os.stat(file)
    except OSError:  # not on this machine, or not there: who reads it says so
        return file
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


def read_results(path: str | Path, data: Data) -> Detections:
    """A COCO results file, such as COCOEvaluator's ``coco_instances_results.json``.

    Raises:
        InputError: it cannot be read, or is of another data set.
    """
    try:
        rows = json.loads(Path(path).read_text())
        label_of = {category: k for k, category in enumerate(data.category_ids)}
        strange = [row for row in rows if row["image_id"] not in data.place]
        strange_class = [row for row in rows if row["category_id"] not in label_of]
        if strange or strange_class:
            found = f"{len(strange)} detections of images, {len(strange_class)} of classes it lacks"
            raise InputError(path, found, f"detections on {data.name}")
        detections = Detections(
            image=np.array([data.place[row["image_id"]] for row in rows], dtype=np.int64),
            label=np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64),
            box=np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(len(rows), 4),
            score=np.array([row["score"] for row in rows], dtype=np.float64),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"cannot be read ({type(error).__name__})"
        raise InputError(path, found, "a COCO results file") from error
    if not (np.isfinite(detections.box).all() and np.isfinite(detections.score).all()):
        raise InputError(path, "boxes or scores that are not finite", "a COCO results file")
    size = {record["image_id"]: (record["width"], record["height"]) for record in data.records}
    size = np.array([size[row["image_id"]] for row in rows]).reshape(len(rows), 2)
    near = detections.box[:, :2]
    far = near + detections.box[:, 2:]
    outside = ((near > size) | (far < 0)).any(axis=1)
    if outside.any():
        raise InputError(
            path,
            f"{outside.sum()} of {len(rows)} boxes outside their image",
            f"detections on {data.name}",
        )
    return detections


@dataclass
class Detector:
    """One of the detectors to be compared; nothing is built yet.

    Attributes:
        name: what the report calls it.
        config: where its config comes from, for the record.
        weights: its checkpoint, any URI that Detectron2 reads.
        node: LazyConfig node of the detector itself.
        mapper: node of what reads its test images; None: the same as another's.
        classes: names in its order; None: the checkpoint's, else the data set's.
        input_format: channel order it wants; None: its own ``input_format``, else that of its images.
        results: COCO results files that may hold its detections, the first that fits is taken.
        expected_AP: the AP that these must have, where it is known, else they are of something else.
        must_fit: whether results that do not fit are an error, and not just computed anew.
    """

    name: str
    config: str
    weights: str
    node: DictConfig = field(repr=False)
    mapper: DictConfig | None = field(default=None, repr=False)
    classes: tuple[str, ...] | None = None
    input_format: str | None = None
    results: tuple[Path, ...] = ()
    expected_AP: float | None = None
    must_fit: bool = False

    @cached_property
    def key(self) -> dict[str, str]:
        """What its detections depend on, besides the data set."""
        content = {"model": self.node, "mapper": self.mapper, "classes": self.classes}
        if self.input_format is not None:
            content["input_format"] = self.input_format
        return {"weights_sha256": sha256(self.weights), "config_sha256": config_hash(content)}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the training left beside the weights: ``run.json``, its last start alone."""
        record = read_json(Path(self.weights).with_name("run.json"))
        if not record.get("rows"):
            return {}
        last, teacher = record["rows"][-1], record.get("teacher") or {}
        kept = {key: last.get(key) for key in ("started", "seed", "device", "iterations")}
        seconds = last.get("seconds")
        kept["seconds"] = None if seconds is None else round(seconds, 1)
        kept["command"] = record.get("command")
        return kept | {"teacher_sha256": teacher.get("weights_sha256")}


@dataclass
class Ready:
    """A detector that was built.

    Attributes:
        teacher: frozen, asked and never trained: so is every detector of a comparison.
        map: the data set's classes ("student") beside the detector's own ("teacher").
    """

    detector: Detector
    teacher: Teacher
    map: ClassMap

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.teacher.detector.parameters())

    @cached_property
    def label_to_own(self) -> dict[int, int]:
        return dict(self.map.pairs)


def build(detector: Detector, data: Data, device: torch.device) -> Ready:
    """Build a detector and load its weights strictly.

    Raises:
        InputError: the weights cannot be read or do not fit, or its classes have no names.
    """
    image_format = reading_mapper(detector.mapper).get("image_format", "BGR")
    node = without_weights(detector.node)
    teacher = Teacher(
        instantiate(node),
        detector.weights,
        image_format=image_format,
        input_format=detector.input_format,
    )
    count = num_classes_of(teacher.detector)
    names = detector.classes or read(detector.weights).get(CLASSES)
    if names is None and count == len(data.truth.classes):
        names = data.truth.classes
    if names is None or len(names) != count:
        found = f"{count} classes, " + ("without names" if names is None else f"{len(names)} names")
        expected = f"a recipe or checkpoint that names them, or the {len(data.truth.classes)} of {data.name}"
        raise InputError(f"detector {detector.name!r}", found, expected)
    class_map = ClassMap.by_name(data.truth.classes, tuple(names))
    if not class_map.pairs:
        raise InputError(
            f"detector {detector.name!r}", "none of the classes", f"some of {data.name}"
        )
    teacher.detector.to(device)
    return Ready(detector, teacher, class_map)


def from_config(name: str, config: str, weights: str, results: str | None = None) -> Detector:
    """A detector by a config and weights: a recipe, its student if it is a Distiller's, a yacs YAML, a zoo name.

    Raises:
        InputError: there is no such config.
    """
    recipe = recipe_of(config)
    node, classes = model_of(config), None
    if recipe is not None:
        node, classes = student_of(recipe.model), _trained_on(recipe)
    return Detector(
        name,
        config,
        weights,
        node,
        test_mapper(config if recipe is None else recipe),
        classes,
        results=() if results is None else (Path(results),),
        must_fit=results is not None,
    )


def _trained_on(recipe: DictConfig) -> tuple[str, ...] | None:
    try:
        names = dataset_names(recipe, "train")
        return class_names(names) if names else None
    except (InputError, OSError):
        return None  # data that is not here any more: the checkpoint may name its classes


def study_of(folder: Path) -> dict[str, Any] | None:
    """A study's ``results.json``: ``rows``, ``dataset``, ``baseline``, ``featured``; None for another folder.

    Raises:
        InputError: there is one that cannot be read.
    """
    file = folder / "results.json"
    if not file.is_file():
        return None
    content = read_json(file)
    if not content.get("rows") or not {"dataset", "baseline", "featured"} <= content.keys():
        raise InputError(file, "no rows, or not what they are about", "the results.json of a study")
    return content


def detectors_of_run(folder: Path, dataset: str | None = None) -> tuple[list[Detector], str]:
    """Teacher, if there was one, and what was trained; and the data set, by default the one it was measured on.

    Raises:
        InputError: the folder holds no finished run, its config cannot be read, or its teacher's larger images
            cannot be had.
    """
    config, weights = folder / "config.yaml", folder / "model_final.pth"
    for file in (config, weights):
        if not file.is_file():
            raise InputError(file, "no such file", "the output folder of a finished run or study")
    recipe = load(str(config))
    found = []
    if is_distiller(recipe.model) and recipe.model.teacher.weights:
        node = recipe.model.teacher
        classes = None
        if node.get("classes") is not None:
            classes = renamed(class_names(instantiate(node.classes)), node.get("aliases") or {})
        mapper = _full_images(test_mapper(recipe), node.get("scale", 1), config)
        weights_of = str(_moved(folder, node.weights))
        order = node.get("input_format")
        found.append(
            Detector("teacher", str(config), weights_of, node.detector, mapper, classes, order)
        )
    name = "distilled" if is_distiller(recipe.model) else "detector"
    found.append(from_config(name, str(config), str(weights)))
    if dataset is None:
        names = check_dataset(dataset_names(recipe, "test"))
        if not names:
            raise InputError(config, "no dataloader.test.dataset.names", "--dataset NAME")
        dataset = names[0]
    return found, dataset


def _full_images(mapper: DictConfig | None, scale: int, config: Path) -> DictConfig | None:
    """The node that reads a teacher's images: of larger ones that which makes them, inside the student's."""
    if scale == 1 or mapper is None:
        return mapper
    if not builds(mapper, TwoScales):
        found = (
            f"a teacher of images {scale} times larger, and dataloader.test.mapper is no TwoScales"
        )
        raise InputError(config, found, "the mappers of distill(…, scale=…)")
    return mapper.mapper


def _moved(folder: Path, weights: str) -> str | Path:
    """Weights that a recipe names, or what is beside the run's folder now that both have moved."""
    beside = folder.parent / Path(weights).parent.name / Path(weights).name
    return beside if not Path(weights).exists() and beside.is_file() else weights


def detectors_of_study(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    baseline: str = "baseline",
    featured: str | None = None,
) -> list[Detector]:
    """Teacher, baseline, and the student that the study is about, under the study's first seed with all.

    Args:
        folder: of the study; each run has one in it.
        rows: of its ``results.json``.
        baseline: the method that the others are paired with.
        featured: the method asked about. None, or where it has no run: the distilled one with the highest AP.

    Raises:
        InputError: a run's config cannot be read, no run was distilled, or its baseline or teacher is missing.
    """
    recipes = {}
    for row in rows:
        file = folder / row["name"] / "config.yaml"
        if file.is_file():  # a run's folder may have gone
            recipes[row["name"]] = load(str(file))
    rows = [row for row in rows if row["name"] in recipes]
    distilled = [
        row for row in rows if is_distiller(recipes[row["name"]].model) and row["AP"] is not None
    ]
    of_seed = {row["seed"]: row for row in rows if row["method"] == baseline}
    distilled = [row for row in distilled if row["seed"] in of_seed]
    distilled = [row for row in distilled if row["method"] == featured] or distilled
    if not distilled:
        raise InputError(
            folder, f"no distilled run beside a {baseline!r}", "a study of distillation"
        )
    seed = min(row["seed"] for row in distilled)
    best = max((row for row in distilled if row["seed"] == seed), key=lambda row: row["AP"])
    hashes = {row["weights_sha256"]: row for row in rows}
    record = read_json(folder / best["name"] / "run.json").get("teacher") or {}
    teacher = hashes.get(record.get("weights_sha256"))
    if (
        teacher is None
    ):  # a teacher that was not measured before the run, or has been trained elsewhere
        named = Path(recipes[best["name"]].model.teacher.weights).parent.name
        teacher = next((row for row in rows if row["name"] == named), None)
    shown = [row for row in (teacher, of_seed[seed], best) if row is not None]
    found = []
    for row in shown:
        run = folder / row["name"]
        one = from_config(row["method"], str(run / "config.yaml"), str(run / "model_final.pth"))
        one.results, one.expected_AP = (run / "test/coco_instances_results.json",), row["AP"]
        found.append(one)
    return found


def same_mapper(detectors: Iterable[Detector]) -> None:
    """Give those whose config does not say how images are read the first one's that does.

    Raises:
        InputError: none says.
    """
    detectors = list(detectors)
    said = next((d.mapper for d in detectors if d.mapper is not None), None)
    if said is None:
        raise InputError(
            detectors[0].config,
            "does not say how test images are read",
            "at least one recipe with dataloader.test.mapper, or a yacs config",
        )
    for detector in detectors:
        if detector.mapper is None:
            detector.mapper = said


def loader_of(detector: Detector, records: list[dict], begin: int = 0) -> Iterable[list[dict]]:
    """Batches of one image each, from a place on, as a detector reads them."""
    return build_test_loader(
        records,
        mapper=instantiate(detector.mapper),
        sampler=range(begin, len(records)),
        num_workers=int(len(records) - begin > FEW),
    )


def input_scale(given: dict) -> torch.Tensor:
    """(4,) what takes XYXY boxes of an image's file to those of the detector's input.

    Args:
        given: what a loader yields of it: "image", and the file's "height" and "width".
    """
    height, width = given["image"].shape[-2:]
    return torch.tensor([width / given["width"], height / given["height"]]).repeat(2)
