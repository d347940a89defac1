"""ICD's attention on pictures: it is the decoder's own, lies where its cells lie, and comes from a run's file."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from d2kd.data import coco_dataset
from d2kd.layers.queries import make_queries
from d2kd.losses import DistillLosses, ICDLoss, ImitationLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.testing import distiller
from d2kd.utils.errors import InputError
from d2kd.visualization import icd_attention
from d2kd.visualization.icd_attention import (
    HEAT,
    TILE,
    Attention,
    attention_panel,
    compute_attention,
    draw_attention,
    load_icd,
)
from d2kd.visualization.panels import STRIP

from .common import CLASSES, batch, build, tiny_faster_rcnn, tiny_retinanet
from .test_scales import two_scales
from .tiny_run import draw_data


def model_of(node=tiny_retinanet, **options):
    torch.manual_seed(0)
    return distiller(lambda: ICDLoss(**{"heads": 4, **options}), node)


def truth(boxes, size, classes=None):
    gt = Instances(size)
    gt.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    gt.gt_classes = torch.tensor(classes or [0] * len(boxes))
    return gt


@pytest.mark.parametrize(
    "node, options",
    [
        (tiny_retinanet, {}),
        (tiny_faster_rcnn, {}),
        (tiny_retinanet, {"query_positions": True, "normalize_keys": True}),
    ],
)
def test_it_is_what_the_distillation_is_weighted_by(node, options, monkeypatch):
    model = model_of(node, layers=2, jitter=0.0, negatives_per_instance=0, **options)
    [example] = batch(sizes=((40, 90),), objects=(3,))
    loss, gt = model.losses.by_name["loss"], example["instances"]
    found = compute_attention(loss, model.teacher, [example], gt)
    rows = sum(x.sum((-1, -2)) for x in found.levels.values())
    assert rows.shape == (3, 2 * 4)
    np.testing.assert_allclose(rows, 1, rtol=1e-5)
    layers, run = [], loss.run_decoder
    monkeypatch.setattr(loss, "run_decoder", lambda *args: layers.extend(run(*args)) or layers)
    with EventStorage(start_iter=1):
        model([example])
    summed = torch.cat([layer.decoded.attention[0] for layer in layers])
    flat = np.concatenate([x.sum(0).reshape(len(x[0]), -1) for x in found.levels.values()], axis=1)
    np.testing.assert_allclose(flat, summed.numpy(), rtol=1e-4, atol=1e-7)


def test_objects_are_in_pixels_of_the_resized_image():
    model, [example] = model_of(), batch(sizes=((64, 96),), objects=(1,))
    loss = model.losses.by_name["loss"]
    small, large = truth([[5, 8, 20, 16]], (32, 48)), truth([[10, 16, 40, 32]], (64, 96))
    one, other = (compute_attention(loss, model.teacher, [example], gt) for gt in (small, large))
    for level in one.levels:
        np.testing.assert_allclose(one.levels[level], other.levels[level], rtol=1e-5)
    assert small.gt_boxes.tensor.tolist() == [[5, 8, 20, 16]]  # left as it was


def test_even_attention_is_even_on_the_picture():
    model, [example] = model_of(), batch(sizes=((64, 64),), objects=(2,))
    loss = model.losses.by_name["loss"]
    for layer in loss.decoder:
        torch.nn.init.zeros_(layer.query.weight)
        torch.nn.init.zeros_(layer.query.bias)
    found = compute_attention(loss, model.teacher, [example], example["instances"])
    cells = {level: x.shape[-2] * x.shape[-1] for level, x in found.levels.items()}
    valid = {level: np.count_nonzero(x[0, 0]) for level, x in found.levels.items()}
    assert all(valid[level] <= cells[level] for level in cells)
    for level, share in found.level_fractions(1).items():
        assert share == pytest.approx(valid[level] / sum(valid.values()), rel=1e-5)
    assert np.ptp(found.upsample("p3", (32, 32))) < 1e-6


def test_cells_lie_where_they_lie():
    cells = np.zeros((1, 1, 4, 6), np.float32)
    cells[0, 0, 1, 2] = 1
    whole = Attention({"p3": cells}, (1.0, 1.0)).upsample("p3", (40, 60))[0, 0]
    assert whole[10:20, 20:30].all() and whole.sum() == 100
    # The lower half and the right third are padding: the image has two rows of four cells.
    padded = Attention({"p3": cells}, (2.0, 1.5)).upsample("p3", (40, 60))[0, 0]
    assert padded[20:40, 30:45].all() and padded.sum() == 20 * 15


def test_density_is_of_pixels_and_not_of_cells():
    fine, coarse = np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 2, 2))
    fine[0, 0, 0, 0], coarse[0, 0, 1, 1] = 0.25, 0.75
    found = Attention({"p3": fine, "p4": coarse}, (1.0, 1.0)).density((8, 8))[0, 0]
    assert found.mean() == pytest.approx(1)
    assert (found[:2, :2] == 0.25 * 16).all() and (found[4:, 4:] == 0.75 * 4).all()
    assert found.sum() == pytest.approx(4 * 4 + 16 * 3)


def test_how_much_is_in_a_box():
    fine, coarse = np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 2, 2))
    fine[:, 0, 0, 0], coarse[:, 0, 0, 1] = [0.25, 1], [0.75, 0]
    found = Attention({"p3": fine, "p4": coarse}, (1.0, 1.0))
    assert found.fraction_inside(np.array([0, 0, 1, 1])).tolist() == [[1], [1]]
    assert found.fraction_inside(np.array([0, 0, 0.25, 0.125])).tolist() == [[0.125], [0.5]]
    assert found.fraction_inside(np.array([0.25, 0, 0.75, 1])).tolist() == [[0.375], [0]]
    assert found.fraction_inside(np.array([0.9, 0.9, 0.9, 0.9])).tolist() == [[0], [0]]
    # Where half of the cells are padding, the image's right half is in the second quarter of the columns.
    padded = Attention({"p3": np.full((1, 1, 2, 4), 0.125)}, (1.0, 2.0))
    assert padded.fraction_inside(np.array([0.5, 0, 1, 1])).tolist() == [[0.25]]


def test_even_attention_is_in_a_box_by_chance():
    even = {"p3": np.full((1, 3, 5, 7), 1 / 70), "p4": np.full((1, 3, 1, 2), 1 / 4)}
    box = np.array([0.1, 0.3, 0.4, 0.9])
    np.testing.assert_allclose(Attention(even, (1.0, 1.0)).fraction_inside(box), 0.3 * 0.6)


def test_a_panel_shows_rows_and_levels():
    p3, p4 = np.full((2, 3, 4, 4), 0.01), np.full((2, 3, 2, 2), 0.01)
    p3[1, 2, 3, 0] = 0.5
    image = np.zeros((80, 80, 3), np.uint8)
    attention = Attention({"p3": p3, "p4": p4}, (1.0, 1.0))
    panel = attention_panel(image, attention.object_attention(1), np.array([0, 0, 8, 8]), "a thing")
    assert panel.shape == (STRIP + 4 * TILE, 3 * TILE, 3) and panel.dtype == np.uint8
    rows = panel[STRIP:].reshape(4, TILE, 3, TILE, 3).transpose(0, 2, 1, 3, 4)
    corner = (slice(TILE - TILE // 4 + 2, TILE - 2), slice(2, TILE // 4 - 2))
    assert (rows[3, 1][corner] == HEAT).all()  # the last head's brightest cell
    assert (rows[0, 1][corner] == HEAT).all()  # and so the mean's
    assert rows[3, 2][corner].max() < 10  # a fiftieth of that
    assert (rows[2, 1][corner] == HEAT).all() and (rows[2, 2][corner] == HEAT).all()  # all even
    assert (rows[3, 0][corner] == HEAT).all()


def saved_run(folder, **options):
    """A recipe's model node, and the checkpoint that its run would leave."""
    model = model_of(tiny_faster_rcnn, **options)
    loss = model.losses.by_name.pop("loss")
    model.losses.by_name["mine"] = loss
    state = {"model": model.student.state_dict(), "losses": model.losses.state_dict()}
    torch.save(state, folder / "run.pth")
    losses = L(DistillLosses)(mine=L(ICDLoss)(**{"heads": 4, **options}, priors="no such file"))
    node = L(Distiller)(losses=losses)
    return model, node, str(folder / "run.pth")


def test_the_loss_comes_back_from_a_runs_checkpoint(tmp_path):
    model, node, file = saved_run(tmp_path)
    loss = load_icd(node, build(tiny_faster_rcnn()), model.teacher, file)
    trained = model.losses.by_name["mine"].state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in loss.state_dict().items())
    node.losses.mine._target_ = "d2kd.losses.icd.ICDLoss"  # as a saved recipe says it
    load_icd(node, build(tiny_faster_rcnn()), model.teacher, file)


def test_a_teacher_of_larger_images(tmp_path, monkeypatch):
    """Its levels are those that were trained, and lie on the picture as they do for images of one size.

    The objects have the sizes in which the loss was trained with them, the student's.
    """
    model, node, file = saved_run(tmp_path)
    teacher, [full] = Teacher(model.teacher.detector, None, scale=2), batch(((64, 96),), (2,))
    loss = load_icd(node, build(tiny_faster_rcnn()), teacher, file)
    assert loss.levels == {f"p{k}": f"p{k + 1}" for k in (2, 3, 4)}
    [small] = two_scales([full])
    given = []

    def kept(gt, *args, **options):
        given.extend(gt)
        return make_queries(gt, *args, **options)

    monkeypatch.setattr(icd_attention, "make_queries", kept)
    found = compute_attention(loss, teacher, [small], full["instances"])
    assert given[0].image_size == small["image"].shape[1:] == (32, 48)
    boxes, halves = given[0].gt_boxes.tensor, full["instances"].gt_boxes.tensor / 2
    torch.testing.assert_close(boxes, halves, rtol=0, atol=1e-4)
    loss.levels = {match: match for match in loss.levels.values()}
    wanted = compute_attention(loss, model.teacher, [full], full["instances"])
    assert found.extent == wanted.extent
    for level, same in zip(found.levels, wanted.levels, strict=True):
        np.testing.assert_allclose(found.levels[level], wanted.levels[same], rtol=1e-5)


def test_a_teacher_of_images_half_again_as_large(tmp_path):
    """Its maps are read on the student's grid, as in training, and that grid covers the whole picture."""
    model, node, file = saved_run(tmp_path)
    teacher, [full] = Teacher(model.teacher.detector, None, scale=1.5), batch(((101, 77),), (2,))
    loss = load_icd(node, build(tiny_faster_rcnn()), teacher, file)
    [small] = two_scales([full], 1.5)
    height, width = small["image"].shape[1:]
    found = compute_attention(loss, teacher, [small], full["instances"])
    sides = [math.ceil(side / 16) * 16 for side in (height, width)]  # p4, the coarsest that matches
    assert found.extent == (sides[0] / height, sides[1] / width)
    for level, weights in found.levels.items():
        assert weights.shape[-2:] == tuple(side // loss.strides[level] for side in sides)
        rows, columns = (math.ceil(side / loss.strides[level]) for side in (height, width))
        assert (weights[..., :rows, :columns] > 0).all()
        assert weights[..., rows:, :].sum() == weights[..., columns:].sum() == 0
    assert found.level_fractions(0).keys() == {"p2", "p3", "p4"}
    assert sum(found.level_fractions(0).values()) == pytest.approx(1, abs=1e-5)


def draw(folder, number, *objects):
    draw_data(folder, objects=objects)
    name = coco_dataset(f"seen_{folder}", str(folder / "data.json"), str(folder))
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    model = model_of()
    loss = model.losses.by_name["loss"]
    return draw_attention(folder / "out", name, loss, model.teacher, mapper, number)


def test_pictures_of_images_with_objects(tmp_path):
    drawn = draw(tmp_path, 8, 0, 2, 5, 0)
    written = drawn.files
    boxes = json.loads((tmp_path / "data.json").read_text())["annotations"]
    share = [one["area"] / 64**2 for one in boxes]
    assert 0 < drawn.fraction_inside < 1
    assert drawn.by_chance == pytest.approx(sum(share) / len(share))
    assert [file.name for file in written] == ["01_1.png", "02_2.png"]
    height, width = STRIP + 5 * TILE, 6 * TILE  # four heads and their mean; five levels and all
    two, five = (np.asarray(Image.open(file)).shape[:2] for file in written)
    assert two == (height, 2 * width + 6) and five == (2 * height + 6, 3 * width + 12)
    [one] = draw(tmp_path / "one", 1, 0, 2, 5, 0).files
    assert one.name == "01_1.png"


def test_what_is_refused(tmp_path, refuses):
    model, node, file = saved_run(tmp_path)
    student, teacher, [example] = build(tiny_faster_rcnn()), model.teacher, batch(((64, 64),), (1,))
    torch.save({"model": student.state_dict()}, tmp_path / "plain.pth")

    def load(file="run.pth", **losses):
        losses = L(DistillLosses)(**losses) if losses else node.losses
        load_icd(L(Distiller)(losses=losses), student, teacher, file)

    refuses(lambda: load(it=L(ImitationLoss)()), "model.losses: no ICDLoss")
    refuses(lambda: load("plain.pth"), "plain.pth: no losses.mine; expected")
    refuses(lambda: load("gone.pth"), "gone.pth: no such file")
    refuses(
        lambda: load(mine=L(ICDLoss)(heads=4, layers=2)), "run.pth: .* missing .*all weights of"
    )
    gt = truth([[1, 1, 30, 30]], (64, 64), [CLASSES])
    loss = model.losses.by_name["mine"]
    refuses(lambda: compute_attention(loss, teacher, [example], gt), f"gt_classes: {CLASSES}")
    with pytest.raises(InputError, match="no annotated object"):
        draw(tmp_path, 2, 0, 0)
    assert not (tmp_path / "out").exists()
