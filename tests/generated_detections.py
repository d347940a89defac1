"""Annotations and detections drawn at random, of any size: what detectors would say, without detectors."""

from __future__ import annotations

import numpy as np

from d2kd.comparison.matching import Detections, GroundTruth


def generated_truth(
    images: int = 40, classes: int = 4, objects: float = 5.0, crowds: float = 0.05, seed: int = 0
) -> GroundTruth:
    """Objects of COCO's spread of sizes; the last class has none, and one image is empty."""
    random = np.random.default_rng(seed)
    counts = random.poisson(objects, images)
    counts[0] = 0
    image = np.repeat(np.arange(images), counts)
    total = len(image)
    side = np.exp(random.normal(np.log(70), 0.9, (total, 2))).clip(4, 400)
    corner = random.uniform(0, 1, (total, 2)) * np.maximum(640 - side, 1)
    label = np.sort(random.zipf(1.5, total) % max(classes - 1, 1))
    random.shuffle(label)
    box = np.concatenate([corner, side], axis=1).round(2)
    return GroundTruth(
        image_ids=tuple(range(100, 100 + images)),
        classes=tuple(f"class {k}" for k in range(classes)),
        image=image,
        label=label,
        box=box,
        area=box[:, 2] * box[:, 3] * random.uniform(0.5, 1.0, total),
        crowd=random.random(total) < crowds,
    )


def generated_detections(
    truth: GroundTruth, quality: float = 0.5, background: float = 4.0, seed: int = 0
) -> Detections:
    """What a detector of some quality says: most objects, some twice, some as another class, and background.

    Scores are rounded, so that some are equal.
    """
    random = np.random.default_rng(seed)
    copies = random.choice([0, 1, 2, 3], len(truth), p=[0.15, 0.5, 0.25, 0.1])
    of = np.repeat(np.arange(len(truth)), copies)
    noise = random.normal(0, 0.25 * (1 - quality) + 0.02, (len(of), 4))
    box = truth.box[of] + noise * truth.box[of][:, [2, 3, 2, 3]]
    other = random.random(len(of)) < 0.3 * (1 - quality)
    label = np.where(other, random.integers(len(truth.classes), size=len(of)), truth.label[of])
    score = random.beta(3 + 4 * quality, 3, len(of))
    images = len(truth.image_ids)
    extra = random.poisson(background * images)
    box = np.concatenate([box, random.uniform(5, 300, (extra, 4))]).astype(np.float32)
    box[:, 2:] = np.maximum(box[:, 2:], 1)
    return Detections(
        image=np.concatenate([truth.image[of], random.integers(images, size=extra)]),
        label=np.concatenate([label, random.integers(len(truth.classes), size=extra)]),
        box=box.astype(np.float64),
        score=np.concatenate([score, random.beta(1, 5, extra)]).round(2),
    )


def coco_of(truth: GroundTruth) -> dict:
    """The content of a COCO annotation file."""
    ids = [int(i) for i in truth.image_ids]
    return {
        "images": [{"id": i, "width": 640, "height": 640, "file_name": f"{i}.jpg"} for i in ids],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(truth.classes)],
        "annotations": [
            {"id": n + 1, "image_id": ids[truth.image[n]], "category_id": int(truth.label[n]) + 1}
            | {"bbox": truth.box[n].tolist(), "area": float(truth.area[n])}
            | {"iscrowd": int(truth.crowd[n])}
            for n in range(len(truth))
        ],
    }


def results_of(truth: GroundTruth, detections: Detections) -> list[dict]:
    """The content of a COCO results file."""
    d, ids = detections, truth.image_ids
    return [
        {"image_id": int(ids[i]), "category_id": int(k) + 1, "bbox": b.tolist(), "score": float(s)}
        for i, k, b, s in zip(d.image, d.label, d.box, d.score)
    ]
