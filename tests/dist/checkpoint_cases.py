"""What ranks do in the tests of checkpoints: small sharded roles whose state is a known function of the step."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sgmd_dist import checkpoint
from sgmd_dist.checkpoint import folder, saving, staging
from sgmd_dist.shard import local
from sgmd_dist.errors import UserError
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.layout import Layout
from sgmd_dist.recipe import OptimSection
from sgmd_dist.roles import Roles, build_roles
from running import train, train_command

Axes = dict[str, int]
SHAPES = {"0.weight": (7, 5), "0.bias": (7,), "1.weight": (3, 7), "1.bias": (3,)}  # nothing divides evenly


def value(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """The tensor `name` as it is after `step`, whoever holds it."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(shape, generator=generator)


def make_roles(axes: Axes) -> Roles:
    """Generator and fake score of two uneven layers, sharded over the mesh of these axes."""
    size = world_size()
    sequence = axes.get("ring", 1) * axes.get("ulysses", 1)
    replicate = axes.get("dp_replicate", 1)
    layout = Layout(
        size, replicate, size // replicate // sequence, axes.get("ring", 1), axes.get("ulysses", 1), size, 1
    )
    mesh = build_mesh(layout, torch.device("cpu"))
    modules: dict[str, Any] = {}
    for name in ("generator", "fake_score"):
        module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        for layer in module:
            fully_shard(layer, mesh=mesh.fsdp)
        modules[name] = (fully_shard(module, mesh=mesh.fsdp), None)
    return build_roles(modules, set(modules), OptimSection(), 10, recomputes=False)


def fill(roles: Roles, step: int) -> None:
    """Write the state of `step` into the live tensors, as training would: in place."""
    for tree, part in checkpoint.training_state(roles).items():
        for key, tensor in part.items():
            full = value(f"{tree}/{key}", tuple(tensor.shape), step)
            if isinstance(tensor, DTensor):
                full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
            local(tensor).copy_(full)


def assert_filled(roles: Roles, step: int) -> None:
    for tree, part in checkpoint.training_state(roles).items():
        for key, tensor in part.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(full, value(f"{tree}/{key}", tuple(tensor.shape), step)), f"{tree} {key}, step {step}"


def saver(run_dir: Path, asynchronous: bool, keep: int = 2) -> checkpoint.Saver:
    return checkpoint.Saver(run_dir, recipe="run: {name: x}\n", keep=keep, asynchronous=asynchronous, layout={})


def relay(run_dir: Path, step: int, axes: Axes, asynchronous: bool) -> list[int]:
    """Load what ranks of another number saved as `step` - 1, compare every bit, save `step`; the shards' sizes."""
    with process_group():
        roles = make_roles(axes)
        if step:
            checkpoint.load(folder.path_of(run_dir, step - 1), roles)
            assert_filled(roles, step - 1)
        fill(roles, step)
        checkpoints = saver(run_dir, asynchronous, keep=9)
        checkpoints.save(roles, step=step, stream={"unit": step})
        checkpoints.close()
        return [local(p).numel() for p in roles["generator"].parameters.values()]


# Training on during a save


def slow_down_staging(seconds_per_tensor: float) -> None:
    """A copy that is still going on when training goes on."""
    part_of = staging.local

    def slow(tensor: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(seconds_per_tensor)
        return part_of(tensor)

    staging.local = slow


def train_on(run_dir: Path) -> list[str]:
    """Three asynchronous saves in a row, each with writes to every tensor at the first moment at which they may be."""
    slow_down_staging(0.01)
    with process_group():
        roles = make_roles({})
        checkpoints = saver(run_dir, asynchronous=True)
        was_staging = []
        for step in range(1, 4):
            fill(roles, step)
            checkpoints.save(roles, step=step, stream={"unit": step})
            was_staging.append(not checkpoints._staged.done())
            checkpoints.wait_staged()
            fill(roles, 100 + step)
        checkpoints.wait()
        assert was_staging[0], "the copy was over before anything could spoil it"
        for step in (2, 3):
            checkpoint.load(folder.path_of(run_dir, step), roles)
            assert_filled(roles, step)
        checkpoints.close()
    return sorted(path.name for path in (run_dir / checkpoint.FOLDER).iterdir())


def train_while_copying(recipe_path: Path, overrides: list[str]) -> None:
    """Train with a copy that takes its time, beside forward and backward passes."""
    slow_down_staging(0.001)
    train(recipe_path, overrides)


# Kills


def kill_at(moment: str) -> Callable[[], None]:
    """Arrange that this process dies by SIGKILL at a moment of a save; returns what to call to arm it."""
    armed = [False]

    def die(at: str) -> None:
        if armed[0] and at == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(owner: Any, name: str, before: str, after: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            die(before)
            result = original(*args, **kwargs)
            die(after)
            return result

        setattr(owner, name, wrapped)

    dying(saving, "is_finite", "before the checks", "after the first check")
    dying(saving, "local_checksums", "amid the checks", "after the checks")
    dying(FileSystem, "create_stream", "before a file is opened", "after a file is opened")
    dying(FileSystem, "rename", "before DCP's list has its name", "after DCP's list has its name")
    dying(folder, "write_meta", "before the description", "after the description")
    dying(folder, "commit", "before the commit", "after the commit")
    dying(folder, "_set_aside", "before an older one is taken back", "after an older one is taken back")
    dying(os, "fsync", "before a file is on the disk", "after a file is on the disk")
    return lambda: armed.__setitem__(0, True)


def save_until_killed(run_dir: Path, asynchronous: bool, victim: int, moment: str) -> None:
    """Save steps 1 and 2, then die at a moment of step 3 on one rank."""
    arm = kill_at(moment)
    with process_group():
        roles = make_roles({})
        checkpoints = saver(run_dir, asynchronous)
        for step in range(1, 5):
            checkpoints.wait()
            if step == 3 and dist.get_rank() == victim:
                arm()
            fill(roles, step)
            checkpoints.save(roles, step=step, stream={"unit": step})
            checkpoints.wait_staged()
            fill(roles, 100 + step)
        checkpoints.wait()
        raise AssertionError("nobody died")


def load_and_check(run_dir: Path) -> int:
    """The step of the newest checkpoint, with every bit compared."""
    with process_group():
        roles = make_roles({})
        found = checkpoint.load_newest(tuple(reversed(checkpoint.present(run_dir))), roles)
        assert found.damaged == {}
        assert_filled(roles, found.meta.step)
        return found.meta.step


# Writes that fail


def save_with_a_failing_write(run_dir: Path, asynchronous: bool, rank: int, name: str) -> str:
    """Save step 1; one rank cannot write a file of step 2; then the disk is mended. Returns the message of step 2."""
    original = FileSystem.create_stream
    broken = [False]

    def full(self: FileSystem, path: Any, mode: str) -> Any:
        if broken[0] and "w" in mode and name in str(path):
            return open("/dev/full", "wb")  # every flush to it fails with ENOSPC, as a full disk's
        return original(self, path, mode)

    FileSystem.create_stream = full
    with process_group():
        roles = make_roles({})
        checkpoints = saver(run_dir, asynchronous)
        fill(roles, 1)
        checkpoints.save(roles, step=1, stream={})
        checkpoints.wait()
        broken[0] = dist.get_rank() == rank
        try:
            checkpoints.save(roles, step=2, stream={})
            checkpoints.wait()
            message = "saved"
        except UserError as error:
            message = str(error)
        dist.barrier()
        left = sorted(path.name for path in (run_dir / checkpoint.FOLDER).iterdir())
        assert left == ["step-00000001"], left
        broken[0] = False
        dist.barrier()
        fill(roles, 3)
        checkpoints.save(roles, step=3, stream={})
        checkpoints.wait()
        checkpoints.close()
    return message


def train_on_a_full_disk(recipe_path: Path, overrides: list[str]) -> None:
    """`launch/train.py` where rank 1 cannot write its tensors from the second save on."""
    original, num_saves = FileSystem.create_stream, [0]

    def full(self: FileSystem, path: Any, mode: str) -> Any:
        if "w" in mode and "__1_" in str(path):
            num_saves[0] += 1
            if num_saves[0] > 1:
                return open("/dev/full", "wb")
        return original(self, path, mode)

    FileSystem.create_stream = full
    train_command(recipe_path, overrides)


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"gone": Path.unlink, "cut": cut, "flipped": flip}
FILES = ("meta.json", "recipe.yaml", ".metadata", "__1_0.distcp")


def fall_back(run_dir: Path) -> dict[str, str]:
    """Damage the newest of three checkpoints in every way, one after the other; what is said of each."""
    said: dict[str, str] = {}
    with process_group():
        is_main = dist.get_rank() == 0
        roles = make_roles({})
        checkpoints = saver(run_dir, asynchronous=False, keep=9)
        for step in (1, 2, 3):
            fill(roles, step)
            checkpoints.save(roles, step=step, stream={"unit": step})
        older, newest = (folder.path_of(run_dir, step) for step in (2, 3))
        whole = run_dir / "whole"
        if is_main:
            shutil.copytree(newest, whole)
        for name in FILES:
            for kind, damage in DAMAGE.items():
                if is_main:
                    damage(newest / name)
                dist.barrier()
                fill(roles, 50)
                found = checkpoint.load_newest((newest, older), roles)
                assert (found.path, list(found.damaged)) == (older, [newest]), f"{name} {kind}"
                assert_filled(roles, 2)
                said[f"{name} {kind}"] = found.damaged[newest]
                dist.barrier()
                if is_main:
                    shutil.rmtree(newest)
                    shutil.copytree(whole, newest)
                dist.barrier()
        _unreadable_on_one_rank(newest, older, roles)
        checkpoints.close()
    return said


def _unreadable_on_one_rank(newest: Path, older: Path, roles: Roles) -> None:
    original = FileSystem.create_stream

    def failing(self: FileSystem, path: Any, mode: str) -> Any:
        if dist.get_rank() == 1 and newest in Path(path).parents and "distcp" in str(path):
            raise OSError(5, "Input/output error")
        return original(self, path, mode)

    FileSystem.create_stream = failing
    found = checkpoint.load_newest((newest, older), roles)
    assert "rank 1: OSError [Errno 5] Input/output error" in found.damaged[newest]
    assert_filled(roles, 2)
    FileSystem.create_stream = original

