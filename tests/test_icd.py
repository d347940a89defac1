"""ICD: queries, decoder, distance and priors; which term trains which part, and when."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from d2kd.data import InstancePriors, coco_dataset, estimate_priors, incremental_split
from d2kd.layers import attention as attention_module
from d2kd.layers.attention import (
    CellPositions,
    InstanceDecoderLayer,
    sine_position_embedding,
    summed_attention,
)
from d2kd.layers.masks import valid_cells
from d2kd.layers.queries import make_descriptors, make_queries, num_queries, sample_negatives
from d2kd.losses import ICDLoss
from d2kd.losses import icd as icd_module
from d2kd.losses.icd import localization_loss, value_distance
from d2kd.testing import DETECTORS, check_loss, distiller
from d2kd.utils.errors import InputError
from d2kd.utils.io import write_json

from .common import CLASSES, batch, tiny_faster_rcnn, tiny_retinanet
from .parity import Arrays, compare
from .parity import icd as parity
from .parity.icd import sine_positions
from .tiny_run import draw_data

REFERENCE = str(Path(__file__).with_name("parity") / "icd.npz")


def icd(**options):
    return lambda: ICDLoss(**{"heads": 4, **options})


@pytest.mark.parametrize("family", DETECTORS)
def test_properties(family):
    check_loss(icd(), [family])


def test_properties_of_the_options():
    check_loss(icd(layers=2, weights="uniform", normalizer="instance"), ["retinanet"])
    check_loss(icd(weights="box"), ["faster_rcnn"])
    check_loss(icd(layers=2, query_positions=True, normalize_keys=True), ["retinanet"])


def test_a_second_layer_takes_the_queries_of_the_first(tmp_path, monkeypatch):
    """Other layers' losses are those of them alone on these queries, and distillation their mean."""
    reference, roll = Arrays(REFERENCE), re.compile(r"weight/(decoder|student_value_projection)/0")

    def outputs(name, arrays):
        np.savez(tmp_path / name, **{**reference, **arrays})
        return parity.outputs(Arrays(tmp_path / f"{name}.npz"))

    other = {name: np.roll(reference[name], 1, 0) for name in reference if roll.match(name)}
    both = outputs("both", {name.replace("/0", "/1"): value for name, value in other.items()})
    queries = both["layer0/decoded_queries"]
    trained = parity.trained

    def with_queries_given(arrays):
        loss = trained(arrays)
        loss.query_encoder = torch.nn.Identity()
        return loss

    monkeypatch.setattr(parity, "trained", with_queries_given)
    alone = outputs("alone", {**other, "descriptor": queries.detach().numpy()})
    for name, value in both.items():
        second = name.replace("layer1", "layer0")
        if name.startswith(("loss/distill", "student_feature_grad")):
            expected = (reference.tensor(name) + alone[name]) / 2
        else:
            expected = reference[name] if name == second else alone[second]
        assert compare(value, np.asarray(torch.as_tensor(expected).detach()))[2], name
    assert len(both) == 9 + 2 * 5


# The distance.


def random_values(heads=2, cells=30, d=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, heads, cells, d, generator=g), torch.rand(2, heads, cells, generator=g)


@pytest.mark.parametrize("normalizer", ["image", "instance"])
def test_distance_is_0_for_equals_4_for_opposites_and_two_between_strangers(normalizer):
    """Whatever the scale of values, and however many queries an object has."""
    (ours, theirs), weights = random_values(cells=4000)
    assert float(value_distance(ours, ours, weights, normalizer)) == 0
    opposite = float(value_distance(-theirs, theirs, weights, normalizer))
    assert opposite == pytest.approx(4, abs=1e-3)
    value = float(value_distance(ours, theirs, weights, normalizer))
    assert value == pytest.approx(2, abs=0.05)
    again = float(value_distance(10 * ours, theirs, 2 * weights, normalizer))
    assert again == pytest.approx(value, rel=1e-3)


# The decoder.


def layer_and_inputs(queries=6, cells=20, channels=8, heads=2, images=2):
    torch.manual_seed(0)
    layer = InstanceDecoderLayer(channels, heads)
    valid = torch.arange(cells)[None] < torch.tensor([cells, cells - 7])[:images, None]
    asked, read = (torch.randn(images, n, channels) for n in (queries, cells))
    places = (torch.randn(images, n, channels // 2) for n in (cells, 1))
    positions = CellPositions(*([x] for x in places))
    return layer, (asked, read, positions, valid), torch.rand(images, queries) < 0.5


def test_summed_attention_is_the_softmax_of_the_logits_in_any_chunk():
    layer, inputs, chosen = layer_and_inputs()
    attention = layer.logits(*inputs).softmax(-1)
    slow = torch.stack([a[:, c].sum(1) for a, c in zip(attention, chosen)])
    even = inputs[-1].sum(-1).log()
    entropies = torch.cat([
        torch.special.entr(a[:, c]).sum(-1).flatten() / e
        for a, c, e in zip(attention, chosen, even)
    ])  # fmt: skip
    for max_memory_mib in (1e-9, 64):
        decoded = layer(*inputs, chosen, max_memory_mib)
        torch.testing.assert_close(decoded.attention, slow)
        torch.testing.assert_close(decoded.entropy, entropies.mean())
        assert not decoded.attention.requires_grad
    assert layer(*inputs).attention is None
    everybody, one = torch.ones_like(chosen), torch.arange(chosen.shape[1]) == 4
    for wanted in (everybody, one.expand_as(chosen), everybody & torch.tensor([[True], [False]])):
        slow = torch.stack([a[:, c].sum(1) for a, c in zip(attention, wanted)])
        torch.testing.assert_close(layer(*inputs, wanted).attention, slow)
    nobody = layer(*inputs, torch.zeros_like(chosen))
    assert not nobody.attention.any() and nobody.entropy.isnan()


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor):
                # An expanded mask is large only to the eye.
                stored = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                self.bytes = max(self.bytes, stored)
        return result


def test_memory_is_bounded_forward_and_backward():
    def largest(max_memory_mib):
        layer, inputs, _ = layer_and_inputs(queries=160, cells=4096, images=1)
        with Largest() as mode:
            decoded = layer(*inputs, torch.arange(160)[None] < 120, max_memory_mib)
            decoded.queries.sum().backward()
        return mode.bytes

    assert largest(0.5) <= 2**19 < largest(64)  # all logits of two heads would take ten times that


@pytest.mark.parametrize("max_memory_mib", [1, 2, 4])
def test_no_more_of_the_attention_is_alive_at_once_than_allowed(max_memory_mib):
    query, key = torch.randn(1, 2, 90, 8), torch.randn(1, 2, 10000, 8)
    valid, chosen = torch.ones(1, 10000, dtype=torch.bool), torch.ones(1, 90, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True) as profiler:
        summed_attention(query, key, valid, chosen, max_memory_mib)
    changes = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    alive = np.cumsum([x.nbytes() for x in sorted(changes, key=lambda x: x.start_ns())])
    results = 3 * 2 * 10000 * 4  # the sum, what is added to it, and what was added before
    assert 0.7 * max_memory_mib * 2**20 < alive.max() - results <= max_memory_mib * 2**20


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="heads: 5; expected a divisor of 24 channels"):
        distiller(icd(heads=5), tiny_retinanet)
    with pytest.raises(InputError, match="heads: 0"):
        InstanceDecoderLayer(8, 0)


def test_valid_cells_of_all_levels_are_those_of_each():
    images, padded, sizes = [(1, 1), (33, 65), (64, 96)], (64, 96), [(8, 12), (2, 3), (1, 1)]
    for (h, w), valid in zip(sizes, valid_cells(images, padded, sizes), strict=True):
        stride = (64 / h + 96 / w) / 2
        for (height, width), found in zip(images, valid, strict=True):
            expected = torch.zeros(h, w, dtype=torch.bool)
            expected[: math.ceil(height / stride), : math.ceil(width / stride)] = True
            assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [8, 7])
def test_rows_and_columns_give_the_positions_of_all_cells(channels):
    torch.manual_seed(0)
    sizes, padded = [(1, 1), (33, 65), (64, 96)], (64, 96)
    valid = valid_cells(sizes, padded, [(8, 12), (2, 3), (1, 1)])
    linear = torch.nn.Linear(channels, 6)
    whole = linear(torch.cat([sine_positions(x, channels).flatten(1, 2) for x in valid], dim=1))
    found = CellPositions.from_masks(valid, channels).project(linear.weight, linear.bias)
    valid = torch.cat([x.flatten(1) for x in valid], dim=1)
    torch.testing.assert_close(found[valid], whole[valid])


@pytest.mark.parametrize("channels", [8, 7])
def test_points_are_embedded_as_cells_are(channels):
    cells = sine_positions(torch.ones(1, 4, 5, dtype=torch.bool), channels)[0]
    rows, columns = torch.meshgrid(torch.arange(1, 5) / 4, torch.arange(1, 6) / 5, indexing="ij")
    points = sine_position_embedding(torch.stack([columns, rows], dim=-1), channels)
    torch.testing.assert_close(points, cells, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_queries_with_positions_begin_by_looking_around_their_points(seed):
    torch.manual_seed(seed)
    valid = torch.ones(1, 6, 6, dtype=torch.bool)
    places, cells = sine_positions(valid, 16).flatten(1, 2), CellPositions.from_masks([valid], 16)
    nothing = torch.zeros_like(places)
    layer = InstanceDecoderLayer(16, 2, query_positions=True)
    [logits] = layer.logits(nothing, nothing, cells, valid.flatten(1), places)
    near = logits.diagonal(dim1=1, dim2=2)
    assert (near.mean(1) > logits.mean((1, 2))).all()
    torch.testing.assert_close(logits, logits.transpose(1, 2))
    without = layer.logits(nothing, nothing, cells, valid.flatten(1))
    assert float(without.std(2).max()) < float(logits.std(2).max()) / 2


@pytest.mark.parametrize("normalize", [False, True])
def test_normalized_keys_hide_the_scale_of_a_level_and_values_do_not(normalize):
    layer = InstanceDecoderLayer(8, 2, normalize_keys=normalize)
    _, (queries, cells, positions, valid), _ = layer_and_inputs()
    large = torch.cat([cells[:, :15], 100 * cells[:, 15:]], dim=1)
    one, other = (layer.logits(queries, x, positions, valid) for x in (cells, large))
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3) == normalize
    one, other = (layer(queries, x, positions, valid).values for x in (cells, large))
    torch.testing.assert_close(other[:, :, 15:], 100 * one[:, :, 15:])


# The queries.


def gt_of(examples):
    return [x["instances"] for x in examples]


PRIORS = InstancePriors.uniform(CLASSES)


def test_descriptors_are_the_published_ones_in_class_and_place():
    reference = Arrays(REFERENCE)
    used = ~reference["query_is_padding"]
    classes, centers = (reference.tensor(f"query_{x}") for x in ("classes", "centers"))
    found = make_descriptors(classes, centers, torch.ones_like(centers), len(PRIORS.frequency))
    expected = reference["descriptor"].transpose(1, 0, 2)[..., :-10]
    assert compare(found[..., :-10].numpy()[used], expected[used])[0] < 1e-5


@pytest.mark.parametrize(
    "side, bin", [(0, 0), (1, 0), (64, 0), (65, 1), (130, 2), (259, 3), (519, 4)]
)
def test_size_bins(side, bin):
    sides = torch.tensor([float(side), 1e9])
    found = make_descriptors(torch.tensor(0), torch.zeros(2), sides, 1)[-10:]
    assert found.nonzero().flatten().tolist() == [bin, 9]


@pytest.mark.parametrize(
    "objects, cap, count", [(0, 300, 1), (1, 300, 6), (40, 300, 240), (60, 300, 300), (130, 100, 130)]
)  # fmt: skip
def test_counts(objects, cap, count):
    assert num_queries(objects, 5.0, cap) == count
    assert num_queries(objects, 0.0, cap) == max(objects, 1)
    gt = gt_of(batch(objects=(objects, 0)))
    queries = make_queries(gt, PRIORS, max_queries=cap)
    assert queries.descriptors.shape == (2, count, CLASSES + 266)
    assert queries.is_used.sum(1).tolist() == [count, 1]
    assert queries.is_positive.sum(1).tolist() == [objects, 0]
    assert not queries.descriptors[1, 1:].any()


def test_images_get_the_same_queries_together_as_alone():
    """Sides are counted by each image's own size."""
    gt = gt_of(batch(objects=(3, 0))) + gt_of(batch(sizes=((300, 400), (64, 64)), objects=(4, 2)))
    generator = torch.Generator().manual_seed(0)
    alone = [make_queries([one], PRIORS, generator=generator) for one in gt]
    together = make_queries(gt, PRIORS, generator=generator.manual_seed(0))
    assert alone[2].descriptors[..., -9:-5].any()  # not all sides are in the first bin
    for name, value in vars(together).items():
        for found, expected in zip(value, (getattr(one, name)[0] for one in alone), strict=True):
            assert torch.equal(found[: len(expected)], expected)
            assert not found[len(expected) :].any()


def test_points_stay_inside_and_edges_are_the_box_s():
    gt = gt_of(batch(sizes=((300, 400), (48, 72)), objects=(30, 7)))
    queries = make_queries(gt, PRIORS)
    left, top, right, bottom = queries.edge_distances[queries.is_used].unbind(-1)
    for low, high in ((left, right), (top, bottom)):
        part = low / (low + high)
        assert part.min() > 0.199 and part.max() < 0.801 and part.std() > 0.1
    size, boxes = torch.tensor(gt[0].image_size).flip(0), gt[0].gt_boxes.tensor
    real = queries.is_positive[0]
    edges, centers = queries.edge_distances[0, real], queries.centers[0, real]
    sides = (edges[:, :2] + edges[:, 2:]) * size
    torch.testing.assert_close(sides, boxes[:, 2:] - boxes[:, :2])
    torch.testing.assert_close((centers - edges[:, :2]) * size, boxes[:, :2])
    expected = make_descriptors(gt[0].gt_classes, centers, sides, CLASSES)
    torch.testing.assert_close(queries.descriptors[0, real], expected)


def test_fakes_follow_the_priors():
    priors = InstancePriors([1.0, 0.0, 3.0], [[0.1, 0.3]] * 3, [[0.01, 0.01]] * 3)
    boxes, classes = sample_negatives(priors, 4000, torch.Generator().manual_seed(0))
    assert classes.bincount().tolist()[1] == 0
    assert float((classes == 2).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert boxes.min() >= 0 and boxes.max() <= 1
    inside = ((boxes > 0) & (boxes < 1)).all(1)
    sides = (boxes[:, 2:] - boxes[:, :2])[inside]
    torch.testing.assert_close(sides.mean(0), torch.tensor([0.1, 0.3]), atol=2e-3, rtol=0)
    assert sides[:, 0].min() >= 0.0799 and sides[:, 0].max() <= 0.1201
    assert torch.corrcoef(sides.T)[0, 1].abs() < 0.1
    assert 0.1 < inside.float().mean() < 1
    # Anywhere in the image, but for what is cut off: of even spread the deviation is a root of 12 of the range.
    centers = (boxes[:, :2] + boxes[:, 2:])[inside] / 2
    even = (1 - torch.tensor([0.1, 0.3])) / 12**0.5
    torch.testing.assert_close(centers.std(0), even, atol=0.02, rtol=0)


def test_a_class_that_the_student_does_not_have():
    examples = batch()
    examples[1]["instances"].gt_classes[0] = CLASSES
    with pytest.raises(InputError, match="gt_classes: 3; expected classes from 0 to 2"):
        step_at(distiller(icd(), tiny_retinanet), examples, 0.5)


# The priors.


def test_priors_of_a_data_set_restated_and_kept(tmp_path):
    draw_data(tmp_path)
    content = json.loads((tmp_path / "data.json").read_text())
    content["categories"].append({"id": 4, "name": "never seen"})
    content["annotations"][0]["iscrowd"] = 1
    for image in content["images"]:
        image["width"] = 128
    (tmp_path / "data.json").write_text(json.dumps(content))
    node = L(coco_dataset)(
        name=f"priors_{tmp_path}", json_file=str(tmp_path / "data.json"), image_root=str(tmp_path)
    )
    priors = estimate_priors(node)
    kept = [x for x in content["annotations"] if not x["iscrowd"]]
    sides = [[x["bbox"][2] / 128, x["bbox"][3] / 64] for x in kept]
    for k in range(4):
        own = [s for s, x in zip(sides, kept) if x["category_id"] == k + 1]
        assert float(priors.frequency[k]) == pytest.approx(len(own) / len(kept))
        torch.testing.assert_close(
            priors.mean[k], torch.tensor(own or sides).mean(0), atol=1e-6, rtol=0
        )
        spread = torch.tensor(own or sides).std(0, correction=0)
        torch.testing.assert_close(priors.std[k], spread, atol=1e-6, rtol=0)
    assert priors.frequency[3] == 0

    file = tmp_path / "priors.json"
    write_json(file, {"schema": 1, "rows": priors.rows()[::-1]})
    loaded = ICDLoss(priors=str(file)).priors
    assert all(torch.equal(getattr(priors, x), getattr(loaded, x)) for x in vars(priors))


def test_priors_of_data_that_know_their_classes_once_loaded(tmp_path):
    draw_data(tmp_path)
    name = f"stock_{tmp_path}"
    register_coco_instances(name, {}, str(tmp_path / "data.json"), str(tmp_path))
    assert estimate_priors(name).num_classes == 3


@pytest.mark.parametrize("step, classes", [(1, 1), (2, 3)])
def test_priors_of_a_step_are_of_the_classes_seen_so_far(tmp_path, step, classes):
    draw_data(tmp_path)
    name = coco_dataset(f"whole_{tmp_path}", str(tmp_path / "data.json"), str(tmp_path))
    priors = estimate_priors(incremental_split(name, "1+2", step))
    assert priors.num_classes == classes
    new = priors.frequency[-1 if step == 1 else 1 :]
    assert new.sum() == pytest.approx(1)


def test_priors_that_cannot_be(tmp_path):
    draw_data(tmp_path, objects=(0, 0))
    name = coco_dataset(f"empty_{tmp_path}", str(tmp_path / "data.json"), str(tmp_path))
    with pytest.raises(InputError, match="no annotated object"):
        estimate_priors(name)
    draw_data(tmp_path / "some")
    name = coco_dataset(f"some_{tmp_path}", str(tmp_path / "some/data.json"), str(tmp_path / "some"))  # fmt: skip
    with pytest.raises(InputError, match="an object of class . in .*classes from 0 to 0"):
        estimate_priors([name], num_classes=1)
    with pytest.raises(InputError, match="not registered"):
        estimate_priors("nowhere")
    with pytest.raises(InputError, match="priors: of 2 classes; expected 3"):
        distiller(icd(priors=InstancePriors.uniform(2)), tiny_retinanet)
    with pytest.raises(InputError, match="no such file"):
        ICDLoss(priors=str(tmp_path / "nowhere.json"))
    for frequency, line in (
        ([0.0, 0.0], "priors.frequency: 0 for every class; expected at least one that occurs"),
        ([float("nan"), 1.0], "priors.frequency: not finite or negative; expected numbers from 0"),
        ([-1.0, 2.0], "priors.frequency: not finite or negative"),
        ([1.0], r"priors.mean: shape \(2, 2\); expected a row for each class, width and height"),
    ):
        with pytest.raises(InputError, match=line):
            InstancePriors(frequency, [[0.1, 0.1]] * 2, [[0.0, 0.0]] * 2)
    row = PRIORS.rows()[0]
    for content, line in (
        ("[]", "TypeError: .*; expected JSON with .rows. of class, frequency, mean and std"),
        ("{", "JSONDecodeError: .*line 1 column 2"),
        (json.dumps({"rows": [row, row]}), "classes are not 0, 1, 2 … once each"),
        (json.dumps({"rows": []}), r"priors.mean: shape \(0,\); expected a row for each class"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=f"bad.json: .*{line}"):
            InstancePriors.load(str(tmp_path / "bad.json"))


# The loss in a step.


def step_at(model, examples, progress, max_iter=1000):
    model.max_iter = max_iter
    with EventStorage(start_iter=int(progress * max_iter)) as storage:
        losses = model(examples)
    return {key: value for key, value in losses.items() if "distill/" in key}, storage


def term(losses, name):
    return losses[f"distill/loss_loss_{name}"]


def touched(model, value):
    """Which parts of a distiller a term trains."""
    model.zero_grad()
    value.backward()
    loss = model.losses.by_name["loss"]
    parts = {
        "student features": model.student.backbone,
        "student head": model.student.head,
        "student values": loss.student_values,
        "decoder": loss.decoder,
        "encoder": loss.query_encoder,
        "auxiliary head": loss.auxiliary_head,
    }
    return {
        name
        for name, part in parts.items()
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }


def test_who_is_trained_by_what_and_when():
    model = distiller(icd(start=0.2, aux_warmup=0.3), tiny_retinanet)
    aux = {"decoder", "encoder", "auxiliary head"}
    for progress, expected in (
        (0.1, None),
        (0.4, {"student values"}),
        (0.5, {"student values", "student features"}),
        (1.0, {"student values", "student features"}),
    ):
        for name in ("identification", "localization"):
            losses, _ = step_at(model, batch(), progress)
            assert touched(model, term(losses, name)) == aux
        losses, _ = step_at(model, batch(), progress)
        if expected is None:
            assert "distill/loss_loss_distillation" not in losses
        else:
            assert touched(model, term(losses, "distillation")) == expected
    assert all(p.grad is None for p in model.teacher.detector.parameters())


@pytest.mark.parametrize("node, factor, cap", [(tiny_retinanet, 8, 300), (tiny_faster_rcnn, 3, 100)])  # fmt: skip
def test_lambda_is_the_family_s_and_the_auxiliary_weights_are_1(node, factor, cap):
    model = distiller(icd(), node)
    loss = model.losses.by_name["loss"]
    assert loss.max_queries == cap
    assert (loss.negatives_per_instance, loss.jitter, loss.aux_warmup) == (5, 0.3, 0)
    assert loss.distill_start == 1000 / 90000  # as published
    losses, storage = step_at(model, batch(), 0.5)
    values = {key: value for key, (value, _) in storage.latest().items()}
    distance = values[icd_module.DISTANCE]
    assert float(term(losses, "distillation").detach()) == pytest.approx(factor * distance)
    assert 0 < distance < 4 and 0 < values[icd_module.ENTROPY] <= 1.0001
    slots = 12 + 6  # of two objects and of one
    guess = -(3 / slots * math.log(3 / slots) + 15 / slots * math.log(15 / slots))
    for name, key, bound in (
        ("identification", icd_module.IDENTIFICATION, guess),
        ("localization", icd_module.LOCALIZATION, 0.6),
    ):
        assert float(term(losses, name).detach()) == pytest.approx(values[key] * bound, rel=1e-5)


def test_the_loss_passes_its_memory_on(monkeypatch):
    attended, taken = attention_module._attention_and_entropy, []

    def counted(query, key, valid):
        taken.append(query.shape[1])
        return attended(query, key, valid)

    monkeypatch.setattr(attention_module, "_attention_and_entropy", counted)
    for max_memory_mib, counts in ((64, [3, 1]), (1e-9, [1] * 4)):
        taken.clear()
        model = distiller(icd(max_attention_mib=max_memory_mib), tiny_retinanet)
        step_at(model, batch(objects=(3, 1)), 0.5)
        assert taken == counts


def test_images_without_objects():
    model = distiller(icd(), tiny_retinanet)
    losses, storage = step_at(model, batch(objects=(0, 0)), 0.5)
    assert float(term(losses, "distillation").detach()) == 0
    assert float(term(losses, "localization").detach()) == 0
    assert 0 < float(term(losses, "identification").detach()) < math.inf
    undefined = {icd_module.IDENTIFICATION, icd_module.LOCALIZATION, icd_module.ENTROPY}
    assert not undefined & set(storage.latest())


@pytest.mark.parametrize("normalizer", ["image", "instance"])
@pytest.mark.parametrize("weights", ["attention", "uniform", "box"])
def test_images_count_the_same_or_objects_do(weights, normalizer):
    """Whatever weighs the cells; an image without objects counts as 0, and there is no attention to tell of."""
    loss = icd(weights=weights, normalizer=normalizer, jitter=0.0)
    model = distiller(loss, tiny_retinanet)
    images = batch(sizes=((128, 128),) * 3, objects=(3, 1, 0))

    def distillation(*chosen):
        losses, storage = step_at(model, [images[i] for i in chosen], 0.5)
        objects = set(chosen) != {2}
        assert (icd_module.ENTROPY in storage.latest()) == (weights == "attention" and objects)
        return float(term(losses, "distillation").detach())

    three, one = distillation(0), distillation(1)
    assert three != pytest.approx(one, rel=1e-3) and distillation(2) == 0
    mean = (3 * three + one) / 4 if normalizer == "instance" else (three + one) / 2
    assert distillation(0, 1) == pytest.approx(mean, rel=1e-4)
    without = three if normalizer == "instance" else three / 2
    assert distillation(0, 2) == pytest.approx(without, rel=1e-4)


def test_box_weights_count_the_cells_in_boxes_alone():
    side = 128  # of one cell of the last level, whose centre is in the image so

    def distillation(weights, *box):
        torch.manual_seed(7)
        model = distiller(icd(weights=weights), tiny_retinanet)
        images = batch(sizes=((side, side), (side, side)), objects=(1, 1))
        for image in images:
            image["instances"].gt_boxes.tensor[:] = torch.tensor(box, dtype=torch.float32)
        return float(term(step_at(model, images, 0.5)[0], "distillation").detach())

    everywhere = distillation("uniform", 0, 0, side, side)
    assert distillation("box", 0, 0, side, side) == pytest.approx(everywhere, rel=1e-6) != 0
    assert distillation("box", 0, 0, side / 4, side) != pytest.approx(everywhere, rel=1e-3)
    assert distillation("uniform", 0, 0, side / 4, side) == pytest.approx(everywhere, rel=1e-6)
    assert distillation("box", 0.5, 0.5, 1.5, 1.5) == 0  # no cell's centre is there


def test_it_warns_once_where_the_decoder_has_not_learned(caplog):
    model = distiller(icd(start=0.5), tiny_retinanet)

    def warnings():
        return [x for x in caplog.records if "distillation begins" in x.message]

    step_at(model, batch(), 0.1)
    assert not warnings()
    for progress in (0.5, 0.6):
        step_at(model, batch(), progress)
        assert len(warnings()) == 1 and "increase aux_warmup" in caplog.text
    # one that continues after the start says nothing, nor does one that has learned
    resumed = distiller(icd(start=0.5), tiny_retinanet)
    resumed.losses.load_state_dict(model.losses.state_dict())
    step_at(resumed, batch(), 0.7)
    learned = distiller(icd(start=0.5), tiny_retinanet)
    for progress in (0.1, 0.5):
        learned.max_iter = 10
        with EventStorage(start_iter=int(progress * 10)) as storage:
            for _ in range(30):
                storage.put_scalar(icd_module.IDENTIFICATION, 0.5)
                storage.put_scalar(icd_module.LOCALIZATION, 0.5)
            learned(batch())
    assert len(warnings()) == 1


def test_a_run_repeats_and_leaves_the_other_generators_alone(monkeypatch):
    """Each process draws numbers of its own."""

    def values(seed, rank=0, steps=2):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        torch.manual_seed(7)
        model = distiller(icd(seed=seed), tiny_retinanet)
        model.requires_grad_(False)
        return [float(term(step_at(model, batch(), 0.5)[0], "localization")) for _ in range(steps)]

    one, again, other, beside = (values(*key) for key in ((1,), (1,), (2,), (1, 1)))
    assert one == again and one[0] != one[1]
    assert not set(one) & {*other, *beside}
    model = distiller(icd(), tiny_retinanet)
    loss = model.losses.by_name["loss"]
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    make_queries(gt_of(batch()), PRIORS, generator=loss.generator())
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == np.random.get_state()[1]).all()


def test_seed_and_count_of_draws_are_saved_as_numbers_and_restored():
    """The seed, too: one drawn anew, by the loss or by the recipe, is another in a resumed run."""
    model, other = (distiller(icd(seed=-1), tiny_retinanet) for _ in range(2))
    loss, restored = (x.losses.by_name["loss"] for x in (model, other))
    assert loss.seed != restored.seed
    drawn = [loss.generator().initial_seed() for _ in range(3)]
    state = model.losses.state_dict()
    assert state["by_name.loss._extra_state"].tolist() == [3, loss.seed]
    assert not other.losses.load_state_dict(state).missing_keys and restored.num_forwards == 3
    assert restored.generator().initial_seed() == loss.generator().initial_seed() not in drawn
    del state["by_name.loss._extra_state"]
    with pytest.raises(RuntimeError, match='Missing key.*"by_name.loss._extra_state"'):
        other.losses.load_state_dict(state)


@pytest.mark.parametrize(
    "options, line",
    [
        ({"weights": "attentive"}, "weights: attentive; expected attention or uniform or box"),
        ({"normalizer": "batch"}, "normalizer: batch"),
        ({"layers": 0}, "layers: 0"),
        ({"jitter": 0.5}, "jitter: 0.5"),
        ({"start": 1.0}, "start: 1.0"),
        ({"start": 0.5, "aux_warmup": 0.5}, "start: 0.5"),
        ({"max_queries": 0}, "max_queries: 0"),
        ({"negatives_per_instance": -1.0}, "negatives_per_instance: -1.0"),
    ],
)
def test_options_that_cannot_be(options, line):
    with pytest.raises(InputError, match=line):
        ICDLoss(**options)


def test_boxes_without_area_are_finite():
    logits, edges = torch.randn(1, 3, 4, requires_grad=True), torch.zeros(1, 3, 4)
    value = localization_loss(logits, edges, torch.tensor([[True, False, False]]))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()


def test_levels_of_two_widths_are_refused(refuses):
    levels = {"p3": ShapeSpec(channels=8), "p4": ShapeSpec(channels=9)}
    backbone = SimpleNamespace(output_shape=lambda: levels)
    line = "levels: the student's p3 has 8 channels, p4 has 9 channels; expected one width"
    refuses(lambda: icd_module._width("student", backbone, levels), line)
