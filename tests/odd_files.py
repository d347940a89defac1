"""Annotation files of any content are understood by every reader alike, or refused in one line.

    python -m tests.odd_files --examples 2000

changes values, types and keys of a small file in COCO's format, and text and tags of VOC's files, at random. Either an
InputError of one line names the fault; or a detector that knows the annotations has an AP of 100 by Detectron2's evaluator
and in a comparison, or none where nothing counts. Prints how many were refused; anything else ends it with a traceback.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import tempfile
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.evaluation import COCOEvaluator
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from d2kd.comparison.accuracy import compute_accuracy
from d2kd.comparison.detectors import load_coco_results, load_data
from d2kd.comparison.matching import match_detections
from d2kd.data import check_dataset, coco_dataset, register_voc
from d2kd.utils.console import suppress_output
from d2kd.utils.errors import InputError

from .common import CLASSES, perfect
from .tiny_run import draw_data

NAMES = [f"class {k}" for k in range(CLASSES)]
_numbers = itertools.count()


def register(content, images, classes=None) -> str:
    number = next(_numbers)
    file = images / f"{number}.json"
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return coco_dataset(f"{images}_{number}", str(file), str(images), classes)


def ap_of_oracle(name: str, folder: Path) -> float:
    """AP of a detector that knows the annotations: by Detectron2's evaluator, and in a comparison the same."""
    check_dataset(name)
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(folder), use_fast_impl=False)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": perfect(record)}])
    ap = evaluator.evaluate()["bbox"]["AP"]
    data = load_data(name)
    found = load_coco_results(folder / "coco_instances_results.json", data)
    matches = match_detections(data.truth, found)
    metrics = compute_accuracy(data.truth, matches, range(len(data.truth.classes)), 0.5).metrics
    assert metrics["AP"] == pytest.approx(ap, nan_ok=True) or (
        np.isnan(ap) and metrics["AP"] is None
    )
    return ap


def objects_learned(name: str) -> int:
    """Objects that a box detector's mapper leaves for training."""
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    return sum(len(mapper(record)["instances"]) for record in DatasetCatalog.get(name))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 100), st.floats(allow_subnormal=False, width=32),
    st.text(max_size=3), st.lists(st.floats(0, 60, width=32), max_size=5), st.just([[]]), st.just({}),
    st.builds(lambda counts: {"size": [64, 64], "counts": counts}, st.lists(st.integers(-1, 4096), max_size=2) | st.text(max_size=3)),
)  # fmt: skip
KEYS = {
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation", "keypoints"],
    "images": ["id", "file_name", "width", "height"],
    "categories": ["id", "name", "supercategory"],
}  # fmt: skip
COCO_EDITS = st.lists(
    st.sampled_from([(s, k) for s, keys in KEYS.items() for k in keys]).flatmap(
        lambda at: st.tuples(st.just(at), st.booleans(), st.integers(0, 6), VALUES)
    ),
    min_size=1,
    max_size=3,
)
VOC_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["size", "width", "height", "name", "bndbox", "xmin", "ymax", "object"]),
        st.sampled_from(["remove", "twice", "text"]),
        st.integers(0, 6),
        st.one_of(st.integers(-9, 99).map(str), st.floats(width=32).map(str), st.text(max_size=4)),
    ),
    min_size=1,
    max_size=3,
)


def check_coco(edits, images: Path, folder: Path) -> bool:
    """Return whether a file with these edits is accepted; the images are those of :func:`draw_data`."""
    content = json.loads((images / "data.json").read_text())
    for (section, key), drop, position, value in edits:
        record = content[section][position % len(content[section])]
        record.pop(key, None) if drop else record.update({key: value})
    return is_accepted(lambda: register(content, images), folder)


def check_voc(edits, root: Path, folder: Path) -> bool:
    """Return whether a set with these edits of its first annotation is accepted."""
    file = root / "Annotations" / "train0.xml"
    original = file.read_bytes()
    tree = ET.parse(file)
    for tag, how, position, text in edits:
        parents = [p for p in tree.iter() for child in p if child.tag == tag]
        if not parents:
            continue
        parent = parents[position % len(parents)]
        child = parent.find(tag)
        if how == "remove":
            parent.remove(child)
        elif how == "twice":
            parent.append(copy.deepcopy(child))
        else:
            child.text = "".join(c for c in text if c.isprintable())
    tree.write(file, encoding="utf-8")
    try:
        name = f"{root}_{next(_numbers)}"
        return is_accepted(lambda: register_voc(name, str(root), "train", NAMES), folder)
    finally:
        file.write_bytes(original)


def is_accepted(make: Callable[[], str], folder: Path) -> bool:
    try:
        name = make()
        ap = ap_of_oracle(name, folder)
    except InputError as error:
        assert error.expected and "\n" not in str(error), error
        return False
    assert ap == pytest.approx(100) or np.isnan(ap) or objects_learned(name) == 0, ap
    return True


def sweep(strategy, check: Callable[[list], bool], examples: int) -> Counter:
    """Return how many of so many random edits were accepted (True) and refused (False)."""
    counts: Counter = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(edits=strategy)
    def run(edits):
        with suppress_output():
            counts[check(edits)] += 1

    run()
    return counts


def main() -> None:
    from .test_voc import write_voc

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=2000, help="of each format")
    examples = parser.parse_args().examples
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        images, root = Path(folder, "images"), Path(folder, "voc")
        draw_data(images)
        write_voc(root)
        for kind, edits, check, key, at in (
            ("COCO", COCO_EDITS, check_coco, "images", images),
            ("VOC", VOC_EDITS, check_voc, "root", root),
        ):
            counts = sweep(edits, partial(check, **{key: at}, folder=Path(folder, "out")), examples)
            print(f"{kind}: {counts[True]} files understood, {counts[False]} refused in one line")


if __name__ == "__main__":
    main()
