"""Evaluation of a detector on a recipe's test data."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import build_part
from ..data import use_seeded_loaders
from ..data.datasets import dataset_names
from ..utils.compat import has_compiled_operators
from ..utils.errors import InputError
from ..utils.random_state import preserved_random_state
from .checkpoint import get_student

logger = logging.getLogger(__name__)


def get_test_dataset_name(config: DictConfig) -> str | None:
    """Return the registered name of a recipe's test data set; None if there are several, or none."""
    # Without the checks of check_dataset, which read all annotations: this is called at every evaluation.
    names = dataset_names(config, "test")
    return names[0] if len(names) == 1 else None


def build_recipe_test_loader(
    config: DictConfig, dataset_name: str | None = None
) -> Iterable | None:
    """Build the loader of ``dataloader.test``; None if the recipe has no test loader or no evaluator.

    Args:
        config: a recipe with defaults.
        dataset_name: a registered data set to use instead of the recipe's.
    """
    if "test" not in config.dataloader or "evaluator" not in config.dataloader:
        return None
    config = copy.deepcopy(config)
    if dataset_name is not None:
        config.dataloader.test.dataset.names = dataset_name
    use_seeded_loaders(config.dataloader, seed=config.train.seed)
    return build_part("dataloader.test", config.dataloader.test)


def build_evaluator(
    config: DictConfig, output_dir: str | Path | None = None, dataset_name: str | None = None
) -> Any:
    """Build the evaluator of ``dataloader.evaluator``.

    If Detectron2's compiled COCO evaluation is not available, that of pycocotools is used.

    Args:
        config: a recipe with defaults.
        output_dir: folder of the evaluator's files; by default the run's ``inference``.
        dataset_name: a registered data set to use instead of the recipe's.
    """
    if dataset_name is None:
        check_test_data(config)
    config = copy.deepcopy(config)
    node = config.dataloader.evaluator
    output_dir = output_dir or Path(config.train.output_dir, "inference")
    for x in node if OmegaConf.is_list(node) else [node]:
        if not OmegaConf.is_dict(x) or not _is_coco(x):
            continue
        if dataset_name is not None:
            x.dataset_name = dataset_name
        if x.get("output_dir") is None:
            x.output_dir = str(output_dir)
        if not has_compiled_operators():
            x.use_fast_impl = False
    return build_part("dataloader.evaluator", node)


_TASKS = {"bbox", "segm", "keypoints"}


def check_test_data(config: DictConfig) -> None:
    """Check that a COCO evaluator has one test set: it would compare the images of another with its own by their ids.

    Raises:
        InputError: there are several; an image lacks what the evaluator reads; or it has a task that COCO has not.
    """
    nodes = config.dataloader.get("evaluator") or {}
    nodes = list(filter(_is_coco, nodes if OmegaConf.is_list(nodes) else [nodes]))
    for node in nodes:
        tasks = node.get("tasks") if OmegaConf.is_dict(node) else None
        if tasks is not None and not (OmegaConf.is_list(tasks) and set(tasks) <= _TASKS):
            raise InputError("dataloader.evaluator.tasks", tasks, "a list of bbox, segm, keypoints")
    names = dataset_names(config, "test")
    for name in names if nodes else ():
        if MetadataCatalog.get(name).get("json_file"):
            continue
        for number, record in enumerate(DatasetCatalog.get(name)):
            if lacking := [key for key in ("image_id", "height", "width") if key not in record]:
                culprit = f"data set {name!r}: image {number}"
                raise InputError(culprit, f"no {', '.join(lacking)}", "what COCOEvaluator reads")
    if len(names) > 1 and nodes:
        raise InputError(
            "dataloader.test.dataset.names",
            f"{len(names)} data sets, {', '.join(names)}",
            "one, as COCOEvaluator has one; measure the others by --eval-only",
        )


def _is_coco(node) -> bool:
    if not OmegaConf.is_dict(node):  # an evaluator itself, as Detectron2 takes
        return isinstance(node, COCOEvaluator)
    target = node.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    return inspect.isclass(target) and issubclass(target, COCOEvaluator)


def do_test(
    config: DictConfig,
    model: nn.Module | Callable,
    *,
    loader: Iterable | None = None,
    evaluator: Any = None,
    output_dir: str | Path | None = None,
) -> dict:
    """Evaluate a model.

    Args:
        config: a recipe.
        model: a detector, a :class:`Distiller`, whose student is evaluated, or a function of batches.
        loader: by default that of :func:`build_recipe_test_loader`.
        evaluator: one or several; by default that of :func:`build_evaluator`.
        output_dir: as for :func:`build_evaluator`.

    Returns:
        ``{"bbox": {"AP": …, "AP-<class>": …}}`` in the main process, ``{}`` in others.
    """
    loader = loader or build_recipe_test_loader(config)
    if loader is None:
        logger.info("the recipe has no evaluator: no evaluation")
        return {}
    with preserved_random_state():
        evaluator = evaluator or build_evaluator(config, output_dir)
        if isinstance(model, nn.Module):
            model = get_student(model)
        results = inference_on_dataset(model, loader, evaluator)
    results = _numbers(results)
    print_csv_format(results)
    return results


def _numbers(results: Any) -> dict:
    """Return an evaluator's results as ``{task: {metric: float}}`` or ``{metric: float}``; what is no number is left out.

    Someone else's evaluator may return anything, for which no run shall end.
    """
    if not isinstance(results, Mapping):
        if results is not None:
            logger.warning("dataloader.evaluator: its result, a %s, is no dict", _kind(results))
        return {}
    kept = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            kept[str(key)] = inner = {}
            for name, metric in _numbers(value).items():
                deeper = metric if isinstance(metric, Mapping) else {"": metric}
                inner |= {f"{name}/{k}" if k else name: v for k, v in deeper.items()}
            continue
        try:
            kept[str(key)] = float(value)
        except (TypeError, ValueError):
            found = _kind(value)
            logger.warning("dataloader.evaluator: its %r, a %s, is no number", key, found)
    return kept


def _kind(value: Any) -> str:
    return type(value).__name__


def finite_metrics(results: Mapping) -> dict:
    """Return results, possibly nested by task, without metrics that are not finite."""
    return {
        name: finite_metrics(value) if isinstance(value, Mapping) else value
        for name, value in results.items()
        if isinstance(value, Mapping) or math.isfinite(value)
    }
