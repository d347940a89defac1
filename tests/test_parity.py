"""The parity command: this project agrees with the reference arrays, and a change of one is reported."""

from pathlib import Path

import numpy as np
import pytest

from .parity import Arrays, compare
from .parity.__main__ import main as parity


def file_of(method):
    name = "gfl_erd" if method in ("gfl", "erd") else method
    return str(Path(__file__).with_name("parity") / f"{name}.npz")


def altered(path, method, **changes):
    """A copy of the method's file with other arrays, or without those that are None."""
    arrays = {**Arrays(file_of(method)), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return str(path)


def refused(method, file, capsys):
    """What the command says of a file that it does not take."""
    with pytest.raises(SystemExit) as stop:
        parity(["--method", method, file])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    return captured.err


@pytest.mark.parametrize(
    "method, inputs, count",
    [
        ("bckd", None, 16),
        ("crosskd", None, 45),
        ("icd", None, 14),
        ("ld", None, 19),
        ("pgd", None, 29),
        ("gfl", ["class_logits", "box_logits"], 25),
        ("erd", [f"{d}_{x}_logits" for d in ("old", "new") for x in ("class", "box")], 24),
        ("dkd", None, 4),
        ("dist", None, 9),
        ("pkd", None, 7),
        ("cwd", None, 7),
        ("mgd", None, 22),
        ("fgd", None, 73),
        ("reviewkd", None, 44),
    ],
)
def test_methods_agree(method, inputs, count, capsys):
    """Labels, losses, gradients, detections and selections are those of the published implementation."""
    file = file_of(method)
    assert parity(["--method", method, file]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == count and all(line.endswith(" ok") for line in lines)
    if inputs is not None:  # all arrays of the method but these are compared
        names = {name for name in Arrays(file) if name.startswith(f"{method}/")}
        wanted = {name for name in names if name.split("/")[1] not in inputs}
        assert {line.split()[0] for line in lines} == wanted


def scaled(value):
    return value * np.float32(1.001)


def finite(logits):
    return np.where(logits == -np.inf, np.float32(-1e9), logits)


@pytest.mark.parametrize(
    "method, name, change",
    [
        ("bckd", "loss/box/p4", scaled),
        ("bckd", "student_box_logits_grad/p3", np.negative),
        ("crosskd", "fcos/loss/regression", scaled),
        ("crosskd", "retinanet/student_regression_tower_grad/p4", np.negative),
        ("icd", "loss/distill", scaled),
        ("icd", "position_embedding", lambda value: value[:-1]),
        ("icd", "layer0/attention_logits", finite),
        ("icd", "key_is_padding", np.logical_not),
        ("icd", "student_feature_grad/p5", lambda value: value * np.float32(np.nan)),
        ("ld", "loss/vlr/p4", scaled),
        ("pgd", "own_mask/loss", scaled),
        ("pgd", "regression_map/p4", lambda value: value[:1]),
        ("ld", "paper/vlr_region", np.sign),
        ("gfl", "gfl/loss_bbox", scaled),
        ("gfl", "gfl/atss_labels", lambda value: value[:, 1:]),
        ("gfl", "gfl/class_logits_grad/p4", np.negative),
        ("erd", "erd/loss_dist_bbox", scaled),
        ("erd", "erd/kept_box_locations/image1", lambda value: value[:-1]),
        ("erd", "erd/distill_grad_box_logits/p4", np.negative),
        ("dkd", "loss/non_target", scaled),
        ("dist", "dense/student_logits_grad/p4", scaled),
        ("pkd", "student_feature_grad/p4", scaled),
        ("cwd", "loss/p5", scaled),
        ("reviewkd", "after/p4/conv2.1.running_var", scaled),
        ("fgd", "background_mask/p5", scaled),
        ("mgd", "weight_grad/p3/generation.0.weight", scaled),
    ],
)
def test_it_can_fail(method, name, change, tmp_path, capsys):
    value = change(Arrays(file_of(method))[name])
    assert parity(["--method", method, altered(tmp_path / "a.npz", method, **{name: value})]) == 1
    out = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "OUT" in line]
    assert out == [name]


@pytest.mark.parametrize(
    "method, name",
    [
        ("bckd", "teacher_box_logits/p5"),
        ("bckd", "box_weight"),
        ("crosskd", "gfl/is_used/p4"),
        ("crosskd", "fcos/normalizer"),
        ("icd", "teacher_feature/p6"),
        ("icd", "loss/distill"),
        ("icd", "query_centers"),
        ("ld", "image1/gt_boxes_xyxy"),
        ("ld", "kd_temperature"),
        ("pgd", "teacher_boxes_xyxy"),
        ("pgd", "image1/uniform/regression"),
        ("gfl", "gfl/box_logits/p6"),
        ("gfl", "gfl/loss_dfl"),
        ("gfl", "num_old_classes"),
        ("gfl", "image1/gt_boxes_xyxy"),
        ("erd", "erd/old_box_logits/p6"),
        ("erd", "gfl/anchors_xyxy"),
        ("erd", "erd/loss_dfl"),
        ("erd", "image2/size_hw"),
        ("dkd", "gt_classes"),
        ("dist", "dense/teacher_logits/p4"),
        ("pkd", "teacher_feature/p4"),
        ("cwd", "tau"),
        ("reviewkd", "weight/p3/att_conv.0.bias"),
        ("fgd", "image1/gt_boxes_xyxy"),
        ("mgd", "weight/p4/generation.2.bias"),
    ],
)
def test_it_names_a_missing_array(method, name, tmp_path, capsys):
    file = altered(tmp_path / "less.npz", method, **{name: None})
    assert f"no array '{name}'" in refused(method, file, capsys)


def test_it_refuses_what_is_no_such_file(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("text")
    small = altered(tmp_path / "small.npz", "icd", descriptor=np.zeros((1, 2, 3), np.float32))
    for file in (str(tmp_path / "text.npz"), str(tmp_path / "none.npz"), small):
        assert file in refused("icd", file, capsys)


def test_comparison_follows_its_tolerance():
    ones = np.ones(3, np.float32)
    assert compare(ones * (1 + 9e-5), ones)[2] and not compare(ones * (1 + 2e-4), ones)[2]
    assert compare(np.zeros(0), np.zeros(0, np.float32)) == (0, 0, True)
    assert not compare(np.array([1, 2]), np.array([1, 3]))[2]
