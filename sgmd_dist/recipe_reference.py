"""Writes docs/recipes.md from the recipe's sections: python -m sgmd_dist.recipe_reference > docs/recipes.md

A section's docstring describes its keys: a line `key: text`, or sentences that name `key` in backticks; what names no
key stands above the table. `PLAIN_KEYS` has a word for keys whose docstring leaves them to their name.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from sgmd_dist import registry
from sgmd_dist.recipe import ModelSection, ObjectiveSection, Recipe
from sgmd_dist.recipe_file import expectation, section_of
from sgmd_dist.schedule import Schedule
from sgmd_dist.section import Section

HEAD = """# Recipes: every key

This page is written by `python -m sgmd_dist.recipe_reference > docs/recipes.md` from the docstrings and types of
the recipe's sections. A recipe is a YAML file of these sections; `recipes/sgmd.yaml` is one with comments.

- `base: other.yaml` reads another recipe first, relative to this one, and overrides it key by key.
- `key.sub=value` on the command line overrides any key, the last one wins; the value is YAML.
- A key that is not known, and a value out of its range, end every command with exit code 2 before it begins.
- The resolved recipe, every key with its value, is written to `run.dir/recipe.yaml`, and is a recipe itself.

A key that takes a *schedule* takes a number, or one of these:

```yaml
{schedule: linear, from: 0.0, to: 0.1, steps: 500, start: 0}
{schedule: cosine, from: 0.0, to: 0.1, steps: 500, start: 0}
{schedule: piecewise, points: [[0, 0.1], [1000, 0.05]]}
```

The first two move during `steps` steps from step `start` (default 0) on, and are constant before and after; the third
holds each value from its step on.
"""
SHORT = 40  # characters: longer words stand once in a table
TABLE = ["| key | takes | default | what |", "|---|---|---|---|"]
PLAIN_KEYS = {
    "run.name": "what logs and reports call the run",
    "run.dir": "the run's folder, relative to the working directory",
    "run.seed": "of every random draw: data order, noise, noise levels, random weights",
    "run.steps": "optimizer steps in all",
    "run.log_every": "steps between two lines of metrics",
    "model.family": "a file in `sgmd_dist/models`",
    "model.compute_dtype": "of forward and backward passes",
    "model.text_tokens": "to which prompt embeddings are cut or padded with zeros",
    "model.teacher": "the frozen network that is distilled",
    "model.generator": "the few-step generator",
    "model.fake_score": "the network that follows the generator's samples",
    "model.teacher.pretrained": "a folder for this role alone; default: `model.pretrained`",
    "model.generator.pretrained": "as the teacher's",
    "model.generator.lora": "an adapter instead of a whole network; null trains the whole network",
    "model.generator.lora.rank": "of the adapter's two matrices",
    "model.generator.lora.targets": "ends of layers' names",
    "objective.name": "a file in `sgmd_dist/objectives`",
    "objective.exit_groups": "equal parts of a step's micro-batches, each with its own draw of the exit step",
    "objective.fisher_weight": "of the generator's Fisher term",
    "objective.nr_weight": "of the generator's noise-residual term, the paper's lambda",
    "objective.rc_weight": "of the fake score's loss",
    "objective.diversity": "the diversity term",
    "objective.diversity.weight": "of the diversity term; 0 = off",
    "objective.gan": "the GAN term",
    "optim.generator": "AdamW for the generator",
    "optim.fake_score": "AdamW for the fake score",
    "optim.max_grad_norm": "gradients are scaled down to this norm, over all parameters of a role",
    "optim.schedule": "of the learning rates",
    "optim.ema": "the moving average of the generator",
    "optim.generator.lr": "learning rate",
    "optim.generator.betas": "decay of AdamW's two moments",
    "optim.generator.weight_decay": "AdamW's, decoupled",
    "optim.generator.eps": "AdamW's",
    "optim.schedule.name": "its form after the warm-up",
    "data.micro_batch_size": "videos in one pass of a rank; accumulation follows from it",
    "data.text_encoder": "a diffusers folder with `text_encoder` and `tokenizer`",
    "data.threads": "that read shards, on each rank",
    "data.video.num_frames": "frames",
    "data.video.height": "pixels",
    "data.video.width": "pixels",
    "parallel.dp_replicate": "copies of the shards (HSDP)",
    "logging.tensorboard": "write `run.dir/tensorboard`",
}
_KEY_LINE = re.compile(r"^(\w+(?:, \w+)*): (.*)")
_NAMED = re.compile(r"`(\w+)(?:[:=][^`]*)?`")
_SUBJECT = re.compile(r"((?:`\w+`(?:, )?)+): ")  # as in "`a`, `b`: what both do"
_CLAUSE_END = re.compile(r"(?<=\.)\s+(?=[A-Z`])|(?<=;)\s+")


def reference() -> str:
    """The page, as Markdown."""
    parts = [HEAD]
    for name, field in Recipe.model_fields.items():
        section = section_of(field)
        assert section is not None, name
        parts += _section([name], section, f"## {name}")
        kind = {"model": registry.MODELS, "objective": registry.OBJECTIVES}.get(name)
        parts += _plugins(name, kind, section) if kind else []
    return "\n".join(parts)


def undescribed() -> list[str]:
    """Keys that no docstring and no entry of `PLAIN_KEYS` describes, as `## data: shards`. Arguments of diffusers'
    classes are described there."""
    found, heading, elsewhere = [], "", False
    for line in reference().splitlines():
        if line.startswith("#"):
            heading, elsewhere = line, False
        elsewhere = elsewhere or "rguments of diffusers'" in line
        match = re.match(r"\| `(.+?)` \|.*\|  \|$", line)
        if match and not elsewhere:
            found.append(f"{heading}: {match[1]}")
    return found


def _plugins(name: str, kind: str, base: type[BaseModel]) -> Iterator[str]:
    """The sections of all plug-ins, each class once: what several share stands before what one has."""
    modules = {plugin: registry.load(kind, plugin) for plugin in registry.available(kind)}
    shared: dict[type[BaseModel], list[str]] = {}
    for plugin, module in modules.items():
        for cls in module.Section.__mro__[1:]:
            if issubclass(cls, base) and cls is not base:
                shared.setdefault(cls, []).append(plugin)
    key = {"model": "family", "objective": "name"}[name]
    for cls, plugins in shared.items():
        yield from _section([name], cls, f"### {name}.{key}: {', '.join(plugins)}", omit=key)
    for plugin, module in modules.items():
        about = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        heading = f"### {name}.{key}: {plugin}"
        yield from _section([name], module.Section, heading, about=about, omit=key, of=f" of {plugin}")


def _section(
    paths: list[str], cls: type[BaseModel], heading: str, *, about: str = "", omit: str = "", of: str = ""
) -> Iterator[str]:
    """A heading, what the docstring says of the whole, the table of the class's own keys, and the sections below."""
    fields = {name: field for name, field in cls.model_fields.items() if name in _own(cls) and name != omit}
    intro, said = _described(cls)
    words = {name: _words(f"{paths[0]}.{field.alias or name}", said.get(name, "")) for name, field in fields.items()}
    first = {text: name for name, text in reversed(words.items()) if len(text) > SHORT}
    rows = [
        _row(name, field, words[name] if first.get(words[name], name) == name else f"see `{first[words[name]]}`")
        for name, field in fields.items()
    ]
    yield "\n\n".join(filter(None, [heading, about, intro, "\n".join([*TABLE, *rows]) if rows else ""])) + "\n"
    below: dict[type[BaseModel], list[str]] = {}
    for name, field in fields.items():
        section = section_of(field)
        if section is not None and section is not Schedule:
            below.setdefault(section, []).extend(f"{path}.{name}" for path in paths)
    for section, names in below.items():
        yield from _section(names, section, f"### {', '.join(names)}{of}", of=of)


def _own(cls: type[BaseModel]) -> set[str]:
    """The keys that a table lists: those of a plug-in's class are its own, those of other sections all."""
    if issubclass(cls, ModelSection | ObjectiveSection):
        return set(cls.__annotations__)
    return set(cls.model_fields)


def _words(path: str, said: str) -> str:
    return _joined(filter(None, [PLAIN_KEYS.get(path, ""), said]))


def _joined(clauses: Iterable[str]) -> str:
    """Clauses behind semicolons, sentences behind full stops."""
    return re.sub(r"; (?=[A-Z])", ". ", "; ".join(clauses))


def _row(name: str, field: FieldInfo, words: str) -> str:
    cells = [f"`{field.alias or name}`", _takes(field), _default(field), words]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes(field: FieldInfo) -> str:
    section = section_of(field)
    if section is Schedule:
        return f"a number{_bounds(field)} or a schedule"
    if section is not None:
        return "a section or null" if field.default is None else "a section"
    return expectation(field, None).partition("; did you mean")[0]


def _bounds(field: FieldInfo) -> str:
    """The bounds that `schedule.scheduled` checks, as ` >= 0 and <= 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<="}
    found = [inspect.getclosurevars(m.func).nonlocals for m in field.metadata if hasattr(m, "func")]
    return " and".join(f" {sign} {b[name]:g}" for b in found for name, sign in signs.items() if b.get(name) is not None)


def _default(field: FieldInfo) -> str:
    section = section_of(field)
    if field.default is PydanticUndefined:
        return "required"
    if section is not None and section is not Schedule:
        return "`null`" if field.default is None else ""
    value: Any = to_jsonable_python(field.default)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _described(cls: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """What a class's docstring says of the section, and what it or those of its bases say of each key."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if issubclass(base, Section) and base is not Section]):
        names = {field.alias or name: name for name, field in base.model_fields.items()}
        said: dict[str, list[str]] = {}
        intro: list[str] = []
        for text, keys in _statements(inspect.cleandoc(base.__doc__ or ""), set(names)):
            for key in keys:
                said.setdefault(names[key], []).append(text.rstrip(".;"))
            if not keys:
                intro.append(text)
        texts |= {name: _joined(clauses) for name, clauses in said.items()}
    return re.sub(r";$", ".", " ".join(intro)), texts


def _statements(doc: str, keys: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Key lines and clauses with the keys that each is about. A clause that names none goes on about those before."""
    for paragraph in doc.split("\n\n"):
        prose: list[str] = []
        entries: list[tuple[str, list[str]]] = []
        for line in paragraph.splitlines():
            match = _KEY_LINE.match(line)
            if match and (found := [key for key in match[1].split(", ") if key in keys]):
                entries.append((match[2], found))
            elif entries:
                entries[-1] = (f"{entries[-1][0]} {line.strip()}", entries[-1][1])
            else:
                prose.append(line.strip())
        about: list[str] = []
        for clause in filter(None, _CLAUSE_END.split(" ".join(prose))):
            subject = _SUBJECT.match(clause)
            named = _NAMED.findall(subject[1] if subject else clause)
            about = [key for key in dict.fromkeys(named) if key in keys] or about
            yield clause[subject.end() :] if subject else clause, about
        yield from entries


if __name__ == "__main__":
    print(reference(), end="")
