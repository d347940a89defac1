"""GFL: its formulas restated slowly, its anchors' labels, odd input, precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou_loss

from d2kd.config import add_d2kd_config, load
from d2kd.layers.focal_losses import distribution_focal_loss, quality_focal_loss
from d2kd.modeling import GFL, LinearP6P7
from d2kd.modeling.atss import atss_matches
from d2kd.modeling.box_regression import (
    Box2BoxTransformStride,
    generalized_iou_loss,
    integral,
)
from d2kd.testing import edge_case_batches, forward_losses, tiny_gfl
from d2kd.utils.errors import InputError

from .common import CLASSES, batch, build
from .parity.gfl_erd import detector


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Formulas


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.5])
def test_quality_focal_loss_restated(beta):
    logits = torch.randn(20, CLASSES, dtype=torch.float64) * 3
    quality = torch.rand(20, CLASSES, dtype=torch.float64) * (torch.rand(20, CLASSES) > 0.5)
    loss = quality_focal_loss(logits, quality, beta)
    for x, q, value in zip(logits.flatten(), quality.flatten(), loss.flatten()):
        p = 1 / (1 + math.exp(-x))
        expected = abs(q - p) ** beta * -(q * math.log(p) + (1 - q) * math.log(1 - p))
        assert value == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("bins", [2, 17])
def test_distribution_focal_loss_restated(bins):
    logits = torch.randn(30, 4, bins, dtype=torch.float64)
    distances = torch.rand(30, 4, dtype=torch.float64) * (bins + 2) - 1  # on both sides of 0 … n
    loss = distribution_focal_loss(logits, distances)
    for z, d, value in zip(logits.view(-1, bins), distances.flatten(), loss.flatten()):
        t = min(max(float(d), 0.0), bins - 1 - 0.1)
        j = int(t)
        entropy = [-math.log(float(p)) for p in z.softmax(0)]
        assert value == pytest.approx((j + 1 - t) * entropy[j] + (t - j) * entropy[j + 1])


def test_giou_loss_is_torchvisions():
    """Also of boxes that are apart, touch, or are empty; and the gradients."""
    corner = torch.rand(60, 2) * 20
    random = torch.cat([corner, corner + torch.rand(60, 2) * 20], 1)
    odd = torch.tensor([[0, 0, 5, 5], [5, 0, 9, 9], [5, 5, 9, 9], [2, 2, 2, 2], [7, 1, 7, 8]])
    rows = torch.cat([random, odd.float()])
    values, gradients = [], []
    for loss in (generalized_iou_loss, generalized_box_iou_loss):
        boxes = rows.repeat_interleave(len(rows), 0).requires_grad_()
        found = loss(boxes, rows.repeat(len(rows), 1))
        found.sum().backward()
        values.append(found)
        gradients.append(boxes.grad)
    assert torch.equal(*values) and torch.equal(*gradients)
    assert len(generalized_iou_loss(rows[:0], rows[:0])) == 0


def test_boxes_survive_their_distributions():
    """A box within 15.9 strides of its location is what the two whole distances around each edge mean."""
    stride, scale = 8, 8
    centers = torch.rand(50, 2) * 200
    distances = torch.rand(50, 4) * 15.9
    boxes = torch.cat([centers - distances[:, :2] * stride, centers + distances[:, 2:] * stride], 1)
    anchors = torch.cat([centers - scale * stride / 2, centers + scale * stride / 2], 1)
    coder = Box2BoxTransformStride(scale)
    found = coder.get_deltas(anchors, boxes)
    torch.testing.assert_close(found, distances, atol=1e-4, rtol=0)
    bins = torch.arange(17.0)
    probability = (1 - (found[..., None] - bins).abs()).clamp(min=0)
    again = coder.apply_deltas(integral(probability.clamp(min=1e-30).log()), anchors)
    torch.testing.assert_close(again, boxes, atol=1e-2, rtol=0)
    # FCOS's own transform, from boxes of one stride around the same centres.
    points = torch.cat([centers - stride / 2, centers + stride / 2], 1)
    fcos = Box2BoxTransformLinear(normalize_by_size=True).get_deltas(points, boxes)
    torch.testing.assert_close(found, fcos, atol=1e-4, rtol=1e-4)


# Labels


def grid(strides=(8, 16), side=64, scale=8):
    levels = []
    for stride in strides:
        n = math.ceil(side / stride)
        y, x = torch.meshgrid(*[torch.arange(n) * float(stride)] * 2, indexing="ij")
        centers = torch.stack([x, y], -1).view(-1, 2)
        half = scale * stride / 2
        levels.append(Boxes(torch.cat([centers - half, centers + half], 1)))
    return levels


def slow_atss(anchors, gt_boxes, topk):
    every, best = Boxes.cat(anchors), {}
    centers, overlaps = every.get_centers().tolist(), pairwise_iou(every, gt_boxes).T.double()
    for g, (gt, center) in enumerate(zip(gt_boxes.tensor.tolist(), gt_boxes.get_centers())):
        candidates, start = [], 0
        for level in anchors:
            rows = range(start, start + len(level))
            candidates += sorted(rows, key=lambda r: math.dist(centers[r], center.tolist()))[:topk]
            start += len(level)
        threshold = overlaps[g, candidates].mean() + overlaps[g, candidates].std()
        for r in candidates:
            x, y = centers[r]
            inside = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y) > 0.01
            overlap = overlaps[g, r]
            if inside and overlap >= threshold and overlap > best.get(r, (-1, None))[0]:
                best[r] = (overlap, g)
    return torch.tensor([best.get(r, (None, -1))[1] for r in range(len(every))])


@pytest.mark.parametrize("topk", [1, 9, 1000])
@pytest.mark.parametrize("count", [1, 2, 15])
def test_atss_restated(count, topk):
    anchors = grid(strides=(8, 16, 32, 64), side=96)
    for _ in range(5):
        corner = torch.rand(count, 2) * 80 - 10
        boxes = Boxes(torch.cat([corner, corner + 2 + torch.rand(count, 2) * 60], 1))
        matches = atss_matches(anchors, boxes, topk)
        assert torch.equal(matches, slow_atss(anchors, boxes, topk))


@pytest.mark.parametrize("inside, match", [(0.02, 0), (0.005, -1)])
def test_a_centre_on_the_border_of_an_object_is_not_in_it(inside, match):
    anchors = grid(strides=(16, 32), side=32, scale=1)
    # Only the last of the four anchors of 16 pixels overlaps it.
    matches = atss_matches(anchors, Boxes([[16 - inside, 8, 40, 24]]), topk=4)
    assert matches.tolist() == [-1, -1, -1, match, -1]


def test_atss_on_odd_objects():
    anchors = grid(strides=(8, 16, 32, 64))
    none = Boxes(torch.zeros(0, 4))
    assert (atss_matches(anchors, none) == -1).all()
    assert len(atss_matches([Boxes(torch.zeros(0, 4))], Boxes([[0.0, 0.0, 9.0, 9.0]]))) == 0
    for odd in ([-90.0, -90, -50, -50], [20.0, 20, 20, 20], [3.0, 3, 4, 4], [30.0, 0, 20, 9]):
        assert (atss_matches(anchors, Boxes([odd])) == -1).all(), odd
    usual = [10.0, 12.0, 40.0, 50.0]
    alone = atss_matches(anchors, Boxes([usual]))
    assert (alone == 0).any()
    beside = atss_matches(anchors, Boxes([[3.0, 3, 4, 4], usual, [-90.0, -90, -50, -50]]))
    assert torch.equal(beside, torch.where(alone == 0, 1, -1)), "an odd object took part"


@pytest.mark.parametrize("topk", [1, 4])
def test_the_recipe_sets_how_many_candidates_of_a_level_an_object_has(topk):
    gfl = with_options(topk_anchors=topk)
    anchors = gfl.anchor_generator([torch.zeros(1, 1, n, n) for n in (8, 4, 2, 1, 1)])
    objects = truths(objects=(2, 1))
    labels, _ = gfl.label_anchors(anchors, objects)
    for found, one in zip(labels, objects, strict=True):
        foreground = (0 <= found) & (found < CLASSES)
        expected, other = (slow_atss(anchors, one.gt_boxes, k) >= 0 for k in (topk, 5 - topk))
        assert torch.equal(foreground, expected) and not torch.equal(expected, other)


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers read, and tensors as large as their content says."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, indices = function.overloadpacket.__name__, ()
        if name in ("index", "index_put", "index_put_"):
            indices = [x for x in args[1] if x is not None]
        masks = any(x.dtype == torch.bool for x in indices)
        self.count += masks or name in ("nonzero", "_local_scalar_dense")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sixth", [2, 1], ids=["rounded up", "rounded down"])
@pytest.mark.parametrize("classes", [1, 4])
def test_images_are_labelled_together_as_alone(classes, sixth):
    """One without objects and one smaller than the others; nothing waits, unless a backbone rounds sizes down."""
    sizes, objects = [(64, 96), (96, 64), (33, 20), (96, 96)], [3, 0, 2, 1]
    truth = [x["instances"] for x in batch(sizes=sizes, objects=objects)]
    for one in truth:
        one.gt_classes %= classes
    gfl = build(tiny_gfl(classes=classes))
    anchors = gfl.anchor_generator([torch.zeros(1, 1, n, n) for n in (12, 6, 3, sixth, 1)])
    with Waits() as waits:
        labels, boxes = gfl.label_anchors(anchors, truth)
    assert sixth == 1 or not waits.count

    centers = Boxes.cat(anchors).get_centers()
    for one, label, box in zip(truth, labels, boxes, strict=True):
        # What lies beyond the image's own padding is ignored.
        height, width = (math.ceil(side / 32) * 32 for side in one.image_size)
        valid = (centers < torch.tensor([width, height])).all(dim=1)
        of_level = valid.split([len(level) for level in anchors])
        matches = atss_matches([a[v] for a, v in zip(anchors, of_level)], one.gt_boxes)
        expected = torch.cat([one.gt_classes, torch.tensor([classes])])[matches]
        assert torch.equal(label[valid], expected) and (label[~valid] == -1).all()
        assert torch.equal(box[valid][matches >= 0], one.gt_boxes.tensor[matches[matches >= 0]])
    assert any(((0 <= x) & (x < classes)).any() for x in labels) and (labels[0] == -1).any()


# Losses


def answers(images=2, classes=CLASSES, side=64, levels=("p3", "p4", "p5")):
    """A GFL without a network, and random answers of its head."""
    shapes = [(side // 2 ** int(level[1:]),) * 2 for level in levels]
    logits = [torch.randn(images, classes, *shape, requires_grad=True) for shape in shapes]
    edges = [torch.randn(images, 68, *shape, requires_grad=True) for shape in shapes]
    return detector(list(levels), classes, 16), logits, edges


def losses_of(gfl, logits, edges, truth):
    anchors = gfl.anchor_generator(logits)
    labels, boxes = gfl.label_anchors(anchors, truth)
    by_anchor = gfl._transpose_predictions([logits, edges])
    return gfl.losses(anchors, by_anchor[0], labels, by_anchor[1], boxes)


def truths(**options):
    return [x["instances"] for x in batch(sizes=((64, 64),) * 2, **options)]


def with_options(**options):
    """A small GFL whose recipe says so."""
    node = tiny_gfl()
    node.update(options)
    return build(node).train()


@pytest.mark.parametrize(
    "weight, term",
    [("cls_weight", "loss_cls"), ("box_weight", "loss_box_reg"), ("dfl_weight", "loss_dfl")],
)
def test_a_weight_is_that_of_its_own_term_alone(weight, term):
    once, twice = (forward_losses(with_options(**{weight: value}), batch()) for value in (0.5, 1.0))
    for name, value in once.items():
        assert value > 0 and torch.equal(twice[name], value * (2 if name == term else 1)), name


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_what_background_costs_under_another_exponent(beta):
    """With a score p, p^beta of its cross entropy; without objects nothing else costs."""
    gfl, logits = with_options(qfl_beta=beta), []
    gfl.head.register_forward_hook(lambda *args: logits.extend(args[-1][0]))
    losses = forward_losses(gfl, batch(sizes=((64, 64),) * 2, objects=(0, 0)))
    costs = sum((x.sigmoid() ** beta * F.softplus(x)).sum() for x in logits)
    torch.testing.assert_close(losses["loss_cls"], costs / 2)
    assert losses["loss_box_reg"] == losses["loss_dfl"] == 0


def test_ignored_anchors_give_nothing():
    gfl, logits, edges = answers()
    instances = truths(objects=(2, 0))
    small = Instances((64, 32))
    small.gt_boxes, small.gt_classes = instances[1].gt_boxes, instances[1].gt_classes
    losses = losses_of(gfl, logits, edges, [instances[0], small])
    sum(losses.values()).backward()
    for level, x in enumerate(logits):
        columns = 32 // 2 ** (level + 3)
        assert x.grad[1, :, :, :columns].abs().min() > 0
        assert not x.grad[1, :, :, columns:].any()


def test_an_answer_learns_from_its_own_term_alone():
    """A score is constant where it weighs a box, and a box where a score is to say how well it fits."""
    gfl, logits, edges = answers()
    losses = losses_of(gfl, logits, edges, truths(objects=(3, 2)))
    for name, value in losses.items():
        options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        learns = [
            any(x.any() for x in torch.autograd.grad(value, kind, **options))
            for kind in (logits, edges)
        ]
        assert learns == [name == "loss_cls", name != "loss_cls"], name


# The detector


@pytest.mark.parametrize("classes", [1, CLASSES])
@pytest.mark.parametrize("why", edge_case_batches())
def test_trains_and_detects_on_odd_input(why, classes):
    model = build(tiny_gfl(classes=classes)).train()
    examples = edge_case_batches(classes)[why]
    losses = forward_losses(model, examples)
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_dfl"]
    assert all(torch.isfinite(value) for value in losses.values()), losses
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    with torch.no_grad():
        model.head.cls_score.bias += 4
        found = model.eval()(examples)
    for example, answer in zip(examples, found, strict=True):
        boxes, scores = answer["instances"].pred_boxes, answer["instances"].scores
        assert 0 < len(boxes) <= 100 and boxes.nonempty().all()
        assert boxes.inside_box((example["height"], example["width"]), 1e-3).all()
        assert torch.equal(scores, scores.sort(descending=True).values) and scores.min() > 0.05


def test_losses_are_float32_inside_autocast():
    model = build(tiny_gfl()).train()
    exact = forward_losses(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = forward_losses(model, batch())
        _, edges = model.head([torch.randn(1, 16, 8, 8)] * 5)
    assert all(x.dtype == torch.float32 for x in edges)
    for name, value in losses.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.01)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_score_learns_how_well_the_box_fits():
    model = build(tiny_gfl(classes=2)).train()
    examples = batch(sizes=((64, 64),), objects=(1,), classes=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        sum(forward_losses(model, examples).values()).backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(examples)[0]["instances"]
    truth = examples[0]["instances"]
    assert found.pred_classes[0] == truth.gt_classes[0]
    iou = pairwise_iou(found.pred_boxes[:1], truth.gt_boxes).item()
    assert iou > 0.7 and abs(found.scores[0].item() - iou) < 0.2


# Configs


def test_last_levels_are_linear():
    block = LinearP6P7(4, 4)
    for conv in (block.p6, block.p7):
        torch.nn.init.zeros_(conv.bias)
    x = torch.randn(1, 4, 8, 8)
    for a, b in zip(block(-x), block(x), strict=True):
        torch.testing.assert_close(a, -b)
    assert block.in_feature == "p5"


def test_the_published_recipe():
    config = load("baselines/gfl_R_50_FPN_1x.py")
    loader, optimizer = config.dataloader, config.optimizer
    formats = {config.model.input_format, loader.train.mapper.image_format}
    assert formats | {loader.test.mapper.image_format} == {"RGB"}
    assert loader.train.mapper.augmentations[0].short_edge_length == 800
    assert config.train.init_checkpoint == "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    assert (optimizer.lr, loader.train.total_batch_size) == (0.01, 16)
    assert config.lr_multiplier.warmup_length * config.train.max_iter == 500
    scheduler = config.lr_multiplier.scheduler
    ends = [end * config.train.max_iter / scheduler.milestones[-1] for end in scheduler.milestones]
    assert ends == [60000, 80000, 90000]

    model = instantiate(config.model)
    bottom_up, top_block = model.backbone.bottom_up, model.backbone.top_block
    assert bottom_up.res3[0].conv1.stride == (1, 1) and bottom_up.res3[0].conv2.stride == (2, 2)
    frozen = {n for n, p in bottom_up.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(("stem", "res2")) for name in frozen)
    norms = {type(m) for m in bottom_up.modules() if "BatchNorm" in type(m).__name__}
    assert norms == {FrozenBatchNorm2d}
    assert isinstance(top_block, LinearP6P7) and top_block.p6.in_channels == 256
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert inference_options(model) == (0.05, 1000, 0.6, 100)
    optimizer.params.model = model
    groups = instantiate(optimizer).param_groups
    assert {group["weight_decay"] for group in groups} == {1e-4}

    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GFL"
    cfg.MODEL.BACKBONE.NAME = "build_gfl_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    gfl = cfg.MODEL.GFL
    gfl.NUM_OLD_CLASSES, gfl.NUM_GROUPS = 40, 16
    gfl.SCORE_THRESH_TEST, gfl.TOPK_CANDIDATES_TEST, gfl.NMS_THRESH_TEST = 0.1, 500, 0.5
    same = build_model(cfg)
    assert isinstance(same, GFL) and same.input_format == cfg.INPUT.FORMAT
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, same)]
    assert shapes[0] == shapes[1]
    assert (same.num_old_classes, same.head.cls_subnet[1].num_groups) == (40, 16)
    assert inference_options(same) == (0.1, 500, 0.5, 100)


def inference_options(gfl):
    tests = (gfl.test_score_thresh, gfl.test_topk_candidates, gfl.test_nms_thresh)
    return (*tests, gfl.max_detections_per_image)


def test_norms_of_which_scale_and_offset_learn():
    """As published; the statistics are nobody's, and stem and res2 stay as they are."""
    torch.manual_seed(0)
    bottom_up = instantiate(load("baselines/gfl_R_50_FPN_1x_affine.py").model.backbone.bottom_up)
    bottom_up.train()
    learning = {n for n, p in bottom_up.named_parameters() if p.requires_grad and ".norm." in n}
    assert learning and all(name.startswith(("res3", "res4", "res5")) for name in learning)
    before = {n: b.clone() for n, b in bottom_up.named_buffers()}
    sum(x.square().mean() for x in bottom_up(torch.randn(2, 3, 64, 64)).values()).backward()
    parameters = dict(bottom_up.named_parameters())
    assert all(parameters[name].grad is not None for name in learning)
    assert all(torch.equal(b, before[n]) for n, b in bottom_up.named_buffers())


def test_an_object_of_no_class_is_refused():
    """It would be learned as background, and without a word."""
    examples = batch()
    for wrong in (CLASSES, CLASSES + 2, -1):
        examples[0]["instances"].gt_classes[0] = wrong
        with pytest.raises(InputError, match=f"ground truth: an object of class {wrong}, which is"):
            forward_losses(build(tiny_gfl()).train(), examples)
