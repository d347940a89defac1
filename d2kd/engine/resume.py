"""What the processes of a resumed run agree on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..utils.errors import InputError
from .checkpoint import (
    NORMALIZER,
)


def check_agreed(last: tuple[str, dict] | None) -> None:
    """Whether all processes go on from one checkpoint; or they would train different weights, and never say so.

    Raises:
        InputError: they do not.
    """
    found = "no checkpoint" if last is None else Path(last[0]).name
    for rank, other in enumerate(comm.all_gather(found)):
        if other != found:
            raise InputError(
                "--resume",
                f"{found} in process {comm.get_rank()}, {other} in process {rank}",
                "one output folder that all processes see",
            )


def dealt_anew(states: Sequence[dict], processes: int) -> dict[str, Any]:
    """What each of another number of processes goes on with; a batch has as many images in all as before.

    A normalizer counts the foreground of its process's share of them, so it is their sum that stays.
    """
    known = [state[NORMALIZER] for state in states if NORMALIZER in state]
    return {NORMALIZER: sum(known) / processes} if known else {}
