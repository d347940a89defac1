"""Recipes as YAML files that build the same again."""

from __future__ import annotations

from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import cloudpickle
import yaml
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ..data.catalog import REGISTERED_BY
from ..utils.env import importable_name
from ..utils.errors import InputError
from ..utils.io import write_text


def save_config(config: DictConfig, path: str | Path) -> None:
    """Write a config as YAML that builds the same again: by ``LazyConfig.load``, and so by any of d2kd's commands.

    Classes and functions of modules stand there by their names. Those that no module has, such as a lambda or a class
    of the recipe's own file, and objects that YAML does not know are in it as one pickle, which a later version of
    Python may fail to read. A data set that a recipe's or a study's file registers stands there with that file, which
    is run again. Reading such a YAML executes code, as a recipe does.

    Raises:
        InputError: the config holds what cannot be pickled.
    """
    content = _to_write(OmegaConf.to_container(config, resolve=False))
    layout = {"sort_keys": False, "default_flow_style": None, "allow_unicode": True, "width": 9999}
    try:
        text = yaml.dump(content, Dumper=_Dumper, **layout)
    except Exception as error:  # an object decides itself how it fails
        expected = "a recipe of values that can be pickled"
        raise InputError(path, f"cannot be written ({error})", expected) from error
    write_text(path, text)


class _Registered(str):
    """The name of a data set that a file of configs registers."""


def _to_write(value: Any) -> Any:
    if isinstance(value, dict):
        value = {key: _to_write(item) for key, item in value.items()}
        target = value.get("_target_")
        return (
            value | {"_target_": importable_name(target) or target} if callable(target) else value
        )
    if isinstance(value, list):
        return [_to_write(item) for item in value]
    return _Registered(value) if isinstance(value, str) and value in REGISTERED_BY else value


class _Dumper(yaml.Dumper):
    """Keeps what YAML has no word for in one pickle, so that what its parts share stays shared."""

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
            if (name := importable_name(data)) is not None:
                return self._call(f"{locate.__module__}.locate", [self.represent_data(name)])
        elif hasattr(data, "__dict__") and importable_name(kind) is not None:
            if (kind.__reduce__, kind.__reduce_ex__) == (object.__reduce__, object.__reduce_ex__):
                return self.represent_object(data)
        self._pickled.append(data)
        index = self.represent_data(len(self._pickled) - 1)
        return self._call("operator.getitem", [self._all, index])

    def represent_registered(self, name: str) -> yaml.Node:
        arguments = [self.represent_data(text) for text in (str(name), REGISTERED_BY[name])]
        return self._call("d2kd.data.catalog.registered", arguments)


for _kind in (type, FunctionType, BuiltinFunctionType):
    _Dumper.add_representer(_kind, _Dumper.represent_other)
_Dumper.add_multi_representer(object, _Dumper.represent_other)
_Dumper.add_representer(_Registered, _Dumper.represent_registered)
