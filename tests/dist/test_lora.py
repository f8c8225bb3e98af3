"""Adapters on one shared base train as adapters on three bases of their own do in a plain process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import WanTransformer3DModel
from lora_reference import LoraReference
from ranks import run_ranks
from test_passes import PassCounter
from running import State, parameter_difference, train, train_unsaved
from torch import nn
from torch._dynamo.utils import counters

from sgmd_dist import checkpoint
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

TOLERANCE = 1e-6
STEPS = 3
BOTH = ["model.generator.lora={rank: 4, alpha: 8}", "model.fake_score.lora={rank: 3}"]
TWO_LAYERS = [f"model.{role}.lora={{rank: 3, targets: [to_q, ffn.net.2]}}" for role in ("generator", "fake_score")]
GENERATOR_ALONE = ["model.generator.lora={rank: 4, targets: [to_q, ffn.net.2]}"]
CHECKPOINTING = "parallel.activation_checkpointing=block"
_references: dict[tuple[str, ...], State] = {}


def reference(recipe_path: Path, overrides: list[str]) -> State:
    """The plain trainer's result, computed once per variant."""
    key = tuple(overrides)
    if key not in _references:
        torch.set_num_threads(1)
        _references[key] = LoraReference(load_recipe(recipe_path, overrides)).train()
    return _references[key]


def moved(state: State) -> float:
    """How far the EMA is from the generator: shows that training did something."""
    pairs = zip(state["generator"].values(), state["generator.ema"].values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def only_parameters(state: State) -> State:
    return {name: part for name, part in state.items() if not name.endswith(".optimizer")}


LAYOUTS = {
    "1 rank": (1, []),
    "2 ranks": (2, []),
    "2 ranks, checkpointing": (2, [CHECKPOINTING]),
    "2 ranks, selective checkpointing": (2, ["parallel.activation_checkpointing=selective"]),
    "2 ranks, gathered until the backward": (2, ["parallel.reshard_after_forward=false"]),
    "HSDP 2 x 2, checkpointing": (4, ["data.global_batch_size=4", "parallel.dp_replicate=2", CHECKPOINTING]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_shared_base_equals_three_separate_ones(recipe_path: Path, layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    state = run_ranks(world_size, train_unsaved, recipe_path, [*BOTH, *overrides])[0]
    expected = reference(recipe_path, [*BOTH, *(key for key in overrides if key.startswith("data."))])
    assert moved(expected) > 1e-3
    assert parameter_difference(only_parameters(state), expected) < TOLERANCE


def test_a_fake_score_without_an_adapter_keeps_a_network_of_its_own(recipe_path: Path) -> None:
    state = run_ranks(2, train_unsaved, recipe_path, GENERATOR_ALONE)[0]
    expected = reference(recipe_path, GENERATOR_ALONE)
    assert len(state["generator"]) == 2 * 2 * 3, "A and B, in 2 blocks, of two to_q and one ffn.net.2"
    assert moved(expected) > 1e-4
    assert parameter_difference(only_parameters(state), expected) < TOLERANCE


def test_ranks_that_share_sequences_train_adapters_as_one_process_does(recipe_path: Path) -> None:
    parallel = ["parallel.ulysses=2", "parallel.ring=2", CHECKPOINTING]
    state = run_ranks(4, train_unsaved, recipe_path, [*BOTH, *parallel])[0]
    assert parameter_difference(only_parameters(state), reference(recipe_path, BOTH)) < TOLERANCE


def train_compiled(recipe_path: Path, overrides: list[str]) -> tuple[State, dict[str, int]]:
    """Train with compiled blocks, whose graphs run eagerly: what Dynamo makes of switching is what is in question."""
    compiled = nn.Module.compile
    nn.Module.compile = lambda self: compiled(self, backend="eager")
    state = train_unsaved(recipe_path, [*overrides, "parallel.compile=true"])
    return state, dict(counters["unimplemented"])


def test_compiled_blocks_train_adapters_as_eager_ones_do(recipe_path: Path, one_block_folder: Path) -> None:
    small = ["data.global_batch_size=1", "run.steps=2", f"model.pretrained={one_block_folder}"]
    overrides = [*TWO_LAYERS, *small]
    state, not_compiled = run_ranks(1, train_compiled, recipe_path, [*overrides, CHECKPOINTING])[0]
    assert not_compiled == {}
    assert parameter_difference(only_parameters(state), reference(recipe_path, overrides)) < TOLERANCE


def test_a_bfloat16_base_with_float32_adapters_gives_one_result_on_any_number_of_ranks(recipe_path: Path) -> None:
    """bf16 compute has 8 bits of mantissa: 2 ranks stay within 5% of the distance that training goes."""
    overrides = [*BOTH, "model.compute_dtype=bfloat16", CHECKPOINTING]
    one, two = (run_ranks(n, train_unsaved, recipe_path, overrides)[0] for n in (1, 2))
    exact = reference(recipe_path, BOTH)
    assert parameter_difference(two, one) < 0.05 * moved(exact)
    assert parameter_difference(only_parameters(two), exact) < 0.5 * moved(exact)
    assert {p.dtype for part in two.values() for p in part.values()} == {torch.float32}


def what_lies_on_a_rank(recipe_path: Path, overrides: list[str]) -> tuple[int, int]:
    """Bytes of this rank's shards of all distinct parameters; elements of all adapters over all ranks."""
    recipe = load_recipe(recipe_path, overrides)
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        parameters = {p for role in trainer.roles.values() for p in role.module.parameters()}
        num_bytes = sum(p.to_local().nbytes for p in parameters)
        elements = sum(p.numel() for role in trainer.roles.trained for p in role.parameters.values())
        trainer.close()
        del trainer
    return num_bytes, elements


def test_the_ranks_hold_one_copy_of_the_base(recipe_path: Path, wan_folder: Path) -> None:
    """The base in bfloat16 once, two adapters in float32."""
    ranks = run_ranks(2, what_lies_on_a_rank, recipe_path, [*BOTH, "model.compute_dtype=bfloat16"])
    base = sum(p.numel() for p in WanTransformer3DModel.from_pretrained(wan_folder / "transformer").parameters())
    assert sum(num_bytes for num_bytes, _ in ranks) == 2 * base + 4 * ranks[0][1]


def count_passes(recipe_path: Path, overrides: list[str]) -> tuple[dict[str, int], float]:
    """Passes of one step through a layer of the shared base, and those that the roles counted, per sample."""
    recipe = load_recipe(recipe_path, overrides)
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        counter = PassCounter(trainer.roles["teacher"].module.blocks[1].ffn.net[2].base_layer)
        trainer.train_step()
        planned = sum(trainer.roles.take_passes().values())
        trainer.close()
        del trainer
    return dict(counter.counts), planned


def test_a_step_takes_the_planned_passes_and_no_weight_gradient_of_the_base(recipe_path: Path) -> None:
    counts, planned = run_ranks(1, count_passes, recipe_path, [*BOTH, CHECKPOINTING])[0]
    assert sum(counts.values()) == planned
    assert counts.keys() == {"forward", "input"}


def test_a_checkpoint_holds_adapters_only_and_resumes_on_other_ranks(recipe_path: Path, tmp_path: Path) -> None:
    """Weights, moments and moving average of adapters: names, and elements."""
    overrides = [*BOTH, f"run.dir={tmp_path}/run"]
    run_ranks(2, train, recipe_path, [*overrides, "run.steps=2"])
    folder, expected = checkpoint.find(tmp_path / "run"), reference(recipe_path, BOTH)
    names = {f"{tree}.{name}": t.numel() for tree, part in expected.items() for name, t in part.items()}
    for tree in ("generator", "fake_score"):
        for name, t in expected[tree].items():
            moments = {"exp_avg": t.numel(), "exp_avg_sq": t.numel(), "step": 1}
            names |= {f"{tree}.optimizer.{name}.{key}": size for key, size in moments.items()}
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {name: tensor.size.numel() for name, tensor in saved.items()} == names
    assert load_recipe(folder / checkpoint.RECIPE_FILE).model.generator.lora.rank == 4
    state = run_ranks(1, train, recipe_path, overrides)[0]
    assert parameter_difference(only_parameters(state), expected) < TOLERANCE
