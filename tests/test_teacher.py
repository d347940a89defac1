"""A teacher is loaded strictly, sees its own kind of image, and stays out of sight."""

import argparse
import copy
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

import d2kd.modeling.teacher as teacher_module
from d2kd.engine.checkpoint import StudentCheckpointer
from d2kd.losses import DistillLosses, TARLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.modeling import weights as weights_module
from d2kd.modeling.inference_optimization import compile_modules, fuse_norms
from d2kd.utils.errors import InputError

from .common import (
    CLASSES,
    DETECTORS,
    batch,
    build,
    lively,
    tiny_faster_rcnn,
    tiny_retinanet,
)


@pytest.fixture
def detector():
    return build(tiny_retinanet())


@pytest.fixture
def weights(detector, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": detector.state_dict()}, path)
    return path


def test_weights_are_loaded_whole(detector, weights):
    teacher = Teacher(build(tiny_retinanet(), seed=5), str(weights))
    for key, value in detector.state_dict().items():
        assert torch.equal(value, teacher.detector.state_dict()[key])
    assert not teacher.detector.training
    assert not any(p.requires_grad for p in teacher.detector.parameters())
    assert len(teacher.weights_sha256) == 64


def test_the_hash_follows_the_file(detector, weights):
    """Also where another one of equal size has taken its place."""
    before, size = Teacher(copy.deepcopy(detector), str(weights)).weights_sha256, weights.stat()
    torch.save({"model": build(tiny_retinanet(), 7).state_dict()}, weights)
    assert weights.stat().st_size == size.st_size
    assert Teacher(copy.deepcopy(detector), str(weights)).weights_sha256 != before


def test_statistics_and_anchors_of_old_files_are_forgiven(detector, tmp_path, caplog):
    path = tmp_path / "old.pth"
    extra = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    extra["anchor_generator.cell_anchors.0"] = torch.zeros(6, 4)
    torch.save({"model": {**detector.state_dict(), **extra}}, path)
    teacher = Teacher(build(tiny_retinanet()), str(path))
    assert torch.equal(teacher.detector.pixel_mean, detector.pixel_mean), "the file's came through"
    for name in ("pixel_mean", "pixel_std"):
        assert f"its {name} is" in caplog.text


@pytest.mark.parametrize("old_format", [False, True])
def test_objects_of_other_programs_are_named_and_never_made(detector, weights, old_format):
    """A whole file is not called truncated; once its classes are trusted it is read."""
    content = {"model": detector.state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, weights, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(InputError, match="holds argparse.Namespace, which only a trusted") as error:
        Teacher(build(tiny_retinanet()), str(weights))
    assert "truncated" not in str(error.value) and "add_safe_globals" in str(error.value)
    with torch.serialization.safe_globals([argparse.Namespace]):
        Teacher(build(tiny_retinanet()), str(weights))
    torch.save({**content, "AP": np.float64(40), "args": None}, weights)
    with pytest.raises(InputError, match="holds numpy.*scalar, numpy.dtype"):
        Teacher(build(tiny_retinanet()), str(weights))


def test_names_may_be_matched_by_their_ends(detector, weights):
    """As Detectron2 lets a URI ask for: here for weights that do not say they are the backbone's."""
    state = {k.removeprefix("backbone."): v for k, v in detector.state_dict().items()}
    _save(weights, state)
    with pytest.raises(InputError, match="missing"):
        Teacher(build(tiny_retinanet()), str(weights))
    teacher = Teacher(build(tiny_retinanet(), seed=5), f"{weights}?matching_heuristics=True")
    started = build(tiny_retinanet(), seed=6)
    StudentCheckpointer(started).load_initial(f"{weights}?matching_heuristics=True")
    for key, value in detector.state_dict().items():
        assert torch.equal(value, teacher.detector.state_dict()[key])
        assert torch.equal(value, started.state_dict()[key])
    assert len(teacher.weights_sha256) == 64


def _save(path, state):
    torch.save({"model": state}, path)


@pytest.mark.parametrize(
    "spoil, found",
    [
        (lambda path, state: path.unlink(), "no such file"),
        (lambda path, state: path.write_bytes(path.read_bytes()[:-700]), "cannot be read"),
        (lambda path, state: _save(path, dict(list(state.items())[:-1])), "1 missing"),
        (lambda path, state: _save(path, state | {"extra.weight": torch.ones(1)}), "1 unexpected"),
        (lambda path, state: _save(path, {k: v[None] for k, v in state.items()}), "misshapen"),
    ],
)
def test_bad_weights_are_named(detector, weights, spoil, found):
    spoil(weights, detector.state_dict())
    with pytest.raises(InputError, match=found) as error:
        Teacher(build(tiny_retinanet()), str(weights))
    assert str(weights) in error.value.culprit and "\n" not in str(error.value)


def _prefixed(state, *prefixes):
    return {f"{prefix}{key}": value for prefix in prefixes for key, value in state.items()}


def _safetensors(path, state):
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, path)


OF_OTHER_TOOLS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "scheduler": {"a.b": state}},
    "another key": lambda state: {"model_state_dict": state, "loss": torch.tensor(3.0)},
    "beside other values": lambda state: {**state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "beside a name": lambda state: {"model": "retinanet", "state_dict": state},
    "averaged": lambda state: {"ema_state_dict": state, "step": torch.tensor(5)},
    "within model": lambda state: {"model": {"state_dict": state, "epoch": 3}},
    "DDP": lambda state: {"model": _prefixed(state, "module.")},
    "compiled, DDP": lambda state: {"state_dict": _prefixed(state, "module._orig_mod.")},
    "Lightning": lambda state: {
        "state_dict": _prefixed(state, "model.") | {"loss.weight": torch.ones(2)},
        "callbacks": {"best": {"a.b": torch.ones(1)}},
    },
    "a wrapper in DDP": lambda state: _prefixed(state, "module.detector."),
    "the teacher alone": lambda state: {"teacher": _prefixed(state, "module.")},
    "other classes": lambda state: {"model": state, "classes": 80, "losses": [1.0]},
    "classes by number": lambda state: {"model": state, "classes": {0: "a"}},
}


@pytest.mark.parametrize("content", OF_OTHER_TOOLS.values(), ids=OF_OTHER_TOOLS)
def test_weights_of_other_tools(detector, weights, content):
    """As a teacher's, which must be whole, and to start from."""
    torch.save(content(detector.state_dict()), weights)
    names = [f"class {k}" for k in range(CLASSES)]
    teacher = Teacher(build(tiny_retinanet(), 5), str(weights), classes=names)
    started = build(tiny_retinanet(), 6)
    StudentCheckpointer(started).load_initial(str(weights))
    for key, value in detector.state_dict().items():
        assert torch.equal(value, teacher.detector.state_dict()[key])
        assert torch.equal(value, started.state_dict()[key])


def test_weights_are_read_by_what_the_file_is(detector, tmp_path):
    """Also a path, torch's file with a pickle's suffix, and a pickle whose names Detectron2 would change."""
    state = {key: value.numpy() for key, value in detector.state_dict().items()}
    files = [tmp_path / name for name in ("torch.pkl", "own.pkl", "no_suffix")]
    for file in (files[0], files[2]):
        torch.save({"state_dict": detector.state_dict()}, file)
    files[1].write_bytes(pickle.dumps({"state_dict": state}))
    for file in files:
        teacher = Teacher(build(tiny_retinanet(), 5), file)
        assert teacher.weights == str(file)
        for key, value in detector.state_dict().items():
            assert torch.equal(value, teacher.detector.state_dict()[key]), file


def test_averaged_weights_beside_the_model_are_mentioned(detector, weights, caplog):
    state = detector.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, "model_ema": other}, weights)
    teacher = Teacher(build(tiny_retinanet(), 5), str(weights))
    assert all(torch.equal(value, teacher.detector.state_dict()[k]) for k, value in state.items())
    assert "its 'model' is used, not its 'model_ema'" in caplog.text


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NOT_ONE = {
    "two sets": (
        lambda path, s: torch.save({"state_dict": s, "ema_state_dict": s}, path),
        "holds weights in 2 places: state_dict, ema_state_dict; expected one; save it, such as by torch.save",
    ),
    "teacher and student": (
        lambda path, s: torch.save({"model": {"teacher": s, "student": s}}, path),
        "2 places: model.teacher, model.student; .*'model'..'teacher'",
    ),
    "prefixes": (
        lambda path, s: _save(path, _prefixed(s, "modelTeacher.", "modelStudent.")),
        "weights of several modules: modelStudent., modelTeacher.; expected one",
    ),
    "a list": (lambda path, s: torch.save([s], path), "holds one list, no weights by name"),
    "a tensor": (lambda path, s: torch.save(torch.ones(2), path), "holds one Tensor"),
    "a number": (lambda path, s: torch.save(3, path), "holds one int"),
    "numbered": (lambda path, s: torch.save({0: torch.ones(2)}, path), "its keys are 0;"),
    "nothing": (lambda path, s: torch.save({}, path), "no weights by name; its keys are none"),
    "no weights": (lambda path, s: _save(path, {}), "no weights by name; its keys are model"),
    "a value": (lambda path, s: _save(path, s | {"a.b": 3}), "its 'a.b' is no tensor; expected"),
    "nan": (
        lambda path, s: _save(path, s | {"a.b": torch.tensor([1, math.nan])}),
        "its 'a.b' has values that are nan; expected weights that",
    ),
    "meta": (
        lambda path, s: _save(path, {k: v.to("meta") for k, v in s.items()}),
        "has no values; expected weights that were trained",
    ),
    "a module": (
        lambda path, s: torch.save(build(tiny_retinanet()), path),
        "holds a whole model, with .* others, which only a trusted file may",
    ),
    "TorchScript": (
        lambda path, s: torch.jit.save(torch.jit.script(nn.ReLU()), path),
        "a TorchScript program; expected the state dict",
    ),
    "safetensors": (_safetensors, "a safetensors file; expected a name that ends in"),
    "LFS": (lambda path, s: path.write_text(LFS), "a pointer of Git LFS, not the file itself"),
    "HTML": (lambda path, s: path.write_text("\n<!DOCTYPE html>404"), "a web page"),
    "text": (lambda path, s: path.write_text("Übung, no weights"), "a text file; expected a check"),
    "empty": (lambda path, s: path.write_bytes(b""), "an empty file; expected a whole checkpoint"),
    "an archive": (
        lambda path, s: zipfile.ZipFile(path, "w").writestr("a.txt", "a"),
        "a zip archive without weights",
    ),
    "a folder": (lambda path, s: (path.unlink(), path.mkdir()), "a folder; expected a checkpoint"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("write, line", NOT_ONE.values(), ids=NOT_ONE)
def test_what_is_no_checkpoint(detector, weights, refuses, write, line):
    write(weights, detector.state_dict())
    refuses(lambda: Teacher(build(tiny_retinanet()), str(weights)), line)
    started = StudentCheckpointer(build(tiny_retinanet()))
    refuses(lambda: started.load_initial(str(weights)), line)


@pytest.mark.parametrize("family", DETECTORS)
def test_own_channel_order_and_statistics(family):
    """An RGB teacher of BGR images answers as if it had been given RGB images and its own statistics."""
    examples = batch()
    node = DETECTORS[family]()
    said = None
    if family == "fcos":  # which does not know its channel order, so the teacher is told
        said = "RGB"
    else:
        node.input_format = "RGB"
    node.pixel_mean, node.pixel_std = [123.0, 116.0, 103.0], [58.0, 57.0, 56.0]
    teacher = Teacher(build(node), None, image_format="BGR", input_format=said)
    plain = Teacher(build(node), None, image_format="RGB", input_format=said)
    assert teacher.flip_channels and not plain.flip_channels
    turned = [{**x, "image": x["image"].flip(0)} for x in examples]
    before = examples[0]["image"].clone()
    for level, feature in teacher.outputs(examples).features.items():
        torch.testing.assert_close(feature, plain.outputs(turned).features[level])
    assert torch.equal(before, examples[0]["image"]), "the student's batch was changed"
    for own, theirs in zip(lively(teacher.detector)(turned), teacher.detect(examples), strict=True):
        assert len(own["instances"])
        assert torch.equal(own["instances"].scores, theirs["instances"].scores)
    mean = torch.tensor([123.0, 116.0, 103.0]).view(3, 1, 1)
    torch.testing.assert_close(teacher.detector.pixel_mean, mean)


def live_statistics(detector, seed=0):
    """Norms that do something, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    for module in detector.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return detector


def answers(teacher):
    """All that a teacher says of maps, and of regions if it knows some."""
    outputs = teacher.outputs(batch())
    if not hasattr(teacher.detector, "roi_heads"):
        return [*outputs.features.values(), *outputs.pred_logits, *outputs.pred_anchor_deltas]
    boxes = [x["instances"].gt_boxes for x in batch()]
    outputs.set_region_boxes([boxes])
    (regions,) = outputs.regions
    return [*outputs.features.values(), regions.pred_class_logits, regions.pred_proposal_deltas]


@pytest.mark.parametrize("family", DETECTORS)
@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"fuse_norms": True}, 1e-4),
        ({"channels_last": True}, 1e-4),
        ({"fuse_norms": True, "channels_last": True}, 1e-4),
        ({"dtype": "bfloat16"}, 0.1),
    ],
    ids=["fused", "channels last", "both", "bfloat16"],
)
def test_a_faster_teacher_has_the_same_outputs(family, options, tolerance):
    plain = Teacher(live_statistics(build(DETECTORS[family]())), None)
    quick = Teacher(live_statistics(build(DETECTORS[family]())), None, **options)
    for expected, found in zip(answers(plain), answers(quick), strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        assert (expected - found.float()).abs().max() <= tolerance * scale
        assert not found.requires_grad


def test_norms_are_fused_at_the_first_use_and_once():
    """Until then weights can be inherited by name."""
    teacher = Teacher(live_statistics(build(tiny_retinanet())), None, fuse_norms=True)

    def norms():
        return [m for m in teacher.detector.modules() if isinstance(m, FrozenBatchNorm2d)]

    assert norms()
    assert teacher.outputs(batch()).features and not norms()
    assert not any(p.requires_grad for p in teacher.detector.parameters())
    once = {name: p.clone() for name, p in teacher.detector.named_parameters()}
    assert teacher.outputs(batch()).features
    assert all(p.equal(once[name]) for name, p in teacher.detector.named_parameters())


def test_norms_that_still_learn_are_not_folded():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert fuse_norms(layers.train()) == 0 and isinstance(layers[1], nn.BatchNorm2d)
    live_statistics(layers.eval())
    images = torch.rand(2, 3, 8, 8)
    before = layers(images)
    assert fuse_norms(layers) == 1 and isinstance(layers[1], nn.Identity)
    torch.testing.assert_close(layers(images), before)


@pytest.mark.parametrize("family", DETECTORS)
def test_backbone_and_heads_are_compiled(family, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    detector = build(DETECTORS[family]())
    compile_modules(detector)
    assert compiled[0] is detector.backbone
    heads = {"cascade_rcnn": 3}.get(family, 1)
    assert len(compiled) == 1 + heads


def test_a_teacher_answers_in_its_own_precision():
    def answer(dtype):
        teacher = Teacher(build(tiny_retinanet()), None, dtype=dtype)
        return teacher.outputs(batch()).features["p3"].dtype

    assert answer(None) == torch.float32 and answer("bfloat16") == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert answer(None) == torch.bfloat16 and answer("float32") == torch.float32
        # A loss may switch autocast off, and be the first that reads.
        outputs = Teacher(build(tiny_retinanet()), None).outputs(batch())
        with torch.autocast("cpu", enabled=False):
            assert outputs.features["p3"].dtype == torch.bfloat16
        assert outputs.pred_logits[0].dtype == torch.bfloat16
    outputs = Teacher(build(tiny_retinanet()), None).outputs(batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs.features["p3"].dtype == torch.float32
    with pytest.raises(InputError, match="teacher.dtype: half; expected float32"):
        Teacher(build(tiny_retinanet()), None, dtype="half")


def test_under_autocast_weights_are_cast_once_and_for_all(monkeypatch):
    casts = []
    cast = teacher_module.cast_weights_
    monkeypatch.setattr(
        teacher_module, "cast_weights_", lambda *given: casts.append(given[1]) or cast(*given)
    )
    teacher = Teacher(build(tiny_retinanet()), None)
    exact = teacher.outputs(batch()).features["p3"]
    assert exact.dtype == torch.float32 and not casts
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert teacher.outputs(batch()).features["p3"].dtype == torch.bfloat16
    assert casts == [torch.bfloat16]
    assert teacher.outputs(batch()).features["p3"].dtype == torch.bfloat16
    assert len(teacher.detect(batch())) == len(batch())


@pytest.mark.parametrize("family", DETECTORS)
def test_weights_are_kept_in_the_precision_of_the_answers(family):
    """So that autocast need not make them so in each step; to the bit what it would say."""
    casting = Teacher(live_statistics(build(DETECTORS[family]())), None, dtype="bfloat16")
    casting._pending_optimizations.pop("cast")
    kept = Teacher(lively(live_statistics(build(DETECTORS[family]()))), None, dtype="bfloat16")
    before = kept.detect(batch())
    for ours, theirs in zip(answers(kept), answers(casting), strict=True):
        assert ours.dtype == theirs.dtype and ours.equal(theirs)
    halves = {p.dtype for p in kept.detector.backbone.parameters()}
    assert torch.bfloat16 in halves
    assert {p.dtype for p in casting.detector.parameters()} == {torch.float32}
    for own, then in zip(kept.detect(batch()), before, strict=True):
        assert len(own["instances"])
        for name, value in own["instances"].get_fields().items():
            other = then["instances"].get(name)
            value, other = (getattr(v, "tensor", v) for v in (value, other))
            assert value.equal(other), name


def test_no_file_is_named_by_its_key(refuses):
    line = "teacher.weights: none; expected its checkpoint, by model.teacher.weights=FILE"
    refuses(lambda: Teacher(build(tiny_faster_rcnn()), ""), line)


def test_class_names_in_the_file(tmp_path):
    """They need not be given: where the student has others, classes are compared by name; and they may be renamed."""
    names = [f"class {k}" for k in range(CLASSES)]
    other = [names[1], names[0], "old name"]
    detector, student = build(tiny_faster_rcnn()), build(tiny_faster_rcnn(), seed=1)

    def class_map(stored, classes=names, **options):
        torch.save({"model": detector.state_dict(), "classes": stored}, tmp_path / "x.pth")
        teacher = Teacher(copy.deepcopy(detector), str(tmp_path / "x.pth"), **options)
        losses = DistillLosses(tar=TARLoss())
        return Distiller(
            student=student, teacher=teacher, losses=losses, max_iter=9, classes=classes
        ).class_map

    assert class_map(other).pairs == ((0, 1), (1, 0))
    assert class_map(other, aliases={"old name": names[2]}).pairs == ((0, 1), (1, 0), (2, 2))
    assert class_map(names) is None and class_map(other, classes=None) is None
    assert class_map(other[:-1]) is None  # of another detector


def test_aliases_of_no_names_are_refused(refuses):
    detector = build(tiny_retinanet())
    line = "teacher.aliases: no teacher.classes; expected classes that they rename"
    refuses(lambda: Teacher(detector, None, aliases={"a": "b"}), line)


def test_weights_that_cannot_be_fetched(refuses, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(weights_module.PathManager, "get_local_path", fail)
    line = r"http://nowhere/w.pth: cannot be fetched \(no route\); expected a reachable checkpoint"
    refuses(lambda: weights_module.local_path("http://nowhere/w.pth"), line)
