"""Images without labels: how they are named and drawn, and what a step with them computes."""

import copy
import json
import math
from collections import Counter

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import LinearParamScheduler
from PIL import Image

from d2kd.config import with_defaults
from d2kd.data import (
    DownscaledStudentMapper,
    OpenCVDatasetMapper,
    build_train_loader,
    check_dataset,
    coco_dataset,
    image_folder,
    subset,
    training_records,
)
from d2kd.data.datasets import training_classes
from d2kd.data.loader import check_sample, images_used
from d2kd.doctor import diagnose
from d2kd.engine import Trainer
from d2kd.losses import (
    BCKDLoss,
    CrossKDLoss,
    CWDLoss,
    DistillLoss,
    DistillLosses,
    DISTLoss,
    DKDLoss,
    ERDLoss,
    FGDLoss,
    ICDLoss,
    ImitationLoss,
    LDLoss,
    LwFLoss,
    MGDLoss,
    PGDLoss,
    PKDLoss,
    ReviewKDLoss,
    TARLoss,
)
from d2kd.losses.dense import labels_of
from d2kd.modeling import Distiller, Teacher
from d2kd.modeling.outputs import OutputNotAvailable
from d2kd.testing import DETECTORS, check_loss, forward_losses
from d2kd.testing import distiller as tiny_distiller
from d2kd.utils.io import read_metrics

from .common import batch, build, tiny_faster_rcnn, tiny_fcos, tiny_retinanet
from .tiny_run import distiller, draw_data, recipe, without_evaluation
from .two_processes import in_two

# Data sets


@pytest.fixture
def folder(tmp_path):
    """Photographs in folders, one of them turned by its orientation; and another file."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "wide.jpg")
    Image.new("RGB", (20, 50)).save(root / "more" / "tall.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (44, 33)).save(root / "turned.jpg", exif=exif)
    (root / "notes.txt").write_text("of no use")
    return root


def test_a_folder_of_images_is_a_data_set(folder, monkeypatch):
    monkeypatch.setenv("PHOTOS", str(folder))
    assert image_folder("photos", "$PHOTOS") == image_folder("photos", str(folder)) == "photos"
    assert check_dataset(["photos"]) == ["photos"]
    records = DatasetCatalog.get("photos")
    sizes = [(r["file_name"][len(str(folder)) + 1 :], r["width"], r["height"]) for r in records]
    assert sizes == [("more/tall.PNG", 20, 50), ("turned.jpg", 33, 44), ("wide.jpg", 40, 30)]
    assert all(r["unlabelled"] and "annotations" not in r for r in records)
    assert len({r["image_id"] for r in records}) == 3
    assert len(training_records("photos")) == 3  # filter_empty leaves out only labelled images
    part = subset("photos", 2)
    assert check_dataset(part) and [r["unlabelled"] for r in training_records(part)] == [True] * 2


@pytest.mark.parametrize("content", ["whole", "images alone"])
def test_a_coco_file_whose_annotations_are_not_used(tmp_path, content):
    draw_data(tmp_path, (1, 0, 2))
    file = tmp_path / "data.json"
    if (
        content == "images alone"
    ):  # as in COCO's files of unlabelled images, with numbers of a table
        images = json.loads(file.read_text())["images"]
        file.write_text(json.dumps({"images": [{**one, "width": 64.0} for one in images]}))
    for _ in range(2):
        assert coco_dataset("bare", str(file), str(tmp_path), unlabelled=True) == "bare"
    assert check_dataset("bare") == ["bare"]
    records = training_records("bare")
    assert [r["image_id"] for r in records] == [0, 1, 2]
    assert all(r["unlabelled"] and "annotations" not in r for r in records)
    assert MetadataCatalog.get("bare").get("thing_classes") is None


def test_classes_are_those_of_labelled_data(tmp_path):
    draw_data(tmp_path / "data")
    config = recipe(tmp_path / "data", tmp_path / "run")
    names = config.dataloader.train.dataset
    names.names = [L(image_folder)(name="first", root=str(tmp_path / "data")), names.names]
    assert training_classes(config) == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    "act, line",
    [
        (lambda: image_folder("x", "none"), "none: no such folder; expected a folder of images"),
        (lambda: image_folder("x", "empty"), r"empty: no image; expected at least one, \*.bmp"),
        (lambda: image_folder("x", "$NOWHERE_1"), "NOWHERE_1: not set; expected the folder of x"),
        (
            lambda: (image_folder("x", "photos"), image_folder("x", "photos/more")),
            "data set 'x': already registered as images in photos; expected a name not yet taken",
        ),
        (
            lambda: (image_folder("y", "bad"), DatasetCatalog.get("y")),
            "bad/a.png: cannot be decoded .*; expected a readable image",
        ),
        (lambda: coco_dataset("x", "a.json", "none", unlabelled=True), "none: no such folder"),
        (lambda: coco_dataset("x", "a.json", "photos", unlabelled=True), "a.json: no such file"),
        (lambda: coco_dataset("x", "0.json", "photos", unlabelled=True), "0.json: no images;"),
        (
            lambda: coco_dataset("x", "1.json", "photos", unlabelled=True),
            "photos/gone.png: missing; expected every image that 1.json names",
        ),
        (
            lambda: coco_dataset("x", "2.json", "photos", unlabelled=True),
            "2.json: no list 'images'; its keys are 'annotations'; expected the lists images",
        ),
    ],
)
def test_odd_unlabelled_data(refuses, folder, tmp_path, act, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    image = {"id": 1, "file_name": "gone.png", "width": 6, "height": 6}
    for number, content in enumerate(({"images": []}, {"images": [image]}, {"annotations": []})):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    refuses(act, line)


def test_files_are_checked_again(folder, refuses):
    image_folder("photos", str(folder))
    for file in folder.rglob("*.*g"):
        file.unlink()
    (folder / "more" / "tall.PNG").unlink()
    refuses(lambda: check_dataset("photos"), "photos: no image; expected at least one")


# Batches


class Probe:
    """A mapper that reports what it was given and drew, and drops all else."""

    def __call__(self, record):
        return {"index": record["index"], "draw": torch.rand(()).item()}


SETS = {"labelled": (4, False), "photos": (6, True), "more photos": (5, True)}


def loader(sets=("labelled", "photos", "more photos"), start=0, **options):
    names = [name for name in sets for _ in range(SETS[name][0])]
    records = [
        {"index": i, "width": 2 + i % 3, "height": 3, "dataset_name": name}
        | ({"unlabelled": True} if SETS[name][1] else {})
        for i, name in enumerate(names)
    ]
    options = {"mapper": Probe(), "total_batch_size": 4, "seed": 1, **options}
    return build_train_loader(records, start=start, **options)


def take(number, **options):
    return [b for b, _ in zip(loader(**options), range(number))]


def kinds(batches):
    """Of each batch, whether it is unlabelled."""
    found = [{one.get("unlabelled", False) for one in b} for b in batches]
    assert all(len(kind) == 1 for kind in found)
    return [kind.pop() for kind in found]


@pytest.mark.parametrize(
    "ratio, expected",
    [
        ([1, 1, 0.0001], 0.5),
        ([3, 0.5, 0.5], 0.25),
        ([1, 3, 2], 5 / 6),
        ([0.1, 0.1, 0.1], 2 / 3),
        (None, 11 / 15),  # as many as images
    ],
)
def test_both_kinds_alternate_evenly(ratio, expected):
    found = kinds(take(120, ratio=ratio))
    assert not found[0]
    for end in range(1, 121):
        assert abs(sum(found[:end]) - expected * end) <= 1


@pytest.mark.parametrize("grouping", [False, True])
def test_labelled_batches_are_those_without_unlabelled_images(grouping):
    options = {"aspect_ratio_grouping": grouping}
    mixed = take(60, ratio=[2, 2, 1], **options)
    labelled = [b for b, kind in zip(mixed, kinds(mixed)) if not kind]
    assert labelled == take(len(labelled), sets=("labelled",), **options)
    draws = Counter(one["draw"] for b in mixed for one in b)
    assert max(draws.values()) == 1  # no positions in common
    photos = Counter(one["index"] for b, kind in zip(mixed, kinds(mixed)) if kind for one in b)
    of_photos = sum(count for index, count in photos.items() if index < 10)
    assert of_photos / photos.total() == pytest.approx(2 / 3, abs=0.06)


def test_a_mixed_stream_depends_on_seed_and_position_alone(monkeypatch):
    options = {"ratio": [3, 1, 1]}
    expected = take(30, **options)
    assert take(30, num_workers=2, **options) == expected != take(30, seed=2, **options)
    for start in (1, 8, 17):
        assert take(5, start=start, **options) == expected[start : start + 5]
    counted = images_used(loader(**options), 30)
    sets = Counter(
        "labelled" if one["index"] < 4 else "photos" if one["index"] < 10 else "more photos"
        for b in expected
        for one in b
    )
    assert counted == sets
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(take(30, **options))
    assert kinds(shares[0]) == kinds(shares[1]) == kinds(expected)


def test_a_mapper_that_passes_an_image_over_gets_one_of_the_same_kind():
    def only_labelled(record):
        return None if record["index"] == 3 or record["index"] > 4 else {"index": record["index"]}

    for b in take(20, mapper=only_labelled, ratio=[1, 1, 1]):
        kind = b[0].get("unlabelled", False)
        assert {one["index"] for one in b} <= ({4} if kind else {0, 1, 2})


@pytest.mark.parametrize("kind", ["Detectron2's", "OpenCV", "two sizes"])
def test_mappers_read_images_without_annotations(folder, kind):
    options = {"is_train": True, "augmentations": [T.Resize((32, 48))], "image_format": "BGR"}
    mapper = (OpenCVDatasetMapper if kind == "OpenCV" else DatasetMapper)(**options)
    if kind == "two sizes":
        mapper = DownscaledStudentMapper(mapper, 2)
    image_folder("photos", str(folder))
    photos = build_train_loader(training_records("photos"), mapper=mapper, total_batch_size=2)
    check_sample(photos, "dataloader.train", num_classes=3)
    for one in next(iter(photos)):
        assert one["unlabelled"] and "instances" not in one
        assert one["image"].shape == ((3, 16, 24) if kind == "two sizes" else (3, 32, 48))


def test_a_mapper_that_needs_annotations_is_named_before_training(refuses):
    def needs(record):
        record["annotations"] if record.get("unlabelled") else None
        return batch()[0]

    line = "train.mapper: fails .KeyError: 'annotations'.; expected a function from a dataset dict"
    refuses(lambda: check_sample(loader(mapper=needs), "train", num_classes=3), line)


# Steps


def unlabelled(**options):
    """Its ground truth must not be read."""
    return [{**x, "unlabelled": True} for x in batch(**options)]


def model_of(node, **losses):
    student, teacher = build(node()), build(node(width=6, channels=24), seed=1)
    return Distiller(
        student=student, teacher=Teacher(teacher, None), losses=DistillLosses(**losses), max_iter=9
    ).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


FAMILIES = {
    "faster_rcnn": lambda: DKDLoss(),
    "mask_rcnn": lambda: PKDLoss(),
    "cascade_rcnn": lambda: TARLoss(),
    "retinanet": lambda: TARLoss(),
    "fcos": lambda: CrossKDLoss(),
    "gfl": lambda: BCKDLoss(),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_the_distillation_losses_alone(family):
    """Its gradients are those of these losses, and the student's state is as before but for what any forward moves."""
    model = model_of(DETECTORS[family], it=FAMILIES[family]())
    sum(forward_losses(model, batch()).values()).backward()  # has a loss normalizer now
    model.zero_grad()
    before = copy.deepcopy(model.student.state_dict())
    attributes = {k: v for k, v in vars(model.student).items() if isinstance(v, float | int)}
    torch.manual_seed(0)
    with EventStorage(start_iter=1) as storage:
        losses = model(unlabelled())
        logged = set(storage.histories())
    assert losses and all(key.startswith("distill/") for key in losses)
    assert all(name.startswith("distill/") for name in logged)
    sum(losses.values()).backward()
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert 0 < sum(float(g.norm()) for g in found.values()) < math.inf
    after = model.student.state_dict()
    assert all(value.equal(after[key]) for key, value in before.items())
    now = {k: v for k, v in vars(model.student).items() if isinstance(v, float | int)}
    assert now == attributes

    # Restated: a labelled step of images without objects, whose own losses are left out.
    outputs = []
    seen = model.losses.forward
    model.losses.forward = lambda s, t, **more: outputs.append((s, t)) or seen(s, t, **more)
    model.zero_grad()
    none = [{**x, "instances": x["instances"][:0]} for x in batch()]
    empty = forward_losses(model, none)
    (student, teacher) = outputs[0]
    student.is_labelled = teacher.is_labelled = False
    for regions in vars(student).get("regions", ()):
        regions.gt_classes = regions.gt_boxes = None
    with EventStorage(start_iter=1):
        again = seen(student, teacher, progress=1 / 9)
    assert any(not key.startswith("distill/") for key in empty)
    assert {k: v.item() for k, v in again.items()} == {k: v.item() for k, v in losses.items()}
    sum(again.values()).backward()
    expected = gradients(model)
    assert expected.keys() == found.keys()
    assert all(g.equal(found[name]) for name, g in expected.items())


def test_a_labelled_step_is_what_it_was(tmp_path):
    """Also after an unlabelled one, of a student that draws no random numbers."""
    first = model_of(tiny_retinanet, it=TARLoss())
    second = copy.deepcopy(first)
    forward_losses(second, unlabelled())
    for name, value in forward_losses(first, batch()).items():
        assert value.equal(forward_losses(copy.deepcopy(second), batch())[name]), name
    assert not hasattr(second.student, "loss_normalizer")  # an unlabelled batch has made none


def test_batch_norms_see_unlabelled_images():
    def node(**options):
        found = tiny_retinanet(**options)
        found.backbone.bottom_up.norm = "BN"
        return found

    model = model_of(node, it=PKDLoss())
    before = copy.deepcopy(model.student.state_dict())
    forward_losses(model, unlabelled())
    moved = [k for k, v in model.student.state_dict().items() if not v.equal(before[k])]
    assert moved and all("running_" in k or "num_batches_tracked" in k for k in moved)


def test_all_weights_zero():
    """A step in which no loss has a weight still has a gradient, of 0, for every parameter."""
    for losses in ({"it": PKDLoss(weight=0.0)}, {"it": LwFLoss(weight=0.0)}, {}):
        model = model_of(tiny_retinanet, **losses)
        losses = forward_losses(model, unlabelled())
        assert {key: value.item() for key, value in losses.items()} in (
            {"distill/loss_it": 0.0},
            {"distill/loss": 0.0},
        )
        sum(losses.values()).backward()
        found = gradients(model)
        assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(g.any() for g in found.values())


SERVED = {
    "whole map": (lambda: ImitationLoss(mask="none"), tiny_retinanet),
    "pkd": (PKDLoss, tiny_retinanet),
    "cwd": (CWDLoss, tiny_retinanet),
    "mgd": (MGDLoss, tiny_retinanet),
    "reviewkd": (ReviewKDLoss, tiny_retinanet),
    "dkd": (DKDLoss, tiny_faster_rcnn),
    "dist": (DISTLoss, tiny_retinanet),
    "crosskd": (CrossKDLoss, tiny_retinanet),
    "bckd": (BCKDLoss, tiny_retinanet),
    "lwf": (LwFLoss, tiny_retinanet),
    "erd": (ERDLoss, DETECTORS["gfl"]),
    "tar": (TARLoss, tiny_retinanet),
    "tar, features": (
        lambda: TARLoss(classification_weight=0, mask="none"),
        tiny_retinanet,
    ),
}
REFUSED = {
    "box": (ImitationLoss, tiny_retinanet),
    "icd": (ICDLoss, tiny_retinanet),
    "fgd": (FGDLoss, tiny_retinanet),
    "pgd": (PGDLoss, tiny_retinanet),
    "ld": (LDLoss, DETECTORS["gfl"]),
    "tar without classes": (lambda: TARLoss(classification_weight=0), tiny_retinanet),
}


@pytest.mark.parametrize("name", SERVED)
def test_methods_that_need_no_ground_truth(name):
    make, node = SERVED[name]
    model = tiny_distiller(make, node)
    model.losses.check_unlabelled()
    losses = forward_losses(model, unlabelled())
    assert losses and all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert 0 < sum(float(p.grad.norm()) for p in model.student.parameters() if p.requires_grad)
    assert all(value.isfinite() for value in forward_losses(model, batch()).values())


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_objects(name, refuses):
    make, node = REFUSED[name]
    model = tiny_distiller(make, node)
    line = "losses.loss: .*Loss, which needs ground truth, and unlabelled images; expected a loss"
    refuses(model.losses.check_unlabelled, line)
    refuses(lambda: forward_losses(model, unlabelled()), line)
    model.losses.by_name["loss"].weight = 0.0  # it is never called
    forward_losses(model, unlabelled())


def test_tar_has_its_class_term_without_gates():
    """The teacher's top class takes the place of the label: of regions the background included."""
    for node in (tiny_faster_rcnn, tiny_retinanet):
        values = {}
        for gate in ("better", "none"):
            model = model_of(node, it=TARLoss(cls_gate=gate, background_weight=0.5, weight=1.0))
            losses = forward_losses(model, unlabelled())
            assert losses.keys() == {"distill/loss_it_classification"}
            values[gate] = losses["distill/loss_it_classification"].item()
        assert values["better"] == values["none"] > 0


def test_labels_of_a_teacher():
    logits = torch.tensor([[2.0, 1.0, -1.0], [-0.1, -3.0, -2.0], [-1.0, -1.0, 0.1]])
    assert labels_of(logits).tolist() == [0, 3, 2]


class Reads(DistillLoss):
    """A loss that says that it needs no ground truth, and reads this."""

    needs_ground_truth = False

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, student, teacher):
        for outputs in (student, teacher):
            assert not outputs.is_labelled
            with pytest.raises(OutputNotAvailable, match="unlabelled images have no ground truth"):
                getattr(outputs, self.name)
        getattr(student, self.name)


@pytest.mark.parametrize(
    "node, name",
    [
        (tiny_faster_rcnn, "gt_instances"),
        (tiny_faster_rcnn, "input_instances"),
        (tiny_retinanet, "gt_instances"),
        (tiny_retinanet, "gt_labels"),
        (tiny_fcos, "matched_gt_boxes"),
    ],
)
def test_ground_truth_is_not_there_to_be_read(node, name, refuses):
    model = model_of(node, it=Reads(name))
    line = "losses.it: unlabelled images have no ground truth; expected"
    refuses(lambda: forward_losses(model, unlabelled()), line)


def test_check_loss_meets_unlabelled_images():
    class Secretly(PKDLoss):
        def forward(self, student, teacher):
            assert student.gt_instances
            return super().forward(student, teacher)

    class Own(PKDLoss):
        def forward(self, student, teacher):
            return super().forward(student, teacher) * student.is_labelled

    for kind, fault in ((Secretly, "it reads ground truth"), (Own, "the student's gradient has")):
        with pytest.raises(AssertionError, match=f"retinanet: unlabelled images: {fault}"):
            check_loss(kind, ["retinanet"])


def test_a_batch_of_both_kinds(refuses):
    model = model_of(tiny_retinanet, it=PKDLoss())
    both = [*batch()[:1], *unlabelled()[1:]]
    line = "batch: labelled and unlabelled images; expected one kind in a batch, as d2kd's build"
    refuses(lambda: forward_losses(model, both), line)


# Runs


def mixed_run(tmp_path, losses=None, node=tiny_retinanet, ratio=(1, 1), folder="run", **train):
    """Six labelled images and four unlabelled ones, batches of 2, a learning rate that a step shows."""
    for name, objects in (("one", (1, 2, 1, 1, 2, 1)), ("two", (1, 0, 2, 1))):
        if not (tmp_path / name).exists():
            draw_data(tmp_path / name, objects)
    losses = losses or L(DistillLosses)(it=L(PKDLoss)())
    train = {"max_iter": 8, "seed": 3, **train}
    config = recipe(tmp_path / "one", tmp_path / folder, distiller(losses=losses), **train)
    config.model.student, config.model.teacher.detector = node(), node(channels=24)
    node = config.dataloader.train
    photos = L(image_folder)(name="two", root=str(tmp_path / "two"))
    node.dataset.names = [node.dataset.names, photos]
    node.ratio = list(ratio)
    return without_evaluation(config)


def finished(config, resume=False):
    trainer = Trainer(with_defaults(config))
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def test_a_run_on_both(tmp_path):
    config = mixed_run(tmp_path, node=tiny_faster_rcnn, checkpointer={"period": 4})
    finished(config)
    rows = read_metrics(tmp_path / "run" / "metrics.json")
    own = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "roi_head/num_fg_samples"}
    for row in rows[:8]:
        labelled = row["iteration"] % 2 == 0
        assert (own <= row.keys()) == labelled and bool(own & row.keys()) == labelled
        assert ("total_loss" in row) == labelled == ("total_loss_unlabelled" not in row)
        assert row["distill/loss_it"] > 0
    (row,) = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    assert row["images_used"] == {f"tiny_{tmp_path / 'one'}": 8, "two": 8}
    whole = torch.load(tmp_path / "run" / "model_final.pth")

    (tmp_path / "run" / "last_checkpoint").write_text("model_0000003.pth")
    finished(config, resume=True)
    resumed = torch.load(tmp_path / "run" / "model_final.pth")
    assert all(value.equal(whole["model"][key]) for key, value in resumed["model"].items())
    rows = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    assert rows[1]["start_iter"] == 4 and rows[1]["images_used"] == row["images_used"]


def test_a_loss_that_decays_to_zero_and_accumulation(tmp_path):
    weight = L(LinearParamScheduler)(start_value=1.0, end_value=0.0)
    losses = L(DistillLosses)(it=L(TARLoss)(weight=weight))
    finished(mixed_run(tmp_path, losses, ratio=[1, 3], accumulate=2))
    rows = read_metrics(tmp_path / "run" / "metrics.json")
    assert [("total_loss" in row) for row in rows[:8]] == [True, False, False, False] * 2
    assert all(row["distill/loss_it_classification"] > 0 for row in rows[:8])


def refused(tmp_path, losses=None, edit=lambda config: None):
    config = mixed_run(tmp_path, losses)
    edit(config)
    return lambda: Trainer(with_defaults(config))


def test_what_is_refused_before_training(tmp_path, refuses):
    def without_teacher(config):
        config.model = config.model.student

    def unlabelled_alone(config):
        config.dataloader.train.dataset.names = config.dataloader.train.dataset.names[1]

    def unlabelled_test(config):
        config.dataloader.test.dataset.names = "two"

    losses = L(DistillLosses)(good=L(PKDLoss)(), bad=L(FGDLoss)())
    line = "losses.bad: FGDLoss, which needs ground truth, and unlabelled images; expected a loss"
    refuses(refused(tmp_path, losses), line)
    for edit, line in (
        (without_teacher, "training data two: unlabelled images, and a model without a teacher"),
        (unlabelled_alone, "training data two: unlabelled images; expected a data set with labels"),
        (unlabelled_test, "test data two: unlabelled images; expected labels"),
    ):
        refuses(refused(tmp_path, edit=edit), line)
    config = mixed_run(tmp_path)
    trainer = type("Other", (Trainer,), {"build_train_loader": lambda *_: [unlabelled()]})
    line = "training data two: unlabelled images, and a loader that mixes them with others"
    refuses(lambda: trainer(with_defaults(config)), line)


def test_the_doctor_knows_them(tmp_path):
    found = {f.subject: f for f in diagnose(mixed_run(tmp_path), images=0, iterations=2)}
    assert found["train data, unlabelled"].found == "4 images, for distillation alone"
    assert found["train data"].found.startswith("6 images, 8 objects")
    assert found["train images"].found == "10 of 10 decoded"
    errors = {f.subject for f in found.values() if f.state == "error"}
    assert errors == {"teacher's weights"}  # an untrained one
    assert "task losses" in found


def _half_of_the_images(rank, tmp_path):
    finished(mixed_run(tmp_path, L(DistillLosses)(it=L(TARLoss)()), tiny_faster_rcnn))


def test_two_processes(tmp_path):
    """Parameters that no loss reaches have a gradient, so that DDP ends each step."""
    mixed_run(tmp_path)  # draws the data
    assert in_two(_half_of_the_images, tmp_path) == [0, 0]
    (row,) = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    assert row["images_used"] == {f"tiny_{tmp_path / 'one'}": 8, "two": 8} and row["finished"]
