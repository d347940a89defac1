"""AP, its intervals and the scores where precision and recall are read, against COCO's own code and plain loops."""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2kd.comparison.accuracy import (
    METRICS,
    bootstrap_ap,
    bootstrap_counts,
    class_operating_point,
    compute_accuracy,
    paired_gains,
    percentile_interval,
    precision_array,
)
from d2kd.comparison.matching import (
    Detections,
    GroundTruth,
    match_detections,
    rowwise_iou,
)
from d2kd.structures.rle import object_array, to_rle

from .generated_detections import coco_of, generated_detections, generated_truth, results_of
from .test_error_types import scene


def columns_of(detections):
    return [x for x in vars(detections).values() if x is not None]


def cocoeval(truth, detections, masks=None):
    content, results = coco_of(truth), results_of(truth, detections)
    for rows, rle in ((content["annotations"], masks), (results, detections.mask)):
        for row, mask in zip(rows, () if masks is None else rle):
            row["segmentation"] = mask
    if masks is not None:
        for row in results:
            del row["bbox"]  # as Detectron2 does, or areas were those of boxes
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        kind = "bbox" if masks is None else "segm"
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(images=6, objects=60, classes=2, crowds=0.3),  # more than 100 of a class in an image
        dict(images=30, classes=300),
        dict(images=1, objects=0),
    ],
    ids=["ordinary", "crowds", "300 classes", "no object"],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_precision_is_cocos(options, seed):
    truth = generated_truth(**options, seed=seed)
    dense = 80 if options.get("crowds") else 4
    detections = generated_detections(truth, quality=0.3 * seed, background=dense, seed=seed)
    if not len(detections):
        pytest.skip("COCO refuses an empty file")
    expected = cocoeval(truth, detections)
    found = precision_array(truth, match_detections(truth, detections))
    np.testing.assert_array_equal(found, expected.eval["precision"][..., -1])
    measured = compute_accuracy(
        truth, match_detections(truth, detections), range(len(truth.classes)), 0.5
    )
    for name, stat in zip(METRICS, expected.stats):
        assert measured.metrics[name] == (None if stat == -1 else 100 * stat)


def triangles(boxes):
    """The lower left half of each box, as in a COCO file."""
    corners = ([x, y, x, y + h, x + w, y + h] for x, y, w, h in boxes.tolist())
    return object_array([to_rle([corner], 640, 640) for corner in corners])


@pytest.mark.parametrize("options", [{}, dict(images=6, objects=40, classes=2, crowds=0.3)])
def test_every_precision_of_masks_is_cocos(options):
    truth = generated_truth(**options, seed=1)
    detections = generated_detections(truth, quality=0.6, seed=1)
    detections = replace(detections, mask=triangles(detections.box))
    masks = triangles(truth.box)
    expected = cocoeval(truth, detections, masks)
    matches = match_detections(truth, detections, masks)
    found = precision_array(truth, matches)
    np.testing.assert_array_equal(found, expected.eval["precision"][..., -1])
    assert 5 < expected.stats[0] * 100 < 95
    assert not np.array_equal(found, precision_array(truth, match_detections(truth, detections)))


def test_masks_of_any_coco_form():
    polygon = [[2, 2, 8, 2, 8, 6]]
    rle = to_rle(polygon, 10, 12)
    assert isinstance(rle["counts"], str) and to_rle(rle, 10, 12) == rle
    pixels = mask_util.decode(rle)
    runs = np.flatnonzero(np.diff(np.r_[0, pixels.flatten("F"), 0]))
    whole = {"size": [10, 12], "counts": np.diff(np.r_[0, runs, 120]).tolist()}
    assert to_rle(whole, 10, 12) == rle
    for nothing in (None, [], [[1, 2, 3, 4]]):
        assert to_rle(nothing, 10, 12) is None


def test_equal_boxes_and_scores_are_matched_as_cocos_loop_does():
    truth = generated_truth(images=8, objects=3, seed=1)
    detections = generated_detections(truth, seed=1)
    twice = Detections(*(np.concatenate([x, x]) for x in columns_of(detections)))
    twice.score[:] = 0.5
    expected = cocoeval(truth, twice).eval["precision"][..., -1]
    np.testing.assert_array_equal(precision_array(truth, match_detections(truth, twice)), expected)


def test_without_detections_ap_is_zero_and_without_objects_undefined():
    def only(of, first, kept):
        columns = [(k, v) for k, v in vars(of).items() if v is not None]
        return replace(of, **{k: v[kept] for k, v in columns[first:]})

    truth, no = generated_truth(), slice(0)
    nothing = only(generated_detections(truth), 0, no)
    measured = compute_accuracy(
        truth, match_detections(truth, nothing), range(len(truth.classes)), 0.5
    )
    assert measured.metrics["AP"] == 0 and measured.per_class["class 3"] is None
    assert measured.best["precision"] is None and measured.best["recall"] == 0
    nobody = only(truth, 2, no)
    assert set(
        compute_accuracy(nobody, match_detections(nobody, nothing), [0], 0.5).metrics.values()
    ) == {None}


def test_the_best_f1_is_that_of_the_best_threshold():
    """Of equal scores a threshold takes all or none, whichever is right."""
    truth = generated_truth(images=4, seed=3)
    detections = generated_detections(truth, seed=3)
    detections.score[:] = detections.score.round(1)
    matches = match_detections(truth, detections)
    at = [compute_accuracy(truth, matches, range(4), t) for t in np.unique(detections.score)]
    best = max((one.fixed for one in at), key=lambda fixed: fixed["f1"])
    assert len(at) > 5 and [one.best for one in at] == [best] * len(at)


def test_means_are_over_the_given_classes():
    truth = generated_truth()
    matches = match_detections(truth, generated_detections(truth))
    some = compute_accuracy(truth, matches, [0, 2], 0.5)
    mean = np.mean([some.per_class["class 0"], some.per_class["class 2"]])
    assert some.metrics["AP"] == pytest.approx(mean)
    alone = [compute_accuracy(truth, matches, [k], 0.5).precision for k in (0, 2)]
    assert some.precision == pytest.approx(np.mean(alone, axis=0)) and alone[0] != alone[1]


def test_sizes_are_cocos_and_the_smaller_one_on_their_bounds():
    areas = np.array([1023, 1024, 1025, 9215, 9216, 9217.0])
    truth = generated_truth(images=2, objects=9)
    truth = replace(truth, area=np.resize(areas, len(truth)))
    assert truth.size[:6].tolist() == [0, 0, 1, 1, 1, 2]


def repeated(truth, detections, counts):
    """The resampled data set written out: every image as often as it was drawn."""
    drawn = np.repeat(np.arange(len(counts)), counts)

    def copies(values, of_image):
        parts = [np.flatnonzero(of_image == image) for image in drawn]
        new = np.repeat(np.arange(len(drawn)), [len(part) for part in parts])
        return new, *(value[np.concatenate(parts)] for value in list(values)[1:])

    of = copies(list(vars(truth).values())[2:], truth.image)
    whole = GroundTruth(tuple(range(len(drawn))), truth.classes, *of)
    return whole, Detections(*copies(columns_of(detections), detections.image))


@pytest.mark.parametrize("cells", [8_000_000, 50])
def test_a_resample_has_the_ap_of_its_images_written_out(monkeypatch, cells):
    monkeypatch.setattr("d2kd.comparison.accuracy.CELLS", cells)
    truth = generated_truth(images=12, objects=6, crowds=0.1)
    detections = generated_detections(truth, background=6)
    # Equal scores in different images are ordered by image, which is another order once images are repeated.
    detections.score[:] += np.random.default_rng(0).uniform(0, 1e-3, len(detections))
    counts = bootstrap_counts(12, 6)
    found = bootstrap_ap(truth, match_detections(truth, detections), range(4), counts)

    def close(values, expected, bound):
        expected = np.array([np.nan if x is None else x for x in expected])
        np.testing.assert_allclose(np.array(values, float), expected, atol=bound, rtol=0)

    for row, count in enumerate(counts):
        whole = repeated(truth, detections, count)
        expected = compute_accuracy(whole[0], match_detections(*whole), range(4), 0.5).metrics
        # Copies of an image have equal scores: COCO reads precision between them, too.
        close([found[name][row] for name in METRICS], [expected[name] for name in METRICS], 0.6)
    once = bootstrap_ap(
        truth, match_detections(truth, detections), range(4), np.ones((1, 12), np.int32)
    )
    exact = compute_accuracy(truth, match_detections(truth, detections), range(4), 0.5)
    close([once[name][0] for name in METRICS], [exact.metrics[name] for name in METRICS], 1e-4)
    close(once["per_class"][0], [exact.per_class[name] for name in truth.classes], 1e-4)


def test_a_pairs_interval_is_of_the_difference_and_none_for_equals():
    truth = generated_truth(images=30)
    counts = bootstrap_counts(30, 200)
    better, worse = (generated_detections(truth, quality=q) for q in (0.9, 0.2))
    matches = [match_detections(truth, detections) for detections in (better, worse)]
    a, b = (compute_accuracy(truth, found, range(4), 0.5) for found in matches)
    of_a, of_b = (bootstrap_ap(truth, found, range(4), counts) for found in matches)
    gain = paired_gains(of_a, of_b, a, b)["metrics"]["AP"]
    assert gain["interval"][0] < gain["gain"] < gain["interval"][1] and gain["interval"][0] > 0
    same = paired_gains(of_a, of_a, a, a)
    assert same["metrics"]["AP"] == {"gain": 0.0, "interval": [0.0, 0.0]}
    assert same["per_class"]["class 3"] == {"gain": None, "interval": None}


def test_an_interval_holds_95_of_100_resamples():
    values = np.random.default_rng(0).permutation(1000).astype(float)
    low, high = percentile_interval(np.append(values, [np.nan, np.nan]))
    assert np.mean((low < values) & (values < high)) == 0.95 == 1 - 2 * np.mean(values < low)
    assert percentile_interval(np.full(3, np.nan)) is None


def test_resamples_draw_as_many_images_as_there_are_and_repeat():
    counts = bootstrap_counts(17, 50)
    assert (counts.sum(axis=1) == 17).all() and (counts == bootstrap_counts(17, 50)).all()
    assert not (counts == bootstrap_counts(17, 50, seed=1)).all()


def test_precision_and_recall_at_a_threshold_by_hand():
    near, far = [0, 0, 10, 10], [50, 50, 10, 10]
    seen = [(0, near, 0.9), (0, [90, 0, 10, 10], 0.8), (0, far, 0.7), (0, [70, 0, 5, 5], 0.6)]
    truth, matches = scene([(0, near), (0, far)], seen)
    measured = compute_accuracy(truth, matches, [0], 0.85)
    assert measured.best["threshold"] == 0.7 and measured.best["recall"] == 100
    assert measured.best["precision"] == pytest.approx(200 / 3)
    assert (measured.fixed["precision"], measured.fixed["recall"]) == (100, 50)
    assert matches.found_at().tolist() == [0.9, 0.7]


def slow_counts(truth, detections, k, threshold):
    """True and false positives of a class at IoU 0.5, from a score on: one image and one detection after the other."""
    found = wrong = 0
    for image in range(len(truth.image_ids)):
        objects = np.flatnonzero((truth.image == image) & (truth.label == k))
        chosen = (detections.image == image) & (detections.label == k)
        chosen = np.flatnonzero(chosen & (detections.score >= threshold))
        free = [g for g in objects if not truth.crowd[g]]
        for d in sorted(chosen, key=lambda d: -detections.score[d]):
            box = detections.box[d][None]
            near = {g: rowwise_iou(box, truth.box[g][None])[0] for g in free}
            crowds = [g for g in objects if truth.crowd[g]]
            in_crowd = [rowwise_iou(box, truth.box[g][None], np.array([True]))[0] for g in crowds]
            if near and max(near.values()) >= 0.5:
                free.remove(max(near, key=near.get))
                found += 1
            elif not any(share >= 0.5 for share in in_crowd):
                wrong += 1
    return found, wrong


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_of_a_class_is_the_best_of_all(seed):
    truth = generated_truth(images=10, classes=3, crowds=0.2, seed=seed)
    detections = generated_detections(truth, quality=0.4, seed=seed)
    matches = match_detections(truth, detections)
    objects = [int(((truth.label == k) & ~truth.crowd).sum()) for k in range(3)]
    assert objects[2] == 0 < min(objects[:2])
    for k in range(2):
        scores = np.unique(detections.score[detections.label == k])
        table = {t: slow_counts(truth, detections, k, t) for t in scores}
        best = class_operating_point(truth, matches, k)
        f1 = {t: 200 * found / (found + wrong + objects[k]) for t, (found, wrong) in table.items()}
        assert best["f1"] == pytest.approx(max(f1.values())) == pytest.approx(f1[best["threshold"]])
        precision = {t: found / max(found + wrong, 1) for t, (found, wrong) in table.items()}
        for least in (0.25, 0.5, 0.8, max(precision.values())):
            reached = [t for t, value in precision.items() if value >= least]
            point = class_operating_point(truth, matches, k, precision=least)
            assert point["threshold"] == (min(reached) if reached else None)
            if reached:
                assert point["precision"] == pytest.approx(100 * precision[min(reached)])
                recall = 100 * table[min(reached)][0] / objects[k]
                assert point["recall"] == pytest.approx(recall) and point["objects"] == objects[k]
        given = class_operating_point(truth, matches, k, threshold=0.5)
        assert (given["found"], given["wrong"]) == slow_counts(truth, detections, k, 0.5)
    for options in ({}, {"precision": 0.1}):
        assert class_operating_point(truth, matches, 2, **options)["threshold"] is None
    nothing = match_detections(truth, detections[np.zeros(len(detections), bool)])
    assert class_operating_point(truth, nothing, 0, precision=0.5)["threshold"] is None
