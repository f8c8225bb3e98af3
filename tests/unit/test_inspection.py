"""launch/train.py --inspect-checkpoint: what a checkpoint holds, and whether it is what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run_forked

from sgmd_dist import checkpoint
from sgmd_dist.errors import UserError
from sgmd_dist.roles import Roles

FILES = ("meta.json", "recipe.yaml", ".metadata", "__0_0.distcp")

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def saved(linear_roles: Callable[..., Roles], optimizer_step: Callable[..., None], tmp_path: Path) -> list[Path]:
    """The checkpoints of steps 2 and 4 of a run in `tmp_path`."""
    roles = linear_roles()
    optimizer_step(roles)
    return [
        checkpoint.save(
            tmp_path, roles, step=step, stream={"unit": 8 * step, "seed": 3}, recipe="run:\n  name: mine\n", keep=2
        )
        for step in (2, 4)
    ]


def test_what_a_checkpoint_holds_is_printed_with_numbers(saved: list[Path]) -> None:
    (inspection,) = checkpoint.inspect(saved[1])
    text = inspection.text()
    assert inspection.wrong is None
    assert "step 4, run mine, stream at unit 32, seed 3" in text
    assert "with sgmd_dist " in text and "torch " in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  generator")}
    assert rows["generator"] == ["2", "21", "84"]
    assert rows["generator.optimizer"] == ["6", "44", "176"]
    assert text.endswith("OK: every file and checksum is as saved")


def test_a_run_folder_gives_a_verdict_on_each(saved: list[Path], tmp_path: Path) -> None:
    (saved[0] / "__0_0.distcp").unlink()
    first, second = checkpoint.inspect(tmp_path)
    assert first.path == saved[0] and "__0_0.distcp cannot be read" in (first.wrong or "")
    assert second.path == saved[1] and second.wrong is None


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_anywhere_is_found(saved: list[Path], name: str) -> None:
    path = saved[1] / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 17, 1)):
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(data)
        assert checkpoint.inspect(saved[1])[0].wrong is not None, place
    path.write_bytes(whole)
    assert checkpoint.inspect(saved[1])[0].wrong is None


def test_numbers_that_do_not_fit_their_description_are_found(saved: list[Path]) -> None:
    """Files that are whole, but of another checkpoint: only the tensors' own sums can tell."""
    from sgmd_dist.checkpoint import folder

    meta = checkpoint.read_meta(saved[1])
    folder.write_meta(saved[1], checkpoint.Meta(**{**meta.__dict__, "checksums": dict.fromkeys(meta.checksums, 1)}))
    assert "the checksum of generator, generator.optimizer" in (checkpoint.inspect(saved[1])[0].wrong or "")


def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a checkpoint, or a run folder with checkpoints"):
        checkpoint.inspect(tmp_path)


def test_the_exit_code_says_whether_all_are_whole(saved: list[Path], tmp_path: Path) -> None:
    command = f"python launch/train.py --inspect-checkpoint {tmp_path}"
    assert run_forked(command).code == 0
    (saved[1] / "recipe.yaml").write_text("run: {}\n")
    done = run_forked(command)
    assert done.code == 2
    assert "recipe.yaml is not what was saved" in done.output
