"""The detectors and the data set of a comparison, from configs, from a run's folder, or from a study's folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from ..config import (
    base_mapper,
    full_size_mapper,
    get_test_mapper,
    is_distiller,
    is_feature_extractor,
    load,
    load_recipe_or_none,
    student_node,
    without_weights,
)
from ..config import get_detector_config as model_of
from ..data import build_test_loader, check_dataset
from ..data.datasets import dataset_names, training_classes
from ..export.formats import FORMATS, ExportedDetector
from ..modeling import Teacher
from ..modeling.teacher import to_student_classes
from ..modeling.weights import CLASSES_KEY, file_sha256, load_checkpoint
from ..structures.class_map import ClassMap, apply_aliases, class_names, num_classes_of
from ..structures.rle import object_array, to_rle
from ..utils.env import config_hash
from ..utils.errors import InputError
from ..utils.io import read_json
from .matching import Detections, GroundTruth, counted_annotations

MAX_IMAGES_WITHOUT_WORKER = 32
"""Up to this number of images no loader worker is used."""


@dataclass(frozen=True)
class EvaluationData:
    """A registered data set.

    Attributes:
        name: registered name.
        records: dataset dicts of Detectron2.
        truth: ground truth.
        category_ids: COCO category id of each class.
        sha256: hash of what detections depend on: names, sizes and times of the image files, objects, classes.
        segmentations: of each object, polygons or an RLE as in a COCO file, None without a mask.
    """

    name: str
    records: list[dict]
    truth: GroundTruth
    category_ids: tuple[int, ...]
    sha256: str
    segmentations: Sequence[Any] = ()

    @cached_property
    def masks(self) -> np.ndarray | None:
        """(G,) the objects' masks as of :func:`d2kd.structures.rle.to_rle`; None unless all objects have one."""
        size = {record["image_id"]: (record["height"], record["width"]) for record in self.records}
        found = [
            to_rle(segmentation, *size[self.truth.image_ids[i]])
            for i, segmentation in zip(self.truth.image, self.segmentations)
        ]
        return object_array(found) if found and all(found) else None

    @cached_property
    def index_of(self) -> dict[Any, int]:
        """Image id -> index in ``truth.image_ids``."""
        return {image_id: i for i, image_id in enumerate(self.truth.image_ids)}


def load_data(name: str) -> EvaluationData:
    """Load a registered data set and its objects as COCOEvaluator does.

    Raises:
        InputError: the data set is not registered, or its files cannot be used.
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
    truth = GroundTruth.from_coco(content, category_ids)
    digest = hashlib.sha256(repr((truth.classes, truth.image_ids)).encode())
    for values in (truth.image, truth.label, truth.box, truth.area, truth.crowd):
        digest.update(np.ascontiguousarray(values))
    digest.update("\n".join(file_version(str(record["file_name"])) for record in records).encode())
    found = [a.get("segmentation") for a in counted_annotations(content, category_ids)]
    return EvaluationData(name, records, truth, category_ids, digest.hexdigest(), found)


def file_version(file: str) -> str:
    """Return name, size and modification time of an image file; they change when the image is replaced."""
    try:
        stat = os.stat(file)
    except OSError:  # not a local file, or missing: reading it raises an error
        return file
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


def load_coco_results(path: str | Path, data: EvaluationData) -> Detections:
    """Load a COCO results file, such as COCOEvaluator's ``coco_instances_results.json``.

    Raises:
        InputError: the file cannot be read, or belongs to another data set.
    """
    try:
        rows = json.loads(Path(path).read_text())
        label_of = {category: k for k, category in enumerate(data.category_ids)}
        unknown = [row for row in rows if row["image_id"] not in data.index_of]
        unknown_class = [row for row in rows if row["category_id"] not in label_of]
        if unknown or unknown_class:
            found = f"{len(unknown)} detections of images, {len(unknown_class)} of classes it lacks"
            raise InputError(path, found, f"detections on {data.name}")
        size = {r["image_id"]: (r["height"], r["width"]) for r in data.records}
        detections = Detections(
            image=np.array([data.index_of[row["image_id"]] for row in rows], dtype=np.int64),
            label=np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64),
            box=np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(len(rows), 4),
            score=np.array([row["score"] for row in rows], dtype=np.float64),
            mask=object_array([to_rle(row["segmentation"], *size[row["image_id"]]) for row in rows])
            if rows and all(row.get("segmentation") for row in rows)
            else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"cannot be read ({type(error).__name__})"
        raise InputError(path, found, "a COCO results file") from error
    if not (np.isfinite(detections.box).all() and np.isfinite(detections.score).all()):
        raise InputError(path, "boxes or scores that are not finite", "a COCO results file")
    size = np.array([size[row["image_id"]][::-1] for row in rows]).reshape(len(rows), 2)
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


PROVENANCE = ("started", "seed", "device", "iterations", "train_images")
"""Keys of :attr:`Detector.provenance` from a row of ``run.json``."""


@dataclass
class Detector:
    """Description of a detector to be compared. The detector itself is not built.

    Attributes:
        name: name in the report.
        config: source of the config, for the report only.
        weights: checkpoint, any URI that Detectron2 reads.
        node: LazyConfig node of the detector.
        mapper: LazyConfig node of the test mapper. Default: the mapper of another detector, see :func:`set_default_mapper`.
        classes: class names in the order of the detector. Default: those in the checkpoint, otherwise the data set's.
        input_format: channel order of the input. Default: the detector's ``input_format``, otherwise the mapper's.
        aliases: name of a class of the detector -> the data set's name of that class, where they differ.
        results: COCO results files that may hold its detections; the first one that fits is used.
        expected_AP: AP of a results file that fits; None: not checked.
        strict: whether a results file that does not fit raises an error. By default detections are computed then.
    """

    name: str
    config: str
    weights: str
    node: DictConfig = field(repr=False)
    mapper: DictConfig | None = field(default=None, repr=False)
    classes: tuple[str, ...] | None = None
    input_format: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    results: tuple[Path, ...] = ()
    expected_AP: float | None = None
    strict: bool = False

    @cached_property
    def key(self) -> dict[str, str]:
        """Hashes of what the detections depend on, besides the data set."""
        content = {"model": self.node, "mapper": self.mapper, "classes": self.classes}
        if self.input_format is not None:
            content["input_format"] = self.input_format
        if self.aliases:
            content["aliases"] = dict(self.aliases)
        return {"weights_sha256": file_sha256(self.weights), "config_sha256": config_hash(content)}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Metadata of the training: the last entry of the ``run.json`` beside the weights."""
        record = read_json(Path(self.weights).with_name("run.json"))
        if not record.get("rows"):
            return {}
        last, teacher = record["rows"][-1], record.get("teacher") or {}
        kept = {key: last.get(key) for key in PROVENANCE}
        seconds = last.get("seconds")
        kept["seconds"] = None if seconds is None else round(seconds, 1)
        kept["command"] = record.get("command")
        return kept | {"teacher_sha256": teacher.get("weights_sha256")}


@dataclass
class LoadedDetector:
    """A detector that is built and has its weights.

    Attributes:
        teacher: the frozen detector; every detector of a comparison is wrapped in a Teacher.
        class_map: class map from the detector's classes ("teacher") to those of the data set ("student").
    """

    detector: Detector
    teacher: Teacher
    class_map: ClassMap

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.teacher.detector.parameters())

    def detect_own_classes(self, batch: list[dict]) -> Instances:
        """Return the detections in a batch of one image, on the CPU, in the detector's own classes."""
        with torch.no_grad():
            [output] = self.teacher.detect(batch)
        return output["instances"].to("cpu")

    def detect(self, batch: list[dict]) -> Instances:
        """Return the detections in a batch of one image, on the CPU, in the classes of the data set."""
        return to_student_classes(self.detect_own_classes(batch), self.class_map)

    @cached_property
    def to_detector_label(self) -> dict[int, int]:
        return dict(self.class_map.pairs)


@dataclass
class LoadedOnnx(LoadedDetector):
    """A detector in an ONNX file, which onnxruntime runs on the CPU. It has no ``teacher``."""

    file: ExportedDetector

    def detect_own_classes(self, batch: list[dict]) -> Instances:
        """Return the detections in a batch of one image, in the detector's own classes.

        Raises:
            InputError: the file fails on the image, or returns an index that is no class.
        """
        mapped = base_mapper(self.detector.mapper).get("image_format", "BGR")
        if mapped != self.detector.input_format:
            batch = [{**one, "image": one["image"].flip(0)} for one in batch]
        try:
            [output] = self.file(batch)
        except Exception as error:  # of onnxruntime, or of outputs of other shapes
            shape = tuple(batch[0]["image"].shape)
            found = f"fails on an image of shape {shape} ({error})"
            expected = "boxes (D, 4), scores (D,) and classes (D,)"
            raise InputError(self.file.path, found, expected) from error
        found = output["instances"]
        if len(labels := found.pred_classes):
            low, high, count = int(labels.min()), int(labels.max()), len(self.class_map.teacher)
            if low < 0 or high >= count:
                expected = f"indices of its {count} classes, from 0"
                raise InputError(self.file.path, f"classes {low} to {high}", expected)
        return found


def load_detector(detector: Detector, data: EvaluationData, device: torch.device) -> LoadedDetector:
    """Build a detector and load its weights strictly; see :func:`load_detector_for_classes`."""
    return load_detector_for_classes(detector, data.name, data.truth.classes, device)


def load_detector_for_classes(
    detector: Detector, name: str, classes: Sequence[str] | None, device: torch.device
) -> LoadedDetector:
    """Build a detector and load its weights strictly.

    Args:
        detector: the detector.
        name: name of the data on which it detects objects, for error messages.
        classes: class names of the data; None: those of the detector.
        device: device of the detector.

    Raises:
        InputError: the weights cannot be read or do not fit, the class names are unknown, or there is no test mapper.
    """
    set_default_mapper([detector])
    if detector.weights.endswith(FORMATS["onnx"]):
        names = _aliased(detector, detector.classes)
        file = ExportedDetector(detector.weights)
        return LoadedOnnx(detector, None, _class_map(detector, name, classes, names), file)
    image_format = base_mapper(detector.mapper).get("image_format", "BGR")
    node = without_weights(detector.node)
    teacher = Teacher(
        instantiate(node),
        detector.weights,
        image_format=image_format,
        input_format=detector.input_format,
    )
    count = num_classes_of(teacher.detector)
    names = detector.classes or load_checkpoint(detector.weights).get(CLASSES_KEY)
    stored = teacher.checkpoint_classes
    if stored is not None and set(stored) == set(names):
        names = tuple(stored)  # the recipe's data may have another order than when it was trained
    for default in (_yacs_classes(detector.node), classes) if names is None else ():
        if names is None and default is not None and len(default) == count:
            names = default
    if names is None or len(names) != count:
        found = f"{count} classes, " + ("without names" if names is None else f"{len(names)} names")
        of_data = "" if classes is None else f", or the {len(classes)} of {name}"
        expected = f"a recipe or checkpoint that names them{of_data}"
        raise InputError(f"detector {detector.name!r}", found, expected)
    class_map = _class_map(detector, name, classes, _aliased(detector, names))
    teacher.detector.to(device)
    return LoadedDetector(detector, teacher, class_map)


def _yacs_classes(node: DictConfig) -> Sequence[str] | None:
    """Return the class names of the first training set of a yacs config; None if they are unknown."""
    names = OmegaConf.select(node, "config.DATASETS.TRAIN", default=None)
    known = names and names[0] in DatasetCatalog.list()
    return MetadataCatalog.get(names[0]).get("thing_classes") if known else None


def _aliased(detector: Detector, names: Sequence[str]) -> tuple[str, ...]:
    """Return class names with the detector's aliases; those of other names are of another detector."""
    return tuple(detector.aliases.get(name, name) for name in names)


def _class_map(
    detector: Detector, name: str, classes: Sequence[str] | None, names: Sequence[str]
) -> ClassMap:
    class_map = ClassMap.from_names(names if classes is None else classes, names)
    if not class_map.pairs:
        raise InputError(f"detector {detector.name!r}", "none of the classes", f"some of {name}")
    return class_map


def detector_from_config(
    name: str, config: str, weights: str, results: str | None = None
) -> Detector:
    """Describe a detector by weights and a config: a recipe (of a Distiller its student), yacs YAML, or zoo name.

    Raises:
        InputError: the config does not exist.
    """
    recipe = load_recipe_or_none(config)
    node, classes = model_of(config), None
    if recipe is not None:
        node, classes = student_node(recipe.model), training_classes(recipe)
    return Detector(
        name,
        config,
        weights,
        node,
        get_test_mapper(config if recipe is None else recipe),
        classes,
        results=() if results is None else (Path(results),),
        strict=results is not None,
    )


def detector_from_onnx(name: str, file: str, config: str | None = None) -> Detector:
    """Describe a detector in an ONNX file of the form that ``d2kd export`` writes.

    Args:
        name: name in the report.
        file: the file.
        config: a recipe whose test mapper reads the images. Default: they are resized as the file says.

    Raises:
        InputError: onnxruntime is not installed, the file has another form, or it does not say how to resize.
    """
    exported = ExportedDetector(file)
    exported.check_form()
    about = exported.metadata
    mapper = None if config is None else get_test_mapper(load_recipe_or_none(config) or config)
    if mapper is None:
        resizing = []
        if exported.image_size is not None:
            resizing = [L(T.Resize)(shape=list(exported.image_size))]
        elif "resize" in about:
            short, longest = json.loads(about["resize"])
            resizing = [L(T.ResizeShortestEdge)(short_edge_length=short, max_size=longest)]
        elif about.get("resizing", "none") != "none":
            found = f"images resized by {about['resizing']}"
            raise InputError(file, found, "its recipe, by --config-file, whose mapper does that")
        mapper = L(DatasetMapper)(
            is_train=False, augmentations=resizing, image_format=about["image_format"]
        )
    classes, order = tuple(exported.classes), about["image_format"]
    return Detector(name, file, file, DictConfig({}), mapper, classes, order)


def load_study_results(folder: Path) -> dict[str, Any] | None:
    """Read a study's ``results.json``: ``rows``, ``dataset``, ``baseline``, ``featured``; None if there is no such file.

    Raises:
        InputError: the file cannot be read.
    """
    file = folder / "results.json"
    if not file.is_file():
        return None
    content = read_json(file)
    if not content.get("rows") or not {"dataset", "baseline", "featured"} <= content.keys():
        raise InputError(file, "no rows, dataset, baseline or featured", "a study's results")
    return content


def detectors_from_run(folder: Path, dataset: str | None = None) -> tuple[list[Detector], str]:
    """Describe the teacher of a run, if it has one, and the trained detector.

    Args:
        folder: output folder of the run.
        dataset: data set of the comparison. Default: the first test set of the run.

    Returns:
        the detectors, and the name of the data set.

    Raises:
        InputError: the folder holds no finished run, its config cannot be read, or its mapper yields no
            teacher images although the teacher's images are larger.
    """
    config, weights = folder / "config.yaml", folder / "model_final.pth"
    for file in (config, weights):
        if not file.is_file():
            raise InputError(file, "no such file", "the output folder of a finished run or study")
    recipe = load(str(config))
    found = []
    node = recipe.model.teacher if is_distiller(recipe.model) else None
    if node is not None and node.weights and not is_feature_extractor(node):
        classes = None
        if node.get("classes") is not None:
            classes = apply_aliases(
                class_names(instantiate(node.classes)), node.get("aliases") or {}
            )
        mapper = _full_images(get_test_mapper(recipe), node.get("scale", 1), config)
        weights_of = str(_moved(folder, node.weights))
        order = node.get("input_format")
        found.append(
            Detector("teacher", str(config), weights_of, node.detector, mapper, classes, order)
        )
    name = "distilled" if is_distiller(recipe.model) else "detector"
    found.append(detector_from_config(name, str(config), str(weights)))
    if dataset is None:
        names = check_dataset(dataset_names(recipe, "test"))
        if not names:
            raise InputError(config, "no dataloader.test.dataset.names", "--dataset NAME")
        dataset = names[0]
    return found, dataset


def _full_images(mapper: DictConfig | None, scale: float, config: Path) -> DictConfig | None:
    """Return the mapper of the teacher's images: with ``scale`` > 1 the base mapper inside the student's mapper."""
    if scale == 1 or mapper is None:
        return mapper
    if (inner := full_size_mapper(mapper)) is None:
        found = f"a teacher of images {scale} times larger, and dataloader.test.mapper is no DownscaledStudentMapper"
        raise InputError(config, found, "the mappers of distill(…, scale=…)")
    return inner[0]


def _moved(folder: Path, weights: str) -> str | Path:
    """Return the weights of a recipe, or those beside the run's folder if both folders were moved."""
    beside = folder.parent / Path(weights).parent.name / Path(weights).name
    return beside if not Path(weights).exists() and beside.is_file() else weights


def detectors_from_study(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    baseline: str = "baseline",
    featured: str | None = None,
) -> list[Detector]:
    """Describe teacher, baseline and featured student of a study, for the first seed that has a distilled run.

    Args:
        folder: the study's folder; each run has a folder in it.
        rows: ``rows`` of its ``results.json``.
        baseline: method that the others are compared with.
        featured: method of the student. Default, also if it has no run: the distilled method of the highest AP.

    Raises:
        InputError: a run's config cannot be read, or there is no distilled run with a baseline of its seed.
    """
    recipes = {}
    for row in rows:
        file = folder / row["name"] / "config.yaml"
        if file.is_file():  # the folder may have been deleted
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
    if teacher is None:  # it was not evaluated before the run, or was trained elsewhere
        named = Path(recipes[best["name"]].model.teacher.weights or "").parent.name
        teacher = next((row for row in rows if row["name"] == named), None)
    shown = [row for row in (teacher, of_seed[seed], best) if row is not None]
    found = []
    for row in shown:
        run = folder / row["name"]
        one = detector_from_config(
            row["method"], str(run / "config.yaml"), str(run / "model_final.pth")
        )
        one.provenance["pseudo_labelled_images"] = row.get("pseudo_labelled_images") or None
        one.results, one.expected_AP = (run / "test/coco_instances_results.json",), row["AP"]
        found.append(one)
    return found


def set_default_mapper(detectors: Iterable[Detector]) -> None:
    """Set a missing mapper to that of the first detector that has one.

    Raises:
        InputError: no detector has a mapper.
    """
    detectors = list(detectors)
    mapper = next((d.mapper for d in detectors if d.mapper is not None), None)
    if mapper is None:
        raise InputError(
            detectors[0].config,
            "no mapper of test images",
            "at least one recipe with dataloader.test.mapper, or a yacs config",
        )
    for detector in detectors:
        if detector.mapper is None:
            detector.mapper = mapper


def build_loader(
    detector: Detector, records: list[dict], begin: int = 0, raise_errors: bool = True
) -> Iterable[list[dict]]:
    """Build a test loader of batches of one image with the detector's mapper, starting at record ``begin``.

    ``raise_errors`` is that of :func:`d2kd.data.build_test_loader`.
    """
    return build_test_loader(
        records,
        mapper=instantiate(detector.mapper),
        sampler=range(begin, len(records)),
        num_workers=int(len(records) - begin > MAX_IMAGES_WITHOUT_WORKER),
        raise_errors=raise_errors,
    )


def input_scale(given: dict) -> torch.Tensor:
    """Return (4,), the factors from XYXY boxes in the image file to boxes in the detector's input.

    Args:
        given: input dict of the image, with "image" and the file's "height" and "width".
    """
    height, width = given["image"].shape[-2:]
    return torch.tensor([width / given["width"], height / given["height"]]).repeat(2)
