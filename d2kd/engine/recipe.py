"""A recipe, completed and checked, and what of it Detectron2's own code looks up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, OmegaConf

from ..config import get_config, is_distiller
from ..errors import InputError

CLIP_TYPES = ("full_model", "norm", "value")
# Keys of ``train`` that count something, and the least they may be.
COUNTS = {
    "max_iter": 1,
    "checkpointer.period": 1,
    "checkpointer.max_to_keep": 1,
    "eval_period": 0,
    "log_period": 1,
    "draw_period": 0,
    "draw_images": 1,
}
MAY_BE_NONE = ("checkpointer.max_to_keep",)
# Keys of ``train.distiller``.
DISTILLER = ("optimizer", "lr_multiplier", "clip_gradients")


def complete(cfg: Any) -> DictConfig:
    """A copy of a recipe, a config, a mapping or what ``d2kd.config.distill`` gave, with a full ``train``.

    Raises:
        InputError: a part of the recipe is missing.
    """
    if not OmegaConf.is_config(cfg):
        parts = cfg._asdict() if hasattr(cfg, "_asdict") else dict(cfg)
        cfg = DictConfig(parts, flags={"allow_objects": True})
    missing = [key for key in ("model", "dataloader", "optimizer", "train") if key not in cfg]
    if missing or "train" not in cfg.dataloader:
        found = f"no {', '.join(missing or ['dataloader.train'])}"
        raise InputError("the recipe", found, "model, dataloader.train, optimizer and train")
    config = copy.deepcopy(cfg)
    defaults = get_config("common/train.py").train
    config.train = OmegaConf.merge(defaults, config.train)
    clips = {"train.clip_gradients": config.train.clip_gradients}
    if config.train.get("distiller") is not None:
        distiller = config.train.distiller
        _check_distiller(config.model, distiller)
        distiller.clip_gradients = OmegaConf.merge(
            defaults.clip_gradients, distiller.get("clip_gradients", {})
        )
        clips["train.distiller.clip_gradients"] = distiller.clip_gradients
    for key, clip in clips.items():
        if clip.clip_type not in CLIP_TYPES:
            raise InputError(f"{key}.clip_type", clip.clip_type, " or ".join(CLIP_TYPES))
    for key, least in COUNTS.items():
        found = OmegaConf.select(config.train, key)
        if key in MAY_BE_NONE and found is None:
            continue
        if not isinstance(found, int) or found < least:
            raise InputError(f"train.{key}", found, f"an integer, at least {least}")
    return config


def unknown_keys(config: DictConfig) -> list[str]:
    """Keys of a complete recipe's ``train`` that nothing here reads; a hook of one's own may."""
    known = get_config("common/train.py").train
    distiller = dict.fromkeys(DISTILLER) | {"clip_gradients": known.clip_gradients}
    known = OmegaConf.merge(known, {"distiller": distiller})

    def below(prefix: str, given: DictConfig, known: DictConfig) -> Iterator[str]:
        for key in given:
            if key not in known:
                yield f"{prefix}.{key}"
            elif OmegaConf.is_dict(known[key]) and OmegaConf.is_dict(given[key]):
                yield from below(f"{prefix}.{key}", given[key], known[key])

    return list(below("train", config.train, known))


def _check_distiller(model: DictConfig, distiller: DictConfig) -> None:
    expected = "optimizer, lr_multiplier and clip_gradients of what a Distiller's losses own"
    if not is_distiller(model):
        raise InputError("train.distiller", "no Distiller in the recipe", expected)
    if (
        not OmegaConf.is_dict(distiller)
        or "optimizer" not in distiller
        or set(distiller) - set(DISTILLER)
    ):
        found = ", ".join(distiller) if OmegaConf.is_dict(distiller) else distiller
        raise InputError("train.distiller", found or "nothing", expected)


def run_card(config: DictConfig) -> CfgNode:
    """The values that DefaultTrainer and hooks written for it look up in a yacs config."""
    train, card = config.train, get_cfg()
    card.OUTPUT_DIR = str(train.output_dir)
    card.SEED = train.seed
    card.MODEL.WEIGHTS = train.init_checkpoint or ""
    card.SOLVER.MAX_ITER = train.max_iter
    card.SOLVER.CHECKPOINT_PERIOD = train.checkpointer.period
    card.SOLVER.AMP.ENABLED = train.amp.enabled
    card.SOLVER.CLIP_GRADIENTS.ENABLED = train.clip_gradients.enabled
    card.TEST.EVAL_PERIOD = train.eval_period
    return card
