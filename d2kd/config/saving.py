"""Save recipes as YAML files that build the same objects again."""

from __future__ import annotations

from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import cloudpickle
import yaml
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ..data.catalog import REGISTERED_BY
from ..utils.env import import_path
from ..utils.errors import InputError
from ..utils.io import write_text


def save_config(config: DictConfig, path: str | Path) -> None:
    """Save a config as YAML, to be loaded by ``LazyConfig.load`` or any of d2kd's commands.

    Classes and functions are saved by their import path. Those without one, such as a lambda or a class defined in
    the recipe, and objects that YAML cannot represent are saved together in one pickle, which a later version of
    Python may fail to load. A data set that the file of a recipe or study registers is saved with the path of that
    file, which is executed again. Loading such a YAML executes code, as loading a recipe does.

    Raises:
        InputError: if the config contains an object that cannot be pickled.
    """
    try:
        text = _to_yaml(config)
    except Exception as error:  # pickling an object may raise anything
        expected = "a recipe of values that can be pickled"
        raise InputError(path, f"cannot be written ({error})", expected) from error
    write_text(path, text)


def _to_yaml(config: DictConfig) -> str:
    content = _serializable(OmegaConf.to_container(config, resolve=False))
    layout = {"sort_keys": False, "default_flow_style": None, "allow_unicode": True, "width": 9999}
    return yaml.dump(content, Dumper=_Dumper, **layout)


def changed_values(config: DictConfig, path: str | Path) -> dict[str, tuple[str, str]]:
    """Compare a config with the one that :func:`save_config` has written to a file, without executing anything.

    Returns:
        key -> (value in the file, value now), both as YAML, for each value that differs, with "nothing" for a key that
        one of them lacks. Objects that are saved as a pickle are not compared. Empty if either cannot be read.
    """
    try:
        before, now = (
            _flatten(yaml.compose(text)) for text in (Path(path).read_text(), _to_yaml(config))
        )
    except Exception:  # no such file, broken YAML, or an object that cannot be pickled
        return {}
    keys = [*before, *(key for key in now if key not in before)]
    pairs = {key: (before.get(key, "nothing"), now.get(key, "nothing")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flatten(node: yaml.Node, key: str = "") -> dict[str, str]:
    """Return the values of a YAML node as text, by their dotted keys."""
    call = node.tag.rpartition("python/object/apply:")[2] if "apply:" in node.tag else ""
    if call == "operator.getitem":  # one of the pickled objects
        return {key: "an object"}
    if call:  # of a name, see _Dumper
        return {key: node.value[0].value}
    if isinstance(node, yaml.ScalarNode):
        return {key: node.value}
    if isinstance(node, yaml.MappingNode):
        if not node.value:
            return {key: "{}"}
        items = [(name.value, value) for name, value in node.value]
    elif all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return {key: f"[{', '.join(item.value for item in node.value)}]"}
    else:
        items = [(str(k), value) for k, value in enumerate(node.value)]
    found = {}
    for name, value in items:
        found |= _flatten(value, f"{key}.{name}" if key else name)
    return found


class _Registered(str):
    """The name of a data set that a config file registers."""


def _serializable(value: Any) -> Any:
    if isinstance(value, dict):
        value = {key: _serializable(item) for key, item in value.items()}
        target = value.get("_target_")
        return value | {"_target_": import_path(target) or target} if callable(target) else value
    if isinstance(value, list):
        return [_serializable(item) for item in value]
    return _Registered(value) if isinstance(value, str) and value in REGISTERED_BY else value


class _Dumper(yaml.Dumper):
    """Puts all objects that YAML cannot represent into one pickle, so that shared parts stay shared."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._pickled: list[Any] = []
        self._pickle = yaml.ScalarNode("tag:yaml.org,2002:binary", "", style="|")
        self._all = self._call("pickle.loads", [self._pickle])

    def represent(self, data: Any) -> None:
        node = self.represent_data(data)
        self._pickle.value = self.represent_binary(cloudpickle.dumps(self._pickled)).value
        self.serialize(node)

    def _call(self, function: str, arguments: list[yaml.Node]) -> yaml.Node:
        return yaml.SequenceNode(f"tag:yaml.org,2002:python/object/apply:{function}", arguments)

    def represent_other(self, data: Any) -> yaml.Node:
        kind = type(data)
        if hasattr(data, "__qualname__"):
            if (name := import_path(data)) is not None:
                return self._call(f"{locate.__module__}.locate", [self.represent_data(name)])
        elif hasattr(data, "__dict__") and import_path(kind) is not None:
            if (kind.__reduce__, kind.__reduce_ex__) == (object.__reduce__, object.__reduce_ex__):
                return self.represent_object(data)
        self._pickled.append(data)
        index = self.represent_data(len(self._pickled) - 1)
        return self._call("operator.getitem", [self._all, index])

    def represent_registered(self, name: str) -> yaml.Node:
        arguments = [self.represent_data(text) for text in (str(name), REGISTERED_BY[name])]
        return self._call("d2kd.data.catalog.ensure_registered", arguments)


for _kind in (type, FunctionType, BuiltinFunctionType):
    _Dumper.add_representer(_kind, _Dumper.represent_other)
_Dumper.add_multi_representer(object, _Dumper.represent_other)
_Dumper.add_representer(_Registered, _Dumper.represent_registered)
