"""The properties every distillation loss owes its users, checked on small detectors in seconds.

    from d2kd.testing import check_loss
    check_loss(lambda: MyLoss(levels=["p3"]), detectors=["faster_rcnn", "retinanet"])

``python -m d2kd.testing`` checks this project's own against all families and prints a table.

Everything runs on the CPU, seeded, without downloads, and leaves the caller's random state alone.
"""

from __future__ import annotations

import copy
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
    """The LazyConfig node of a Faster R-CNN with frozen norms, the same in train and in eval."""
    return _tiny_rcnn("faster_rcnn_small", width, channels, classes)


def tiny_mask_rcnn(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """The LazyConfig node of a Mask R-CNN with frozen norms."""
    model = _tiny_rcnn("mask_rcnn_small", width, channels, classes)
    model.roi_heads.mask_head.input_shape = ShapeSpec(channels=channels, width=14, height=14)
    model.roi_heads.mask_head.conv_dims = [channels] * 2
    return model


def tiny_cascade_rcnn(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """The LazyConfig node of a Cascade R-CNN of three stages with frozen norms."""
    return _tiny_rcnn("cascade_rcnn_small", width, channels, classes)


def tiny_retinanet(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """The LazyConfig node of a RetinaNet with frozen norms."""
    return _tiny_dense("retinanet_small", width, channels, classes)


def tiny_fcos(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """The LazyConfig node of an FCOS with frozen norms."""
    return _tiny_dense("fcos_small", width, channels, classes)


def tiny_gfl(width: int = 4, channels: int = 16, classes: int = CLASSES) -> DictConfig:
    """The LazyConfig node of a GFL with frozen norms; those of its head know no mode."""
    model = _tiny_dense("gfl_small", width, channels, classes)
    model.head.num_groups = 2
    return model


def _tiny_rcnn(name: str, width: int, channels: int, classes: int) -> DictConfig:
    model = get_config(f"common/models/{name}.py").model
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
    model = get_config(f"common/models/{name}.py").model
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
"""Small detectors by family: functions of width, channels and classes that return a model node."""


def build(node: DictConfig, seed: int = 0) -> nn.Module:
    """An instantiated node with the weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return instantiate(node)


def batch(
    sizes: Sequence[tuple[int, int]] = ((64, 64), (48, 72)),
    objects: Sequence[int] = (2, 1),
    classes: int = CLASSES,
    seed: int = 0,
) -> list[dict]:
    """Detectron2's training batch: random images of ``sizes`` (H, W) with ``objects[i]`` boxes each.

    Masks are the boxes as polygons, for the families that want them.
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
    """Boxes as masks, one polygon each."""
    corners = boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]].tolist()
    return PolygonMasks([[polygon] for polygon in corners])


def odd_batches(classes: int = CLASSES) -> dict[str, list[dict]]:
    """Batches on which losses break, by what is odd about them."""
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
    """Check a loss against each family of detectors.

    Silent on itself, once every part that has a ``make_identity()`` has been told to compare a detector with
    its copy as equal and to leave out what trains only such parts; student undisturbed; teacher invisible; only what
    is read runs; gradients where they belong; finite on empty and odd input, with one class and under autocast;
    silent at weight 0.

    Args:
        factory: makes the loss, anew at each call.
        detectors: family names of :data:`DETECTORS`, or functions like its values by a name of yours.

    Returns:
        what was checked, as ``"<family>: <property>"``.

    Raises:
        AssertionError: a property does not hold; the message names it, the family and what was seen.
    """
    families = (
        dict(detectors)
        if isinstance(detectors, Mapping)
        else {name: DETECTORS[name] for name in detectors}
    )
    checked = []
    with torch.random.fork_rng():
        for family, node in families.items():
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
    """A small Distiller in training; the teacher a wider stranger, or (``same``) the student's copy."""
    student = build(node(classes=classes))
    teacher = (
        copy.deepcopy(student) if same else build(node(width=6, channels=24, classes=classes), 1)
    )
    loss = factory()
    if weight is not None:
        loss.weight = weight
    losses = DistillLosses(loss=loss)
    return Distiller(
        student=student, teacher=Teacher(teacher, None), losses=losses, max_iter=2
    ).train()


def step(model: nn.Module, examples: list[dict], seed: int = 0) -> dict[str, Tensor]:
    """The losses of one forward, half-way through a run, with the random draws of a seed."""
    torch.manual_seed(seed)
    with EventStorage(start_iter=1):
        return model(examples)


def distillation(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the distillation losses among a step's losses."""
    terms = [value for key, value in losses.items() if key.startswith("distill/")]
    assert terms, "the loss returned nothing"
    return sum(terms)


def _gradient_norm(modules: Iterable[nn.Module]) -> float:
    gradients = [p.grad.norm() for m in modules for p in m.parameters() if p.grad is not None]
    return float(torch.stack(gradients).norm()) if gradients else 0.0


def _silent_on_itself(factory, node) -> None:
    model = distiller(factory, node, same=True)
    for module in model.losses.modules():
        if hasattr(module, "make_identity"):
            module.make_identity()
    value = distillation(step(model, batch()))
    assert abs(value.item()) <= 1e-6, f"against its own copy the loss is {value.item()}"
    if value.requires_grad:
        value.backward()
    norm = _gradient_norm([model.student])
    assert norm <= 1e-5, f"against its own copy the student is pushed by {norm}"


def _student_undisturbed(factory, node) -> None:
    model = distiller(factory, node)
    copied = copy.deepcopy(model.student)
    alone, drawn = step(copied, batch()), torch.get_rng_state()
    beside, drawn_beside = step(model, batch()), torch.get_rng_state()
    for key, value in alone.items():
        assert torch.equal(value, beside[key]), (
            f"{key} is {beside[key].item()}, alone {value.item()}"
        )
    state = model.student.state_dict()
    changed = [key for key, value in copied.state_dict().items() if not value.equal(state[key])]
    assert not changed, f"its {changed[:3]} are not as after a step alone"
    # Its next step would draw other regions, or other images.
    assert drawn_beside.equal(drawn), "numbers were drawn from the student's generator"
    hooked = [name for name, m in model.named_modules() if m._forward_hooks]
    assert not hooked, f"hooks left on {hooked}"


def _teacher_invisible(factory, node) -> None:
    model = distiller(factory, node)
    teacher = model.teacher.detector
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    theirs = {id(p) for p in teacher.parameters()}
    model.train()
    sum(step(model, batch()).values()).backward()
    assert not any(id(p) in theirs for p in model.parameters()), "its parameters are the model's"
    assert not any("teacher" in key for key in model.state_dict()), "it is in the state_dict"
    assert not any(m.training for m in teacher.modules()), "train() reached it"
    assert all(p.grad is None for p in teacher.parameters()), "it received a gradient"
    changed = [
        key for key, value in teacher.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert not changed, f"a step changed its {changed[:3]}"


_ASKED_BY = {
    "backbone": ("features",),
    "proposal_generator": ("proposals",),
    "roi_heads.box_head": ("regions",),
    "head": ("predictions",),
}


def _only_what_is_read_runs(factory, node) -> None:
    model = distiller(factory, node)
    teacher = model.teacher.detector
    ran: list[str] = []
    for name in _ASKED_BY:
        try:
            module = teacher.get_submodule(name)
        except AttributeError:
            continue
        # A cascade's stages run one by one; the list that holds them never does.
        first = module[0] if isinstance(module, nn.ModuleList) else module
        first.register_forward_hook(lambda *_, name=name: ran.append(name))
    given = []
    ask = model.teacher.ask
    model.teacher.ask = lambda *args, **kwargs: given.append(ask(*args, **kwargs)) or given[-1]
    step(model, batch())
    read = set(given[0].__dict__)
    for name in set(ran):
        assert read & set(_ASKED_BY[name]), f"the teacher's {name} ran, and nothing read it"
        assert ran.count(name) == 1, f"the teacher's {name} ran {ran.count(name)} times in a step"


def _gradients_where_they_belong(factory, node) -> None:
    model = distiller(factory, node)
    value = distillation(step(model, batch()))
    assert value.requires_grad, "the loss is detached from the student"
    value.backward()
    norm = _gradient_norm([model.student])
    assert 0 < norm < float("inf"), f"the student's gradient has norm {norm}"
    # A parameter may meet a gradient of 0, but one without any would stop DDP.
    idle = [n for n, p in model.losses.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {idle[:3]}"


def _finite(factory, node, examples, *, why: str, **options) -> None:
    model = distiller(factory, node, **options)
    losses = step(model, examples)
    for key, value in losses.items():
        assert torch.isfinite(value).all(), f"{why}: {key} is {value.item()}"
    sum(losses.values()).backward()
    norm = _gradient_norm([model])
    assert norm < float("inf"), f"{why}: the gradient has norm {norm}"


def _empty_and_odd_input(factory, node) -> None:
    for why, examples in odd_batches().items():
        _finite(factory, node, examples, why=why)
    _finite(factory, node, batch(classes=1), why="one class", classes=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            step(build(node()).train(), batch())
        except RuntimeError:
            return  # the detector alone cannot: GIoU on FCOS's half-precision boxes fails in fvcore
        _finite(factory, node, batch(), why="bfloat16 autocast")


def _silent_at_weight_zero(factory, node) -> None:
    model = distiller(factory, node, weight=0.0)
    losses = step(model, batch())
    sum(losses.values()).backward()
    terms = {key: value.item() for key, value in losses.items() if key.startswith("distill/")}
    assert not any(terms.values()), f"weight 0 gives {terms}"
    idle = [n for n, p in model.losses.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"at weight 0 no gradient reaches {idle[:3]}, and DDP would stop"


PROPERTIES: dict[str, Callable] = {
    "silent on itself": _silent_on_itself,
    "student undisturbed": _student_undisturbed,
    "teacher invisible": _teacher_invisible,
    "only what is read runs": _only_what_is_read_runs,
    "gradients where they belong": _gradients_where_they_belong,
    "empty and odd input": _empty_and_odd_input,
    "silent at weight 0": _silent_at_weight_zero,
}
"""What :func:`check_loss` checks, in this order."""


def main() -> int:
    """Print how many properties each method of this project keeps on each family; 1 if one is broken."""
    broken = []
    print("".join(f"{head:>14}" for head in ("kept", *DETECTORS)))
    for name in METHODS:
        print(f"{name:>14}", end="", flush=True)
        # As in a recipe, from which a loss may take its seed.
        recipe = {"losses": without_priors(method(name)["losses"]), "train": {"seed": 0}}
        recipe = OmegaConf.create(recipe, flags={"allow_objects": True})
        (loss,) = instantiate(recipe.losses).by_name.values()
        for family in DETECTORS:
            try:
                kept = check_loss(lambda loss=loss: copy.deepcopy(loss), [family])
                cell = f"{len(kept)} of {len(PROPERTIES)}"
            except InputError:  # a loss that is not for this family
                cell = "-"
            except AssertionError as error:
                cell = "broken"
                broken.append(f"{name}: {error}")
            print(f"{cell:>14}", end="", flush=True)
        print()
    for error in broken:
        print(error)
    return 1 if broken else 0


if __name__ == "__main__":
    # What a loss has to say of a real run would stand between the columns.
    logging.getLogger("d2kd").setLevel(logging.ERROR)
    raise SystemExit(main())
