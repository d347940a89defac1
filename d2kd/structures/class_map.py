"""The mapping between the classes of a student and its teacher.

Classes match if their names are equal. A name without an equal matches the name that differs only in case, or in
spaces, hyphens and underscores between characters ("traffic light" and "Traffic_Light"), if there is exactly one.
Classes of one side only are not compared.
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
    """Return the number of classes of a detector, without the background."""
    return getattr(detector, "roi_heads", detector).num_classes


def class_names(given: str | Iterable[str], culprit: str = "classes") -> tuple[str, ...]:
    """Return class names in the order of a detector's class indices.

    Args:
        given: the names, or the name of a registered data set (or names of several, of which the first with labels is used). An
            incremental data set gives all classes learned up to the end of its increment.
        culprit: name of the option, for error messages.

    Raises:
        InputError: if there is no such data set, or no class names.
    """
    if not isinstance(given, str):
        given = [str(name) for name in given]
        if given and all(map(_registered, given)):
            labelled = [n for n in given if not MetadataCatalog.get(n).get("unlabelled")]
            given = [*labelled, *given][0]
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
    """Raise InputError unless the number of names is the detector's number of classes."""
    if len(classes) != num_classes_of(detector):
        raise InputError(
            f"classes of the {side}",
            f"{len(classes)} names",
            f"{num_classes_of(detector)}, one for each class of the {type(detector).__name__}",
        )


@dataclass(frozen=True)
class ClassMap:
    """The classes that two detectors share.

    Attributes:
        student, teacher: class names in each detector's order, K_S and K_T of them.
        pairs: class indices (student, teacher) of each shared class, in the student's order.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def from_names(cls, student: Sequence[str], teacher: Sequence[str]) -> ClassMap:
        """Match two lists of class names. Equal lists match index by index.

        Raises:
            InputError: if a name is twice in a list.
        """
        student, teacher = tuple(student), tuple(teacher)
        if student == teacher:
            return cls(student, teacher, tuple((k, k) for k in range(len(student))))
        s, t = _index_by_name("classes", student), _index_by_name("teacher.classes", teacher)
        pairs = [(s.pop(name), t.pop(name)) for name in student if name in t]
        s, t = _by_normalized_name(s), _by_normalized_name(t)
        pairs += [(k, t[key]) for key, k in s.items() if key in t]
        return cls(student, teacher, tuple(sorted(pairs)))

    @property
    def is_identity(self) -> bool:
        """Whether every class has the same index on both sides."""
        same = [(k, k) for k in range(len(self.student))]
        return len(self.student) == len(self.teacher) and list(self.pairs) == same

    @property
    def shared_fraction(self) -> float:
        """Fraction of the student's classes that the teacher has, in [0, 1]."""
        return len(self.pairs) / len(self.student)

    @property
    def student_ids(self) -> list[int]:
        """The student's indices of the shared classes."""
        return [k for k, _ in self.pairs]

    @property
    def teacher_ids(self) -> list[int]:
        """The teacher's indices of the shared classes, in the same order."""
        return [k for _, k in self.pairs]

    def map_labels(self, labels: Tensor) -> Tensor:
        """Map the student's labels to indices in ``pairs``.

        Args:
            labels: any shape, in ``{-1, 0, …, K_S}``: -1 ignored, K_S background.

        Returns:
            Tensor: of equal shape; ``len(pairs)`` is background, -1 is ignored or a class that the teacher lacks.
        """
        table = torch.full((len(self.student) + 2,), -1)
        table[self.student_ids] = torch.arange(len(self.pairs))
        table[len(self.student)] = len(self.pairs)
        # Label -1 indexes the last entry, which is -1.
        return table.to(labels, non_blocking=True)[labels]

    def labels_to_student(self, labels: Tensor) -> Tensor:
        """Map the teacher's labels, any shape, in ``{0, …, K_T - 1}``, to the student's; -1 for classes it lacks."""
        table = torch.full((len(self.teacher),), -1)
        table[self.teacher_ids] = torch.tensor(self.student_ids)
        return table.to(labels, non_blocking=True)[labels]

    def shared_logits(
        self, student: Tensor, teacher: Tensor, background: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return both sides' logits of the shared classes, in the same order.

        Args:
            student, teacher: ``(..., K_S)`` and ``(..., K_T)``, or ``K_S + 1`` and ``K_T + 1`` with ``background``.
            background: whether the last entry is the background, which is then also last in the outputs.
        """
        return (
            self.select(student, "student", background),
            self.select(teacher, "teacher", background),
        )

    def select(self, logits: Tensor, side: str, background: bool = False) -> Tensor:
        """Return one side's logits of the shared classes, see :meth:`shared_logits`; ``side``: "student" or "teacher"."""
        # An indexed copy may have another layout, and sums of it other roundings.
        if self.is_identity:
            return logits
        classes = self.student_ids if side == "student" else self.teacher_ids
        index = torch.tensor([*classes, logits.shape[-1] - 1] if background else classes)
        return logits[..., index.to(logits.device, non_blocking=True)]

    def __str__(self) -> str:
        lacking = [name for k, name in enumerate(self.student) if k not in self.student_ids]
        text = f"{len(self.pairs)} of the student's {len(self.student)} classes are known to the teacher"
        return f"{text}; not {', '.join(lacking)}" if lacking else text


def num_shared_classes(detector: nn.Module, class_map: ClassMap | None) -> int:
    """Return the number of classes that are compared, given one of the detectors."""
    return num_classes_of(detector) if class_map is None else len(class_map.pairs)


def check_same_classes(student: nn.Module, teacher: nn.Module, class_map: ClassMap | None) -> None:
    """Raise InputError where two detectors have other numbers of classes, and no names by which to match them."""
    counts = [num_classes_of(detector) for detector in (student, teacher)]
    if class_map is None and counts[0] != counts[1]:
        raise InputError(
            "num_classes",
            f"student {counts[0]}, teacher {counts[1]}",
            "the same classes, or the names of both: the teacher's and the Distiller's classes",
        )


def check_shared_classes(
    student: nn.Module, teacher: nn.Module, class_map: ClassMap | None
) -> None:
    """Raise InputError as :func:`check_same_classes` does, and where no class is the student's and the teacher's."""
    check_same_classes(student, teacher, class_map)
    if class_map is not None and not class_map.pairs:
        raise InputError(
            "classes", "none is the student's and the teacher's", "at least one of both"
        )


def apply_aliases(names: Sequence[str], aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Return ``names`` with those in ``aliases`` replaced.

    Raises:
        InputError: if an alias is for a name that is not in ``names``.
    """
    for name in aliases:
        if name not in names:
            near = difflib.get_close_matches(name, names) or names
            raise InputError("teacher.aliases", repr(name), f"of {', '.join(near)}")
    return tuple(aliases.get(name, name) for name in names)


def _index_by_name(culprit: str, names: Sequence[str]) -> dict[str, int]:
    for name, times in Counter(names).items():
        if times > 1:
            raise InputError(culprit, f"{name!r} {times} times", "a name once")
    return {name: k for k, name in enumerate(names)}


def _by_normalized_name(numbers: Mapping[str, int]) -> dict[str, int]:
    """Return the indices by normalized name, without names whose normalized form is not unique."""
    keys = {name: _normalize_name(name) for name in numbers}
    times = Counter(keys.values())
    return {key: numbers[name] for name, key in keys.items() if times[key] == 1}


def _normalize_name(name: str) -> str:
    # Only between characters: a sign at the start or end is part of the name, as "A-" is not "A".
    name = unicodedata.normalize("NFC", name.strip()).casefold()
    return re.sub(r"(?<=[^\s_-])[\s_-]+(?=[^\s_-])", "", name)
