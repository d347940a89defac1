"""Error kinds where each is known by construction, and what mending them must and must not do."""

import numpy as np
import pytest

from d2kd.comparison.accuracy import compute_accuracy
from d2kd.comparison.error_types import ERROR_TYPES, count_error_types, find_errors
from d2kd.comparison.matching import Detections, GroundTruth, match_detections

from .generated_detections import generated_detections, generated_truth

OBJECT = [0, 0, 20, 20]
SHIFTED = [0, 10, 20, 20]  # IoU 1/3
ELSEWHERE = [200, 200, 20, 20]


def scene(objects, detections, classes=("a", "b")):
    """One image: objects as (label, box[, crowd]), detections as (label, box, score)."""
    truth = GroundTruth(
        (7,),
        classes,
        np.zeros(len(objects), int),
        np.array([o[0] for o in objects], int),
        np.array([o[1] for o in objects], float).reshape(-1, 4),
        np.array([o[1][2] * o[1][3] for o in objects], float),
        np.array([len(o) > 2 for o in objects], bool),
    )
    found = Detections(
        np.zeros(len(detections), int),
        np.array([d[0] for d in detections], int),
        np.array([d[1] for d in detections], float).reshape(-1, 4),
        np.array([d[2] for d in detections], float),
    )
    return truth, match_detections(truth, found)


def kinds(objects, detections):
    truth, matches = scene(objects, detections)
    found = count_error_types(truth, matches, range(len(truth.classes)))
    return {k: n for k, n in found.count.items() if n}, found


HIT, AGAIN = (0, OBJECT, 0.9), (0, OBJECT, 0.8)


@pytest.mark.parametrize(
    "detections, expected",
    [
        ([HIT], {}),
        ([(1, OBJECT, 0.9)], {"classification": 1}),
        ([(0, SHIFTED, 0.9)], {"localization": 1}),
        ([(1, SHIFTED, 0.9)], {"both": 1, "missed": 1}),
        ([HIT, AGAIN], {"duplicate": 1}),
        ([(0, ELSEWHERE, 0.9)], {"background": 1, "missed": 1}),
        ([], {"missed": 1}),
        ([(0, SHIFTED, 0.9), (1, OBJECT, 0.5)], {"classification": 1, "localization": 1}),
        # A duplicate that overlaps too little is a localization error, as TIDE's order of tests has it.
        ([HIT, (0, SHIFTED, 0.8)], {"localization": 1}),
    ],
)
def test_each_kind_alone(detections, expected):
    assert kinds([(0, OBJECT)], detections)[0] == expected


@pytest.mark.parametrize(
    "objects, detections, expected",
    [
        # TIDE's order: localization, classification, duplicate; the places of ``ERROR_TYPES`` do not count.
        ([(0, OBJECT), (1, OBJECT)], [HIT, AGAIN], {"classification": 1}),
        ([(0, SHIFTED), (1, OBJECT)], [HIT], {"localization": 1, "missed": 1}),
        ([], [HIT], {"background": 1}),
        ([(0, OBJECT, "crowd")], [HIT, AGAIN], {}),  # nothing is wrong, and nobody need find it
    ],
)
def test_other_objects(objects, detections, expected):
    count, found = kinds(objects, detections)
    assert count == expected
    if not objects:
        assert found.AP50 is None and set(found.cost.values()) == {None}


@pytest.mark.parametrize(
    "detections, kind",
    [([(1, OBJECT, 0.9)], "classification"), ([(0, SHIFTED, 0.9)], "localization"), ([], "missed")],
)
def test_mending_the_only_error_costs_all_there_is(detections, kind):
    # Class b has an object that is found, so that the mean over classes is known: 50 before, 100 after.
    other = (1, [100, 100, 20, 20])
    _, found = kinds([(0, OBJECT), other], [*detections, (*other, 0.95)])
    assert found.AP50 == pytest.approx(50)
    assert found.cost[kind] == pytest.approx(50)
    assert all(found.cost[other] == 0 for other in ERROR_TYPES if other != kind)


def test_what_is_missed_costs_less_the_more_is_found():
    objects = [(0, [40 * i, 0, 20, 20]) for i in range(10)] + [(1, [0, 100, 20, 20])]
    costs = []
    for count in range(11):
        right = [(*one, 0.9) for one in [*objects[:count], objects[-1]]]
        costs.append(kinds(objects, right)[1].cost["missed"])
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(50) and costs[1] > 40 and costs[10] == 0
    # Where nothing was said at all, nobody knows; what was said of class a alone was wrong.
    assert kinds(objects[:10], [])[1].cost["missed"] is None
    wrong = [(0, [0, 200, 20, 20], 0.9), (*objects[-1], 0.9)]
    assert kinds(objects, wrong)[1].cost["missed"] == 0


def test_an_object_is_mended_once_by_the_best_that_means_it():
    truth, matches = scene([(0, OBJECT)], [(0, SHIFTED, 0.5), (0, SHIFTED, 0.9), (1, OBJECT, 0.7)])
    errors = find_errors(truth, matches)
    assert matches.detections.score[errors.fixes].tolist() == [0.9]
    # Mending classification drops the detection of b: its object is the better one's to mend.
    assert count_error_types(truth, matches, [0, 1]).cost["classification"] == 0
    assert count_error_types(truth, matches, [0, 1]).cost["localization"] == pytest.approx(100)
    # Classes that are not compared do not count.
    found = count_error_types(*scene([(0, OBJECT), (1, ELSEWHERE)], [(1, OBJECT, 0.9)]), [0])
    assert found.count["classification"] == 0 and found.AP50 == 0


def test_every_wrong_detection_has_one_kind_and_every_lost_object_a_reason():
    truth = generated_truth(objects=10, crowds=0.1)
    matches = match_detections(truth, generated_detections(truth, background=8))
    errors = find_errors(truth, matches)
    wrong = ~matches.is_tp[0, 0] & ~matches.ignored[0, 0]
    assert ((errors.type >= 0) == wrong).all() and len(set(errors.type[wrong])) == 5
    found = np.zeros(len(truth), bool)
    found[matches.object[0, 0, matches.is_tp[0, 0]]] = True
    reason = errors.missed.copy()
    reason[errors.target[errors.fixes]] = True
    assert (reason == (~found & ~truth.crowd)).all()


def test_ap50_is_the_reported_one_and_costs_are_gains():
    truth = generated_truth(objects=10)
    matches = match_detections(truth, generated_detections(truth, quality=0.2, background=8))
    found = count_error_types(truth, matches, range(4))
    assert found.AP50 == pytest.approx(
        compute_accuracy(truth, matches, range(4), 0.5).metrics["AP50"]
    )
    assert all(0 <= cost <= 100 - found.AP50 for cost in found.cost.values())
    assert found.cost["localization"] > 0 and found.cost["missed"] > 0
