"""The definition of a study, its runs, and the recipe of each run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from omegaconf import DictConfig, OmegaConf

from ..comparison.labels import check_min_score
from ..config import Recipe, apply_overrides, as_config, get_config_file
from ..data import incremental_split, split_classes
from ..data.catalog import recording_registrations
from ..data.incremental import Split
from ..utils.env import config_hash
from ..utils.errors import InputError

RELATIONS = ("teacher", "init_from", "match_time_of")
RUN_KEYS = ("config", *RELATIONS, "labels", "shared_across_seeds", "optional", "increment")
NAMES = "dataloader.train.dataset.names"
"""Where a recipe has the names of its training data."""


@dataclass(frozen=True)
class Labels:
    """Further training data of a run: images that the final detector of another run labels before the training.

    ``dataset`` is the name of a registered data set, or a node that registers one; its annotations are not used.
    ``min_score`` is the minimum score of detections.
    """

    detector: str
    dataset: Any
    min_score: float = 0.5

    def key(self, weights_sha256: str) -> str:
        """Return a hash of what the labels depend on, besides the content of the data set."""
        node = self.dataset
        source = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        return config_hash([weights_sha256, source, self.min_score])


@dataclass(frozen=True)
class Run:
    """One training: a method with one seed.

    ``test`` is the test set; ``teacher`` and ``init_from`` name other runs. ``match_time_of`` is the distilled run whose
    training time is matched. That run need not be trained, but its teacher must be, since steps with it are timed.
    ``labels`` are further training data, labelled by another run.
    """

    name: str
    method: str
    seed: int
    config: DictConfig = field(repr=False)
    test: str = ""
    teacher: str | None = None
    init_from: str | None = None
    match_time_of: Run | None = None
    labels: Labels | None = None

    @property
    def shared_across_seeds(self) -> bool:
        """Whether all seeds share this run."""
        return self.name == self.method

    @property
    def dependencies(self) -> list[str]:
        """Names of the runs that must be trained before."""
        teacher_beside = self.match_time_of and self.match_time_of.teacher
        labelled_by = self.labels and self.labels.detector
        return [n for n in (self.teacher, self.init_from, teacher_beside, labelled_by) if n]


@dataclass(frozen=True)
class Study:
    """The definition of a study.

    Args:
        runs: method -> node, see :mod:`d2kd.study`.
        test: name of the registered test set. A file may give a LazyConfig node that registers it.
        baseline: method that the others are compared with, seed by seed.
        title: title of the table and the plots.
        compare: further methods to compare with.
        featured: method whose detections are drawn next to those of the baseline.
        seeds: seeds of the runs that are not ``shared_across_seeds``.
        pictures: number of images to draw.
        increments: the classes of each increment of a class-incremental study, see :func:`d2kd.data.split_classes`.
        upper_bound: method that learns all classes at once; gaps are computed to it.
        threshold: score threshold of detections in the pictures.
        fast: overrides of every recipe with ``--fast``, such as "train.max_iter=20".
        fast_setup: LazyConfig node called first with ``--fast``, for example to register fewer images.
    """

    runs: Mapping[str, DictConfig] = field(repr=False)
    test: str
    baseline: str
    title: str = "A study"
    compare: Sequence[str] = ()
    featured: str | None = None
    seeds: Sequence[int] = (0,)
    pictures: int = 6
    increments: Split = ()
    upper_bound: str | None = None
    threshold: float = 0.3
    fast: Sequence[str] = ()
    fast_setup: DictConfig | None = None

    @property
    def references(self) -> list[str]:
        return [self.baseline, *(method for method in self.compare if method != self.baseline)]

    @property
    def paired(self) -> list[str]:
        """Methods whose gains are computed: those with a run per seed and all classes, without the baseline."""
        per_seed = [
            method for method, node in self.runs.items() if not node.get("shared_across_seeds")
        ]
        return [m for m in per_seed if m != self.baseline and self.has_all_classes(m)]

    def increment_of(self, method: str) -> int | None:
        """Return the increment of a method, starting from 1; None if it learns all classes."""
        return self.runs[method].get("increment")

    def previous(self, method: str) -> str | None:
        """Return the method of an earlier increment that a method depends on; None if there is none."""
        increment, node = self.increment_of(method), self.runs[method]
        if increment is None:
            return None
        others = [node[key] for key in ("teacher", "init_from") if node.get(key) is not None]
        return next(
            (other for other in others if (self.increment_of(other) or increment) < increment), None
        )

    def has_all_classes(self, method: str) -> bool:
        return self.increment_of(method) in (None, len(self.increments))

    def test_set_of(self, method: str) -> str:
        """Return the test set of a method."""
        increment = self.increment_of(method)
        return (
            self.test
            if increment is None
            else incremental_split(self.test, self.increments, increment, cumulative=True)
        )

    def plan(
        self, seeds: Sequence[int] = (), only: Sequence[str] = (), fast: bool = False
    ) -> list[Run]:
        """Return the runs in the order of training: by seed, then as in the file, each after the runs it needs.

        Args:
            seeds: default: the study's seeds.
            only: methods to run, and those that they need; default: all that are not optional.
            fast: whether to apply the overrides of ``--fast``.

        Raises:
            InputError: a method is unknown, runs need each other in a circle, or an override does not fit.
        """
        planned: dict[str, Run] = {}

        def visit(method: str, seed: int, above: tuple[str, ...]) -> str:
            if method in above:
                circle = " needs ".join((*above, method))
                raise InputError("runs", circle, "runs that do not need each other")
            run = made(method, seed, above, RELATIONS)
            planned.setdefault(run.name, run)
            return run.name

        def made(method: str, seed: int, above: tuple[str, ...], relations: Sequence[str]) -> Run:
            node, above = self.runs[method], (*above, method)
            name = method if node.get("shared_across_seeds") else f"{method}_seed{seed}"
            if name in planned and relations == RELATIONS:
                return planned[name]
            others = {key: node[key] for key in relations if node.get(key) is not None}
            distilled = others.pop("match_time_of", None)
            needs = {key: visit(other, seed, above) for key, other in others.items()}
            if relations == RELATIONS and node.get("labels"):
                given = dict(node["labels"])
                detector = visit(given.pop("detector"), seed, above)
                needs["labels"] = Labels(detector, **given)
            # A copy with its own root, which interpolations such as "${train.max_iter}" refer to.
            content = OmegaConf.to_container(node.config, resolve=False)
            config = OmegaConf.create(content, flags={"allow_objects": True})
            if fast:
                config = apply_overrides(config, self.fast)
            own_seed = (
                int(config.train.get("seed") or 0) if node.get("shared_across_seeds") else seed
            )
            like = distilled and made(distilled, seed, above, ["teacher"])
            return Run(
                name,
                method,
                own_seed,
                config,
                self.test_set_of(method),
                **needs,
                match_time_of=like,
            )

        _known("runs", only, self.runs)
        methods = only or [m for m, node in self.runs.items() if not node.get("optional")]
        for seed in seeds or self.seeds:
            for method in methods:
                visit(method, seed, ())
        return list(planned.values())


def load_study(path: str | Path) -> Study:
    """Load a study from a file on disk or in this project, and check it. No detector is built.

    Raises:
        InputError: the file is missing, fails to load, or is not a valid study; or its test data cannot be registered.
    """
    file = Path(path) if Path(path).is_file() else get_config_file(str(path))
    try:
        with recording_registrations(file):
            content = LazyConfig.load(str(file))
        return build_study(content, path)
    except InputError:
        raise
    except Exception as error:  # a config is code, and may raise any error
        found = f"does not load ({type(error).__name__}: {error})"
        raise InputError(path, found, "a study, a LazyConfig (.py)") from error


def load_and_plan(
    path: str | Path, seeds: Sequence[int], only: Sequence[str], fast: bool
) -> tuple[Study, list[Run]]:
    """Load a study and plan its runs; see :meth:`Study.plan` for the arguments.

    Raises:
        InputError: see :func:`load_study` and :meth:`Study.plan`.
    """
    study = load_study(path)
    runs = study.plan(seeds, only, fast)
    if fast and study.fast_setup is not None:
        instantiate(study.fast_setup)
    return study, runs


def build_study(config: Mapping[str, Any], culprit: str | Path = "study") -> Study:
    """Build a study from the content of a file, and check it; see :func:`load_study`."""
    for key in ("study", "runs"):
        if not isinstance(config.get(key), Mapping):
            raise InputError(
                culprit, f"no dict named {key!r}", "a file that defines 'study' and 'runs'"
            )
    given = dict(config["study"])
    runs = {method: _with_config(node) for method, node in config["runs"].items()}
    _known(f"{culprit}: study", given, [f.name for f in fields(Study) if f.name != "runs"])
    for key in ("test", "baseline"):
        if key not in given:
            raise InputError(
                f"{culprit}: study", f"no {key!r}", "test=<data set>, baseline=<method>"
            )
    given["test"] = instantiate(given["test"])
    if given.get("increments"):
        given["increments"] = split_classes(given["test"], given["increments"])
    study = Study(runs=runs, **given)
    _known(
        f"{culprit}: study",
        [*study.references, *(name for name in (study.featured, study.upper_bound) if name)],
        runs,
    )
    for method, node in runs.items():
        where = f"{culprit}: runs.{method}"
        # It names the run's folder.
        if not isinstance(method, str) or method in ("", "..") or Path(method).name != method:
            raise InputError(where, repr(method), "a name that a folder may have")
        _known(where, node, RUN_KEYS)
        increment = node.get("increment")
        if increment is not None and increment not in range(1, len(study.increments) + 1):
            expected = (
                f"from 1 to {len(study.increments)}"
                if study.increments
                else "none, without study.increments"
            )
            raise InputError(f"{where}.increment", increment, expected)
        if not node.get("config"):
            raise InputError(where, "no config", "config=<a whole recipe>")
        others = {key: node.get(key) for key in RELATIONS}
        if node.get("labels") is not None:
            _check_labels(f"{where}.labels", node)
            others["labels.detector"] = node["labels"]["detector"]
        for key, other in others.items():
            _known(f"{where}.{key}", [other] if other else [], runs)
            if (
                other
                and node.get("shared_across_seeds")
                and not runs[other].get("shared_across_seeds")
            ):
                raise InputError(
                    f"{where}.{key}",
                    f"{other} is made per seed",
                    "a run with shared_across_seeds=True",
                )
            config = other and runs[other].get("config") or {}
            if other and key == "match_time_of" and "teacher" not in (config.get("model") or {}):
                raise InputError(f"{where}.{key}", f"{other} has no teacher", "a distilled run")
    return study


def _with_config(run: Any) -> Any:
    """Return a run with a :class:`Recipe`, which OmegaConf turns into a list, as a run with a config."""
    recipe = run.get("config") if isinstance(run, Mapping) else None
    if not isinstance(recipe, Recipe) and not OmegaConf.is_list(recipe):
        return run
    return DictConfig({**run, "config": as_config(recipe)}, flags={"allow_objects": True})


def _check_labels(where: str, node: Mapping) -> None:
    """Check the labels of a run, except whether their detector is a run."""
    labels = node["labels"]
    if not isinstance(labels, Mapping) or not (labels.get("detector") and "dataset" in labels):
        expected = "dict(detector=<run>, dataset=<data set>, min_score=…)"
        raise InputError(where, repr(labels), expected)
    _known(where, labels, [f.name for f in fields(Labels)])
    check_min_score(f"{where}.min_score", labels.get("min_score", 0.5))
    name = instantiate(labels["dataset"])
    if name not in DatasetCatalog.list():
        raise InputError(f"{where}.dataset", repr(name), "a registered data set, or a node of one")
    if OmegaConf.select(OmegaConf.create({"config": node["config"]}), f"config.{NAMES}") is None:
        raise InputError(where, f"a config without {NAMES}", "data that the labels are added to")


def _known(culprit: str, names, known) -> None:
    for name in names:
        if name not in known:
            raise InputError(culprit, f"unknown {name!r}", f"one of {', '.join(known)}")


def prepare_recipe(
    run: Run, finished: Mapping[str, Mapping], folder: Path, ratio: float | None = None
) -> tuple[DictConfig, str]:
    """Return the recipe of a run, ready to be trained, and its fingerprint.

    The fingerprint has hashes of weights instead of paths, so that a study can be moved. The labels of a run are part of
    it, but not of the recipe yet, see :func:`d2kd.study.run.add_labels`.

    Args:
        run: the run.
        finished: name -> row of the runs it needs.
        folder: output folder of the run.
        ratio: cost of a distilled step relative to a plain one; only for an equal-time run.
    """
    config = copy.deepcopy(run.config)
    config.train.seed = run.seed
    if run.match_time_of is not None:
        # Schedules are fractions of max_iter, so they stretch with it.
        config.train.max_iter = max(1, round(run.match_time_of.config.train.max_iter * ratio))
    sources = {"model.teacher.weights": run.teacher, "train.init_checkpoint": run.init_from}
    sources = {key: finished[name] for key, name in sources.items() if name}
    key = _fingerprint(config, {key: row["weights_sha256"] for key, row in sources.items()})
    if run.labels is not None:
        key = config_hash([key, run.labels.key(finished[run.labels.detector]["weights_sha256"])])
    config.train.output_dir = str(folder)
    for where, row in sources.items():
        OmegaConf.update(config, where, row["weights"])
    return config, key


def timed_recipes(
    run: Run, finished: Mapping[str, Mapping], folder: Path
) -> tuple[DictConfig, DictConfig, str]:
    """Return the distilled and the plain recipe to be timed for an equal-time run, and their common fingerprint.

    They are the same for all seeds. See :func:`prepare_recipe` for the arguments.
    """
    distilled, key = prepare_recipe(replace(run.match_time_of, seed=0), finished, folder)
    plain = replace(run, seed=0, init_from=None, match_time_of=None, labels=None)
    plain, of_plain = prepare_recipe(plain, finished, folder)
    return distilled, plain, config_hash([key, of_plain])


def _fingerprint(config: DictConfig, sources: Mapping[str, str]) -> str:
    config = copy.deepcopy(config)
    config.train.output_dir = ""
    for key in sources:
        OmegaConf.update(config, key, "")
    for key in ("draw_period", "draw_images"):  # drawing does not affect the training
        config.train.pop(key, None)
    return config_hash([OmegaConf.to_container(config, resolve=False), dict(sources)])
