"""Pairs on ranks: each is what the teacher makes of its noise, whoever makes it; and DMD trains on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import RankError, run_ranks
from reference import Reference
from running import parameter_difference, train_unsaved
from safetensors.torch import load as load_safetensors
from test_dry_run import dry
from test_planner import passes_by_exit, sent_bytes, two_each

from sgmd_dist.assemble import build_model, load_network
from sgmd_dist.data.captions import StoredCaptions
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.preparation import Summary
from sgmd_dist.data.verify import verify
from sgmd_dist.dryrun import check_equal
from sgmd_dist.errors import UserError
from sgmd_dist.pairs import PairRows, chain_of, make_pairs, pair_noise
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.preemption import StopRequest
from sgmd_dist.recipe_file import load_recipe

COUNT, NUM_STEPS = 9, 4
TWO_AT_ONCE = ["data.micro_batch_size=2", "data.global_batch_size=4"]
Pair = dict[str, torch.Tensor]


def make(recipe_path: Path, out: Path, count: int | None, overrides: list[str], last_round: int = 99) -> Summary:
    """What `launch/prepare.py pairs` does; rank 0 is asked to stop before round `last_round`."""
    recipe = load_recipe(recipe_path, [*TWO_AT_ONCE, *overrides])
    stop, is_stopping = StopRequest(), PairRows._is_stopping
    rounds = iter(range(99))

    def next_round(self: PairRows) -> bool:
        stop.is_set = next(rounds) >= last_round and self._mesh.is_main
        return is_stopping(self)

    PairRows._is_stopping = next_round
    with process_group() as device:
        mesh = build_mesh(recipe.layout(world_size()), device)
        chain = chain_of(recipe, NUM_STEPS)
        summary = make_pairs(recipe, mesh, out, chain, num_pairs=count, shard_bytes=8000, stop=stop)
        del mesh
    return summary


def pairs_in(folder: Path) -> dict[int, Pair]:
    """Every pair's tensors by its number."""
    index = ShardIndex.open(folder)
    found = {}
    for number, key in enumerate(index.keys):
        data = index.local_path(int(index.shard[number])).read_bytes()
        found[int(key)] = load_safetensors(data[index.offset[number] :][: index.size[number]])
    return found


def captions_in(folder: Path) -> dict[int, str]:
    index = ShardIndex.open(folder)
    captions = StoredCaptions(index)
    return {int(key): captions.read(number)[0] for number, key in enumerate(index.keys)}


def assert_same_pairs(ours: dict[int, Pair], theirs: dict[int, Pair]) -> None:
    """Equal noise and text, and samples to a rounding of bf16."""
    assert ours.keys() == theirs.keys()
    for number, pair in ours.items():
        other = theirs[number]
        assert torch.equal(pair["noise"], other["noise"]) and torch.equal(pair["prompt_embeds"], other["prompt_embeds"])
        torch.testing.assert_close(pair["latents"], other["latents"], atol=1e-3, rtol=2**-7)


@pytest.fixture(scope="module")
def by_one_rank(tmp_path_factory: pytest.TempPathFactory, write_recipe) -> Path:
    """9 pairs that one rank made, with the recipe beside them."""
    folder = tmp_path_factory.mktemp("one")
    [summary] = run_ranks(1, make, write_recipe(folder), folder / "pairs", COUNT, [])
    assert (summary.num_rows, summary.num_encoded, summary.num_new, summary.stopped) == (9, 9, 9, False)
    return folder


def test_a_pair_is_the_stored_noise_and_what_the_teacher_makes_of_it(by_one_rank: Path, shards: Path) -> None:
    """Integrated again from what is stored, with diffusers' guidance and a chain written out."""
    recipe = load_recipe(by_one_rank / "recipe.yaml")
    network = load_network(build_model(recipe, "teacher"), None, torch.device("cpu"))
    index = ShardIndex.open(by_one_rank / "pairs")
    negative = torch.zeros(1, 8, 32)
    negative[0, : len(index.negative_prompt())] = index.negative_prompt()
    times = [1 - i / NUM_STEPS for i in range(NUM_STEPS + 1)]
    sigmas = [5 * t / (1 + 4 * t) for t in times]
    for number, pair in pairs_in(by_one_rank / "pairs").items():
        assert torch.equal(pair["noise"], pair_noise(index.latent_shape(0), recipe.run.seed, number))
        text = torch.zeros(1, 8, 32)
        text[0, : len(pair["prompt_embeds"])] = pair["prompt_embeds"]
        x = pair["noise"].float()[None]
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            with torch.no_grad():
                positive, other = (network(x, torch.tensor([sigma]), t, sigma) for t in (text, negative))
            x = x + (following - sigma) * (other + 3.0 * (positive - other))
        torch.testing.assert_close(pair["latents"], x[0].bfloat16(), atol=1e-3, rtol=2**-7)
        assert (pair["latents"] - pair["noise"]).abs().max() > 0.1


def test_pairs_are_a_whole_data_set_with_captions(by_one_rank: Path, shards: Path) -> None:
    report = verify([str(by_one_rank / "pairs")])
    assert report.mistakes == [] and report.samples == {"3x3x8x8": COUNT} and report.num_shards > 1
    source = ShardIndex.open(shards)
    captions, found = StoredCaptions(source), captions_in(by_one_rank / "pairs")
    stored = dict(captions.read(number) for number in range(source.num_samples))
    for number, pair in pairs_in(by_one_rank / "pairs").items():
        assert torch.equal(stored[found[number]], pair["prompt_embeds"])
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("layout", [[], ["parallel.ulysses=2"]])
def test_two_ranks_make_the_same_pairs(
    by_one_rank: Path, recipe_path: Path, tmp_path: Path, layout: list[str]
) -> None:
    """9 rows in batches of 2: the first rank has 3 rounds, the second, if its sequence is its own, idles in one."""
    summaries = run_ranks(2, make, recipe_path, tmp_path / "pairs", COUNT, layout)
    assert len(set(summaries)) == 1 and summaries[0].num_encoded == COUNT
    assert_same_pairs(pairs_in(tmp_path / "pairs"), pairs_in(by_one_rank / "pairs"))


def test_ranks_stop_together_and_any_number_continues(by_one_rank: Path, recipe_path: Path, tmp_path: Path) -> None:
    """Only rank 0 is asked to stop; the others end their shards after the same round."""
    out = tmp_path / "pairs"
    stopped = run_ranks(2, make, recipe_path, out, COUNT, [], 1)
    assert all(summary.stopped and summary.num_encoded == 4 for summary in stopped)
    assert not (out / "index.json").exists()
    [more] = run_ranks(1, make, recipe_path, out, 4, [])
    assert (more.num_encoded, more.num_new, more.stopped) == (4, 0, False)
    ends = run_ranks(3, make, recipe_path, out, COUNT, ["data.global_batch_size=6"])
    assert all((summary.num_encoded, summary.num_new) == (9, 5) for summary in ends)
    assert_same_pairs(pairs_in(out), pairs_in(by_one_rank / "pairs"))

    with pytest.raises(RankError, match=r"other settings: guidance_scale was 3\.0, is now 2\.0"):
        run_ranks(1, make, recipe_path, out, COUNT, ["objective.guidance_scale=2"])


def test_a_teacher_that_is_no_distillations_is_refused(recipe_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective\.name = flow_matching: pairs are made by the teacher"):
        chain_of(load_recipe(recipe_path, ["objective={name: flow_matching}"]), 50)
    ramp = "objective.guidance_scale={schedule: linear, from: 1, to: 5, steps: 9}"
    with pytest.raises(UserError, match=r"objective\.guidance_scale: goes from 1 to 5 .* override it with a number"):
        chain_of(load_recipe(recipe_path, [ramp]), 50)


def test_damaged_shards_are_named(recipe_path: Path, tmp_path: Path, shards: Path) -> None:
    index = ShardIndex.open(shards)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in shards.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    with open(damaged / index.local_path(0).name, "r+b") as file:
        file.seek(int(index.offset[5]) + 300)
        file.write(b"\x55\xaa")
    captions = StoredCaptions(ShardIndex.open(damaged))
    assert captions.read(4)[0]
    with pytest.raises(UserError, match=rf"sample '{index.keys[5]}' at offset {index.offset[5]}: its crc32 is not"):
        captions.read(5)


# -- training ---------------------------------------------------------------------------------------------------

DMD = ["objective={name: dmd}", "run.steps=3"]


def test_dmd_on_two_ranks_equals_one_plain_process(by_one_rank: Path, recipe_path: Path) -> None:
    overrides = [*DMD, f"data.shards={by_one_rank / 'pairs'}"]
    state = run_ranks(2, train_unsaved, recipe_path, overrides)[0]
    torch.set_num_threads(1)
    expected = Reference(load_recipe(recipe_path, overrides)).train()
    ours = {name: part for name, part in state.items() if not name.endswith(".optimizer")}
    assert parameter_difference(ours, expected) < 1e-6
    lines = (recipe_path.parent / "run/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["generator/regression"] > 0 for line in lines)


def test_a_dmd_step_takes_the_planned_passes(by_one_rank: Path, recipe_path: Path) -> None:
    """With recomputation: two of the generator with gradients, 4 passes each, and one rollout for both networks."""
    overrides = [*DMD, f"data.shards={by_one_rank / 'pairs'}", "parallel.activation_checkpointing=block"]
    [counts] = run_ranks(1, passes_by_exit, recipe_path, overrides, [0])[0]
    assert counts == {"generator": 8, "fake_score": 1 + 4, "teacher": 2}
    planned = make_plan(load_recipe(recipe_path, overrides), Machine(1, 1, 80)).passes
    assert planned == {role: (count, count) for role, count in counts.items()}


def test_what_a_dmd_step_sends_is_planned(by_one_rank: Path, recipe_path: Path) -> None:
    overrides = [*DMD, f"data.shards={by_one_rank / 'pairs'}"]
    sent = run_ranks(2, sent_bytes, recipe_path, overrides)[0]
    plan = make_plan(load_recipe(recipe_path, [two_each(2), *overrides]), Machine(1, 2, 80))
    planned = {flow.kind: flow.sent_bytes for flow in plan.flows}
    assert sent == {kind: planned[kind] for kind in ("all-gather", "reduce-scatter")}


def test_a_dry_run_needs_no_pairs(recipe_path: Path) -> None:
    traces = dry(recipe_path, DMD, 2, [0, 1])
    check_equal(traces)
    assert [part.name for part in traces[0].last_step] == ["step 2, generator", "step 2, fake_score"]
