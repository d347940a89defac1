"""What is handed on detects as the detector does, in another runtime, in any size of image."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.cbook
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data.transforms import Resize, ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from PIL import Image

from d2kd.config import distill, load, with_defaults, with_downscaled_student
from d2kd.data import coco_dataset
from d2kd.export import formats, table
from d2kd.export.formats import (
    ExportedDetector,
    count_mismatches,
    export_detector,
    prepare_for_export,
    single_image_model,
)
from d2kd.modeling import TimmBackbone, TorchvisionBackbone
from d2kd.modeling.weights import CLASSES_KEY
from d2kd.testing import tiny_mask_rcnn
from d2kd.utils.errors import InputError

from .common import CLASSES, DETECTORS, build, command, lively, tiny_retinanet
from .pages import block
from .resume_runs import run
from .tiny_run import (
    distiller,
    draw_data,
    recipe,
    teacher_weights,
    without_evaluation,
    write_recipe,
)

pytest.importorskip("onnxruntime")
NAMES = [f"class {k}" for k in range(CLASSES)]
ABOUT = {"classes": json.dumps(NAMES), "image_format": "BGR"}
SMALL_NETWORKS = {  # their bottom-up networks, under a RetinaNet
    "mobilenet_v3": L(TorchvisionBackbone)(name="mobilenet_v3_small", norm_momentum=1.0),
    # Its padding is computed from the size of the image.
    "efficientnet_lite": L(TimmBackbone)(name="tf_efficientnet_lite0", norm_momentum=1.0),
}
# One-stage and two-stage, with masks; the others are written like one of them.
OFTEN = ("mask_rcnn", "retinanet")
FAMILIES = ("mask_rcnn", "cascade_rcnn", "retinanet", "fcos", "gfl", *SMALL_NETWORKS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def untrained(family, threshold=None):
    """A detector whose untrained scores pass, so that there is something to compare."""
    small = SMALL_NETWORKS.get(family)
    if small:
        pytest.importorskip("timm" if small._target_ is TimmBackbone else "torchvision")
    node = DETECTORS["retinanet" if small else family]()
    if small:
        node.backbone.bottom_up = {**small, "out_features": ["res3", "res4", "res5"]}
    detector = lively(build(node).eval())
    if small:  # statistics of an image, or its last features are all alike
        with torch.no_grad():
            pixels = detector.preprocess_image([{"image": images()[0]}]).tensor
            detector.backbone.train()(pixels)
        detector.eval()
    if not hasattr(detector, "roi_heads"):
        with torch.no_grad():  # far apart, or rounding decides which of two is the better
            detector.head.cls_score.weight *= 10 if small else 100
        return detector
    for module in detector.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = threshold or 0.2
    return detector


def images():
    """A photograph, whose sides are no multiples of anything, and noise of odd and small sizes."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB").resize((171, 203))
    generator = seeded(1)
    noise = [torch.rand(3, *size, generator=generator) * 255 for size in ((33, 65), (17, 90))]
    return [torch.from_numpy(np.asarray(photograph).transpose(2, 0, 1).copy()), *noise]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each family's files, written once."""
    folder, written = tmp_path_factory.mktemp("exported"), {}

    def of(family, form):
        path = folder / f"{family}{formats.FORMATS[form]}"
        if path not in written:
            written[path] = prepare_for_export(untrained(family))
            export_detector(written[path], path, ABOUT)
        return written[path], ExportedDetector(path)

    return of


@pytest.mark.parametrize(
    "family, form",
    [
        pytest.param(
            family, form, marks=[pytest.mark.sweep] * (form != "onnx" and family not in OFTEN)
        )
        for family in FAMILIES
        for form in formats.FORMATS
    ],
)
def test_a_file_detects_what_its_detector_does(files, family, form):
    detector, exported = files(family, form)
    for image in images():
        height, width = image.shape[-2:]
        # As from a picture twice as high, so that boxes are scaled back.
        batch = [{"image": image, "height": 2 * height, "width": width}]
        with torch.no_grad():
            (wanted,), (found,) = detector(batch), exported(batch)
        wanted, found = wanted["instances"], found["instances"]
        assert found.image_size == (2 * height, width)
        assert len(wanted) > 1
        assert found.get_fields().keys() == wanted.get_fields().keys()
        assert count_mismatches(found, wanted) == 0
        assert (found.scores.diff() <= 1e-6).all()
    masks = " masks" if family == "mask_rcnn" else ""
    assert exported.metadata["outputs"] == "boxes scores classes" + masks
    assert exported.classes == NAMES and exported.metadata["image_format"] == "BGR"


@pytest.mark.parametrize("form", formats.FORMATS)
@pytest.mark.parametrize("family", ["retinanet", "mask_rcnn"])
def test_a_file_sees_images_of_a_few_pixels(files, family, form):
    detector, exported = files(family, form)
    for size in ((1, 1), (1, 150), (7, 5)):
        image = torch.rand(3, *size, generator=seeded(2)) * 255
        batch = [{"image": image, "height": size[0], "width": size[1]}]
        with torch.no_grad():
            (wanted,), (found,) = detector(batch), exported(batch)
        assert count_mismatches(found["instances"], wanted["instances"]) == 0


@pytest.mark.parametrize("family", FAMILIES[:5])
def test_the_traced_image_leaves_no_mark(family):
    """Not its size, nor how much was found in it: the graph is the same, with the same constants."""

    def graph(size):
        with torch.no_grad(), formats.tracing():
            model = single_image_model(detector, torch.rand(3, *size, generator=seeded(3)) * 255)
            traced = torch.jit.trace(model, model.flattened_inputs, check_trace=False)
        inlined = traced.inlined_graph
        torch._C._jit_pass_erase_shape_information(inlined)
        constants = [node.output().toIValue() for node in inlined.findAllNodes("prim::Constant")]
        return re.sub(r" #.*|__torch__\S*", "", str(inlined)), str(constants)

    detector = prepare_for_export(untrained(family))
    if not hasattr(detector, "roi_heads"):
        detector.test_topk_candidates = 60  # between what the first level has of the two
    assert graph((33, 40)) == graph((130, 97))


@pytest.mark.parametrize("form", formats.FORMATS)
def test_an_image_without_detections(form, tmp_path):
    """It may be the traced one, and any other."""
    detector = prepare_for_export(untrained("mask_rcnn", threshold=0.345))
    path = tmp_path / f"model{formats.FORMATS[form]}"
    export_detector(detector, path, ABOUT)
    traced = torch.rand(3, *formats.EXAMPLE, generator=seeded(0)) * 255
    exported, (photograph, noise, _) = ExportedDetector(path), images()
    for image in (traced, photograph):
        shapes = [tuple(values.shape) for values in exported.detect(image)]
        assert shapes == [(0, 4), (0,), (0,), (0, 1, 28, 28)]
        assert len(exported([{"image": image}])[0]["instances"]) == 0
    with torch.no_grad():
        (wanted,) = detector.inference([{"image": noise}], do_postprocess=False)
    found = exported.detect(noise)
    assert len(wanted) == len(found[0]) > 0
    assert torch.allclose(found[3], wanted.pred_masks, atol=1e-4)


def test_mask_ap_of_a_file_is_that_of_its_detector(files, tmp_path):
    """Where the detector's own detections are the ground truth, both have 100."""
    detector, exported = files("mask_rcnn", "onnx")
    batches, rows, listed = [], [], []
    for number, image in enumerate(images()):
        height, width = image.shape[-2:]
        size = {"height": height, "width": width}
        batches.append([{"image": image, "image_id": number, **size}])
        (tmp_path / f"{number}.png").touch()
        listed.append({"id": number, "file_name": f"{number}.png", **size})
        with torch.no_grad():
            found = detector(batches[-1])[0]["instances"]
        for row in instances_to_coco_json(found, number):
            rle = row["segmentation"]
            ids = {"id": len(rows) + 1, "category_id": row["category_id"] + 1, "iscrowd": 0}
            if area := int(mask_util.area(rle)):
                rows.append({**row, **ids, "area": area})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)]
    content = {"images": listed, "annotations": rows, "categories": categories}
    (tmp_path / "own.json").write_text(json.dumps(content))
    coco_dataset("own detections", str(tmp_path / "own.json"), str(tmp_path))
    evaluator = COCOEvaluator("own detections", use_fast_impl=False, output_dir=str(tmp_path))
    ap = {}
    for name, detect in (("detector", detector), ("file", exported)):
        evaluator.reset()
        for batch in batches:
            with torch.no_grad():
                evaluator.process(batch, detect(batch))
        result = evaluator.evaluate()
        ap[name] = [result[task]["AP"] for task in ("bbox", "segm")]
    assert ap["detector"] == pytest.approx([100, 100], abs=5) and len(rows) > 5
    assert ap["file"] == pytest.approx(ap["detector"], abs=0.1)


def test_the_table_has_mask_ap_if_there_are_masks():
    def text(mask_ap):
        row = {"name": "x", "AP": 1.0, "AP50": 2.0, "mask_AP": mask_ap, "gflops": 6.0}
        return table.format_rows({"rows": [row | {"milliseconds": 4.0, "megabytes": 5.0}]})

    assert "mask AP" in text(3.0) and text(3.0).splitlines()[-1].split()[3] == "3.00"
    assert "mask" not in text(None)


ONE, OTHER = [0, 0, 20, 20], [5, 5, 20, 20]
MASK = torch.zeros(1, 50, 50, dtype=torch.bool)
MASK[0, :20, :20] = True
SMALL, DOT = [0, 0, 3, 3], torch.zeros_like(MASK)
DOT[0, 0, 0] = True
NEAR, FAR = MASK.clone(), MASK.clone()
NEAR[0, 0, :4] = FAR[0, 0, :5] = False  # of 400 pixels


def instances(boxes, scores, classes, *masks):
    found = Instances((50, 50), pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4).float()))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    if masks:
        (found.pred_masks,) = masks
    return found


@pytest.mark.parametrize(
    "one, other, count",
    [
        (
            ([ONE, OTHER], [0.9, 0.5], [0, 1]),
            ([OTHER, [0, 0, 20, 20.05]], [0.5, 0.9005], [1, 0]),
            0,
        ),
        (([ONE, OTHER], [0.9, 0.5], [0, 1]), ([ONE], [0.9], [0]), 1),
        (([ONE, OTHER], [0.9, 0.5], [0, 1]), ([], [], []), 2),
        (([ONE], [0.9], [0]), ([ONE], [0.9], [1]), 2),
        (([ONE], [0.9], [0]), ([[0, 0, 20, 21]], [0.9], [0]), 2),
        (([ONE], [0.9], [0]), ([ONE], [0.91], [0]), 2),
        (([ONE], [0.9], [0], MASK), ([ONE], [0.9], [0], NEAR), 0),
        (([ONE], [0.9], [0], MASK), ([ONE], [0.9], [0], FAR), 2),
        # 1 % of 9 pixels is less than one, which may differ
        (([SMALL], [0.9], [0], DOT), ([SMALL], [0.9], [0], torch.zeros_like(DOT)), 0),
        (([], [], []), ([], [], []), 0),
    ],
)
def test_detections_without_a_match(one, other, count):
    one, other = instances(*one), instances(*other)
    assert count_mismatches(one, other) == count_mismatches(other, one) == count


def test_what_cannot_be_read_or_written(tmp_path, monkeypatch):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    (tmp_path / "broken.ts").write_bytes(b"no graph")
    for name in ("broken.onnx", "broken.ts", "gone.onnx"):
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            ExportedDetector(tmp_path / name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="onnx: cannot be imported.*d2kd.export"):
        export_detector(prepare_for_export(untrained("fcos")), tmp_path / "model.onnx", ABOUT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.onnx", "broken.ts"]
    detector = build(tiny_mask_rcnn())
    detector.roi_heads.keypoint_on = True
    with pytest.raises(InputError, match="keypoints; expected boxes and masks"):
        prepare_for_export(detector)


RECIPE = "recipe(_here / 'data', _here / 'out', distiller(str(_here / 'teacher.pth')))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a recipe with a teacher, and weights of both detectors."""
    folder = tmp_path_factory.mktemp("handing")
    draw_data(folder / "data")
    teacher_weights(folder)
    node = recipe(folder / "data", folder / "out", distiller()).model.student
    torch.save({"model": build(node).state_dict()}, folder / "student.pth")
    write_recipe(folder / "recipe.py", RECIPE)
    write_recipe(folder / "unmeasured.py", RECIPE, "del dataloader.evaluator")
    return folder


@pytest.fixture(scope="module")
def dense(folder):
    """The recipe with RetinaNets, and their weights."""
    for name, node in (("student", tiny_retinanet()), ("teacher", tiny_retinanet(channels=24))):
        torch.save({"model": build(node).state_dict()}, folder / f"dense_{name}.pth")
    retinanets = [
        "from d2kd.testing import tiny_retinanet",
        "model.student, model.teacher.detector = tiny_retinanet(), tiny_retinanet(channels=24)",
        "model.teacher.weights = str(_here / 'dense_teacher.pth')",
        "model.teacher.detector.test_score_thresh = 0.0",
    ]
    write_recipe(folder / "dense_recipe.py", RECIPE, *retinanets)
    return folder


@pytest.mark.parametrize(
    "kind, form, threshold",
    [
        ("", "onnx", "roi_heads.box_predictor.test_score_thresh=0.2"),
        ("dense_", "torchscript", "test_score_thresh=0.0"),
    ],
)
def test_the_table(dense, kind, form, threshold, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table, "FLOP_IMAGES", 1)
    weights = dense / f"{kind}student.pth"
    words = ["--config-file", dense / f"{kind}recipe.py", "--weights", weights, "--format", form]
    words += ["--table", "--output", tmp_path, "--images", "2", "--baseline", weights]
    command("export")([*words, f"model.student.{threshold}"])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "table.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["teacher", "baseline", "student", f"exported, {form}"]
    assert result["schema"] == 1 and result["images_timed"] == 2
    student, exported, teacher = rows["student"], rows[f"exported, {form}"], rows["teacher"]
    assert student["AP"] == pytest.approx(exported["AP"], abs=0.01)
    assert student["gflops"] == pytest.approx(exported["gflops"], rel=0.02)
    assert teacher["gflops"] > student["gflops"] > 0 and teacher["megabytes"] > student["megabytes"]
    path = tmp_path / f"model{formats.FORMATS[form]}"
    assert exported["megabytes"] == path.stat().st_size / 1e6
    assert all(row["milliseconds"] > 0 for row in rows.values())
    assert "0 without a match" in said and (tmp_path / "table.txt").read_text() in said
    assert ExportedDetector(path).classes == NAMES  # by the test data


def test_files_of_several_formats_and_one_that_answers_otherwise(
    dense, tmp_path, capsys, monkeypatch
):
    """The exit code tells of any of them, be it not the last."""
    words = ["--config-file", dense / "dense_recipe.py", "--weights", dense / "dense_student.pth"]
    words += ["--format", "torchscript", "onnx", "--images", "1", "--output", tmp_path]
    words = [*map(str, words), "model.student.test_score_thresh=0.0"]

    def counts():
        pattern = r"(\d+) detections of both, (\d+) without a match"
        found = re.findall(pattern, capsys.readouterr().out)
        totals, alone = zip(*(map(int, pair) for pair in found))
        return totals, list(alone)

    config = load(str(words[1]), [words[-1]])
    student = table.build_student(config, words[3])
    with torch.no_grad():
        count = len(student(table.first_test_images(with_defaults(config), 1)[0])[0]["instances"])
    command("export")(words)
    assert counts() == ((2 * count,) * 2, [0, 0]) and count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.ts"]

    def another_in_torchscript(detector, path, about):
        if path.suffix == ".ts":
            another = lively(build(tiny_retinanet(), seed=9)).eval()
            export_detector(prepare_for_export(another), path, about)

    monkeypatch.setattr(formats, "export_detector", another_in_torchscript)
    with pytest.raises(SystemExit) as exit:
        command("export")(words)
    _, (differing, same) = counts()
    assert exit.value.code == 1 and differing > 0 and same == 0


def test_how_a_reduced_image_was_made(folder):
    config = load(str(folder / "recipe.py"))
    for part in ("train", "test"):
        mapper = config.dataloader[part].mapper
        mapper.image_format, mapper.augmentations = "RGB", [L(Resize)(shape=(48, 64))]
    student = build(config.model.student)
    weights = str(folder / "student.pth")
    plain = table.export_metadata(config, student, weights)
    small = table.export_metadata(with_downscaled_student(config, 2), student, weights)
    assert plain["image_format"] == small["image_format"] == "RGB"
    assert "48" in plain["resizing"] and small["resizing"].startswith(plain["resizing"])
    assert small["resizing"].removeprefix(plain["resizing"]) == " 1/2 (means of 2 x 2 pixels)"
    other = table.export_metadata(with_downscaled_student(config, 1.5), student, weights)
    assert other["resizing"].removeprefix(plain["resizing"]) == " 1/1.5 (antialiased bilinear)"


def test_a_teacher_of_larger_images_computes_more(folder):
    config = load(str(folder / "recipe.py"))
    whole = distill(config, teacher=config.model.teacher, losses=config.model.losses, scale=2)
    config = with_defaults(OmegaConf.create(whole._asdict(), flags={"allow_objects": True}))
    gflops = {}
    student = build(config.model.student)
    [batch] = table.first_test_images(config, 1)
    for scale in (1, 2):
        config.model.teacher.scale = scale
        row = table.teacher_row(config, student)
        gflops[scale] = table.gflops(row.module, [row.inputs(batch)] * scale)  # of an image
    assert 6 * gflops[1] > gflops[2] > 2 * gflops[1] > 0


def test_a_time_is_the_median_of_an_image_after_some_to_warm_up(monkeypatch):
    now, seconds = [0.0], iter([90.0] * table.WARM_UPS + [1.0, 80.0, 3.0])
    monkeypatch.setattr(table, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def detect(batch):
        now[0] += next(seconds)

    row = table.DetectorRow("it", detect, torch.nn.Module(), 0)
    assert table.time_per_image([row], [[{}]] * 3) == [3000.0]


def test_a_teachers_row_is_in_the_students_classes(folder):
    config = load(str(folder / "recipe.py"))
    student = table.build_student(config, str(folder / "student.pth"))
    plain = table.teacher_row(config, student)
    config.model.classes = NAMES
    (batch,) = table.first_test_images(config, 1)
    expected = plain.detect(batch)[0]["instances"].pred_classes
    for turn, known in ((NAMES[::-1], len(expected)), (["x", "y", "z"], 0)):
        config.model.teacher.classes = turn
        row = table.teacher_row(config, student)
        found = row.detect(batch)[0]["instances"].pred_classes
        assert row.has_ap == bool(known)
        assert torch.equal(found, 2 - expected if known else expected)


@pytest.mark.parametrize(
    "words, line",
    [
        ("--config-file {folder}/gone.py", "gone.py: no such config"),
        ("--weights {folder}/gone.pth", "gone.pth: no such file"),
        ("--weights {folder}/teacher.pth", "teacher.pth: "),
        ("--baseline {folder}/student.pth", "--baseline: given without"),
        ("--output {folder}/recipe.py", "--output: "),
        ("--images 0 --table", "--images: 0"),
        ("--table --weights {folder}/turned.pth", "turned.pth: its classes are .*; expected"),
        ("--table --baseline {folder}/turned.pth", "turned.pth: its classes are .*; expected"),
        ("--images 0 dataloader.test=null", "student.pth: 0 names of 3 classes"),
        ("--config-file {folder}/unmeasured.py", "--images 0"),
    ],
)
def test_refused_in_one_line(folder, refuses, words, line):
    turned = torch.load(folder / "student.pth") | {CLASSES_KEY: NAMES[::-1]}
    torch.save(turned, folder / "turned.pth")
    given = ["--config-file", "{folder}/recipe.py", "--weights", "{folder}/student.pth"]
    given = [word.format(folder=folder) for word in [*given, "--output", "out", *words.split()]]
    refuses(lambda: command("export")(given), line)


def example(phrase):
    """The documentation's lines that have these words, of a run in this folder."""
    return block(phrase).replace("output/mine/distilled/", "").replace("handed_on/", "")


WITHOUT_D2KD = 'import sys\nsys.modules["d2kd"] = None\n'
SEEN = """
said = {"channels": photo["image"][:, 0, 0].tolist(), "seen": photo["image"].shape[1:]}
said |= {"size": instances.image_size, "grad": instances.scores.requires_grad}
assert not model.training and len(instances)
import json
print(json.dumps(said))
"""


def test_stock_detectron2_loads_a_runs_checkpoint_strictly(tmp_path):
    """And detects as the recipe's test does: the documentation's lines, in a process that cannot import d2kd."""
    node = model_zoo.get_config("common/models/retinanet.py").model
    stages, head = node.backbone.bottom_up.stages, node.head
    stages.depth, node.backbone.out_channels = 18, 16
    stages.pop("stride_in_1x1")
    node.backbone.top_block.in_channels = 512
    head.input_shape, head.conv_dims = [ShapeSpec(channels=16)] * 5, [16]
    node.num_classes, node.test_score_thresh = CLASSES, 0.0

    draw_data(tmp_path / "data")
    config = recipe(tmp_path / "data", tmp_path, distiller(), max_iter=1)
    config.model.student = node
    reading = config.dataloader.train.mapper, config.dataloader.test.mapper
    reading[0].image_format, reading[1].image_format = "RGB", "${...train.mapper.image_format}"
    reading[1].augmentations = [L(ResizeShortestEdge)(short_edge_length=80, max_size=1333)]
    run(without_evaluation(config))

    Image.new("RGB", (60, 40), (255, 128, 0)).save(tmp_path / "photo.jpg", quality=100)
    script = WITHOUT_D2KD + example("config.model.student") + SEEN
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("channels") == pytest.approx([255, 128, 0], abs=3)  # of a JPEG, and in RGB
    assert said == {"seen": [80, 120], "size": [40, 60], "grad": False}


def test_the_documentations_lines_for_onnx(files, tmp_path, monkeypatch):
    _, exported = files("retinanet", "onnx")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").symlink_to(exported.path)
    made = {"photo": {"image": images()[0]}}
    exec(example("onnxruntime"), made)
    found = exported.detect(images()[0])
    assert made["names"] == NAMES
    for name, value in zip(("boxes", "scores", "classes"), found, strict=True):
        assert np.array_equal(made[name], value)


def test_boxes_without_area_are_not_in_the_file():
    class Flat(torch.nn.Module):
        roi_heads = None

        def inference(self, inputs, do_postprocess):
            return [instances([ONE, [3, 3, 3, 8]], [0.9, 0.8], [0, 1])]

    image = torch.zeros(3, 50, 50)
    boxes, *_ = formats.single_image_model(Flat(), image)(image)
    assert boxes.tolist() == [ONE]
