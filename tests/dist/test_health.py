"""The watch on the generator's motion and colours: one number on any ranks, no influence on the training, and an early end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from loguru import logger
from ranks import run_ranks
from running import State, max_difference, parameter_difference, train, train_until_stopped

from sgmd_dist import checkpoint, rng
from sgmd_dist.assemble import build_model, load_network, load_weights
from sgmd_dist.data.evaluation_pass import evaluation_pass
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.health import TEACHER_FILE, Look, colour_drift
from sgmd_dist.motion import latent_motion
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.rng import SampleId
from sgmd_dist.rollout import guided, sample

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
SAMPLES = 6
WATCH = ["run.steps=4", f"health.motion={{every: 2, samples: {SAMPLES}, teacher_steps: 3}}"]


def run_dir(recipe_path: Path) -> Path:
    return recipe_path.parent / "run"


def ratios(recipe_path: Path, metric: str = "health/motion_ratio") -> dict[int, float]:
    lines = map(json.loads, (run_dir(recipe_path) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[metric] for line in lines if metric in line}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, write_recipe) -> tuple[Path, State]:
    """A recipe, and the state after it was trained on one rank."""
    recipe_path = write_recipe(tmp_path_factory.mktemp("watched"))
    return recipe_path, run_ranks(1, train, recipe_path, WATCH)[0]


def by_hand(recipe_path: Path, shards: Path) -> tuple[float, float]:
    """The newest checkpoint's ratio of motions and its drift, from plain networks on the data set's first samples."""
    recipe, index, device = load_recipe(recipe_path), ShardIndex.open(shards), torch.device("cpu")
    model = build_model(recipe, "generator")
    weights = load_weights(checkpoint.find(run_dir(recipe_path)), "generator", model, None, None)
    generator, teacher = (load_network(model, w, device, recipe.run.seed) for w in (weights, None))
    batch = next(evaluation_pass(index, micro_batch_size=SAMPLES, text_tokens=recipe.model.text_tokens))
    ids = [SampleId(0, 0, place) for place in range(SAMPLES)]
    noise = rng.sample_normal(batch.latent_shape, recipe.run.seed, "health/motion", ids, device=device)
    texts = batch.prompt_embeds, batch.negative_embeds
    videos = sample(guided(generator, *texts, 1.0), noise, 4, 5.0)
    wanted = sample(guided(teacher, *texts, recipe.objective.model_dump()["guidance_scale"]), noise, 3, 5.0)
    return float(latent_motion(videos).mean() / latent_motion(wanted).mean()), float(drift_by_hand(videos, wanted))


def drift_by_hand(videos: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    (found, true) = ((x.double().mean((0, 2, 3, 4)), x.double().std((0, 2, 3, 4))) for x in (videos, wanted))
    return (((found[0] - true[0]) ** 2 + (found[1] - true[1]) ** 2).sqrt() / true[1]).max()


def test_motion_and_drift_are_those_of_plain_networks_on_the_first_samples(
    watched: tuple[Path, State], shards: Path
) -> None:
    found, drifts = ratios(watched[0]), ratios(watched[0], "health/colour_drift")
    assert list(found) == list(drifts) == [2, 4]
    ratio, drift = by_hand(watched[0], shards)
    assert found[4] == pytest.approx(ratio, rel=1e-5)
    assert drifts[4] == pytest.approx(drift, rel=1e-3)
    assert found[2] != found[4]


@pytest.mark.parametrize(
    "world_size, overrides",
    [(2, []), (4, ["parallel.ring=2", "parallel.teacher_offload=true"])],
    ids=["2 ranks", "4 ranks, ring 2, teacher offloaded"],
)
def test_ranks_find_the_same_ratio(
    recipe_path: Path, watched: tuple[Path, State], world_size: int, overrides: Sequence[str]
) -> None:
    state = run_ranks(world_size, train, recipe_path, [*WATCH, *overrides])[0]
    assert list(ratios(recipe_path).values()) == pytest.approx(list(ratios(watched[0]).values()), rel=1e-4)
    assert parameter_difference(state, watched[1]) < 1e-6


def test_to_watch_changes_nothing_of_the_training(recipe_path: Path, watched: tuple[Path, State]) -> None:
    unwatched = run_ranks(1, train, recipe_path, ["run.steps=4"])[0]
    assert set(max_difference(unwatched, watched[1]).values()) == {0.0}
    assert not ratios(recipe_path)


def test_a_run_that_is_asked_to_stop_saves_before_it_looks(recipe_path: Path, watched: tuple[Path, State]) -> None:
    """The look of that step is left out; later ones find what they would have found."""
    run_ranks(2, train_until_stopped, recipe_path, WATCH)
    assert [path.name for path in checkpoint.committed(run_dir(recipe_path))] == ["step-00000002"]
    assert not ratios(recipe_path)
    run_ranks(2, train, recipe_path, WATCH)
    assert ratios(recipe_path) == {4: pytest.approx(ratios(watched[0])[4], rel=1e-4)}


def train_and_log(recipe_path: Path, overrides: Sequence[str]) -> None:
    """Train to the end, which must be a success, and keep what the rank has to say."""
    logger.add(recipe_path.parent / f"rank{os.environ['RANK']}.log", format="{message}", level="WARNING")
    train(recipe_path, overrides)


def test_a_ratio_out_of_bounds_saves_and_ends_the_training_on_all_ranks(recipe_path: Path) -> None:
    """Ended by its own rule, a run is done: exit code 0, so that a batch script does not requeue it."""
    always = "health.motion={every: 2, samples: 3, teacher_steps: 1, lowest: 1, highest: 1, max_drift: 9, stop: true}"
    run_ranks(2, train_and_log, recipe_path, ["run.steps=9", always])
    assert [path.name for path in checkpoint.committed(run_dir(recipe_path))] == ["step-00000002"]
    assert list(ratios(recipe_path)) == [2]
    first, second = ((recipe_path.parent / f"rank{rank}.log").read_text() for rank in range(2))
    assert re.fullmatch(
        r"step 2: latent motion is .* of the teacher's, out of health.motion's 1 to 1: .*; this ends the training\n",
        first,
    )
    assert second == ""


def test_colours_that_drift_end_the_training_too(recipe_path: Path) -> None:
    always = "health.motion={every: 2, samples: 3, teacher_steps: 1, lowest: 0, highest: 99, max_drift: 0.001, stop: true}"
    run_ranks(1, train_and_log, recipe_path, ["run.steps=9", always])
    assert list(ratios(recipe_path)) == [2]
    assert re.fullmatch(
        r"step 2: the values of a latent channel are .* away from the teacher's, beyond health.motion's 0.001: .*\n",
        (recipe_path.parent / "rank0.log").read_text(),
    )


@pytest.mark.parametrize(
    "means, stds, drift",
    [([1.0, 0.0], [2.0, 0.5], 0.0), ([2.0, 0.0], [2.0, 0.5], 0.5), ([1.0, 0.3], [2.0, 0.1], 1.0), ([1.0, 0.0], [0.0, 0.5], 1.0)],
    ids=["the same", "a shifted mean", "mean and contrast of another channel", "a channel that became grey"],
)
def test_a_drift_is_the_farthest_channels_in_the_teachers_deviations(
    means: list[float], stds: list[float], drift: float
) -> None:
    assert colour_drift(Look(1.0, means, stds), Look(1.0, [1.0, 0.0], [2.0, 0.5])) == pytest.approx(drift)


def test_the_teachers_motion_is_measured_once_for_a_run_folder(recipe_path: Path) -> None:
    run_ranks(1, train, recipe_path, [*WATCH, "run.steps=2"])
    path = run_dir(recipe_path) / TEACHER_FILE
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"motion": 1000 * kept["motion"]}))
    run_ranks(1, train, recipe_path, WATCH)
    assert ratios(recipe_path)[4] < ratios(recipe_path)[2] / 100, "the kept number was taken"
    run_ranks(1, train, recipe_path, [*WATCH, "run.steps=6", "health.motion.teacher_steps=4"])
    assert ratios(recipe_path)[6] > ratios(recipe_path)[2] / 100, "it is of other settings"


def test_training_goes_on_where_the_teachers_cannot_be_kept(recipe_path: Path) -> None:
    (run_dir(recipe_path) / TEACHER_FILE).mkdir(parents=True)
    run_ranks(1, train, recipe_path, ["run.steps=1", "health.motion={every: 1, samples: 2, teacher_steps: 1}"])
    assert list(ratios(recipe_path)) == [1]
