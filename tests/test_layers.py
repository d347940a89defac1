"""Masks and adapters: values at chosen cells, overlaps, empty and odd input."""

import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.structures import ImageList

from d2kd.layers import masks
from d2kd.layers.adapter import FeatureAdapter, match_levels
from d2kd.layers.feature_rms import FeatureRMS
from d2kd.layers.masks import boxes_to_mask, pad_boxes
from d2kd.utils.errors import InputError


def box(*xyxy):
    return torch.tensor([xyxy], dtype=torch.float32)


def test_gaussian_values_at_centre_edge_corner_and_outside():
    # stride 2: cell centres at 1, 3, 5 …; the box from 1 to 9 has its centre at 5
    (mask,) = boxes_to_mask(pad_boxes([box(1, 1, 9, 9)]), (6, 6), 2)
    assert float(mask[2, 2]) == 1
    assert float(mask[2, 0]) == pytest.approx(math.exp(-0.5)) == pytest.approx(0.6065, abs=1e-4)
    assert float(mask[0, 0]) == pytest.approx(math.exp(-1.0)) == pytest.approx(0.3679, abs=1e-4)
    assert float(mask[5, 2]) == 0 and float(mask[2, 5]) == 0
    assert torch.equal(mask, mask.T)


def test_a_cell_is_inside_if_its_centre_is():
    (mask,) = boxes_to_mask(
        box(3, 0, 8, 4)[None], (2, 4), 4, "box"
    )  # centres x 2, 6, 10, 14; y 2, 6
    assert mask.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", ["gaussian", "box"])
def test_odd_boxes(kind):
    empty = torch.zeros(0, 4)
    boxes = pad_boxes([empty, box(5, 5, 5, 5), box(-50, -50, 500, 500)])
    found = boxes_to_mask(boxes, (3, 5), 4, kind)
    assert found.shape == (3, 3, 5) and torch.isfinite(found).all()
    assert found[0].sum() == 0 and found[1].sum() == 0 and (found[2] > 0).all()


@pytest.mark.parametrize("kind", ["gaussian", "box"])
@pytest.mark.parametrize("at_once", [1, 3 * 6 * 9 * 2, 2**24])
@pytest.mark.parametrize("counts", [(5, 0, 2), (0, 0, 0), (1, 1, 1)])
def test_a_batch_is_painted_as_each_object_alone(counts, at_once, kind, monkeypatch):
    monkeypatch.setattr(masks, "MAX_CELLS_PER_CHUNK", at_once)
    g = torch.Generator().manual_seed(0)
    corners = [torch.rand(count, 2, 2, generator=g) * 40 - 4 for count in counts]
    boxes = [torch.cat([x.amin(1), x.amax(1)], dim=1) for x in corners]
    found = boxes_to_mask(pad_boxes(boxes), (6, 9), 4, kind)
    expected = torch.zeros(3, 6, 9)
    for image, ours in enumerate(boxes):
        for one in ours:
            alone = boxes_to_mask(one[None, None], (6, 9), 4, kind)[0]
            expected[image] = torch.maximum(expected[image], alone)
    assert torch.equal(found, expected) and bool(found.any()) == any(counts)


def shapes(channels, levels=(3, 4, 5), shift=0, name="p{}"):
    return {name.format(n): ShapeSpec(channels=channels, stride=2 ** (n + shift)) for n in levels}


class Backbone(torch.nn.Module):
    """Nothing but shapes, with a top block for the last levels if one is given."""

    def __init__(self, shapes, top_block=None):
        super().__init__()
        self.shapes = shapes
        if top_block is not None:
            self.top_block = top_block

    def output_shape(self):
        return self.shapes


def matched(ours, theirs, wanted=None):
    return match_levels(Backbone(ours), Backbone(theirs), wanted)


def test_levels_match_by_name_else_by_stride():
    assert matched(shapes(4, (2, 3, 4)), shapes(8, (3, 4, 5))) == {"p3": "p3", "p4": "p4"}
    assert matched(shapes(4), shapes(8), ["p4"]) == {"p4": "p4"}
    other = shapes(8, (4, 5, 6), name="res{}")
    assert matched(shapes(4), other) == {"p4": "res4", "p5": "res5"}
    assert matched(shapes(4), other, ["p5"]) == {"p5": "res5"}


def test_pairs_may_have_any_strides():
    pairs = {"p3": "p2", "p5": "p3"}
    assert matched(shapes(4), shapes(8, (2, 3)), pairs) == pairs
    for wanted, line in (
        ({"p9": "p2"}, "the student's backbone has no 'p9'; expected of p3, p4, p5"),
        ({"p3": "p9"}, "the teacher's backbone has no 'p9'; expected of p2, p3"),
        ({}, "share none"),
    ):
        with pytest.raises(InputError, match=line):
            matched(shapes(4), shapes(8, (2, 3)) if wanted else shapes(8, (7,)), wanted)


def test_names_that_mean_other_strides():
    """They hinder neither the levels whose names agree nor a match by stride."""
    ours = shapes(4, (3, 4))
    theirs = ours | {"p4": ShapeSpec(channels=8, stride=32)}
    assert matched(ours, theirs) == matched(ours, theirs, ["p3"]) == {"p3": "p3"}
    assert matched(shapes(4), shapes(8, shift=1)) == {"p4": "p3", "p5": "p4"}
    ours = {"f0": ShapeSpec(channels=4, stride=8), "f1": ShapeSpec(channels=4, stride=16)}
    theirs = {f"f{k}": ShapeSpec(channels=4, stride=4 * 2**k) for k in range(3)}
    assert matched(ours, theirs) == {"f0": "f1", "f1": "f2"}


def test_levels_made_in_other_ways_on_top_are_left_out_unless_wanted():
    pooled = Backbone(shapes(4, (3, 4, 5, 6)), LastLevelMaxPool())
    convolved = Backbone(shapes(4, (3, 4, 5, 6, 7)), LastLevelP6P7(4, 4))
    assert list(match_levels(pooled, convolved)) == ["p3", "p4", "p5"]
    assert list(match_levels(convolved, convolved)) == ["p3", "p4", "p5", "p6", "p7"]
    assert list(match_levels(pooled, pooled)) == ["p3", "p4", "p5", "p6"]
    assert match_levels(pooled, convolved, ["p6"]) == {"p6": "p6"}


@pytest.mark.parametrize(
    "ours, theirs, wanted, line",
    [
        (
            shapes(4),
            shapes(4, (4, 5)),
            ["p3"],
            "the teacher's backbone has no 'p3'; expected of p4",
        ),
        (shapes(4), shapes(4, (6,)), None, r"student p3 \(stride 8\), .* share none"),
        (shapes(4), shapes(4, shift=1), ["p3"], "'p3' has stride 8 here and 16 there"),
        (shapes(4, (3,)), shapes(4, (3,), shift=1), None, "share none"),
        (shapes(4), shapes(4), [], "share none"),
    ],
)
def test_levels_that_cannot_be_matched(ours, theirs, wanted, line):
    with pytest.raises(InputError, match=line):
        matched(ours, theirs, wanted)


@pytest.mark.parametrize(
    "kind, channels, parameters",
    [("auto", 4, 0), ("auto", 8, 4 * 8 + 8), ("none", 4, 0), ("1x1", 4, 20), ("3x3", 4, 148)],
)
def test_adapter_kinds(kind, channels, parameters, caplog):
    caplog.set_level("INFO", logger="d2kd")
    adapter = FeatureAdapter(shapes(4), shapes(channels), {"p3": "p3"}, kind)
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    said = {0: "no adapter"}.get(parameters, f"{'3x3' if kind == '3x3' else '1x1'} adapter")
    assert f"teacher p3 ({channels} channels): {said}" in caplog.text
    # Maps are alike at their beginnings; what one has more at the end is padding.
    given, other = torch.rand(2, 4, 6, 7), torch.rand(2, channels, 5, 8)
    student, teacher = adapter(given, other, "p3")
    assert torch.equal(teacher, other[..., :7])
    assert torch.equal(student, adapter.convs["p3"](given)[..., :5, :])
    with pytest.raises(InputError, match="adapter: 5x5"):
        FeatureAdapter(shapes(4), shapes(4), {"p3": "p3"}, "5x5")


def outputs(*sizes, value=None):
    """Features of a teacher of images of these sizes, in one batch; those of the padding are large."""
    height, width = (max(side) for side in zip(*sizes))
    features = {}
    for stride in (4, 8):
        maps = torch.full(
            (len(sizes), 3, math.ceil(height / stride), math.ceil(width / stride)), 1e6
        )
        for k, (h, w) in enumerate(sizes):
            cells = maps[k, :, : math.ceil(h / stride), : math.ceil(w / stride)]
            cells.copy_(torch.randn(cells.shape) * stride if value is None else torch.tensor(value))
        features[f"p{stride}"] = maps
    return SimpleNamespace(
        features=features, images=ImageList(torch.zeros(len(sizes), 3, height, width), [*sizes])
    )


def test_the_rms_is_that_of_all_values_outside_the_padding():
    torch.manual_seed(0)
    rms = FeatureRMS(["p4", "p8"])
    parts = [outputs((32, 64), (24, 40)), outputs((64, 32))]
    rms.set_from(sum(rms.sums(part) for part in parts))
    for level in ("p4", "p8"):
        values = torch.cat([part.features[level].flatten() for part in parts])
        expected = values[values < 1e6].square().mean().sqrt()
        assert rms(level).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_rms_is_measured_once_and_kept():
    first, loaded = FeatureRMS(["p4", "p8"]), FeatureRMS(["p4", "p8"])
    first.measure_once(outputs((32, 32), value=2.0))
    first.measure_once(outputs((32, 32), value=5.0))
    loaded.load_state_dict(first.state_dict())
    loaded.measure_once(outputs((32, 32), value=5.0))
    assert [rms(level).item() for rms in (first, loaded) for level in ("p4", "p8")] == [2.0] * 4


def test_the_rms_of_another_teacher_is_named(caplog):
    for value, is_other in ((3.0, False), (50.0, True), (0.1, True)):
        loaded = FeatureRMS(["p4", "p8"])
        loaded.load_state_dict({"rms_p4": torch.tensor(2.0), "rms_p8": torch.tensor(2.0)})
        caplog.clear()
        for _ in range(2):
            loaded.measure_once(outputs((32, 32), value=value))
        assert caplog.text.count("another teacher's?") == 2 * is_other  # of two levels, once


def test_features_without_a_usable_rms(refuses, caplog):
    rms = FeatureRMS(["p4", "p8"])
    for value in (math.nan, math.inf):
        refuses(lambda: rms.measure_once(outputs((32, 32), value=value)), "features of p4.*finite")  # noqa: B023
    rms.measure_once(outputs((32, 32), value=0.0))
    assert rms("p4") == 1 and "features of p8 are 0" in caplog.text
