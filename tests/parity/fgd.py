"""Focal and global distillation, by the functions that training uses."""

from __future__ import annotations

from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2kd.losses import FGDLoss
from d2kd.losses.fgd import TERMS, background_mask, channel_attention, spatial_attention

from . import Arrays
from .features import feature_maps, load, set_up, student_leaves, with_gradients

COEFFICIENTS = ("alpha", "beta", "gamma", "lambda")


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`FGDLoss` makes of the inputs of ``fgd.npz``.

    Raises:
        InputError: an array is missing.
    """
    student, teacher = feature_maps(arrays)
    instances = []
    for image in range(len(next(iter(teacher.values())))):
        truth = Instances(tuple(arrays[f"image{image}/size_hw"].tolist()))
        truth.gt_boxes = Boxes(arrays.tensor(f"image{image}/gt_boxes_xyxy"))
        arrays[f"image{image}/gt_classes"]  # as given; nothing reads it
        instances.append(truth)
    weights = {
        name: float(arrays[f"{coefficient}_fgd"]) for name, coefficient in zip(TERMS, COEFFICIENTS)
    }
    # All terms are compared, also one whose weight is 0.
    loss = FGDLoss(temperature=float(arrays["temp"]), published_masks=True, normalize=False)
    set_up(loss, student, teacher, arrays)
    found, losses, leaves = {}, {}, student_leaves(student)
    for level, features in student.items():
        leaves |= load(loss.adapters.convs[level], arrays, level, "align")
        for side, blocks in (("s", loss.relations), ("t", loss.target_relations)):
            leaves |= load(blocks[level].key, arrays, level, f"conv_mask_{side}")
            leaves |= load(blocks[level].transform, arrays, level, f"channel_add_conv_{side}")
            # 0 but for rounding: a softmax does not depend on it.
            del leaves[f"weight_grad/{level}/conv_mask_{side}.bias"]
        s, t = loss.adapters(features, teacher[level], level)
        mask = loss.foreground_mask(instances, tuple(t.shape[-2:]), level)
        images = loss.num_images(t)
        terms = {
            name: value / images for name, value in loss.level_terms(level, s, t, mask).items()
        }
        losses[level] = sum(weights[name] * value for name, value in terms.items())
        found |= {f"loss/{level}/{name}": value for name, value in terms.items()}
        found |= {
            f"foreground_mask/{level}": mask,
            f"background_mask/{level}": background_mask(mask),
            f"teacher_spatial_attention/{level}": spatial_attention(t, loss.temperature),
            f"teacher_channel_attention/{level}": channel_attention(t, loss.temperature),
        }
    return with_gradients(found, losses, leaves)
