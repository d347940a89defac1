"""Small detectors and batches for tests, and a check of the properties that every distillation loss should have.

    from d2kd.testing import check_loss
    check_loss(lambda: MyLoss(levels=["p3"]), detectors=["faster_rcnn", "retinanet"])

``python -m d2kd.testing`` checks the losses of this project with all detector families and prints a table.

Everything runs on the CPU in seconds, seeded, without downloads. :func:`check_loss` keeps the caller's random state.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from .config import METHODS, get_config, method, without_priors
from .losses import DistillLoss, DistillLosses
from .modeling import Distiller, Teacher
from .utils.errors import InputError

CLASSES = 3


def tiny_faster_rcnn(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """Return the LazyConfig node of a Faster R-CNN with FrozenBN, which is the same in training and evaluation."""
    return _tiny_rcnn("faster_rcnn_small", width, channels, classes)


def tiny_mask_rcnn(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """Return the LazyConfig node of a Mask R-CNN with FrozenBN."""
    model = _tiny_rcnn("mask_rcnn_small", width, channels, classes)
    model.roi_heads.mask_head.input_shape = ShapeSpec(channels=channels, width=14, height=14)
    model.roi_heads.mask_head.conv_dims = [channels] * 2
    return model


def tiny_cascade_mask_rcnn(
    width: int = 4, channels: int = 16, classes: int = CLASSES
) -> DictConfig:
    """Return the LazyConfig node of a Cascade Mask R-CNN of three stages with FrozenBN."""
    model = tiny_cascade_rcnn(width, channels, classes)
    heads = tiny_mask_rcnn(width, channels, classes).roi_heads
    for part in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads[part] = heads[part]
    return model


def tiny_cascade_rcnn(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """Return the LazyConfig node of a Cascade R-CNN of three stages with FrozenBN."""
    return _tiny_rcnn("cascade_rcnn_small", width, channels, classes)


def tiny_retinanet(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """Return the LazyConfig node of a RetinaNet with FrozenBN."""
    return _tiny_dense("retinanet_small", width, channels, classes)


def tiny_fcos(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """Return the LazyConfig node of an FCOS with FrozenBN."""
    return _tiny_dense("fcos_small", width, channels, classes)


def tiny_gfl(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """Return the LazyConfig node of a GFL with FrozenBN and GroupNorm in its head."""
    model = _tiny_dense("gfl_small", width, channels, classes)
    model.head.num_groups = 2
    return model


@functools.cache
def _small(name: str) -> DictConfig:
    """Return the model node of one of d2kd's configs, which is executed once. Callers change only copies of it."""
    return get_config(f"common/models/{name}.py").model


def _tiny_rcnn(name: str, width: int, channels: int, classes: int) -> DictConfig:
    model = copy.deepcopy(_small(name))
    _shrink(model, width, channels)
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn.head.in_channels = channels
    rpn.batch_size_per_image = 32
    rpn.pre_nms_topk = (60, 30)
    rpn.post_nms_topk = (20, 10)
    heads.num_classes = classes
    heads.batch_size_per_image = 16
    for head in heads.get("box_heads") or [heads.box_head]:
        head.input_shape = ShapeSpec(channels=channels, height=7, width=7)
        head.fc_dims = [32]
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        predictor.input_shape = ShapeSpec(channels=32)
    return model


def _tiny_dense(name: str, width: int, channels: int, classes: int) -> DictConfig:
    model = copy.deepcopy(_small(name))
    _shrink(model, width, channels)
    model.backbone.top_block.in_channels = channels
    model.head.input_shape = [ShapeSpec(channels=channels)] * 5
    model.head.conv_dims = [channels]
    model.num_classes = classes
    return model


def _shrink(model: DictConfig, width: int, channels: int) -> None:
    model.backbone.bottom_up.width = width
    model.backbone.bottom_up.blocks = [1, 1, 1, 1]
    model.backbone.bottom_up.norm = "FrozenBN"
    model.backbone.out_channels = channels


DETECTORS: dict[str, Callable[..., DictConfig]] = {
    "faster_rcnn": tiny_faster_rcnn,
    "mask_rcnn": tiny_mask_rcnn,
    "cascade_rcnn": tiny_cascade_rcnn,
    "retinanet": tiny_retinanet,
    "fcos": tiny_fcos,
    "gfl": tiny_gfl,
}
"""Small detectors by family name: functions of width, channels and classes that return a model node."""


def build(node: DictConfig, seed: int = 0) -> nn.Module:
    """Instantiate a node with random weights from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return instantiate(node)


@functools.lru_cache(maxsize=8)
def _built(node: Callable[..., DictConfig], classes: int, wider: bool = False) -> nn.Module:
    """Return the student of :func:`distiller`, or its wider teacher: to be copied, which is faster than to build it."""
    if wider:
        return build(node(width=6, channels=24, classes=classes), 1)
    return build(node(classes=classes))


def batch(
    sizes: Sequence[tuple[int, int]] = ((64, 64), (48, 72)),
    objects: Sequence[int] = (2, 1),
    classes: int = CLASSES,
    seed: int = 0,
) -> list[dict]:
    """Return a training batch in Detectron2's format: random images of ``sizes`` (H, W), ``objects[i]`` boxes each.

    Masks are the boxes as polygons.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for (height, width), count in zip(sizes, objects, strict=True):
        corner = torch.rand(count, 2, generator=generator) * 0.5
        extent = 0.2 + torch.rand(count, 2, generator=generator) * 0.3
        scale = torch.tensor([width, height, width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1) * scale)
        instances.gt_classes = torch.randint(classes, (count,), generator=generator)
        instances.gt_masks = box_masks(instances.gt_boxes)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        examples.append({"image": image, "instances": instances, "height": height, "width": width})
    return examples


def box_masks(boxes: Boxes) -> PolygonMasks:
    """Return boxes as masks with one polygon each."""
    corners = boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]].tolist()
    return PolygonMasks([[polygon] for polygon in corners])


def edge_case_batches(classes: int = CLASSES) -> dict[str, list[dict]]:
    """Return batches at the limits of valid input, by description."""
    pixel = batch(objects=(1, 1), classes=classes)
    for example in pixel:
        example["instances"].gt_boxes = Boxes(torch.tensor([[3.0, 3.0, 4.0, 4.0]]))
        example["instances"].gt_masks = box_masks(example["instances"].gt_boxes)
    crowd = batch(sizes=((64, 64),), objects=(40,), classes=classes)
    return {
        "no ground truth": batch(objects=(0, 0), classes=classes),
        "one image without ground truth": batch(objects=(2, 0), classes=classes),
        "one image": batch(sizes=((33, 65),), objects=(1,), classes=classes),
        "sizes far apart": batch(sizes=((32, 160), (96, 40)), classes=classes),
        "boxes of one pixel": pixel,
        "more objects than regions": crowd,
    }


def check_loss(
    factory: Callable[[], DistillLoss],
    detectors: Iterable[str] | Mapping[str, Callable[..., DictConfig]] = tuple(DETECTORS),
) -> list[str]:
    """Check the properties of a loss with each detector family.

    * The loss of a detector and its copy is 0. First, ``make_identity()`` is called on every module that has it: it
      sets learned parts to the identity and removes terms that train only such parts.
    * The student's own losses, buffers and random numbers are unchanged.
    * The teacher is not part of the model's parameters, state or training mode.
    * The teacher computes only the outputs that the loss reads, once.
    * The student and all modules of the loss get gradients.
    * Losses and gradients are finite on empty and unusual input, with one class unless that is refused, and under autocast.
    * The loss is 0 at weight 0.
    * It trains the student on unlabelled images, unless it says that it needs ground truth.

    Args:
        factory: function that returns a new loss at each call.
        detectors: family names of :data:`DETECTORS`, or a dict of functions like its values.

    Returns:
        list[str]: the checked properties, as ``"<family>: <property>"``.

    Raises:
        AssertionError: if a property does not hold. The message names the family, the property and the value found.
    """
    if not isinstance(detectors, Mapping):
        detectors = {name: DETECTORS[name] for name in detectors}
    checked = []
    with torch.random.fork_rng():
        for family, node in detectors.items():
            for title, check in PROPERTIES.items():
                torch.manual_seed(0)
                try:
                    check(factory, node)
                except AssertionError as error:
                    raise AssertionError(f"{family}: {title}: {error}") from error
                checked.append(f"{family}: {title}")
    return checked


def distiller(
    factory: Callable[[], DistillLoss],
    node: Callable[..., DictConfig],
    *,
    same: bool = False,
    classes: int = CLASSES,
    weight: float | None = None,
) -> Distiller:
    """Return a small Distiller in training mode. Its teacher is a wider detector or, if ``same``, a student's copy."""
    student = copy.deepcopy(_built(node, classes))
    if same:
        teacher = copy.deepcopy(student)
    else:
        teacher = copy.deepcopy(_built(node, classes, wider=True))
    loss = factory()
    if weight is not None:
        loss.weight = weight
    losses, teacher = DistillLosses(loss=loss), Teacher(teacher, None)
    return Distiller(student=student, teacher=teacher, losses=losses, max_iter=2).train()


def forward_losses(model: nn.Module, examples: list[dict], seed: int = 0) -> dict[str, Tensor]:
    """Return the losses of one forward at half of a run, with random numbers from ``seed``."""
    torch.manual_seed(seed)
    with EventStorage(start_iter=1):
        return model(examples)


def sum_distill_losses(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of the distillation losses in ``losses``."""
    terms = [value for key, value in losses.items() if key.startswith("distill/")]
    assert terms, "the loss returned no terms"
    return sum(terms)


def _gradient_norm(modules: Iterable[nn.Module]) -> float:
    gradients = [p.grad.norm() for m in modules for p in m.parameters() if p.grad is not None]
    return float(torch.stack(gradients).norm()) if gradients else 0.0


def _zero_for_equal_detectors(factory, node) -> None:
    model = distiller(factory, node, same=True)
    for module in model.losses.modules():
        if hasattr(module, "make_identity"):
            module.make_identity()
    value = sum_distill_losses(forward_losses(model, batch()))
    assert abs(value.item()) <= 1e-6, f"the loss of a detector and its copy is {value.item()}"
    if value.requires_grad:
        value.backward()
    norm = _gradient_norm([model.student])
    assert norm <= 1e-5, f"the gradient of a detector with its copy as teacher has norm {norm}"


def _student_unchanged(factory, node) -> None:
    model = distiller(factory, node)
    copied = copy.deepcopy(model.student)
    expected, rng_state = forward_losses(copied, batch()), torch.get_rng_state()
    losses, rng_state_distilled = forward_losses(model, batch()), torch.get_rng_state()
    for key, value in expected.items():
        assert torch.equal(value, losses[key]), (
            f"{key} is {losses[key].item()}, without distillation {value.item()}"
        )
    state = model.student.state_dict()
    changed = [key for key, value in copied.state_dict().items() if not value.equal(state[key])]
    assert not changed, f"{changed[:3]} differ from a step without distillation"
    # Otherwise the next step would sample other regions, or other images.
    assert rng_state_distilled.equal(rng_state), "the global random generator was used"
    hooked = [name for name, m in model.named_modules() if m._forward_hooks]
    assert not hooked, f"hooks left on {hooked}"


def _teacher_hidden(factory, node) -> None:
    model = distiller(factory, node)
    teacher = model.teacher.detector
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    ids = {id(p) for p in teacher.parameters()}
    model.train()
    sum(forward_losses(model, batch()).values()).backward()
    assert not any(id(p) in ids for p in model.parameters()), "it is in model.parameters()"
    assert not any("teacher" in key for key in model.state_dict()), "it is in the state_dict"
    assert not any(m.training for m in teacher.modules()), "it is in training mode"
    assert all(p.grad is None for p in teacher.parameters()), "it received a gradient"
    changed = [key for key, value in teacher.state_dict().items() if not value.equal(before[key])]
    assert not changed, f"a step changed its {changed[:3]}"


_OUTPUTS_OF = {
    "backbone": ("features",),
    "proposal_generator": ("proposals",),
    "roi_heads.box_head": ("regions",),
    "roi_heads.mask_head.predictor": ("mask_regions",),
    "head": ("predictions",),
}


def _only_read_outputs_computed(factory, node) -> None:
    model = distiller(factory, node)
    teacher = model.teacher.detector
    ran: list[str] = []
    for name in _OUTPUTS_OF:
        try:
            module = teacher.get_submodule(name)
        except AttributeError:
            continue
        # The ModuleList of a cascade's stages has no forward.
        first = module[0] if isinstance(module, nn.ModuleList) else module
        first.register_forward_hook(lambda *_, name=name: ran.append(name))
    outputs = []
    compute = model.teacher.outputs
    model.teacher.outputs = lambda *args, **kwargs: (
        outputs.append(compute(*args, **kwargs)) or outputs[-1]
    )
    forward_losses(model, batch())
    computed = set(outputs[0].__dict__)
    for name in set(ran):
        assert computed & set(_OUTPUTS_OF[name]), f"the teacher's {name} ran, but was not read"
        assert ran.count(name) == 1, f"the teacher's {name} ran {ran.count(name)} times in a step"


def _gradients(factory, node) -> None:
    model = distiller(factory, node)
    value = sum_distill_losses(forward_losses(model, batch()))
    assert value.requires_grad, "the loss is detached from the student"
    value.backward()
    norm = _gradient_norm([model.student])
    assert 0 < norm < float("inf"), f"the student's gradient has norm {norm}"
    # DDP allows a gradient of 0, but raises an error for a parameter without gradient.
    missing = [n for n, p in model.losses.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing[:3]}"


def _finite(factory, node, examples, *, case: str, **options) -> None:
    model = distiller(factory, node, **options)
    losses = forward_losses(model, examples)
    for key, value in losses.items():
        assert torch.isfinite(value).all(), f"{case}: {key} is {value.item()}"
    sum(losses.values()).backward()
    norm = _gradient_norm([model])
    assert norm < float("inf"), f"{case}: the gradient has norm {norm}"


def _empty_and_unusual_input(factory, node) -> None:
    for case, examples in edge_case_batches().items():
        _finite(factory, node, examples, case=case)
    try:
        distiller(factory, node, classes=1)
    except InputError:
        pass  # refused before training
    else:
        _finite(factory, node, batch(classes=1), case="one class", classes=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            forward_losses(build(node()).train(), batch())
        except RuntimeError:
            return  # not supported by the detector: fvcore's GIoU fails on FCOS's half-precision boxes
        _finite(factory, node, batch(), case="bfloat16 autocast")


def _zero_at_weight_zero(factory, node) -> None:
    model = distiller(factory, node, weight=0.0)
    losses = forward_losses(model, batch())
    sum(losses.values()).backward()
    terms = {key: value.item() for key, value in losses.items() if key.startswith("distill/")}
    assert not any(terms.values()), f"the loss at weight 0 is {terms}"
    missing = [n for n, p in model.losses.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient at weight 0, which DDP needs, for {missing[:3]}"


def _unlabelled_images(factory, node) -> None:
    model = distiller(factory, node)
    if any(loss.needs_ground_truth for loss in model.losses.by_name.values()):
        return
    try:
        losses = forward_losses(model, [{**x, "unlabelled": True} for x in batch()])
    except InputError as error:
        raise AssertionError(f"it reads ground truth: {error}") from error
    own = [key for key in losses if not key.startswith("distill/")]
    assert not own, f"the student's own losses are there: {own}"
    sum(losses.values()).backward()
    norm = _gradient_norm([model.student])
    assert 0 < norm < float("inf"), f"the student's gradient has norm {norm}"
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient, which DDP needs, for {missing[:3]}"


PROPERTIES: dict[str, Callable] = {
    "zero for equal detectors": _zero_for_equal_detectors,
    "student unchanged": _student_unchanged,
    "teacher hidden": _teacher_hidden,
    "only read outputs computed": _only_read_outputs_computed,
    "gradients": _gradients,
    "empty and unusual input": _empty_and_unusual_input,
    "zero at weight 0": _zero_at_weight_zero,
    "unlabelled images": _unlabelled_images,
}
"""The properties that :func:`check_loss` checks, in this order."""


def main() -> int:
    """Print the number of properties that each method has on each family. Return 1 if a check failed."""
    failed = []
    print("".join(f"{head:>14}" for head in ("passed", *DETECTORS)))
    for name in METHODS:
        print(f"{name:>14}", end="", flush=True)
        # In a recipe, because a loss may refer to its seed.
        recipe = {"losses": without_priors(method(name)["losses"]), "train": {"seed": 0}}
        recipe = OmegaConf.create(recipe, flags={"allow_objects": True})
        (loss,) = instantiate(recipe.losses).by_name.values()
        for family in DETECTORS:
            try:
                passed = check_loss(lambda loss=loss: copy.deepcopy(loss), [family])
                cell = f"{len(passed)} of {len(PROPERTIES)}"
            except InputError:  # the loss does not support this family
                cell = "-"
            except AssertionError as error:
                cell = "failed"
                failed.append(f"{name}: {error}")
            print(f"{cell:>14}", end="", flush=True)
        print()
    for error in failed:
        print(error)
    return 1 if failed else 0


if __name__ == "__main__":
    # Log messages of the losses would break the table.
    logging.getLogger("d2kd").setLevel(logging.ERROR)
    raise SystemExit(main())
