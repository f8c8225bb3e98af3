"""Whatever a person gets wrong in a recipe or a command line ends with exit code 2 and a message, never a traceback."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from commands import REPO, Done, run_in_turn

SEED = 2605
NUM_TRIED, NUM_REFUSED = 800, 500
RECIPES = ("tiny_sgmd", "tiny_dmd2", "tiny_sid", "tiny_sim", "tiny_teacher")
VALUES = [
    *(None, True, False, 0, -1, 1, 3, 10**30, 0.5, -0.5, 1e-30, float("inf"), float("nan")),
    *("", "x", "auto", "1", "1e-5", "null", "~", "/", ".", "tiny", "ä☃", "a" * 300, "\n", "{}", "${HOME}"),
    *([], [1], ["x", None], [[]], {}, {"x": 1}, {"schedule": "linear"}, {"schedule": "linear", "from": "a"}),
]
STRANGE = ["", ":", "\t", " ", "- ", "{", "*", "\x00", "!!python/object:os.system "]
LAUNCHES = [
    "launch/train.py {recipe} --check --world-size 2 run.steps=5 optim.generator.lr=1e-4",
    "launch/train.py {recipe} --check parallel.ulysses=2 parallel.ring=2 --world-size 4",
    "launch/plan.py {recipe} --nodes 2 --gpus-per-node 8 --gpu-memory 80",
    "launch/train.py --inspect-checkpoint {nothing}",
    "launch/sample.py {nothing} --prompts a b --out {nothing}/videos --format gif --seeds 3 4 --size 81x480x832",
    "launch/evaluate.py {nothing} --repeats 1 --teacher-steps 10",
    "launch/export.py {nothing} {nothing}/out --ema --svd-rank 4 --keys original --dtype bfloat16 --max-shard-size 5GB",
    "launch/prepare.py videos {nothing} {nothing}/out --pretrained {nothing} --buckets 81x480x832 --fps 16",
    "launch/prepare.py prompts {nothing} {nothing}/out --pretrained {nothing} --video 81 480 832",
    "launch/prepare.py pairs {nothing} {nothing}/out --samples 10",
    "launch/prepare.py verify {nothing} --threads 2",
    "launch/bench.py science --quick --world rong --seeds 1",
]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys and items of a YAML tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def misspelt(word: str, draw: random.Random) -> str:
    """A letter lost, doubled, exchanged or put in."""
    place = draw.randrange(len(word))
    letter = draw.choice(["", word[place] * 2, draw.choice("abcxyz_-=.0 "), word[place].swapcase() + "q"])
    return word[:place] + letter + word[place + 1 :]


# Recipes


def with_another_value(tree: Any, path: tuple[Any, ...], draw: random.Random) -> None:
    parent(tree, path)[path[-1]] = draw.choice(VALUES)


def without(tree: Any, path: tuple[Any, ...], draw: random.Random) -> None:
    del parent(tree, path)[path[-1]]


def with_a_misspelt_key(tree: Any, path: tuple[Any, ...], draw: random.Random) -> None:
    container = parent(tree, path)
    if isinstance(container, dict):
        container[misspelt(str(path[-1]), draw)] = container.pop(path[-1])


def with_a_stranger(tree: Any, path: tuple[Any, ...], draw: random.Random) -> None:
    container = parent(tree, path)
    if isinstance(container, dict):
        container[draw.choice(["lr", "steps", "name", "x", 7, None, True])] = draw.choice(VALUES)


TREE_CHANGES: list[Callable[[Any, tuple[Any, ...], random.Random], None]] = [
    *(with_another_value, with_another_value, without, with_a_misspelt_key, with_a_stranger)
]


def wrong_recipe(draw: random.Random) -> str:
    """The text of a shipped recipe, changed in a key or a value, or in a few characters."""
    text = (REPO / f"recipes/{draw.choice(RECIPES)}.yaml").read_text(encoding="utf-8")
    text = text.replace("base: ", f"base: {REPO}/recipes/")
    if draw.random() < 0.2:
        place = draw.randrange(len(text))
        return text[:place] + draw.choice(STRANGE) + text[place + 3 :]
    tree = copy.deepcopy(yaml.safe_load(text))
    draw.choice(TREE_CHANGES)(tree, draw.choice(list(leaves(tree))), draw)
    return yaml.safe_dump(tree, allow_unicode=draw.random() < 0.5)


# Command lines


def wrong_command(draw: random.Random, recipe: str, nothing: Path) -> str:
    """A command line with a word lost, doubled, misspelt, moved or replaced. Those that would do something lasting if
    they were right name a folder that is not there."""
    program, *words = draw.choice(LAUNCHES).format(recipe=recipe, nothing=nothing).split()
    place = draw.randrange(len(words))
    words[place : place + 1] = draw.choice(
        [
            [],
            [words[place]] * 2,
            [misspelt(words[place], draw).replace(" ", "")],
            [draw.choice(["-1", "0", "x", "--world-size", "run.steps=", "=3", "a.b.c=1", "1e99", "--", "run={}", "{"])],
        ]
    )
    if "train.py" in program and "--check" not in words and "--inspect-checkpoint" not in words:
        words.append("--check")
    return " ".join(["python", program, *(word for word in words if word)])


def is_refused(done: Done, case: str) -> bool:
    """Whether it was refused, as it should be: what is right although it was changed counts for nothing."""
    assert "Traceback" not in done.output, f"{case}\n{done.output}"
    if done.code == 0:
        return False
    assert done.code == 2, f"{case}\nexit code {done.code}\n{done.output}"
    message = [line for line in done.output.splitlines() if "error: " in line]
    assert len(message) == 1, f"{case}\n{done.output}"
    assert len(message[0].partition("error: ")[2]) > 15, f"{case}\n{done.output}"
    return True


def cases(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Commands, each with all that a person needs to see what is wrong with it."""
    draw = random.Random(SEED)
    for number in range(count):
        if draw.random() < 0.6:
            path, text = folder / f"{number}.yaml", wrong_recipe(draw)
            path.write_text(text, encoding="utf-8")
            command = f"python launch/train.py {path} --check --world-size 2 run.dir={folder}/run"
            yield command, f"{command}\n{text}"
        else:
            command = wrong_command(draw, "recipes/tiny_sgmd.yaml", folder / "nothing")
            yield command, command


def test_five_hundred_mistakes_are_refused_with_a_message(tmp_path: Path) -> None:
    tried = list(cases(NUM_TRIED, tmp_path))
    ends = run_in_turn([command for command, _ in tried])
    refused = [is_refused(done, case) for (_, case), done in zip(tried, ends, strict=True)]
    assert sum(refused) >= NUM_REFUSED, f"{sum(refused)} of {NUM_TRIED}"
