"""The page: complete in itself, and whole whatever the detectors and classes are."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from d2kd.comparison.comparison import Options, build_comparison, compute_detector_metrics
from d2kd.comparison.error_types import ERROR_TYPES
from d2kd.report.page import ValueRange, detector_colors, render, summary_sentence, write_report

from .coco_size import described, generated_data
from .generated_detections import generated_detections


def compared(detectors=3, images=12, classes=4, seed=0):
    names, qualities = (
        ["teacher", "baseline", "distilled", "more", "last"],
        (0.9, 0.1, 0.6, 0.3, 0.5),
    )
    data = generated_data(images, classes, objects=4)
    seen = generated(data, dict(zip(names[:detectors], qualities)))
    return made(data, seen, range(classes), resamples=20, seed=seed)


def generated(data, qualities):
    return {
        name: generated_detections(data.truth, quality, seed=n)
        for n, (name, quality) in enumerate(qualities.items())
    }


def made(data, seen, classes, **options):
    options = Options(**{"resamples": 5, **options})
    found = compute_detector_metrics(seen, data, classes, options)
    return build_comparison(found, [described(n) for n in seen], None, data, classes, options)


def outside(text: str) -> list[str]:
    """What a browser would fetch from elsewhere."""
    named = re.findall(r"""(?:src|href|action|data|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", text)
    named += re.findall(r"url\(([^)]*)\)", text) + re.findall(r"@import\s+(\S+)", text)
    links = re.findall(r"https?://[^\s\"'<]+", text)
    return [name for name in named if not name.startswith(("data:", "#"))] + links


@pytest.mark.parametrize("detectors", [1, 2, 3, 5])
def test_the_page_needs_nothing_else(detectors, tmp_path):
    found = compared(detectors)
    text = write_report(found, tmp_path).read_text()
    assert outside(text) == [] and summary_sentence(found) in text
    assert text.count("<details") == text.count("</details>") and "<svg" in text
    for name in (d.name for d in found.detectors):
        assert name in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_what_would_be_fetched_is_noticed():
    assert outside('<img src="x.png">') == ["x.png"]
    assert outside("a{background:url(y.png)}") == ["y.png"]
    assert "https://a.b/c" in outside('<a href="https://a.b/c">')


def test_300_classes_and_names_that_are_not_ascii():
    found = compared(2, images=20, classes=300)
    rows = re.findall(r"<tr><td>(class \d+)</td>", render(found))
    assert set(rows) == set(found.dataset["classes"])
    data = generated_data(6, 2)
    truth = dataclasses.replace(data.truth, classes=("чашка & <script>", "猫"))
    data = dataclasses.replace(data, truth=truth)
    text = render(made(data, generated(data, {"señal": 0.5, "b": 0.5}), [0, 1]))
    assert "чашка &amp; &lt;script&gt;" in text and "猫" in text and "señal" in text
    assert text.count("<script>") == 1


def test_pictures_are_inlined_and_one_that_is_gone_is_left_blank(tmp_path):
    found = compared(3)
    assert "image not found" in render(found) and "data:image/jpeg" not in render(found)
    for picture in found.objects.pictures:
        Image.new("RGB", (640, 640)).save(tmp_path / picture.file_name)
    here = [
        dataclasses.replace(p, file_name=f"{tmp_path}/{p.file_name}")
        for p in found.objects.pictures
    ]
    few = {
        name: getattr(found.objects, name)[:1]
        for name in ("won_objects", "lost_objects", "gallery")
    }
    objects = dataclasses.replace(found.objects, pictures=here, **few)
    text = render(dataclasses.replace(found, objects=objects))
    assert "image not found" not in text and outside(text) == []
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")).astype(int)
        for one in re.findall(r"data:image/jpeg;base64,([^\"']+)", text)
    ]
    assert len(pictures) == 2 + 2 + 4  # two tiles of two, ground truth and three detectors
    # What is won is found on the right alone, in green; what is lost on the left alone, in red.
    red, green = (
        [(p[..., c] > p[..., 1 - c] + 80).sum() > 50 for p in pictures[:4]] for c in (0, 1)
    )
    assert (red, green) == ([False, False, True, False], [False, True, False, False])
    finds = dict(re.findall(r"<figcaption>(\w+): finds (\d+)<", text))
    shown = objects.pictures[objects.gallery[0]]
    gained = int(finds["distilled"]) - int(finds["baseline"])
    assert gained == len(shown.won) - len(shown.lost) != 0


def test_without_objects_nothing_is_defined_and_the_page_says_so():
    data = generated_data(3, 2, objects=0)
    found = made(data, generated(data, {"a": 0.5, "b": 0.5}), [0, 1])
    assert "undefined" in summary_sentence(found) and "–" in render(found)


def test_what_is_won_is_found_by_one_and_not_by_the_other():
    data = generated_data(24, 4, objects=12)
    objects = made(data, generated(data, {"a": 0.5, "b": 0.5}), [0, 2]).objects
    for changes, finder, other in (
        (objects.won_objects, "b", "a"),
        (objects.lost_objects, "a", "b"),
    ):
        assert len({change.picture for change in changes}) == len(changes) > 1
        for change in changes:
            picture = objects.pictures[change.picture]
            truth, found = picture.truth[change.object], picture.detections[finder]
            assert truth["label"] in (0, 2) and not truth["crowd"]
            scores = [s["score"] for s in found if s["object"] == change.object]
            assert scores == [change.score] and change.score >= objects.thresholds[finder]
            assert change.object not in [s["object"] for s in picture.detections[other]]
    counted = ~data.truth.crowd & np.isin(data.truth.label, [0, 2])
    assert sum(row["objects"] for row in objects.found_by_counts) == counted.sum()
    drawn = [compared(2, seed=seed)["baseline"].intervals for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_charts_show_the_figures():
    found = compared(3, images=60, classes=60)
    page = render(found)
    of = {name: found[name].errors.cost for name in ("baseline", "distilled")}
    lines = re.findall(r'class="name">(\w+)</span>.*?class="value">([^<]*)</span>', page, re.S)
    shown = {kind: text for kind, text in lines if kind in ERROR_TYPES}
    assert shown == {k: f"{of['baseline'][k]:.1f} → {of['distilled'][k]:.1f}" for k in ERROR_TYPES}
    # Of many classes the chart has those whose AP changed most, from gain to loss.
    chart = page.split("with the largest changes</h3>")[1].split("<details")[0]
    gains = found.gain("distilled", "baseline").per_class
    gains = {name: one["gain"] for name, one in gains.items() if one["gain"] is not None}
    drawn = [gains.pop(name) for name in re.findall(r'class="name">([^<]*)<', chart)]
    assert len(drawn) == 24 and drawn == sorted(drawn, reverse=True) and len(gains) > 2
    assert min(map(abs, drawn)) >= max(map(abs, gains.values()))
    # Precision falls to the right.
    for line in re.findall(r'<polyline points="([^"]*)"', page):
        x, y = np.array([point.split(",") for point in line.split()], float).T
        assert (np.diff(x) > 0).all() and (np.diff(y) >= 0).all() and y[-1] > y[0]


def test_the_sentence_says_what_the_interval_allows():
    better = compared(3)
    gain = better.gain("distilled", "baseline")
    of = {d.name: d.accuracy.metrics["AP"] for d in better.detectors}
    share = (of["distilled"] - of["baseline"]) / (of["teacher"] - of["baseline"])
    assert f": {100 * share:.0f} % of the way to teacher" in summary_sentence(better)
    gain.metrics["AP"]["interval"] = [-0.1, 9.0]
    assert "contains 0" in summary_sentence(better) and "of the way" not in summary_sentence(better)


def test_a_detector_has_one_colour_and_the_featured_one_always_the_same():
    colors = detector_colors(compared(5))
    assert len(set(colors.values())) == 5
    assert colors["last"] == detector_colors(compared(3))["distilled"]
    assert len(set(detector_colors(compared(2)).values())) == 2


def test_a_track_has_room_for_zero_and_every_interval():
    gains = {"gain": 3.0, "interval": [-1.0, 5.0]}, {"gain": None, "interval": None}
    domain = ValueRange.around(list(gains))
    places = [domain.at(x) for x in (-1, 0, 3, 5)]
    assert places == sorted(places) and 0 < places[0] and places[-1] < 100
    assert 0 < ValueRange.around([]).at(0) < 100
