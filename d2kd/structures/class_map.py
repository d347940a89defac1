"""Which class of a student is which class of its teacher.

Classes are the same if their names are. A name without its equal is the one that differs from it in case, or in spaces,
hyphens and underscores between characters ("traffic light" is "Traffic_Light"), if there is just one. What only one
side knows is not compared.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor, nn

from ..utils.errors import InputError


def num_classes_of(detector: nn.Module) -> int:
    """How many classes a detector tells apart, without the background."""
    return getattr(detector, "roi_heads", detector).num_classes


def class_names(given: str | Iterable[str], culprit: str = "classes") -> tuple[str, ...]:
    """Names of classes in a detector's order.

    Args:
        given: the names, or the name of a registered data set that has them (the first of several). A class
            step has those that were learned when it is over.
        culprit: what to call it in an error.

    Raises:
        InputError: there is no such data set, it has no class names, or there are none.
    """
    if not isinstance(given, str):
        given = [str(name) for name in given]
        if given and all(map(_registered, given)):
            given = given[0]
    if isinstance(given, str):
        names = None
        if _registered(given):
            metadata = MetadataCatalog.get(given)
            names = metadata.get("seen_classes") or metadata.get("thing_classes")
        if not names:
            near = difflib.get_close_matches(given, DatasetCatalog.list())
            expected = " or ".join(near) or "a registered data set with class names, or the names"
            raise InputError(culprit, repr(given), expected)
        return tuple(names)
    if not given:
        raise InputError(culprit, "no class", "the detector's classes in its order")
    return tuple(given)


def _registered(name: str) -> bool:
    return name in DatasetCatalog.list()


def check_classes(side: str, detector: nn.Module, classes: Sequence[str]) -> None:
    """Raise InputError unless there are as many names as classes."""
    if len(classes) != num_classes_of(detector):
        raise InputError(
            f"classes of the {side}",
            f"{len(classes)} names",
            f"{num_classes_of(detector)}, one for each class of the {type(detector).__name__}",
        )


@dataclass(frozen=True)
class ClassMap:
    """The classes two detectors share.

    Attributes:
        student, teacher: names in each detector's order, K_S and K_T of them.
        pairs: (class of the student, class of the teacher) for each shared one, in the student's order.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def by_name(cls, student: Sequence[str], teacher: Sequence[str]) -> ClassMap:
        """Match two lists by name; a list and its equal have every class at its place.

        Raises:
            InputError: a list has a name twice.
        """
        student, teacher = tuple(student), tuple(teacher)
        if student == teacher:
            return cls(student, teacher, tuple((k, k) for k in range(len(student))))
        ours, theirs = _numbers("classes", student), _numbers("teacher.classes", teacher)
        pairs = [(ours.pop(name), theirs.pop(name)) for name in student if name in theirs]
        ours, theirs = _by_key(ours), _by_key(theirs)
        pairs += [(k, theirs[key]) for key, k in ours.items() if key in theirs]
        return cls(student, teacher, tuple(sorted(pairs)))

    @property
    def is_identity(self) -> bool:
        """Whether every class has the same number on both sides, so that nothing needs translating."""
        same = [(k, k) for k in range(len(self.student))]
        return len(self.student) == len(self.teacher) and list(self.pairs) == same

    @property
    def share(self) -> float:
        """How much of the student's classes the teacher knows, in [0, 1]."""
        return len(self.pairs) / len(self.student)

    @property
    def of_student(self) -> list[int]:
        """The shared classes by the student's numbers."""
        return [ours for ours, _ in self.pairs]

    @property
    def of_teacher(self) -> list[int]:
        """The shared classes by the teacher's numbers, in the same order."""
        return [theirs for _, theirs in self.pairs]

    def shared_labels(self, labels: Tensor) -> Tensor:
        """The student's labels as numbers among the shared classes.

        Args:
            labels: any shape, in ``{-1, 0, …, K_S}``: -1 ignored, K_S background.

        Returns:
            of equal shape: background is ``len(pairs)``; -1 where ignored or unknown to the teacher.
        """
        table = torch.full((len(self.student) + 2,), -1, dtype=labels.dtype, device=labels.device)
        table[self.of_student] = torch.arange(len(self.pairs)).to(table)
        table[len(self.student)] = len(self.pairs)
        return table[labels]  # -1 finds the last entry, which is -1

    def student_labels(self, labels: Tensor) -> Tensor:
        """The teacher's labels by the student's numbers; -1 for what the student does not know.

        Args:
            labels: any shape, in ``{0, …, K_T - 1}``.
        """
        table = torch.full((len(self.teacher),), -1, dtype=labels.dtype, device=labels.device)
        table[self.of_teacher] = torch.tensor(self.of_student).to(table)
        return table[labels]

    def shared_logits(
        self, student: Tensor, teacher: Tensor, background: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Both sides' logits of the shared classes, in the same order.

        Args:
            student, teacher: ``(..., K_S)`` and ``(..., K_T)``, or one more each where the background is last.
            background: whether it is; it is shared, too, and last again.
        """
        both = []
        for logits, classes in ((student, self.of_student), (teacher, self.of_teacher)):
            both.append(logits[..., [*classes, logits.shape[-1] - 1] if background else classes])
        return both[0], both[1]

    def __str__(self) -> str:
        lacking = [name for k, name in enumerate(self.student) if k not in self.of_student]
        text = f"{len(self.pairs)} of the student's {len(self.student)} classes are known to the teacher"
        return f"{text}; not {', '.join(lacking)}" if lacking else text


def renamed(names: Sequence[str], aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Names with some of them exchanged.

    Raises:
        InputError: an alias is for a class that is not there.
    """
    for name in aliases:
        if name not in names:
            near = difflib.get_close_matches(name, names) or names
            raise InputError("teacher.aliases", repr(name), f"of {', '.join(near)}")
    return tuple(aliases.get(name, name) for name in names)


def _numbers(culprit: str, names: Sequence[str]) -> dict[str, int]:
    for name, times in Counter(names).items():
        if times > 1:
            raise InputError(culprit, f"{name!r} {times} times", "a name once")
    return {name: k for k, name in enumerate(names)}


def _by_key(numbers: Mapping[str, int]) -> dict[str, int]:
    """The numbers by what remains of each name without its spelling; none where two names have that in common."""
    keys = {name: _without_spelling(name) for name in numbers}
    times = Counter(keys.values())
    return {key: numbers[name] for name, key in keys.items() if times[key] == 1}


def _without_spelling(name: str) -> str:
    # Between characters alone, for a sign in front or at the end is part of a name: "A-" is not "A".
    name = unicodedata.normalize("NFC", name.strip()).casefold()
    return re.sub(r"(?<=[^\s_-])[\s_-]+(?=[^\s_-])", "", name)
