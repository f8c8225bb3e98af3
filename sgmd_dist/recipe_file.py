"""Reads recipes: YAML, `base:` inheritance, `key.sub=value` overrides, and messages for people."""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sgmd_dist import registry
from sgmd_dist.errors import UserError
from sgmd_dist.recipe import KIND_OF_SECTION, Recipe, recipe_class
from sgmd_dist.schedule import EXPECTED, Schedule

COMMAND_LINE = "command line"
_PLUGIN_KEYS = {"objective": "name", "model": "family"}
_OUR_ERRORS = ("recipe", "schedule")  # error types whose text is a whole message
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_MAX_SHOWN = 80  # characters of a value in a message


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-5` as a number and dates as text, and refuses a key that stands twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                problem = f"the key '{key.value}' stands twice, first in line {lines[key.value]}; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if not resolver[0].endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge and validate a recipe.

    Args:
        path: a YAML file; `base: other.yaml` in it (relative to it) is read first and overridden key by key.
            A section that names another objective or model family than its base starts afresh.
        overrides: `key.sub=value` words, values in YAML; the last one wins.

    Raises:
        UserError: one message with every mistake: file, key, value, what is allowed, the nearest valid key.
    """
    origins: dict[str, str] = {}
    data = _read_with_base(Path(path), origins, ())
    changes: dict[str, Any] = {}
    for word in overrides:
        changes = _merge(changes, _parse_override(word), COMMAND_LINE, {})
    data = _merge(data, changes, COMMAND_LINE, origins)
    return _validate(data, str(path), origins)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return yaml.dump(recipe.resolved(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _validate(data: dict[str, Any], path: str, origins: dict[str, str]) -> Recipe:
    plugins: dict[str, str] = {}
    mistakes: list[str] = []
    for section in _PLUGIN_KEYS:
        try:
            plugins[section] = _plugin_name(section, data, path, origins)
        except UserError as error:
            mistakes.append(str(error))
    schema = recipe_class(plugins)
    try:
        recipe = schema.model_validate(data)
    except ValidationError as error:
        skipped = set(_PLUGIN_KEYS) - set(plugins)  # their keys are not known without the plug-in
        mistakes += [m for section, m in _messages(error, schema, data, path, origins) if section not in skipped]
    else:
        if not mistakes:
            return recipe
    mistakes = list(dict.fromkeys(mistakes))
    if len(mistakes) == 1:
        raise UserError(mistakes[0])
    numbered = (f"[{number}] {mistake}" for number, mistake in enumerate(mistakes, 1))
    raise UserError(f"{len(mistakes)} mistakes: {' '.join(numbered)}")


# Reading and merging


def _read_with_base(path: Path, origins: dict[str, str], chain: tuple[Path, ...]) -> dict[str, Any]:
    data = _read_yaml(path)
    base = data.pop("base", None)
    if base is None:
        return _merge({}, data, str(path), origins)
    if not isinstance(base, str):
        raise UserError(f"{path}: base = {_shown(base)}: expected the file name of another recipe")
    parent, chain = path.parent / base, (*chain, path)
    if not os.path.isfile(parent):  # Path.is_file raises for a name that is too long
        raise UserError(f"{path}: base = {base!r}: no such file {parent}; the name is relative to {path.parent}")
    if parent.resolve() in [child.resolve() for child in chain]:
        circle = " -> ".join(map(str, (*chain, parent)))
        raise UserError(f"{path}: base = {base!r}: the recipes inherit from each other in a circle: {circle}")
    return _merge(_read_with_base(parent, origins, chain), data, str(path), origins)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; the working directory is {Path.cwd()}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    if data is None:
        raise UserError(f"{path}: the file is empty; expected sections such as 'run:' and 'model:'")
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections such as 'run:' and 'model:', found {_shown(data)}")
    return data


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        kind = "" if isinstance(error, yaml.constructor.ConstructorError) else "not valid YAML: "
        return f"line {mark.line + 1}, column {mark.column + 1}: {kind}{error.problem}"
    return f"not valid YAML: {' '.join(str(error).split())}"


def _parse_override(word: str) -> dict[str, Any]:
    key, equals, text = word.partition("=")
    parts = key.split(".")
    if not equals or not all(part.isidentifier() for part in parts):
        raise UserError(f"{COMMAND_LINE}: {word!r}: expected key.sub=value, as in optim.generator.lr=1e-5")
    if parts == ["base"]:
        raise UserError(f"{COMMAND_LINE}: {word!r}: 'base' belongs in a recipe file; give that recipe instead")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{COMMAND_LINE}: {word!r}: the value is not valid YAML: {problem}") from None
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge(
    base: dict[str, Any], update: dict[str, Any], origin: str, origins: dict[str, str], at: str = ""
) -> dict[str, Any]:
    """`update` over `base`, key by key; `origins` learns that the keys of `update` come from `origin`."""
    merged = dict(base)
    for key, value in update.items():
        name = f"{at}{key}"
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _replaces(name, old, value):
            origins[name] = origin
            merged[key] = _merge(old, value, origin, origins, f"{name}.")
        else:
            merged[key] = value
            _mark(value, name, origin, origins)
    return merged


def _replaces(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """A schedule replaces a schedule, and another plug-in's section replaces the section of the base."""
    plugin_key = _PLUGIN_KEYS.get(name)
    if plugin_key is not None:
        return plugin_key in new and plugin_key in old and new[plugin_key] != old[plugin_key]
    return isinstance(new.get("schedule"), str)


def _mark(value: Any, name: str, origin: str, origins: dict[str, str]) -> None:
    origins[name] = origin
    if isinstance(value, dict):
        for key, inner in value.items():
            _mark(inner, f"{name}.{key}", origin, origins)


def _plugin_name(section: str, data: dict[str, Any], path: str, origins: dict[str, str]) -> str:
    key, choices = f"{section}.{_PLUGIN_KEYS[section]}", registry.available(KIND_OF_SECTION[section])
    value = data.get(section)
    if value is not None and not isinstance(value, dict):
        hint = f"expected a section with the key '{_PLUGIN_KEYS[section]}'; {registry.allowed(str(value), choices)}"
        raise UserError(f"{origins[section]}: {section} = {_shown(value)}: {hint}")
    if not value or _PLUGIN_KEYS[section] not in value:
        raise UserError(f"{origins.get(section, path)}: {key}: this key is required; {registry.allowed('', choices)}")
    name = value[_PLUGIN_KEYS[section]]
    if not isinstance(name, str) or name not in choices:
        raise UserError(f"{origins[key]}: {key} = {_shown(name)}: {registry.allowed(str(name), choices)}")
    return name


# Messages


def _messages(
    error: ValidationError, schema: type[BaseModel], data: dict[str, Any], path: str, origins: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """(section, message) of every mistake that pydantic found."""
    for detail in error.errors(include_url=False):
        parts, field, names = _locate(schema, detail["loc"])
        key = ".".join(parts)
        origin = next((origins[k] for k in _prefixes(parts) if k in origins), path)
        value = _look_up(data, parts)
        if field is None:
            near = _elsewhere(schema, parts) or registry.nearest(parts[-1], names)
            expected = f"unknown key; allowed: {', '.join(names)}{near}"
        elif detail["type"] == "missing" and len(parts) == len(detail["loc"]):
            yield parts[0], f"{path}: {key}: this key is required; expected {expectation(field, None)}"
            continue
        elif detail["type"] in _OUR_ERRORS:
            expected = detail["msg"]
        elif detail["type"] == "value_error":
            expected = f"expected {detail['msg'].removeprefix('Value error, ')}"
        else:
            expected = f"expected {expectation(field, value)}"
        is_section = isinstance(value, dict) and (field is None or section_of(field) not in (None, Schedule))
        yield parts[0], f"{origin}: {key}{'' if is_section else f' = {_shown(value)}'}: {expected}"


def _locate(schema: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], FieldInfo | None, list[str]]:
    """The recipe key that `loc` is in, its field (None where the key is unknown), and the keys beside it.

    A place inside a list, or a branch of a union, belongs to the key that holds the list or the union.
    """
    section: type[BaseModel] | None = schema
    parts: list[str] = []
    field: FieldInfo | None = None
    names: list[str] = []
    for part in loc:
        if section is None:
            break
        fields = {known.alias or name: known for name, known in section.model_fields.items()}
        parts.append(str(part))
        field, names = fields.get(str(part)), list(fields)
        section = section_of(field) if field is not None else None
    return parts, field, names


def _elsewhere(schema: type[BaseModel], parts: list[str]) -> str:
    """A hint where a key stands at the top that belongs into a section."""
    if len(parts) > 1:
        return ""
    sections = {name: section_of(field) for name, field in schema.model_fields.items()}
    homes = [name for name, section in sections.items() if section and parts[0] in section.model_fields]
    return f"; did you mean '{homes[0]}.{parts[0]}'?" if homes else ""


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    for kind in _options(field.annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def expectation(field: FieldInfo, value: Any) -> str:
    """What a field takes, in words: `an integer >= 1`."""
    if field.description:
        return field.description
    options = [kind for kind in _options(field.annotation) if kind is not type(None)]
    limits = [(sign, getattr(m, name, None)) for m in field.metadata for name, sign in _SIGNS.items()]
    bounds = [f" {sign} {limit}" for sign, limit in limits if limit is not None]
    text = " or ".join(map(_kind, options)) + " and".join(bounds)
    if len(options) < len(_options(field.annotation)):
        text += " or null"
    if isinstance(value, dict):
        return f"{text}, not a section"
    if options == [str] and isinstance(value, int | float):
        return f"{text}; quote it to make it text"
    choices = [str(choice) for kind in options if get_origin(kind) is Literal for choice in get_args(kind)]
    return text + registry.nearest(str(value), choices)


def _kind(kind: Any) -> str:
    if kind in _KINDS:
        return _KINDS[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (tuple, list):
        inner = get_args(kind)
        number = f"{len(inner)} " if get_origin(kind) is tuple else ""
        one = get_args(inner[0])[0] if get_origin(inner[0]) is Annotated else inner[0]
        return f"a list of {number}{_PLURALS.get(one, 'values')}"
    if kind is Schedule:
        return EXPECTED
    names = [field.alias or name for name, field in kind.model_fields.items()]
    return f"a section with keys {', '.join(names)}"


def _shown(value: Any) -> str:
    """A value on one line, as a recipe would write it, cut where it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _prefixes(parts: list[str]) -> Iterator[str]:
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def _look_up(data: Any, parts: list[str]) -> Any:
    for part in parts:
        if not isinstance(data, dict) or part not in data:
            break
        data = data[part]
    return data
