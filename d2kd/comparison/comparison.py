"""Comparison of several detectors on one data set, with all figures of a report.

    found = compare(detectors, load_data("mine_val"), Path("output/report"))
    found.detectors[-1].accuracy.metrics["AP"], found.gain("distilled", "baseline").metrics["AP"]
    found.save("report.json"); found = Comparison.load("report.json")

The first detector is the reference, normally the teacher. With three detectors or more the second is the baseline,
otherwise the reference is the baseline. The last is the featured detector. All results are plain Python data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.launch import pick_device
from ..structures.class_map import ClassMap
from ..utils.console import ProgressCallback
from ..utils.env import collect_versions
from ..utils.errors import InputError
from ..utils.io import write_json
from .accuracy import (
    Accuracy,
    bootstrap_ap,
    bootstrap_counts,
    compute_accuracy,
    paired_gains,
    percentile_interval,
)
from .detections import get_detections
from .detectors import Detector, EvaluationData, LoadedDetector, load_detector, set_default_mapper
from .error_types import ErrorTypes, count_error_types
from .matching import Detections, Matches, match_detections
from .objects import ChangedObject, FoundObjects, Picture, count_found_objects
from .observation import Observation, observe

SCHEMA = 2


@dataclass(frozen=True)
class DetectorResult:
    """Results of one detector.

    Attributes:
        name, config, weights, weights_sha256: identify the detector.
        parameters: number of parameters; None if only detections are given.
        accuracy, errors: its accuracy and its errors.
        intervals: metric -> 95 % bootstrap interval.
        cost: ``seconds`` and ``memory_mib`` per image.
        missing_classes: classes of the data set that the detector does not have.
        unique_classes: classes that neither the data set nor another detector has.
        provenance: see :attr:`.Detector.provenance`.
        mask_accuracy, mask_intervals: the same of its masks; None and empty unless detector and data have masks.
    """

    name: str
    config: str
    weights: str
    weights_sha256: str | None
    parameters: int | None
    accuracy: Accuracy
    errors: ErrorTypes
    intervals: dict[str, list[float] | None]
    cost: dict[str, float | None]
    missing_classes: list[str] = field(default_factory=list)
    unique_classes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    mask_accuracy: Accuracy | None = None
    mask_intervals: dict[str, list[float] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Gain:
    """``of`` minus ``over``: metric or class -> ``gain`` and its paired 95 % bootstrap ``interval``.

    ``mask_metrics`` are those of masks, None unless both have masks.
    """

    of: str
    over: str
    metrics: dict[str, dict[str, Any]]
    per_class: dict[str, dict[str, Any]]
    mask_metrics: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Comparison:
    """Results of a comparison.

    Attributes:
        dataset: ``name``, ``sha256``, numbers of ``images``, ``objects`` and ``crowds``, ``classes``,
            ``objects_of`` (class -> number of objects), and the classes ``without_objects``.
        compared_classes: classes that all detectors have; means are taken over them.
        detectors: the reference first.
        baseline, featured: names of the two detectors of the main comparison.
        gains: gains over the baseline and over the reference.
        objects: objects found by each detector.
        observation: regions, features and costs; None if only detections are given.
        resamples: number of bootstrap resamples.
        threshold: score threshold of ``accuracy.fixed``.
        notes: warnings.
        versions: software versions.
    """

    dataset: dict[str, Any]
    compared_classes: list[str]
    detectors: list[DetectorResult]
    baseline: str
    featured: str
    gains: list[Gain]
    objects: FoundObjects
    observation: Observation | None
    resamples: int
    threshold: float
    notes: list[str] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> DetectorResult:
        return next(d for d in self.detectors if d.name == name)

    @property
    def reference(self) -> str:
        return self.detectors[0].name

    def gain(self, of: str, over: str) -> Gain | None:
        """Return the gain of a detector over another; None if it was not computed."""
        return next((g for g in self.gains if (g.of, g.over) == (of, over)), None)

    def save(self, path: str | Path) -> None:
        """Write ``report.json``; its ``rows`` are the detectors."""
        content = asdict(self)
        rows = content.pop("detectors")
        write_json(path, {"schema": SCHEMA, "rows": rows, **content})

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Load a file written by :meth:`save`.

        Raises:
            InputError: the file cannot be read, or has another schema.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            rows = content.pop("rows")
            objects, observation = content.pop("objects"), content.pop("observation")
            objects["pictures"] = [Picture(**p) for p in objects["pictures"]]
            for side in ("won_objects", "lost_objects"):
                objects[side] = [ChangedObject(**c) for c in objects[side]]
            for row in rows:
                row["accuracy"] = Accuracy(**row["accuracy"])
                row["errors"] = ErrorTypes(**row["errors"])
                if row.get("mask_accuracy") is not None:
                    row["mask_accuracy"] = Accuracy(**row["mask_accuracy"])
            return cls(
                detectors=[DetectorResult(**row) for row in rows],
                gains=[Gain(**gain) for gain in content.pop("gains")],
                objects=FoundObjects(**objects),
                observation=None if observation is None else Observation(**observation),
                **content,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(path, f"cannot be read ({error})", "a report.json") from error


ProgressFactory = Callable[[str], ProgressCallback]
"""Maps the name of a phase to its progress callback, see :data:`d2kd.utils.console.ProgressCallback`."""


def no_progress(what: str) -> ProgressCallback:
    """Show no progress."""
    return lambda done, total: None


@dataclass(frozen=True)
class Options:
    """Options of :func:`compare`.

    Args:
        threshold: score threshold of ``Accuracy.fixed``.
        resamples, seed: number of resamples and seed of the bootstrap.
        pictures: number of images in the gallery.
        observed: number of images on which regions and features are compared, spread evenly over the data set;
            default: all.
        device: device of the detectors.
    """

    threshold: float = 0.5
    resamples: int = 1000
    seed: int = 0
    pictures: int = 6
    observed: int | None = None
    device: str = "auto"


def compare(
    detectors: Sequence[Detector],
    data: EvaluationData,
    cache: Path,
    options: Options | None = None,
    phase: ProgressFactory = no_progress,
) -> Comparison:
    """Compare detectors on a data set.

    Args:
        detectors: the reference first.
        data: the data set, loaded by :func:`.detectors.load_data`.
        cache: folder of cached detections and counts.
        options: see :class:`Options`.
        phase: shows progress.

    Raises:
        InputError: a detector cannot be used, or the detectors have no class in common.
    """
    options = options or Options()
    _check_names([d.name for d in detectors])
    set_default_mapper(detectors)
    notes: list[str] = []
    device = pick_device(options.device)
    ready = [load_detector(detector, data, device) for detector in detectors]
    classes = _shared(ready, data)
    detections = {
        r.detector.name: get_detections(
            r,
            data,
            cache / _folder(r.detector.name),
            phase(f"{r.detector.name}: detections"),
            notes.append,
        )
        for r in ready
    }
    found = compute_detector_metrics(detections, data, classes, options, phase)
    observation = observe(
        ready,
        data,
        classes,
        [found[d.name].accuracy.best["threshold"] for d in detectors],
        cache / "observation.npz",
        phase("regions and features"),
        notes.append,
        options.observed,
    )
    only = _only(ready, data)
    described = [
        {
            "config": r.detector.config,
            "weights": r.detector.weights,
            "weights_sha256": r.detector.key["weights_sha256"],
            "parameters": r.parameters,
            "cost": cost,
            "missing_classes": [
                c for k, c in enumerate(data.truth.classes) if k not in r.class_map.student_ids
            ],
            "unique_classes": only[r.detector.name],
            "provenance": r.detector.provenance,
        }
        for r, cost in zip(ready, observation.costs)
    ]
    return build_comparison(found, described, observation, data, classes, options, notes)


@dataclass(frozen=True)
class DetectorMetrics:
    """Results of a detector that are computed from its detections; ``masks`` are those of masks, if there are any."""

    matches: Matches
    accuracy: Accuracy
    errors: ErrorTypes
    resampled: dict[str, np.ndarray]
    masks: tuple[Accuracy, dict[str, np.ndarray]] | None = None


def compute_detector_metrics(
    detections: dict[str, Detections],
    data: EvaluationData,
    classes: Sequence[int],
    options: Options,
    phase: ProgressFactory = no_progress,
) -> dict[str, DetectorMetrics]:
    """Compute accuracy, errors and bootstrapped accuracy of each detector, on the same resamples."""
    counts = bootstrap_counts(len(data.truth.image_ids), options.resamples, options.seed)
    found = {}
    for name, detected in detections.items():
        progress = phase(f"{name}: accuracy")
        masks = None
        if detected.mask is not None and data.masks is not None:
            matches = match_detections(data.truth, detected, data.masks)
            masks = (
                compute_accuracy(data.truth, matches, classes, options.threshold),
                bootstrap_ap(data.truth, matches, classes, counts),
            )
        matches = match_detections(data.truth, detected)
        found[name] = DetectorMetrics(
            matches,
            compute_accuracy(data.truth, matches, classes, options.threshold),
            count_error_types(data.truth, matches, classes),
            bootstrap_ap(data.truth, matches, classes, counts, progress),
            masks,
        )
    return found


def build_comparison(
    found: dict[str, DetectorMetrics],
    described: Sequence[dict[str, Any]],
    observation: Observation | None,
    data: EvaluationData,
    classes: Sequence[int],
    options: Options,
    notes: Sequence[str] = (),
) -> Comparison:
    """Build a :class:`Comparison`.

    Args:
        found: returned by :func:`compute_detector_metrics`.
        described: for each detector the other fields of :class:`DetectorResult`.
        observation: returned by :func:`.observation.observe`.
        data, classes, options, notes: see :func:`compare` and :class:`Comparison`.
    """
    names, truth = list(found), data.truth
    baseline, featured = names[1 if len(names) > 2 else 0], names[-1]
    over = [(name, baseline) for name in names if name != baseline]
    over += [(n, names[0]) for n in names[1:] if (n, names[0]) not in over]
    thresholds = {name: one.accuracy.best["threshold"] for name, one in found.items()}
    objects = np.bincount(truth.label[~truth.crowd], minlength=len(truth.classes))
    return Comparison(
        dataset={
            "name": data.name,
            "sha256": data.sha256,
            "images": len(truth.image_ids),
            "objects": int((~truth.crowd).sum()),
            "crowds": int(truth.crowd.sum()),
            "classes": list(truth.classes),
            "objects_of": (of := dict(zip(truth.classes, objects.tolist()))),
            "without_objects": [name for name, number in of.items() if not number],
        },
        compared_classes=[truth.classes[k] for k in classes],
        detectors=[
            DetectorResult(
                name=name,
                accuracy=one.accuracy,
                errors=one.errors,
                intervals=_intervals(one.resampled),
                mask_accuracy=one.masks and one.masks[0],
                mask_intervals=_intervals(one.masks[1]) if one.masks else {},
                **fields,
            )
            for (name, one), fields in zip(found.items(), described, strict=True)
        ],
        baseline=baseline,
        featured=featured,
        gains=[
            Gain(
                a,
                b,
                **paired_gains(
                    found[a].resampled, found[b].resampled, found[a].accuracy, found[b].accuracy
                ),
                mask_metrics=_mask_gains(found[a].masks, found[b].masks),
            )
            for a, b in over
        ],
        objects=count_found_objects(
            data,
            {n: one.matches for n, one in found.items()},
            thresholds,
            classes,
            baseline,
            featured,
            options.pictures,
        ),
        observation=observation,
        resamples=options.resamples,
        threshold=options.threshold,
        notes=list(notes),
        versions=collect_versions(),
    )


def _intervals(resampled: dict[str, np.ndarray]) -> dict[str, list[float] | None]:
    return {name: percentile_interval(x) for name, x in resampled.items() if x.ndim == 1}


def _mask_gains(a: tuple | None, b: tuple | None) -> dict[str, dict[str, Any]] | None:
    if not (a and b):
        return None
    (accuracy_a, resampled_a), (accuracy_b, resampled_b) = a, b
    return paired_gains(resampled_a, resampled_b, accuracy_a, accuracy_b)["metrics"]


def _folder(name: str) -> str:
    """Return the folder name of a detector."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise InputError("--detector", "none", "NAME=CONFIG,WEIGHTS")
    folders: dict[str, str] = {}
    for name in names:
        if not name.strip("."):
            raise InputError("--detector", repr(name), "a name")
        if _folder(name) in folders:
            raise InputError(
                "--detector", f"{folders[_folder(name)]!r} and {name!r}", "other names"
            )
        folders[_folder(name)] = name


def _shared(ready: Sequence[LoadedDetector], data: EvaluationData) -> list[int]:
    classes = sorted(set.intersection(*(set(r.class_map.student_ids) for r in ready)))
    if not classes:
        names = ", ".join(r.detector.name for r in ready)
        raise InputError(names, f"no class of {data.name} that all have", "classes of equal name")
    return classes


def _only(ready: Sequence[LoadedDetector], data: EvaluationData) -> dict[str, list[str]]:
    """Return, for each detector, its classes that neither the data set nor another detector has."""
    only = {}
    for r in ready:
        others = [other.class_map.teacher for other in ready if other is not r]
        maps = [
            ClassMap.from_names(names, r.class_map.teacher)
            for names in (data.truth.classes, *others)
        ]
        known = {k for one in maps for k in one.teacher_ids}
        only[r.detector.name] = [c for k, c in enumerate(r.class_map.teacher) if k not in known]
    return only
