"""What d2kd needs of Detectron2, name by name: where a version differs, this says what, before a training does."""

import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from detectron2 import _C
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import detection_utils
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from torch import nn

from d2kd.engine.checkpoint import LOSS_NORMALIZER
from d2kd.modeling import capture, get_outputs_class
from d2kd.modeling.weights import load_checkpoint
from d2kd.utils import compat

from .common import CLASSES, DETECTORS, batch, build

# The modules and methods that capture() listens to, and how often each is called in a training step.
RCNN = {"backbone": 1, "roi_heads": 1, "box_pooler": 1, "box_predictor.0": 1}
CASCADE = RCNN | {"box_pooler": 3, "box_predictor.1": 1, "box_predictor.2": 1}
DENSE = {"backbone": 1, "head": 1, "anchor_generator": 1, "label_anchors": 1}
MASK = RCNN | {"mask_head": 1, "mask_layers": 1}
LISTENED = {"faster_rcnn": RCNN, "mask_rcnn": MASK, "cascade_rcnn": CASCADE} | dict.fromkeys(
    ("retinanet", "fcos", "gfl"), DENSE
)

# What else is read of a detector, by dotted name.
OF_ALL = [
    "backbone.output_shape",
    "backbone.size_divisibility",
    "device",
    "pixel_mean",
    "pixel_std",
]
OF_ALL += ["preprocess_image"]
OF_RCNN = OF_ALL + [
    *("input_format", "proposal_generator", "roi_heads.num_classes", "roi_heads.box_in_features"),
    *("roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.box_pooler"),
]
OF_PREDICTOR = ["box2box_transform", "test_score_thresh", "test_nms_thresh", "test_topk_per_image"]
OF_DENSE = OF_ALL + [
    *("num_classes", "head_in_features", "anchor_generator.cell_anchors", "label_anchors"),
    *("box2box_transform.apply_deltas", "test_score_thresh", "test_topk_candidates"),
    *("test_nms_thresh", "max_detections_per_image"),
    *("_transpose_dense_predictions", "_decode_multi_level_predictions"),
]
READ = {
    "faster_rcnn": OF_RCNN + [f"roi_heads.box_predictor.{name}" for name in OF_PREDICTOR],
    "mask_rcnn": [
        *OF_RCNN,
        *("roi_heads.mask_on", "roi_heads.mask_in_features", "roi_heads.mask_pooler"),
    ],
    "cascade_rcnn": [*OF_RCNN, "roi_heads.proposal_matchers", "roi_heads.num_cascade_stages"],
    "retinanet": [*OF_DENSE, "input_format"],
    "fcos": OF_DENSE,
    "gfl": [*OF_DENSE, "input_format", "head.reg_max"],
}


def named(thing, dotted):
    for name in dotted.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("family", DETECTORS)
def test_every_name_that_is_listened_to_and_read(family):
    detector = build(DETECTORS[family]()).train()
    kind = get_outputs_class(detector)
    hook_points = kind.hook_points(detector)
    assert hook_points.keys() == LISTENED[family].keys()
    own = list(detector.modules())
    for joint in hook_points.values():
        owner = joint if isinstance(joint, nn.Module) else joint.__self__
        assert any(owner is one for one in own)
    for name in READ[family]:
        named(detector, name)
    with EventStorage(), capture(hook_points) as calls:
        losses = detector(batch())
    assert {name: len(heard) for name, heard in calls.items()} == LISTENED[family]
    assert all(isinstance(value, torch.Tensor) for value in losses.values())

    # Where it has another name, a resumed run would silently start it anew.
    assert hasattr(detector, LOSS_NORMALIZER) == (family in ("retinanet", "fcos"))

    ((images,), features), *_ = calls["backbone"]
    assert isinstance(images, torch.Tensor) and isinstance(features, dict)
    if "head" in hook_points:
        ((inputs,), predictions), *_ = calls["head"]
        assert len(inputs) == len(detector.head_in_features) and len(predictions) in (2, 3)
        assert all(len(of_kind) == len(inputs) for of_kind in predictions)
        _, anchors = calls["anchor_generator"][0]
        assert len(anchors) == len(inputs) and all(isinstance(one, Boxes) for one in anchors)
        (given, truth), (labels, boxes) = calls["label_anchors"][0]
        assert given is anchors and all(isinstance(one, Instances) for one in truth)
        count = sum(map(len, anchors))
        assert [len(one) for one in (*labels, *boxes)] == [count] * 2 * len(truth)
        return
    (inputs, (proposals, _)), *_ = calls["roi_heads"]
    image_list, given, before, truth = inputs
    assert isinstance(image_list, ImageList) and given.keys() == features.keys()
    assert all(isinstance(one, Instances) for one in [*before, *proposals, *truth])
    for (maps, boxes), pooled in calls["box_pooler"]:
        assert isinstance(maps, list) and all(isinstance(one, Boxes) for one in boxes)
        assert pooled.shape[0] == sum(map(len, boxes))
    for (pooled, instances), _ in calls.get("mask_head", ()):
        ((given,), logits) = calls["mask_layers"][0]
        assert (
            given is pooled
            and len(logits) == sum(map(len, instances))
            and logits.shape[1] == CLASSES
        )
        assert all(one.has("gt_masks") and one.has("proposal_boxes") for one in instances)
    for stage in range(len(calls["box_pooler"])):
        ((seen, *_), (logits, deltas)) = calls[f"box_predictor.{stage}"][0]
        assert logits.shape == (len(seen), CLASSES + 1) and deltas.shape[1] in (4, 4 * CLASSES)


def test_what_the_trainer_stands_on():
    model = nn.Linear(1, 1)
    trainer = SimpleTrainer(model, (), torch.optim.SGD(model.parameters(), lr=0.1))
    assert trainer.model is model and callable(trainer.state_dict)
    for name in ("build_model", "build_optimizer", "build_lr_scheduler", "build_train_loader"):
        assert callable(getattr(DefaultTrainer, name))
    for name in ("build_hooks", "build_writers", "test", "resume_or_load", "train", "run_step"):
        assert callable(getattr(DefaultTrainer, name))
    for name in ("EvalHook", "IterationTimer", "LRScheduler", "PeriodicCheckpointer"):
        assert issubclass(getattr(hooks, name), hooks.HookBase)
    assert "img_ids" in inspect.signature(COCOEvaluator.evaluate).parameters
    assert "use_fast_impl" in inspect.signature(COCOEvaluator.__init__).parameters
    assert issubclass(detection_utils.SizeMismatchError, ValueError)


def test_what_the_hooks_stand_on(tmp_path):
    assert hooks.EvalHook(2, dict)._period == 2 and callable(hooks.EvalHook._do_eval)
    trainer, hook = TrainerBase(), hooks.HookBase()
    trainer.register_hooks([hook])
    assert trainer._hooks == [hook]
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path))
    periodic = hooks.PeriodicCheckpointer(checkpointer, 1, max_iter=9, max_to_keep=2)
    assert periodic.recent_checkpoints == [] and periodic.file_prefix == "model"
    periodic.step(0)
    assert periodic.recent_checkpoints == [str(tmp_path / "model_0000000.pth")]


def test_what_checkpoints_stand_on():
    checkpointer = DetectionCheckpointer(nn.Linear(1, 2), save_to_disk=False)
    assert callable(checkpointer._log_incompatible_keys)
    state = {"weight": torch.ones(1, 1), "more": torch.ones(1)}
    found = checkpointer._load_model({"model": state})
    assert (found.missing_keys, found.unexpected_keys) == (["weight", "bias"], ["more"])
    assert found.incorrect_shapes == [("weight", (1, 1), (2, 1))]


def _as_it_is(monkeypatch):
    """0.6, or what is installed."""


def _later(monkeypatch):
    """Where Detectron2 reads files inside ``load`` alone."""
    cls, inside = DetectionCheckpointer, []
    load, load_file = cls.load, cls._load_file

    def loading(self, *args, **kwargs):
        inside.append(self)
        try:
            return load(self, *args, **kwargs)
        finally:
            inside.remove(self)

    def reading(self, file):
        assert self in inside, "`_load_file` must be called inside `load`"
        return load_file(self, file)

    monkeypatch.setattr(cls, "load", loading)
    monkeypatch.setattr(cls, "_load_file", reading)


@pytest.mark.parametrize("version", [_as_it_is, _later])
def test_checkpoints_are_read_by_either(version, tmp_path, monkeypatch):
    """Our own, bare tensors as torch saves them, and the model zoo's."""
    version(monkeypatch)
    state = nn.Linear(2, 3).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    torch.save({"model": state, "iteration": 4}, tmp_path / "ours.pth")
    torch.save(state, tmp_path / "bare.pth")
    zoo = {"model": arrays, "__author__": "Detectron2"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    (tmp_path / "caffe.pkl").write_bytes(pickle.dumps(arrays | {"weight_momentum": 0}))
    torch.save({"model_state": state | {"bn.num_batches_tracked": 1}}, tmp_path / "pycls.pyth")
    for name, rest in {
        "ours.pth": {"iteration": 4},
        "bare.pth": {},
        "zoo.pkl": {"__author__": "Detectron2"},
        "caffe.pkl": {"__author__": "Caffe2", "matching_heuristics": True},
        "pycls.pyth": {"__author__": "pycls", "matching_heuristics": True},
        "bare.pth?matching_heuristics=True": {"matching_heuristics": True},
    }.items():
        found = load_checkpoint(str(tmp_path / name))
        model = found.pop("model")
        assert found == rest and model.keys() == state.keys()
        assert all(np.array_equal(model[key], arrays[key]) for key in arrays)


def test_what_a_backbone_of_ours_and_pictures_stand_on():
    backbone = type("Ours", (Backbone,), {"forward": None})()
    backbone._out_features = ["p3"]
    backbone._out_feature_channels, backbone._out_feature_strides = {"p3": 4}, {"p3": 8}
    assert backbone.output_shape() == {"p3": ShapeSpec(channels=4, stride=8)}
    visualizer = Visualizer(np.zeros((8, 8, 3), np.uint8))
    visualizer.draw_box((1, 1, 5, 5))
    assert len(visualizer.output.ax.patches) == 1


def test_compiled_or_not(monkeypatch):
    monkeypatch.setattr(_C, "__file__", "detectron2/_C.py", raising=False)
    assert not compat.has_compiled_operators()
    monkeypatch.setattr(_C, "__file__", "detectron2/_C.cpython-311-x86_64-linux-gnu.so")
    assert compat.has_compiled_operators()


def test_processes_of_a_machine_are_told_either_way(monkeypatch):
    told = []
    monkeypatch.setattr(comm, "create_local_process_group", told.append, raising=False)
    compat.make_local_process_group(2)
    assert told == [2]
    monkeypatch.delattr(comm, "create_local_process_group")
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    monkeypatch.setattr(compat.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(compat.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(compat.dist, "new_group", lambda ranks: ranks)
    compat.make_local_process_group(2)
    assert comm._LOCAL_PROCESS_GROUP == [2, 3]


def test_boxes_of_either_kind():
    tensor = torch.rand(3, 4)
    for found in compat.box_tensors([Boxes(tensor), tensor]):
        assert torch.equal(found, tensor)


def test_warnings_of_our_own_code_are_errors_and_those_of_others_are_not():
    with warnings.catch_warnings(record=True) as heard:  # pytest's filters stay
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn_explicit("ours", UserWarning, "file", 1, module="d2kd.losses.tar")
        warnings.warn_explicit("theirs", UserWarning, "file", 1, module="detectron2.layers")
    assert [str(one.message) for one in heard] == ["theirs"]
