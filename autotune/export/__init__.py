"""A fitted config in the words of each trainer, one file a trainer; the keys are ones that its classes accept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from autotune.errors import InvalidRequest
from autotune.export import transformers, trl
from autotune.export.transformers import to_transformers
from autotune.export.trl import to_trl

FORMATS = ("yaml", "json", "python")

_SCRIPTS: dict[str, Callable[[dict[str, Any]], str]] = {"transformers": transformers.to_python, "trl": trl.to_python}
TRAINERS = tuple(_SCRIPTS)


def render(document: dict[str, Any], format: str) -> str:
    """What `to_transformers` or `to_trl` gave, as text that ends in a newline. `format` is one of `FORMATS`."""
    if format == "python":
        return _SCRIPTS[document["trainer"]](document)
    if format == "json":
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if format != "yaml":
        raise InvalidRequest(f"format must be one of {', '.join(FORMATS)}, not {format}")
    return _yaml(document)


def _yaml(document: dict[str, Any]) -> str:
    """YAML in which code keeps its lines."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    written: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return written


__all__ = ["FORMATS", "TRAINERS", "render", "to_transformers", "to_trl"]
