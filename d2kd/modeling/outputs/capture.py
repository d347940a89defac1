"""Recording of the inputs and outputs of modules and methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from torch import nn

Call = tuple[tuple, Any]


@contextlib.contextmanager
def capture(hook_points: Mapping[str, nn.Module | Callable]) -> Iterator[dict[str, list[Call]]]:
    """Record the calls of modules and methods while the block runs; hooks are removed at its end.

    Args:
        hook_points: {name: module, or bound method of one}. A name is the key of the recorded calls. An
            ``nn.ModuleList`` is never called, so its members must be named instead.

    Yields:
        for each name, the calls ``(positional inputs, output)`` in order; empty if there was none.
    """
    calls: dict[str, list[Call]] = {name: [] for name in hook_points}
    with contextlib.ExitStack() as stack:
        for name, joint in hook_points.items():
            if not isinstance(joint, nn.Module):
                recorded = _record_method(joint, calls[name])
                stack.enter_context(mock.patch.object(joint.__self__, joint.__name__, recorded))
                continue
            hook = joint.register_forward_hook(
                lambda _, inputs, output, records=calls[name]: records.append((inputs, output))
            )
            stack.callback(hook.remove)
        yield calls


def _record_method(method: Callable, records: list[Call]) -> Callable:
    def recorded(*inputs: Any, **options: Any) -> Any:
        output = method(*inputs, **options)
        records.append((inputs, output))
        return output

    return recorded
