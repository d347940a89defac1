"""How long a comparison takes, and how much memory, at COCO's size: 5,000 images, 80 classes, three detectors.

    python -m tests.coco_size [--images 5000] [--classes 80] [--detectors 3] [--output DIR]

Detections are generated (some 60 an image for each detector), so what is measured is AP, its intervals, the error kinds
and the page. Regions and features are counted while detectors run, and are no part of this. Seconds are those of the
process, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from d2kd.comparison.comparison import Options, build_comparison, compute_detector_metrics
from d2kd.comparison.detectors import EvaluationData
from d2kd.report.page import write_report

from .generated_detections import generated_detections, generated_truth


def generated_data(
    images: int, classes: int, objects: float = 7.3, seed: int = 0
) -> EvaluationData:
    """A data set without images."""
    truth = generated_truth(images, classes, objects, crowds=0.01, seed=seed)
    records = [
        {"file_name": f"{i}.jpg", "image_id": i, "height": 640, "width": 640}
        for i in truth.image_ids
    ]
    return EvaluationData("generated", records, truth, tuple(range(classes)), "0" * 64)


def described(name: str) -> dict:
    """What is not known of a detector without weights."""
    nothing = {"config": "generated", "weights": name, "weights_sha256": None, "parameters": None}
    return {**nothing, "cost": {"seconds": None, "memory_mib": None}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detectors", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    data = generated_data(args.images, args.classes)
    detections = {
        f"detector {n}": generated_detections(data.truth, 0.9 - 0.3 * n, background=50, seed=n)
        for n in range(args.detectors)
    }
    total = sum(map(len, detections.values()))
    print(f"{args.images} images, {len(data.truth)} objects, {total} detections", flush=True)
    start = time.process_time()
    options, classes = Options(), range(args.classes)

    def phase(what):
        print(f"{time.process_time() - start:7.1f} s  {what}", flush=True)
        return lambda step, steps: None

    found = compute_detector_metrics(detections, data, classes, options, phase)
    phase("page")
    comparison = build_comparison(
        found, [described(name) for name in found], None, data, classes, options
    )
    output = args.output or Path(tempfile.mkdtemp())
    write_report(comparison, output)
    size = (output / "report.html").stat().st_size / 2**20
    phase(f"done: a page of {size:.1f} MiB in {output}")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most")


if __name__ == "__main__":
    main()
