"""A comparison from beginning to end, on detectors of a second and images drawn at random."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from PIL import Image

from d2kd.comparison import detections as kept
from d2kd.comparison.comparison import Comparison, Options, compare
from d2kd.comparison.detectors import (
    Detector,
    build_loader,
    detector_from_config,
    detectors_from_run,
    detectors_from_study,
    load_coco_results,
    load_data,
    load_study_results,
)
from d2kd.comparison.detectors import load_detector as build_detector
from d2kd.comparison.regions import why_not_comparable
from d2kd.config import distill
from d2kd.config.saving import save_config
from d2kd.data import coco_dataset, register_voc
from d2kd.losses import DistillLosses
from d2kd.modeling import Teacher
from d2kd.modeling.weights import file_sha256
from d2kd.report.build import format_main_figures
from d2kd.report.page import write_report
from d2kd.testing import DETECTORS, tiny_mask_rcnn
from d2kd.utils.errors import InputError
from d2kd.utils.io import write_json

from .common import build, tiny_faster_rcnn, tiny_retinanet
from .test_voc import NAMES as NAMES_OF_VOC
from .test_voc import write_voc
from .tiny_run import distiller, draw_data, recipe, teacher_weights

QUICK = Options(resamples=20)
NAMES = ("teacher", "baseline", "distilled")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six images: one without objects, a crowd, a class without objects, a name that is not ASCII."""
    folder = tmp_path_factory.mktemp("data")
    draw_data(folder)
    content = json.loads((folder / "data.json").read_text())
    for a in content["annotations"]:
        a["category_id"] = a["category_id"] % 2 + 1
    content["annotations"][0]["iscrowd"] = 1
    content["categories"][0]["name"] = "čaša <b>"
    (folder / "data.json").write_text(json.dumps(content))
    return folder


def named(folder: Path) -> str:
    return coco_dataset(f"tiny_{folder}", str(folder / "data.json"), str(folder))


def seen_by(detectors: list[Detector], data: Path, folder: Path, options=QUICK) -> Comparison:
    return compare(detectors, load_data(named(data)), folder / "kept", options)


def trained(config, run: Path) -> Path:
    """A run's folder, as its training leaves it."""
    save_config(config, run / "config.yaml")
    torch.save({"model": build(tiny_faster_rcnn(), 3).state_dict()}, run / "model_final.pth")
    return run


def taught(data: Path, run: Path, **teacher) -> Path:
    config = recipe(data, run, distiller(teacher_weights(run.parent / "taught")))
    config.model.teacher.update(teacher)
    return trained(config, run)


def pair(folder: Path, data: Path, names=("one", "other"), node=None, **classes) -> list[Detector]:
    """Two detectors of the same weights."""
    return [
        detector_from_config(
            x, *saved(folder / x, data, node or tiny_faster_rcnn(), 0, classes.get(x))
        )
        for x in names
    ]


def saved(folder: Path, data: Path, node, seed: int, classes=None) -> tuple[str, str]:
    """A config and weights of a detector."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(recipe(data, folder, node), folder / "config.yaml")
    state = {"model": build(node, seed).state_dict()} | ({"classes": classes} if classes else {})
    torch.save(state, folder / "model_final.pth")
    return str(folder / "config.yaml"), str(folder / "model_final.pth")


def three(folder: Path, data: Path, make=tiny_faster_rcnn) -> list[Detector]:
    return [
        detector_from_config(name, *saved(folder / name, data, make(), seed))
        for seed, name in enumerate(NAMES)
    ]


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return folder, seen_by(three(folder, data), data, folder)


def test_who_is_who_and_everything_is_there(compared):
    _, found = compared
    assert (found.reference, found.baseline, found.featured) == NAMES
    over = {("teacher", "baseline"), ("distilled", "baseline"), ("distilled", "teacher")}
    assert {(g.of, g.over) for g in found.gains} == over | {("baseline", "teacher")}
    assert found.dataset["crowds"] == 1 and found.dataset["without_objects"] == ["class 2"]
    assert found.observation.regions["of"] == "teacher" and found.observation.images == 6
    assert all(d.cost["seconds"] > 0 and d.parameters > 0 for d in found.detectors)


def test_it_is_read_back_as_it_was_written(compared):
    folder, found = compared
    page = write_report(found, folder / "page")
    assert Comparison.load(page.with_name("report.json")) == found
    assert json.loads(page.with_name("report.json").read_text())["schema"] == 2
    (folder / "other.json").write_text("{}")
    with pytest.raises(InputError, match="other.json: cannot be read .*; expected a report.json"):
        Comparison.load(folder / "other.json")


def test_what_is_known_is_not_computed_again(compared, data, monkeypatch):
    folder, found = compared
    for method in ("detect", "outputs"):
        monkeypatch.setattr(Teacher, method, None)  # which nobody could call
    again = seen_by(three(folder, data), data, folder)
    assert again == found and not again.notes


def test_a_broken_file_is_named_and_computed_anew(compared, data, tmp_path):
    folder, found = compared
    kept = shutil.copytree(folder / "kept", tmp_path / "kept")
    for name in ("teacher/000000.npz", "observation.npz"):
        (kept / name).write_bytes(b"PK broken")
    again = seen_by(three(folder, data), data, tmp_path)
    assert [d.accuracy for d in again.detectors] == [d.accuracy for d in found.detectors]
    assert again.observation.regions == found.observation.regions
    assert len(again.notes) == 2 and all(".npz: cannot be read" in note for note in again.notes)


def test_files_of_other_weights_or_data_are_computed_anew(data, tmp_path):
    seen_by(three(tmp_path, data)[:1], data, tmp_path)
    detectors = [
        detector_from_config("teacher", *saved(tmp_path / "teacher", data, tiny_faster_rcnn(), 9))
    ]
    assert "differs in weights" in seen_by(detectors, data, tmp_path).notes[0]
    other = tmp_path / "other"
    draw_data(other, objects=(1, 1, 1))
    assert "differs in dataset" in seen_by(detectors, other, tmp_path).notes[0]
    size = (other / "1.png").stat().st_size
    Image.new("RGB", (64, 64), (255, 0, 0)).save(other / "1.png")  # replaced, as large as before
    (other / "1.png").write_bytes((other / "1.png").read_bytes().ljust(size, b"\0"))
    notes = seen_by(detectors, other, tmp_path).notes
    assert any("differs in dataset; detections are computed again" in note for note in notes)


def test_an_interrupted_comparison_goes_on_where_it_was(data, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "IMAGES_PER_FILE", 2)
    calls, detect, seen, detect_file = [], Teacher.detect, [], kept._detect

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return detect(self, batch)

    def watched(ready, data, records, *rest):
        seen.append([record["image_id"] for record in records])
        return detect_file(ready, data, records, *rest)

    monkeypatch.setattr(Teacher, "detect", interrupted)
    monkeypatch.setattr(kept, "_detect", watched)
    detectors = three(tmp_path, data)[:1]
    with pytest.raises(KeyboardInterrupt):
        seen_by(detectors, data, tmp_path)
    seen_by(detectors, data, tmp_path)
    assert seen == [[0, 1], [2, 3], [2, 3], [4, 5]]  # only the first file was whole


def _boxes(folder):
    return sum(len(np.load(path)["box"]) for path in folder.glob("*.npz"))


@pytest.mark.parametrize("family", ["retinanet", "fcos", "gfl", "cascade_rcnn", "mask_rcnn"])
def test_a_detector_agrees_with_itself(family, data, tmp_path):
    node = DETECTORS[family]()
    if "roi_heads" not in node:  # which an untrained dense detector never reaches
        node.test_score_thresh = 0.0
    found = seen_by(pair(tmp_path, data, ("one", "same"), node), data, tmp_path)
    assert _boxes(tmp_path / "kept/one") == _boxes(tmp_path / "kept/same") > 0
    gain = found.gain("same", "one").metrics["AP"]
    assert gain["gain"] == 0 and gain["interval"] == [0, 0]
    assert found.objects.won == found.objects.lost == 0
    assert all(row["everywhere"] == pytest.approx(1) for row in found.observation.features["rows"])
    table = found.observation.regions
    [row] = table["pairs"]
    assert table["kind"] == ("regions" if "rcnn" in family else "anchors")
    assert table["rows"] > 0 and row["all"]["agreement"] == 1
    for what in ("class", "box"):
        assert row["all"][what]["first"] == row["all"][what]["second"] == 0
    assert sum(row["all"]["class"].values()) == table["rows"]
    assert sum(row["all"]["box"].values()) == table["foreground"]
    assert sum(part["rows"] for part in row["by_size"].values()) == table["foreground"]
    if "rcnn" not in family:  # whose random proposals lie on nothing
        assert table["foreground"] > 0
        assert (table["detectors"][0]["iou_before"] is None) == (family in ("fcos", "gfl"))


def test_masks_beside_boxes(data, tmp_path):
    """A Mask R-CNN on its own detections as ground truth, then with masks cut in half, beside a detector of boxes."""
    own = shutil.copytree(data, tmp_path / "own")
    [one] = pair(tmp_path, data, ["masks"], tiny_mask_rcnn())
    loaded = load_data(named(data))
    ready, rows, halves = build_detector(one, loaded, torch.device("cpu")), [], []
    for record, batch in zip(loaded.records, build_loader(one, loaded.records)):
        for row in instances_to_coco_json(ready.detect(batch), record["image_id"]):
            ids = {"id": len(rows) + 1, "category_id": row["category_id"] + 1, "iscrowd": 0}
            pixels = mask_util.decode(row["segmentation"])
            if not pixels.any():
                continue
            rows.append({**row, **ids, "area": int(pixels.sum())})
            pixels[:, : int(row["bbox"][0] + row["bbox"][2] / 2)] = 0
            half = mask_util.encode(pixels)
            halves.append({"size": half["size"], "counts": half["counts"].decode()})
    assert len(rows) > 10
    content, ap = json.loads((data / "data.json").read_text()), {}
    other = detector_from_config("boxes", *saved(tmp_path / "boxes", data, tiny_faster_rcnn(), 0))
    for name, masks in (("whole", None), ("half", halves), ("none", [None] * len(rows))):
        given = [r | ({"segmentation": m} if masks else {}) for r, m in zip(rows, masks or rows)]
        (own / "data.json").write_text(json.dumps(content | {"annotations": given}))
        twin = replace(one, name="twin")
        found = compare(
            [one, other, twin], load_data(coco_dataset(name, str(own / "data.json"), str(own))),
            tmp_path / "kept", QUICK,
        )  # fmt: skip
        first, boxes, last = found.detectors
        assert first.accuracy.metrics["AP"] > 90 and boxes.mask_accuracy is None
        assert first.mask_accuracy == last.mask_accuracy
        page = write_report(found, tmp_path / name)
        assert Comparison.load(page.with_name("report.json")) == found
        assert ("mask AP" in page.read_text()) == (name != "none")
        assert ("mask AP" in format_main_figures(found)) == (name != "none")
        if name == "none":
            assert first.mask_accuracy is None and found.gain("twin", "masks").mask_metrics is None
            continue
        ap[name] = first.mask_accuracy.metrics["AP"]
        assert found.gain("twin", "masks").mask_metrics["AP"]["interval"] == [0, 0]
        assert found.gain("boxes", "masks").mask_metrics is None
        assert all("mask" in x for p in found.objects.pictures for x in p.detections["twin"])
    assert ap["whole"] > 90 and ap["half"] < 30


def test_families_that_share_no_regions(data, tmp_path):
    one = detector_from_config("one", *saved(tmp_path / "a", data, tiny_faster_rcnn(), 0))
    other = detector_from_config(
        "other", *saved(tmp_path / "b", data, tiny_retinanet(channels=24), 0)
    )
    found = seen_by([one, other], data, tmp_path)
    assert found.observation.regions is None and "families" in found.observation.why_no_regions
    assert found.observation.features["left_out"] == {"other": "24 channels beside 16"}
    assert "different families" in write_report(found, tmp_path).read_text()


def test_classes_are_compared_by_name(data, tmp_path):
    classes = {"one": ["class 1", "class 2", "čaša <b>"], "other": ["zebra", "Class_1", "crab"]}
    detectors = pair(tmp_path, data, **classes)
    for detector in detectors:
        detector.classes = None  # as of a config without them; the checkpoint has them
    found = seen_by(detectors, data, tmp_path)
    assert found.compared_classes == ["class 1"]
    assert found["other"].missing_classes == ["čaša <b>", "class 2"]
    assert found["other"].unique_classes == ["zebra", "crab"] and found["one"].unique_classes == []
    text = write_report(found, tmp_path).read_text()
    assert "zebra" in text and "unknown" in text


def test_detectors_that_share_no_class_or_a_name_are_refused(data, tmp_path):
    one, other = pair(tmp_path, data)
    for classes, more, line in (
        (one.classes, ("a", "b", "c"), "'other'.*none of the classes"),
        (("class 1", "x", "y"), ("class 2", "x", "y"), "one, other: no class of tiny_.* that all"),
    ):
        one.classes, other.classes = classes, more
        with pytest.raises(InputError, match=line):
            seen_by([one, other], data, tmp_path)
    other.name = one.name
    with pytest.raises(InputError, match="--detector: 'one' and 'one'; expected other names"):
        seen_by([one, other], data, tmp_path / "not")
    assert not (tmp_path / "not").exists()


OUTSIDE = ([70, 2, 3, 4], [1, 70, 3, 4], [-5, 2, 3, 4])


def test_a_results_file_is_used_and_one_of_other_data_refused(data, tmp_path):
    results = tmp_path / "results.json"
    row = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}
    results.write_text(json.dumps([row]))
    config, weights = saved(tmp_path / "a", data, tiny_faster_rcnn(), 0)
    detector = detector_from_config("one", config, weights, str(results))
    found = seen_by([detector], data, tmp_path)
    assert found["one"].accuracy.fixed["wrong"] == 1
    assert found.notes == [f"{results}: detections on only 1 of 6 images"]
    for line, *faults in (
        ("1 detections of images, 0 of classes it lacks; expected .* on tiny_", {"image_id": 99}),
        ("0 detections of images, 1 of classes it lacks", {"category_id": 9}),
        (r"cannot be read \(ValueError\)", {"bbox": [1] * 8}, {"bbox": [1, 2]}),
        ("not finite", {"bbox": [1, 2, 3, float("nan")]}, {"score": float("inf")}),
        ("1 of 2 boxes outside their image", *({"bbox": b} for b in OUTSIDE)),
        (r"cannot be read \(KeyError\); expected a COCO results file", None),
    ):
        for fault in faults:
            results.write_text(json.dumps([row, row | fault] if fault else [{}]))
            with pytest.raises(InputError, match=f"results.json: .*{line}"):
                seen_by([detector], data, tmp_path)
    results.write_text(json.dumps([row]))
    detector.expected_AP = 50.0
    with pytest.raises(InputError, match="AP 0.000; expected 50.000, the AP in the study"):
        seen_by([detector], data, tmp_path)


def test_a_box_may_reach_over_the_edge_of_its_image(data, tmp_path):
    """Not every project clips."""
    boxes = [[-5, -5, 10, 10], [60, 60, 10, 10], [-9, -9, 99, 99], [64, 64, 0, 0]]
    rows = [{"image_id": 1, "category_id": 2, "bbox": box, "score": 0.5} for box in boxes]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    found = load_coco_results(tmp_path / "results.json", load_data(named(data)))
    assert found.box.tolist() == boxes
    (tmp_path / "results.json").write_text("[]")
    assert len(load_coco_results(tmp_path / "results.json", load_data(named(data)))) == 0


def test_a_run_gives_its_teacher_and_its_student(data, tmp_path):
    detectors, dataset = detectors_from_run(taught(data, tmp_path / "run"))
    assert [d.name for d in detectors] == ["teacher", "distilled"] and dataset == named(data)
    found = seen_by(detectors, data, tmp_path)
    assert found.observation.features["left_out"]  # 24 channels and 16
    with pytest.raises(InputError, match="config.yaml: no such file"):
        detectors_from_run(tmp_path)


@pytest.mark.parametrize("scale, side", [(2, 32), (1.5, 43)])
def test_a_run_at_two_scales(data, tmp_path, scale, side):
    """Its teacher is compared on the images that taught: the full ones, in the channel order they have."""
    base = recipe(data, tmp_path / "run")
    for part in ("train", "test"):
        base.dataloader[part].mapper.image_format = "RGB"
    weights = teacher_weights(tmp_path / "taught")
    base.model.input_format = "RGB"
    node = L(Teacher)(detector=tiny_faster_rcnn(channels=24), weights=weights)  # which wants BGR
    whole = distill(base, teacher=node, losses=L(DistillLosses)(), scale=scale)
    config = OmegaConf.create(whole._asdict(), flags={"allow_objects": True})
    detectors, dataset = detectors_from_run(trained(config, tmp_path / "run"))
    ready = [build_detector(d, load_data(dataset), torch.device("cpu")) for d in detectors]
    assert [r.teacher.flip_channels for r in ready] == [True, False]
    teacher, records = instantiate(config.model.teacher), load_data(dataset).records
    loaders = build_loader(detectors[0], records), instantiate(config.dataloader.test)
    for batch, expected in zip(*loaders, strict=True):
        with torch.no_grad():
            (found,), (wanted,) = ready[0].teacher.detect(batch), teacher.detect(expected)
        assert len(wanted["instances"]) > 0
        assert found["instances"].pred_boxes.tensor.equal(wanted["instances"].pred_boxes.tensor)
    shapes = [next(iter(build_loader(d, records)))[0]["image"].shape for d in detectors]
    assert shapes == [(3, 64, 64), (3, side, side)]
    found = compare(detectors, load_data(dataset), tmp_path / "kept", QUICK)
    assert found.observation.regions["of"] == "teacher"


def test_a_teacher_keeps_its_own_channel_order(data, tmp_path):
    detectors, dataset = detectors_from_run(taught(data, tmp_path / "run", input_format="RGB"))
    ready = [build_detector(d, load_data(dataset), torch.device("cpu")) for d in detectors]
    assert [r.teacher.flip_channels for r in ready] == [True, False]
    plain = replace(detectors[0], input_format=None)
    assert plain.key != detectors[0].key


def test_a_run_says_where_its_detectors_come_from(data, tmp_path):
    """The teacher's classes by the student's names, and what the training left beside the weights."""
    classes = dict(classes=["cup", "b", "c"], aliases={"cup": "class 0"})
    run = taught(data, tmp_path / "run", **classes)
    starts = [{"seconds": 1.0}, {"seconds": 12.34, "seed": 3, "iterations": 9}]
    write_json(run / "run.json", {"command": "train", "rows": starts, "teacher": {}})
    (teacher, student), _ = detectors_from_run(run)
    assert teacher.classes == ("class 0", "b", "c") and teacher.provenance == {}
    assert student.provenance == {
        **{"started": None, "seed": 3, "device": None, "iterations": 9, "seconds": 12.3},
        **{"train_images": None},
        **{"command": "train", "teacher_sha256": None},
    }


@pytest.fixture
def study(data, tmp_path):
    """A study's folder that has moved since: a teacher, a baseline, two distilled students."""
    rows = []
    aps = dict(teacher=9.0, baseline_seed0=1.0, weak_seed0=2.0, tar_seed0=3.0)
    for seed, (name, ap) in enumerate(aps.items()):
        folder = tmp_path / name
        _, weights = saved(folder, data, tiny_faster_rcnn(), seed)
        if name.startswith(("weak", "tar")):
            model = distiller("gone/teacher/model_final.pth")
            save_config(recipe(data, folder, model), folder / "config.yaml")
        method = name.removesuffix("_seed0")
        row = {"name": name, "method": method, "seed": 0, "AP": ap}
        rows.append(row | {"weights_sha256": file_sha256(weights)})
    about = {"dataset": named(data), "baseline": "baseline", "featured": None}
    write_json(tmp_path / "results.json", {"schema": 1, **about, "rows": rows})
    return tmp_path


def test_a_study_gives_teacher_baseline_and_its_best_student(study, data):
    content = load_study_results(study)
    assert content["baseline"] == "baseline"
    detectors = detectors_from_study(study, content["rows"], content["baseline"])
    assert [d.name for d in detectors] == ["teacher", "baseline", "tar"]
    for featured, last in (("weak", "weak"), ("gone", "tar")):
        requested = detectors_from_study(study, content["rows"], content["baseline"], featured)
        assert [d.name for d in requested] == ["teacher", "baseline", last]
    more = []  # of a later seed, and better
    for row in content["rows"][1::2]:
        name = row["name"].replace("seed0", "seed1")
        shutil.copytree(study / row["name"], study / name)
        more.append({**row, "name": name, "seed": 1, "AP": 8.0, "weights_sha256": name})
    requested = detectors_from_study(study, [*more, *content["rows"]], content["baseline"])
    assert [d.config for d in requested] == [d.config for d in detectors]
    test = study / "tar_seed0" / "test"
    test.mkdir()
    (test / "coco_instances_results.json").write_text("[]")
    found = compare(detectors, load_data(content["dataset"]), study / "kept", QUICK)
    assert "AP 0.000; expected 3.000, the AP in the study" in found.notes[0]
    with pytest.raises(InputError, match="no distilled run"):
        detectors_from_study(study, content["rows"][:2])
    content.pop("featured")
    write_json(study / "results.json", content)
    with pytest.raises(InputError, match="results.json: no rows, dataset, baseline or featured"):
        load_study_results(study)


def test_some_images_are_enough_for_regions(data, tmp_path):
    found = seen_by(three(tmp_path, data), data, tmp_path, Options(resamples=5, observed=2))
    assert found.observation.images == 2 and found.dataset["images"] == 6
    assert "2 of 6" in write_report(found, tmp_path).read_text()


def test_a_yacs_detector_and_data_in_vocs_format(tmp_path):
    """A config of Detectron2's older kind, and annotations that are in no file of COCO's format."""
    write_voc(tmp_path / "voc")
    name = register_voc(f"voc_{tmp_path}", tmp_path / "voc", "val", NAMES_OF_VOC)
    truth = load_data(name).truth
    assert truth.classes == tuple(NAMES_OF_VOC) and truth.label.tolist() == [1, 0, 2]
    assert truth.box[2].tolist() == [0, 0, 20, 20]  # from 1, 1, 20, 20, counted from 1
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.DEVICE = len(NAMES_OF_VOC), "cpu"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "teacher.pth")
    found = [
        detector_from_config(
            "teacher", str(tmp_path / "teacher.yaml"), str(tmp_path / "teacher.pth")
        )
    ]
    resize = instantiate(found[0].mapper).augmentations.augs[0]
    assert resize.short_edge_length == (64, 64) and resize.max_size == 128
    comparison = compare(found, load_data(name), tmp_path / "kept", QUICK)
    assert comparison.detectors[0].name == "teacher"


def test_other_anchors_are_no_regions_to_compare(data, tmp_path):
    def reason():
        found = load_data(named(data))
        return why_not_comparable([build_detector(d, found, torch.device("cpu")) for d in both])

    both = pair(tmp_path, data, node=tiny_retinanet())
    both[1].node.anchor_generator.sizes = [[x] for x in (8, 16, 32, 64, 128)]
    assert "other has other anchors" in reason()
    both[1].node = both[0].node
    both[1].mapper.augmentations = [L(ResizeShortestEdge)(short_edge_length=32)]
    assert "other has another mapper" in reason()


@pytest.mark.parametrize(
    "change, line",
    [
        ({"name": "."}, "--detector: '.'; expected a name"),
        ({"classes": ["one"]}, "detector 'it': 3 classes, 1 names; expected a recipe or"),
        ({"mapper": None}, "config.yaml: no mapper of test images; expected at least one recipe"),
    ],
    ids=["a name of dots", "too few names", "no way to read images"],
)
def test_a_detector_that_cannot_be_compared(data, tmp_path, refuses, change, line):
    [one] = pair(tmp_path, data, ["it"])
    found = load_data(named(data))
    refuses(lambda: compare([replace(one, **change)], found, Path("kept"), QUICK), line)
    line = "--detector: none; expected NAME=CONFIG,WEIGHTS"
    refuses(lambda: compare([], None, Path("kept"), QUICK), line)


def test_a_run_that_does_not_say_its_data_or_its_images(data, tmp_path, refuses):
    config = recipe(data, tmp_path, distiller(teacher_weights(tmp_path)))
    torch.save({"model": {}}, tmp_path / "model_final.pth")
    config.model.teacher.scale = 2
    save_config(config, tmp_path / "config.yaml")
    line = "config.yaml: a teacher of images 2 times larger, and dataloader.test.mapper is no Downscaled"
    refuses(lambda: detectors_from_run(tmp_path), line)
    config.model.teacher.scale = 1
    del config.dataloader.test.dataset["names"]
    save_config(config, tmp_path / "config.yaml")
    line = "config.yaml: no dataloader.test.dataset.names; expected --dataset NAME"
    refuses(lambda: detectors_from_run(tmp_path), line)
