"""`launch/prepare.py pairs` as a user runs it, and the run that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Done, run_forked

from sgmd_dist.data.captions import StoredCaptions
from sgmd_dist.data.index import ShardIndex

RECIPE = "recipes/tiny_sgmd.yaml"
CAPTIONS = ["a red ball moving left", "a blue square moving up"]


def pairs(folder: Path, words: str) -> Done:
    """The command on two captions, with its cache in `folder`."""
    source = f"data.shards=prompts:{folder / 'captions.txt'} 'data.video={{num_frames: 8, height: 12, width: 12}}'"
    return run_forked(f"python launch/prepare.py pairs {RECIPE} {folder / 'pairs'} {words} {source} run.dir={folder}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    return tmp_path


def test_pairs_are_made_continued_and_trained_on(folder: Path) -> None:
    """Overrides stand behind options; captions come again and again, each time with other noise."""
    first = pairs(folder, "--samples 3 --steps 3")
    assert first.code == 0 and "3 rows: 3 encoded, 0 skipped" in first.output, first.output
    more = pairs(folder, "data.micro_batch_size=2 --samples 8 --steps 3")
    assert more.code == 0 and "8 rows: 8 encoded, 0 skipped; 5 rows in" in more.output, more.output
    index = ShardIndex.open(folder / "pairs")
    captions = StoredCaptions(index)
    found = [captions.read(number)[0] for number in range(8)]
    assert index.has_noise(0) and sorted(found) == sorted(4 * CAPTIONS)

    run = (
        f"python launch/train.py {RECIPE} 'objective={{name: dmd}}' data.shards={folder / 'pairs'} run.dir={folder}/run"
    )
    checked = run_forked(f"{run} run.steps=1 --check")
    assert checked.code == 0 and "dmd on wan, 1 steps" in checked.output, checked.output


def test_mistakes_end_with_exit_code_2(folder: Path) -> None:
    wrong = {
        "--frames 3": "unrecognized arguments: --frames",
        "--samples 0": "expected an integer >= 1",
        "objective.name=flow_matching": "objective.name = flow_matching: pairs are made by the teacher",
        "objective.guidance_scal=3": "objective.guidance_scal = 3: unknown key",
    }
    for words, message in wrong.items():
        done = pairs(folder, words)
        assert done.code == 2 and message in done.output, done.output
    assert not (folder / "pairs").exists()


def test_other_commands_take_no_overrides(folder: Path) -> None:
    done = run_forked(f"python launch/prepare.py world {folder / 'world'} --num-samples 1 run.seed=3")
    assert done.code == 2 and "unrecognized arguments: run.seed=3" in done.output and not (folder / "world").exists()
