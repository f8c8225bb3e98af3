"""One process without a launcher is a whole group; half a launcher's environment is an error."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from sgmd_dist.errors import UserError
from sgmd_dist.layout import Layout
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size

ONE_RANK = Layout(world_size=1, dp_replicate=1, dp_shard=1, ring=1, ulysses=1, num_units=4, accumulation=4)

pytestmark = pytest.mark.usefixtures("no_launcher")


def test_without_a_launcher_the_group_is_this_process() -> None:
    assert world_size() == 1
    with process_group():
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        total = torch.tensor(3.0)
        dist.all_reduce(total)
        assert total == 3
    assert not dist.is_initialized()


def test_the_group_ends_after_an_error_too_and_can_be_made_again() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"), process_group():
            raise ValueError("stop")
        assert not dist.is_initialized()


def test_a_launcher_with_one_rank_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert world_size() == 1
    with process_group():
        assert dist.get_world_size() == 1


def test_world_size_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world_size() == 8


def test_a_world_size_that_some_shell_left_behind_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_size() == 1


@pytest.mark.parametrize("call", [world_size, lambda: process_group().__enter__()])
def test_half_a_launchers_environment_is_named(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RANK = 0 is set and MASTER_ADDR, MASTER_PORT not; start with torchrun"):
        call()
    assert not dist.is_initialized()


def test_the_mesh_of_one_rank_has_one_axis_and_this_rank_is_main() -> None:
    with process_group() as device:
        mesh = build_mesh(ONE_RANK, device)
        assert mesh.fsdp.mesh_dim_names == ("dp_shard",)
        assert mesh.fsdp.size() == 1
        assert (mesh.rank, mesh.dp_rank, mesh.dp_size, mesh.is_main) == (0, 0, 1, True)
        assert mesh.device == device
        del mesh
        gc.collect()


def test_a_layout_for_another_number_of_ranks_is_a_bug() -> None:
    with process_group() as device, pytest.raises(AssertionError, match="another number of ranks"):
        build_mesh(replace(ONE_RANK, world_size=2, dp_shard=2), device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_ranks_than_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(UserError, match=r"LOCAL_RANK = 99, with \d+ GPUs; start one rank per GPU"):
        process_group().__enter__()
