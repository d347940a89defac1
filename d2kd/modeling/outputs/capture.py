"""Recording what modules and methods are called with and return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from torch import nn

Call = tuple[tuple, Any]


@contextlib.contextmanager
def capture(joints: Mapping[str, nn.Module | Callable]) -> Iterator[dict[str, list[Call]]]:
    """Listen to modules, and to methods, while the block runs, and leave no hook behind.

    Args:
        joints: what to listen to, by the name under which its calls are wanted: a module, or the bound method
            of one. An ``nn.ModuleList`` is never called, so it cannot be listened to: name its members.

    Yields:
        for every name the calls ``(positional inputs, output)`` in order; empty if there was none.
    """
    calls: dict[str, list[Call]] = {name: [] for name in joints}
    with contextlib.ExitStack() as listening:
        for name, joint in joints.items():
            if not isinstance(joint, nn.Module):
                listened = _listened(joint, calls[name])
                listening.enter_context(mock.patch.object(joint.__self__, joint.__name__, listened))
                continue
            hook = joint.register_forward_hook(
                lambda _, inputs, output, heard=calls[name]: heard.append((inputs, output))
            )
            listening.callback(hook.remove)
        yield calls


def _listened(method: Callable, heard: list[Call]) -> Callable:
    def listened(*inputs: Any, **options: Any) -> Any:
        output = method(*inputs, **options)
        heard.append((inputs, output))
        return output

    return listened
