"""The page: complete in itself, and whole whatever the detectors and classes are."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from d2kd.comparison.comparison import Options, analyse, assemble
from d2kd.report.page import Domain, colors_of, render, sentence, write_report

from .coco_size import described, generated_data
from .generated_detections import generated_detections


def compared(detectors=3, images=12, classes=4, qualities=(0.9, 0.1, 0.6, 0.3, 0.5), **changes):
    data = generated_data(images, classes, objects=4)
    names = ["teacher", "baseline", "distilled", "more", "last"][:detectors]
    seen = {
        name: generated_detections(data.truth, quality, seed=n)
        for n, (name, quality) in enumerate(zip(names, qualities))
    }
    options = Options(resamples=20)
    found = analyse(seen, data, range(classes), options)
    made = assemble(found, [described(n) for n in names], None, data, range(classes), options)
    return dataclasses.replace(made, **changes)


def outside(text: str) -> list[str]:
    """What a browser would fetch from elsewhere."""
    named = re.findall(r"""(?:src|href|action|data|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", text)
    named += re.findall(r"url\(([^)]*)\)", text) + re.findall(r"@import\s+(\S+)", text)
    return [name for name in named if not name.startswith(("data:", "#"))] + re.findall(
        r"https?://[^\s\"'<]+", text
    )


@pytest.mark.parametrize("detectors", [1, 2, 3, 5])
def test_the_page_needs_nothing_else(detectors, tmp_path):
    found = compared(detectors)
    text = write_report(found, tmp_path).read_text()
    assert outside(text) == [] and sentence(found) in text
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
    seen = {"señal": generated_detections(truth), "b": generated_detections(truth, seed=1)}
    options = Options(resamples=5)
    text = render(
        assemble(
            analyse(seen, data, [0, 1], options),
            [described(n) for n in seen],
            None,
            data,
            [0, 1],
            options,
        )
    )
    assert "чашка &amp; &lt;script&gt;" in text and "猫" in text and "señal" in text
    assert text.count("<script>") == 1


def test_pictures_are_inlined_and_one_that_is_gone_is_left_blank(tmp_path):
    found = compared(3)
    assert "image not found" in render(found) and "data:image/jpeg" not in render(found)
    random = np.random.default_rng(0)
    for picture in found.objects.pictures:
        pixels = random.integers(0, 256, (640, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / picture.file_name)
    there = [
        dataclasses.replace(p, file_name=str(tmp_path / p.file_name))
        for p in found.objects.pictures
    ]
    objects = dataclasses.replace(
        found.objects,
        pictures=there,
        won_objects=found.objects.won_objects[:1],
        lost_objects=[],
        gallery=found.objects.gallery[:1],
    )
    text = render(dataclasses.replace(found, objects=objects))
    assert "image not found" not in text and outside(text) == []
    assert text.count("data:image/jpeg") == 2 + 4  # a tile of two, ground truth and three detectors


def test_without_objects_nothing_is_defined_and_the_page_says_so():
    data = generated_data(3, 2, objects=0)
    seen = {n: generated_detections(data.truth, seed=i) for i, n in enumerate("ab")}
    options = Options(resamples=5)
    found = analyse(seen, data, [0, 1], options)
    made = assemble(found, [described(n) for n in seen], None, data, [0, 1], options)
    assert "undefined" in sentence(made) and "–" in render(made)


def test_the_sentence_says_what_the_interval_allows():
    better = compared(3)
    assert "of the way to teacher" in sentence(better)
    gain = better.gain("distilled", "baseline")
    gain.metrics["AP"]["interval"] = [-0.1, 9.0]
    assert "contains 0" in sentence(better) and "of the way" not in sentence(better)


def test_a_detector_has_one_colour_and_the_featured_one_always_the_same():
    colors = colors_of(compared(5))
    assert len(set(colors.values())) == 5
    assert colors["last"] == colors_of(compared(3))["distilled"]
    assert len(set(colors_of(compared(2)).values())) == 2


def test_a_track_has_room_for_zero_and_every_interval():
    domain = Domain.around(
        [{"gain": 3.0, "interval": [-1.0, 5.0]}, {"gain": None, "interval": None}]
    )
    places = [domain.at(x) for x in (-1, 0, 3, 5)]
    assert places == sorted(places) and 0 < places[0] and places[-1] < 100
    assert 0 < Domain.around([]).at(0) < 100
