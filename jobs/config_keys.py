"""Walks the configuration's models: every key, its default and its meaning."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n     +\S.*)*)", re.MULTILINE)


def config_keys(model: type[Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield every key of the configuration as (dotted name, default, meaning).

    Args:
        model: The section to walk.
        prefix: Dotted name of that section.
    """
    for name, info in _section_fields(model):
        annotation, default, meaning = info
        section = _section_type(annotation)
        if section is None:
            yield f"{prefix}{name}", default, meaning
        else:
            yield from config_keys(section, f"{prefix}{name}.")


def _section_fields(model: type[Any]) -> Iterator[tuple[str, tuple[Any, str, str]]]:
    if issubclass(model, BaseModel):
        for name, info in model.model_fields.items():
            if info.is_required():
                default = "required"
            else:
                default = _plain(info.get_default(call_default_factory=True))
            yield name, (info.annotation, default, info.description or "")
        return
    docs = read_attributes(model.__doc__ or "")
    for field in dataclasses.fields(model):
        name = field.name
        default = "none" if field.default is None else _plain(field.default)
        yield name, (field.type, default, docs.get(name, ""))


def read_attributes(docstring: str) -> dict[str, str]:
    """Return the meaning of each attribute in a Google-style docstring, each on one line.

    Args:
        docstring: With an `Attributes:` section; empty dict without one.
    """
    section = docstring.partition("Attributes:\n")[2].partition("\n\n")[0]
    lines = "\n".join(line.removeprefix("    ") for line in section.splitlines())
    return {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(lines)}


def _plain(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, tuple | dict | list) else str(value)


def _section_type(annotation: Any) -> type[Any] | None:  # noqa: ANN401
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and (
            issubclass(candidate, BaseModel) or hasattr(candidate, "__pydantic_config__")
        ):
            return candidate
    return None
