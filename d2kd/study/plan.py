"""What a study wants to know, the runs it takes, and the recipe of each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf

from ..config import config_file, override
from ..data import class_step, split_classes
from ..data.catalog import registering
from ..data.incremental import Split
from ..utils.env import config_hash
from ..utils.errors import InputError

RELATIONS = ("teacher", "starts_from", "steps_like")
RUN_KEYS = ("config", *RELATIONS, "once", "optional", "step")


@dataclass(frozen=True)
class Run:
    """One training: a method under one seed.

    ``test`` is what it is measured on, ``teacher`` and ``starts_from`` name other runs. ``steps_like`` is the distilled
    run of an equal-time run. That one need not be trained, but its teacher: steps with it are timed.
    """

    name: str
    method: str
    seed: int
    config: DictConfig = field(repr=False)
    test: str = ""
    teacher: str | None = None
    starts_from: str | None = None
    steps_like: Run | None = None

    @property
    def once(self) -> bool:
        """Whether it is one for all seeds."""
        return self.name == self.method

    @property
    def needs(self) -> list[str]:
        """Names of the runs that are trained before."""
        teacher_beside = self.steps_like and self.steps_like.teacher
        return [n for n in (self.teacher, self.starts_from, teacher_beside) if n]


@dataclass(frozen=True)
class Study:
    """What is to be found out.

    Args:
        runs: method -> its node, see the module.
        test: registered data set the figures come from. A file may give a node that registers it.
        baseline: method that the others are paired with.
        title: a line that says what is asked.
        compare: further methods to give the gains over.
        featured: method whose pictures are drawn beside the baseline's.
        seeds: of the runs that are not ``once``.
        pictures: how many images to draw.
        steps: where classes are learned in steps, those of each, see :func:`d2kd.data.split_classes`. A run that
            names its ``step`` is measured on the classes learned by then.
        upper_bound: method that learns all classes at once, to which the others' gaps are given.
        threshold: score from which a detection counts as found, in pictures only.
        fast: overrides such as "train.max_iter=20" of every recipe under ``--fast``.
        fast_setup: a call made first under ``--fast``, say to register fewer images.
    """

    runs: Mapping[str, DictConfig] = field(repr=False)
    test: str
    baseline: str
    title: str = "A study"
    compare: Sequence[str] = ()
    featured: str | None = None
    seeds: Sequence[int] = (0,)
    pictures: int = 6
    steps: Split = ()
    upper_bound: str | None = None
    threshold: float = 0.3
    fast: Sequence[str] = ()
    fast_setup: DictConfig | None = None

    @property
    def references(self) -> list[str]:
        return [self.baseline, *(method for method in self.compare if method != self.baseline)]

    @property
    def paired(self) -> list[str]:
        """Methods whose gains are asked for: those with a run per seed that know all classes, but the baseline."""
        per_seed = [method for method, node in self.runs.items() if not node.get("once")]
        return [m for m in per_seed if m != self.baseline and self.knows_all_classes(m)]

    def step_of(self, method: str) -> int | None:
        """The step that a method's run learns, from 1; None: it learns everything."""
        return self.runs[method].get("step")

    def previous(self, method: str) -> str | None:
        """The method whose run learned the step before."""
        step, node = self.step_of(method), self.runs[method]
        if step is None:
            return None
        others = [node[key] for key in ("teacher", "starts_from") if node.get(key) is not None]
        return next((other for other in others if (self.step_of(other) or step) < step), None)

    def knows_all_classes(self, method: str) -> bool:
        return self.step_of(method) in (None, len(self.steps))

    def test_of(self, method: str) -> str:
        """The data set a method's run is measured on."""
        step = self.step_of(method)
        return self.test if step is None else class_step(self.test, self.steps, step, seen=True)

    def plan(
        self, seeds: Sequence[int] = (), only: Sequence[str] = (), fast: bool = False
    ) -> list[Run]:
        """The runs in the order they are trained: seed by seed, as in the file, each after what it needs.

        Args:
            seeds: instead of the study's own.
            only: methods to run, with whatever they need; all but the optional ones by default.
            fast: apply the overrides of ``--fast``.

        Raises:
            InputError: there is no such method, two runs wait for each other, or an override does not fit.
        """
        planned: dict[str, Run] = {}

        def visit(method: str, seed: int, above: tuple[str, ...]) -> str:
            if method in above:
                circle = " needs ".join((*above, method))
                raise InputError("runs", circle, "runs that do not wait for each other")
            run = made(method, seed, above, RELATIONS)
            planned.setdefault(run.name, run)
            return run.name

        def made(method: str, seed: int, above: tuple[str, ...], relations: Sequence[str]) -> Run:
            node, above = self.runs[method], (*above, method)
            name = method if node.get("once") else f"{method}_seed{seed}"
            if name in planned and relations == RELATIONS:
                return planned[name]
            others = {key: node[key] for key in relations if node.get(key) is not None}
            distilled = others.pop("steps_like", None)
            needs = {key: visit(other, seed, above) for key, other in others.items()}
            # Cut out of the study: its interpolations ("${train.max_iter}") are meant from its own root.
            content = OmegaConf.to_container(node.config, resolve=False)
            config = OmegaConf.create(content, flags={"allow_objects": True})
            if fast:
                config = override(config, self.fast)
            own_seed = int(config.train.get("seed") or 0) if node.get("once") else seed
            like = distilled and made(distilled, seed, above, ["teacher"])
            return Run(
                name, method, own_seed, config, self.test_of(method), **needs, steps_like=like
            )

        _known("runs", only, self.runs)
        methods = only or [m for m, node in self.runs.items() if not node.get("optional")]
        for seed in seeds or self.seeds:
            for method in methods:
                visit(method, seed, ())
        return list(planned.values())


def load(path: str | Path) -> Study:
    """A study from its file, on disk or of this project; checked, but no detector is built.

    Raises:
        InputError: the file is missing or fails to load, or is no study; the line names the key at fault.
            Or the test data, where a node registers it, cannot be used.
    """
    file = Path(path) if Path(path).is_file() else config_file(str(path))
    try:
        with registering(file):
            content = LazyConfig.load(str(file))
        return parse(content, path)
    except InputError:
        raise
    except Exception as error:  # a config is code, and may fail in any way
        found = f"does not load ({type(error).__name__}: {error})"
        raise InputError(path, found, "a study, a LazyConfig (.py)") from error


def planned(
    path: str | Path, seeds: Sequence[int], only: Sequence[str], fast: bool
) -> tuple[Study, list[Run]]:
    """A study from its file, and its runs, ready to be trained; the arguments are those of :meth:`Study.plan`.

    Raises:
        InputError: as of :func:`load` and :meth:`Study.plan`.
    """
    study = load(path)
    runs = study.plan(seeds, only, fast)
    if fast and study.fast_setup is not None:
        instantiate(study.fast_setup)
    return study, runs


def parse(config: Mapping[str, Any], culprit: str | Path = "study") -> Study:
    """:func:`load` for a file's content."""
    for key in ("study", "runs"):
        if not isinstance(config.get(key), Mapping):
            raise InputError(
                culprit, f"no dict named {key!r}", "a file that defines 'study' and 'runs'"
            )
    given, runs = dict(config["study"]), dict(config["runs"])
    _known(f"{culprit}: study", given, [f.name for f in fields(Study) if f.name != "runs"])
    for key in ("test", "baseline"):
        if key not in given:
            raise InputError(
                f"{culprit}: study", f"no {key!r}", "test=<data set>, baseline=<method>"
            )
    given["test"] = instantiate(given["test"])
    if given.get("steps"):
        given["steps"] = split_classes(given["test"], given["steps"])
    study = Study(runs=runs, **given)
    _known(
        f"{culprit}: study",
        [*study.references, *(name for name in (study.featured, study.upper_bound) if name)],
        runs,
    )
    for method, node in runs.items():
        where = f"{culprit}: runs.{method}"
        _known(where, node, RUN_KEYS)
        step = node.get("step")
        if step is not None and step not in range(1, len(study.steps) + 1):
            expected = (
                f"from 1 to {len(study.steps)}" if study.steps else "none, without study.steps"
            )
            raise InputError(f"{where}.step", step, expected)
        if not node.get("config"):
            raise InputError(where, "no config", "config=<a whole recipe>")
        for key in RELATIONS:
            other = node.get(key)
            _known(f"{where}.{key}", [other] if other else [], runs)
            if other and node.get("once") and not runs[other].get("once"):
                raise InputError(
                    f"{where}.{key}", f"{other} is made per seed", "a run with once=True"
                )
            config = other and runs[other].get("config") or {}
            if other and key == "steps_like" and "teacher" not in (config.get("model") or {}):
                raise InputError(f"{where}.{key}", f"{other} has no teacher", "a distilled run")
    return study


def _known(culprit: str, names, known) -> None:
    for name in names:
        if name not in known:
            raise InputError(culprit, f"unknown {name!r}", f"one of {', '.join(known)}")


def prepare(
    run: Run, finished: Mapping[str, Mapping], folder: Path, ratio: float | None = None
) -> tuple[DictConfig, str]:
    """A run's recipe as it will be trained, and its fingerprint.

    The fingerprint knows sources by the hash of their weights, and no paths: a study may be moved.

    Args:
        run: what to prepare.
        finished: rows of the runs it needs, by name.
        folder: where it will be trained.
        ratio: of an equal-time run, what a distilled step costs in plain ones.
    """
    config = copy.deepcopy(run.config)
    config.train.seed = run.seed
    if run.steps_like is not None:
        # Schedules are fractions of max_iter: the same one is stretched.
        config.train.max_iter = max(1, round(run.steps_like.config.train.max_iter * ratio))
    sources = {"model.teacher.weights": run.teacher, "train.init_checkpoint": run.starts_from}
    sources = {key: finished[name] for key, name in sources.items() if name}
    key = _fingerprint(config, {key: row["weights_sha256"] for key, row in sources.items()})
    config.train.output_dir = str(folder)
    for where, row in sources.items():
        OmegaConf.update(config, where, row["weights"])
    return config, key


def timed_recipes(
    run: Run, finished: Mapping[str, Mapping], folder: Path
) -> tuple[DictConfig, DictConfig, str]:
    """The distilled and the plain recipe whose steps are compared for an equal-time run, and the fingerprint of both.

    They are the same for all seeds. Arguments are those of :func:`prepare`.
    """
    distilled, key = prepare(replace(run.steps_like, seed=0), finished, folder)
    plain = replace(run, seed=0, starts_from=None, steps_like=None)
    plain, of_plain = prepare(plain, finished, folder)
    return distilled, plain, config_hash([key, of_plain])


def _fingerprint(config: DictConfig, sources: Mapping[str, str]) -> str:
    config = copy.deepcopy(config)
    config.train.output_dir = ""
    for key in sources:
        OmegaConf.update(config, key, "")
    for key in ("draw_period", "draw_images"):  # pictures of a run change nothing in it
        config.train.pop(key, None)
    return config_hash([OmegaConf.to_container(config, resolve=False), dict(sources)])
