"""Pictures: every panel has its boxes, and odd input is drawn like any other."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.figure import Figure
from PIL import Image

from d2kd.data import coco_dataset
from d2kd.utils.io import read_metrics
from d2kd.visualization.curves import draw_curves
from d2kd.visualization.panels import (
    GAP,
    LEGIBLE_SIDE,
    STRIP,
    count_matched_objects,
    draw_detections,
    draw_differences,
    instances_from_annotations,
    instances_from_results,
    side_by_side,
)

GRAY = np.full((40, 60, 3), 127, np.uint8)
ORANGE = (200, 100, 0)


def truth(*objects):
    """Ground truth of (class, box in XYXY)."""
    rows = [dict(bbox=list(b), bbox_mode=BoxMode.XYXY_ABS, category_id=c) for c, b in objects]
    return instances_from_annotations(rows, (40, 60))


def predicted(*objects):
    """Predictions of (class, score, box in XYXY)."""
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.tensor([o[2] for o in objects]).reshape(-1, 4).float())
    instances.pred_classes = torch.tensor([o[0] for o in objects], dtype=torch.int64)
    instances.scores = torch.tensor([o[1] for o in objects], dtype=torch.float32)
    return instances


def names(*classes):
    return Metadata(thing_classes=list(classes))


def panels_of(picture, count):
    """The panels below their title strips."""
    width = (picture.shape[1] - GAP * (count - 1)) // count
    return [picture[STRIP:, i * (width + GAP) : i * (width + GAP) + width] for i in range(count)]


def test_small_images_are_enlarged_and_large_ones_left():
    for height, width, scale in ((40, 60, LEGIBLE_SIDE / 40), (500, 700, 1)):
        image = np.zeros((height, width, 3), np.uint8)
        picture = side_by_side(image, {"a": truth(), "b": truth()})
        expected = (height * scale + STRIP, 2 * width * scale + GAP, 3)
        assert picture.shape == expected and picture.dtype == np.uint8


def test_panels_can_be_bounded():
    for height, width, longest in ((40, 60, 300), (500, 700, 350), (1, 2000, 100)):
        image = np.full((height, width, 3), 127, np.uint8)
        panel = panels_of(side_by_side(image, {"a": truth()}, longest=longest), 1)[0]
        assert panel.shape == (max(1, height * longest // width), longest, 3)
    whole, seen = np.zeros((1000, 1000, 3), np.uint8), truth((0, (200, 200, 800, 800)))
    panel = panels_of(side_by_side(whole, {"a": seen}, longest=100), 1)[0]
    drawn = panel.any(axis=2)
    assert drawn[50, 18:23].any() and drawn[50, 78:83].any() and not drawn[50, 40:60].any()


def test_boxes_are_drawn_where_they_are():
    box = (10, 10, 50, 30)
    with_box, without = panels_of(side_by_side(GRAY, {"a": truth((0, box)), "b": truth()}), 2)
    assert (without == 127).all()
    changed = (with_box != 127).any(axis=2)
    scale = LEGIBLE_SIDE / 40
    for y, x in ((10, 30), (30, 30), (20, 10), (20, 50)):  # the middles of the four edges
        y, x = round(y * scale), round(x * scale)
        assert changed[y - 2 : y + 3, x - 2 : x + 3].any(), (y, x)
    assert not changed[round(20 * scale), round(40 * scale)]  # the inside stays


HALF = [[10, 10, 50, 10, 50, 30]]  # the upper right half of a box


@pytest.mark.parametrize("kind", ["polygons", "RLE", "pasted"])
def test_masks_are_drawn_inside_their_boxes(kind):
    rle = mask_util.merge(mask_util.frPyObjects(HALF, 40, 60))
    seen = predicted((0, 0.9, (10, 10, 50, 30)), (0, 0.1, (1, 1, 5, 5)))
    if kind == "pasted":
        inside = torch.from_numpy(mask_util.decode(rle)).bool()
        seen.pred_masks = torch.stack([inside, ~inside])
    else:
        box, one = {"bbox": [10, 10, 40, 20], "score": 0.9, "category_id": 0}, {}
        one["segmentation"] = HALF if kind == "polygons" else rle
        seen = instances_from_results([box | one, box | {"score": 0.1}], (40, 60), {0: 0})
        assert len(seen[seen.scores > 0.5]) == 1
    row = dict(bbox=[10, 10, 50, 30], bbox_mode=BoxMode.XYXY_ABS, category_id=0)
    known = instances_from_annotations([row | {"segmentation": HALF}, row], (40, 60))
    panels = panels_of(side_by_side(GRAY, {"a": known, "b": seen}, threshold=0.5), 2)
    scale = LEGIBLE_SIDE / 40
    for panel in panels:
        filled = (panel != 127).any(axis=2)
        assert filled[round(18 * scale), round(45 * scale)]
        assert not filled[round(27 * scale), round(20 * scale)]
    # A detector of boxes is shown beside boxes.
    (alone,) = panels_of(side_by_side(GRAY, {"a": known}), 1)
    assert (alone[round(18 * scale), round(45 * scale)] == 127).all()


def test_scores_below_the_threshold_are_left_out():
    seen = predicted((0, 0.6, (5, 5, 30, 30)), (0, 0.4, (35, 5, 55, 30)))
    picture = side_by_side(GRAY, {"a": seen, "b": truth()}, names("x"), threshold=0.5)
    panel = panels_of(picture, 2)[0]
    half = panel.shape[1] // 2
    assert (panel[:, :half] != 127).any() and (panel[:, half + 60 :] == 127).all()


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 1), (40, 60, 3)])
def test_gray_images_and_other_types(shape):
    image, crowd = np.full(shape, 127.0), dict(bbox=[0, 0, 9, 9], category_id=0, iscrowd=1)
    none = instances_from_annotations([crowd | {"bbox_mode": BoxMode.XYWH_ABS}], (40, 60))
    assert (panels_of(side_by_side(image, {"a": none}), 1)[0] == 127).all()


def test_odd_panels():
    seen = predicted((79, 0.9, (5, 5, 30, 30)))  # a teacher of another class list
    panels = {
        "a title that is much too long for a panel " * 9: truth((0, (1, 1, 2, 2))),
        "nothing": predicted(),
        "other": seen,
    }
    for metadata in (None, names("the only class"), {"other": names("x")}, {}):
        assert side_by_side(GRAY, panels, metadata).shape[2] == 3
    with pytest.raises(ValueError, match="at least one panel"):
        side_by_side(GRAY, {})
    with pytest.raises(ValueError, match="an image is"):
        side_by_side(np.zeros((40, 60, 4)), {"a": truth()})


def test_objects_are_found_once_by_their_own_class():
    objects = truth((0, (0, 0, 20, 20)), (1, (30, 10, 50, 30)))
    cases = {
        (): 0,
        ((0, 0.9, (0, 0, 20, 20)), (0, 0.8, (1, 1, 20, 20))): 1,  # the second is a duplicate
        ((1, 0.9, (0, 0, 20, 20)),): 0,  # another class
        ((0, 0.2, (0, 0, 20, 20)),): 0,  # below the threshold
        ((0, 0.9, (0, 0, 20, 9)),): 0,  # IoU below one half
        ((0, 0.4, (0, 0, 20, 20)), (1, 0.9, (30, 10, 50, 30))): 2,
    }
    for seen, count in cases.items():
        assert count_matched_objects(objects, predicted(*seen), threshold=0.3) == count
    assert count_matched_objects(truth(), predicted((0, 0.9, (0, 0, 9, 9))), threshold=0.3) == 0


@pytest.fixture
def dataset(tmp_path):
    """Three images with one object each, category ids 3 and 7."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(3):
        Image.new("RGB", (60, 40), ORANGE).save(tmp_path / "images" / f"{i}.png")
        images.append(dict(id=10 + i, file_name=f"{i}.png", width=60, height=40))
        box = dict(bbox=[5, 5, 20, 20], area=400, iscrowd=0)
        annotations.append(dict(id=i + 1, image_id=10 + i, category_id=7, **box))
    categories = [dict(id=3, name="cat"), dict(id=7, name="dog")]
    content = dict(images=images, annotations=annotations, categories=categories)
    (tmp_path / "a.json").write_text(json.dumps(content))
    return coco_dataset(tmp_path.name, str(tmp_path / "a.json"), str(tmp_path / "images"))


def test_pictures_show_where_two_differ_whoever_is_better(tmp_path, dataset):
    def results(name, *image_ids):
        row = dict(category_id=7, bbox=[5, 5, 20, 20], score=0.9)
        (tmp_path / name).write_text(json.dumps([dict(row, image_id=i) for i in image_ids]))
        return tmp_path / name

    said = {"teacher": results("t", 10, 12)}  # which is shown, and not compared
    said |= {"baseline": results("b", 10, 11), "student": results("s", 10)}
    written = draw_differences(tmp_path / "p", dataset, said, number=2, threshold=0.5)
    assert [p.name for p in written] == ["01_1.png", "02_0.png"]
    for panel in panels_of(np.asarray(Image.open(written[0])), 4):
        assert tuple(panel[-1, -1]) == ORANGE
    # A second call leaves nothing of the first; a detector that found nothing has no file.
    said["student"] = tmp_path / "absent"
    written = draw_differences(tmp_path / "p", dataset, said, number=1, threshold=0.5)
    assert sorted((tmp_path / "p").iterdir()) == written == [tmp_path / "p" / "01_0.png"]


def test_coco_results_become_instances():
    rows = [dict(category_id=7, bbox=[5, 5, 20, 20], score=0.9)]
    seen = instances_from_results(rows, (40, 60), {3: 0, 7: 1})
    assert seen.pred_boxes.tensor.tolist() == [[5, 5, 25, 25]] and seen.pred_classes.tolist() == [1]
    assert len(instances_from_results([], (40, 60), {})) == 0


def test_detections_of_any_function_of_batches(tmp_path, dataset):
    def see(batch):
        return [{"instances": predicted((1, 0.9, (5, 5, 25, 25)))} for _ in batch]

    detectors = {"teacher": (see, None), "student": (see, ["cat", "dog"])}
    for number, images in ((9, [0, 1, 2]), (2, [0, 2])):  # from the whole data set
        folder = tmp_path / str(number)
        written = draw_detections(folder, dataset, detectors, lambda record: record, number, 0.5)
        names = [f"{n:02d}_{i}.png" for n, i in enumerate(images, 1)]
        assert [p.name for p in written] == names


def test_curves_of_what_was_written(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: figures.append(figure) or save(figure, *_, **__)
    )
    lines = [
        '{"iteration": 4, "loss_cls": 1.0, "loss_box_reg": 0.5, "distill/loss_x": 9.0}',
        '{"iteration": 9, "loss_cls": 3.0}',
        '{"iteration": 9, "loss_cls": 0.5, "bbox/AP": 12.0, "segm/AP": 8.0}',  # after a resume
        '{"bbox/AP": 3.0}',  # no iteration
        '{"iteration": 14, "loss',  # cut by an interruption
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    entries = read_metrics(tmp_path / "metrics.json")
    assert [e["iteration"] for e in entries] == [4, 9] and entries[1]["loss_cls"] == 0.5
    assert read_metrics(tmp_path / "absent.json") == []
    paths = {"a": [tmp_path / "metrics.json"] * 2, "b": [tmp_path / "absent.json"]}
    draw_curves(tmp_path / "curves.png", paths, "title")
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    # The student's own losses and its AP, by how many iterations were done.
    loss, ap = ([line.get_xydata().tolist() for line in axes.lines] for axes in figures[0].axes)
    assert loss == [[[5, 1.5], [10, 0.5]]] * 2 + [[]] and ap == [[[10, 12.0]], [[10, 8.0]]] * 2 + [
        []
    ]
