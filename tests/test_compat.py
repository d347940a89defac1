"""What d2kd captures of Detectron2's detectors, and where its versions differ."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from detectron2 import _C
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from d2kd.engine.checkpoint import LOSS_NORMALIZER
from d2kd.modeling import capture, get_outputs_class
from d2kd.modeling.weights import load_checkpoint
from d2kd.utils import compat

from .common import DETECTORS, batch, build

# The modules and methods that capture() listens to, and how often each is called in a training step.
RCNN = {"backbone": 1, "roi_heads": 1, "box_pooler": 1, "box_predictor.0": 1}
CASCADE = RCNN | {"box_pooler": 3, "box_predictor.1": 1, "box_predictor.2": 1}
DENSE = {"backbone": 1, "head": 1, "anchor_generator": 1, "label_anchors": 1}
LISTENED = {"faster_rcnn": RCNN, "mask_rcnn": RCNN, "cascade_rcnn": CASCADE} | dict.fromkeys(
    ("retinanet", "fcos", "gfl"), DENSE
)


@pytest.mark.parametrize("family", DETECTORS)
def test_what_is_captured(family):
    detector = build(DETECTORS[family]()).train()
    kind = get_outputs_class(detector)
    hook_points = kind.hook_points(detector)
    assert hook_points.keys() == LISTENED[family].keys()
    own = list(detector.modules())
    for joint in hook_points.values():
        assert any(joint is one for one in own) or joint.__self__ is detector
    with EventStorage(), capture(hook_points) as calls:
        losses = detector(batch())
    assert {name: len(heard) for name, heard in calls.items()} == LISTENED[family]
    assert all(isinstance(value, torch.Tensor) for value in losses.values())

    # Where it has another name, a resumed run would silently start it anew.
    assert hasattr(detector, LOSS_NORMALIZER) == (family in ("retinanet", "fcos"))


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


@pytest.mark.parametrize("version", [lambda _: None, _later], ids=["installed", "later"])
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


def test_compiled_or_not(monkeypatch):
    monkeypatch.setattr(_C, "__file__", "detectron2/_C.py", raising=False)
    assert not compat.has_compiled_operators()
    monkeypatch.setattr(_C, "__file__", "detectron2/_C.cpython-311-x86_64-linux-gnu.so")
    assert compat.has_compiled_operators()


def test_processes_of_a_machine_are_a_group_either_way(monkeypatch):
    sizes = []
    monkeypatch.setattr(comm, "create_local_process_group", sizes.append, raising=False)
    compat.make_local_process_group(2)
    assert sizes == [2]
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
    with warnings.catch_warnings(record=True) as shown:  # pytest's filters stay
        for module in ("d2kd", "d2kd.losses.tar"):
            with pytest.raises(FutureWarning, match="old"):
                warnings.warn_explicit("old", FutureWarning, "file", 1, module=module)
        warnings.warn_explicit("other", UserWarning, "file", 1, module="detectron2.layers")
    assert [str(one.message) for one in shown] == ["other"]
