"""Reads the configuration's YAML file; what is wrong with it is told with its key and line."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs.config import JobConfig
from jobs.config_keys import config_keys
from jobs.errors import ConfigError

# PyYAML lets through what a date like 2024-13-45, 0x_ or a very deep list makes Python raise.
YAML_FAULTS = (yaml.YAMLError, ValueError, RecursionError)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a configuration file and apply `section.key=value` overrides.

    Relative paths in it stay relative to the working directory, as on any command line.

    Args:
        path: The YAML file.
        overrides: Texts `a.b=value`; the value is parsed as YAML.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: The file is missing or no YAML mapping, a key is unknown (the nearest known
            one is named), a value has the wrong type or range.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"config {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} can't be read: {error}") from error
    except YAML_FAULTS as error:
        raise ConfigError(f"config {path} is no YAML: {_yaml_fault(error)}") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"is no YAML mapping but {values!r:.60}"
        raise ConfigError(f"config {path} {found}; docs/config.md lists the keys it needs")
    for override in overrides:
        _apply_override(values, override)
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        given = {override.partition("=")[0] for override in overrides}
        raise ConfigError(f"config {path}: {'; '.join(_faults(error, text, given))}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping."""
        lines: dict[str, int] = {}
        for key in (pair[0] for pair in node.value if isinstance(pair[0], yaml.ScalarNode)):
            if key.value in lines:
                told = f"{key.value!r} is there already, on line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=told, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except YAML_FAULTS as error:
        raise ConfigError(f"--set {override!r}: {_yaml_fault(error)}") from error
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {parent} is no section")
    values[last] = value


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _faults(error: ValidationError, text: str, given: Collection[str]) -> Iterator[str]:
    """Yield what is wrong, and on which line of the file, unless `--set` gave it."""
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        is_given = any(f"{key}.".startswith(f"{one}.") for one in given)
        number = None if is_given else find_line(text, fault["loc"])
        line = "" if number is None else f"line {number}: "
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            yield f"{line}unknown key {key!r}{_suggestion(key)}"
        elif fault["type"] == "missing":
            yield f"{line}{key} is missing"
        else:
            value = fault["input"]
            scalar = isinstance(value, str | int | float | None) and "found" not in fault["msg"]
            found = f", found {value!r:.60}" if scalar else ""
            told = fault["msg"].removeprefix("Value error, ")
            yield f"{line}{key or 'the config'}: {told}{found}"


def _suggestion(key: str) -> str:
    names = [name for name, _, _ in config_keys(JobConfig)]
    sections = {name.rpartition(".")[0] for name in names} - {""}
    near = difflib.get_close_matches(key, [*names, *sections], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def find_line(text: str, key: Iterable[str | int]) -> int | None:
    """Return the line, counted from 1, of a key, or of its nearest section that is there.

    Args:
        text: YAML that can be read.
        key: Names and places in lists, from the outside in.

    Returns:
        None where not even the first name is there.
    """
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in key:
        found = _find_child(node, part)
        if found is None:
            break
        named, node = found
        line = named.start_mark.line + 1
    return line


def _find_child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the node that names a child, and the child."""
    if isinstance(node, yaml.MappingNode):
        return next((pair for pair in node.value if pair[0].value == str(part)), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None
