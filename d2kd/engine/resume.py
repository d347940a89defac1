"""Consistency of the processes of a resumed run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..utils.errors import InputError
from .checkpoint import LOSS_NORMALIZER


def check_same_checkpoint(last: tuple[str, dict] | None) -> None:
    """Check that all processes resume from the same checkpoint; otherwise their weights would differ silently.

    Raises:
        InputError: the checkpoints differ.
    """
    found = "no checkpoint" if last is None else Path(last[0]).name
    for rank, other in enumerate(comm.all_gather(found)):
        if other != found:
            raise InputError(
                "--resume",
                f"{found} in process {comm.get_rank()}, {other} in process {rank}",
                "one output folder that all processes see",
            )


def redistribute_normalizer(states: Sequence[dict], processes: int) -> dict[str, Any]:
    """Return the state of each process if their number has changed, with the same total batch size.

    A loss normalizer counts the foreground of its process's part of the batch, so that their sum is preserved.
    """
    values = [state[LOSS_NORMALIZER] for state in states if LOSS_NORMALIZER in state]
    return {LOSS_NORMALIZER: sum(values) / processes} if values else {}
