"""Checkpoints appear whole or not at all, in one process; tests/dist kills and resumes whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sgmd_dist import checkpoint
from sgmd_dist.checkpoint import folder
from sgmd_dist.checkpoint.staging import Staging
from sgmd_dist.errors import UserError
from sgmd_dist.roles import Roles

pytestmark = pytest.mark.usefixtures("alone")


def save(run_dir: Path, roles: Roles, step: int, keep: int = 2) -> Path:
    return checkpoint.save(run_dir, roles, step=step, stream={"unit": 8 * step}, recipe="run: {}\n", keep=keep)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / checkpoint.FOLDER).iterdir())


def copies(roles: Roles) -> checkpoint.Tree:
    return {name: {k: t.clone() for k, t in part.items()} for name, part in checkpoint.training_state(roles).items()}


def assert_equal(a: checkpoint.Tree, b: checkpoint.Tree) -> None:
    assert a.keys() == b.keys()
    for name, part in a.items():
        assert all(torch.equal(tensor, b[name][key]) for key, tensor in part.items()), name


@pytest.fixture
def roles(linear_roles: Callable[..., Roles], optimizer_step: Callable[..., None]) -> Roles:
    """Roles after one step of each trained network."""
    roles = linear_roles()
    for name in ("generator", "fake_score"):
        optimizer_step(roles, name)
    return roles


@pytest.fixture
def saved(roles: Roles, tmp_path: Path) -> Path:
    """A committed checkpoint of step 4 in the run folder `tmp_path`."""
    return save(tmp_path, roles, 4)


@contextmanager
def killed_before_commit() -> Iterator[None]:
    """A save in this block ends where a kill right before the rename would end it."""

    def die(aside: Path, final: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            yield


# What is saved


def test_a_checkpoint_holds_its_files_and_describes_itself(saved: Path, tmp_path: Path) -> None:
    assert saved == tmp_path / "checkpoints" / "step-00000004"
    assert {path.name for path in saved.iterdir()} == {".metadata", "__0_0.distcp", "meta.json", "recipe.yaml"}
    meta = checkpoint.read_meta(saved)
    assert (meta.step, meta.stream) == (4, {"unit": 32})
    assert meta.num_tensors == {
        "generator": 2, "generator.optimizer": 6, "generator.ema": 2, "fake_score": 2, "fake_score.optimizer": 6,
    }  # fmt: skip
    assert meta.versions["torch"] == torch.__version__
    assert (saved / checkpoint.RECIPE_FILE).read_text() == "run: {}\n"


def test_loading_brings_back_every_bit_of_the_trained_roles_and_leaves_the_frozen_one(
    saved: Path, roles: Roles, linear_roles: Callable[..., Roles]
) -> None:
    other = linear_roles(seed=1)
    frozen = other["teacher"].module.weight.clone()
    meta = checkpoint.load(saved, other)
    assert meta.step == 4
    assert_equal(copies(other), copies(roles))
    assert torch.equal(other["teacher"].module.weight, frozen)


def test_an_optimizer_that_never_stepped_is_saved_as_it_would_start(
    tmp_path: Path, linear_roles: Callable[..., Roles], optimizer_step: Callable[..., None]
) -> None:
    path = save(tmp_path, linear_roles(), 0)
    resumed, quiet = linear_roles(seed=1), linear_roles()
    checkpoint.load(path, resumed)
    for roles in (resumed, quiet):
        optimizer_step(roles)
    assert_equal(copies(resumed), copies(quiet))


def test_one_network_is_read_without_its_roles(saved: Path, roles: Roles) -> None:
    shapes = {name: p.shape for name, p in roles["generator"].module.named_parameters()}
    tensors = checkpoint.load_tree(saved, "generator.ema", shapes)
    assert roles["generator"].ema is not None
    assert_equal({"ema": tensors}, {"ema": roles["generator"].ema.shadow})
    assert not torch.equal(tensors["weight"], roles["generator"].module.weight)


def test_one_network_is_read_without_a_warning(saved: Path, roles: Roles, recwarn: pytest.WarningsRecorder) -> None:
    checkpoint.load_tree(saved, "generator", {n: p.shape for n, p in roles["generator"].module.named_parameters()})
    assert [str(warning.message) for warning in recwarn] == []


def test_checksums_see_one_bit_and_the_sign_of_zero(roles: Roles) -> None:
    tree = {"a": {"x": torch.zeros(5), "y": torch.ones(3)}, "empty": {"z": torch.zeros(0)}}
    before = checkpoint.checksums(tree)
    assert before["empty"] == 0
    tree["a"]["x"][2] = -0.0
    after = checkpoint.checksums(tree)
    assert after["a"] != before["a"] and after["empty"] == before["empty"]


# Commit by rename


def test_nothing_is_committed_before_the_rename(roles: Roles, tmp_path: Path) -> None:
    with killed_before_commit():
        save(tmp_path, roles, 4)
    assert names(tmp_path) == ["step-00000004.tmp"]
    assert checkpoint.committed(tmp_path) == []
    with pytest.raises(UserError, match="expected a checkpoint or a run folder with a committed one"):
        checkpoint.find(tmp_path)


def test_older_checkpoints_go_only_after_the_new_one_is_committed(roles: Roles, tmp_path: Path) -> None:
    save(tmp_path, roles, 1, keep=1)
    with killed_before_commit():
        save(tmp_path, roles, 2, keep=1)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000001"]
    save(tmp_path, roles, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_the_leftover_of_an_interrupted_save_is_overwritten_by_the_next_of_its_step(
    roles: Roles, tmp_path: Path, linear_roles: Callable[..., Roles]
) -> None:
    with killed_before_commit():
        save(tmp_path, linear_roles(seed=7), 4)
    (tmp_path / "checkpoints" / "step-00000004.tmp" / "__9_0.distcp").write_text("of another number of ranks")
    path = save(tmp_path, roles, 4)
    assert not (path / "__9_0.distcp").exists()
    resumed = linear_roles(seed=1)
    checkpoint.load(path, resumed)
    assert_equal(copies(resumed), copies(roles))


def test_leftovers_of_other_steps_are_removed_after_a_commit_and_other_files_stay(roles: Roles, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-00000003.tmp", "step-00000002.replaced", "step-00000001-mine", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    save(tmp_path, roles, 4)
    assert names(tmp_path) == ["notes", "step-00000001-mine", "step-00000004"]


def test_saving_a_step_again_replaces_it_also_after_a_kill_amid_the_replacing(
    roles: Roles, tmp_path: Path, linear_roles: Callable[..., Roles]
) -> None:
    save(tmp_path, linear_roles(seed=7), 4)
    replaced = tmp_path / "checkpoints" / "step-00000004.replaced"
    replaced.mkdir()
    (replaced / "meta.json").write_text("{}")
    path = save(tmp_path, roles, 4)
    assert names(tmp_path) == ["step-00000004"]
    resumed = linear_roles(seed=1)
    checkpoint.load(path, resumed)
    assert_equal(copies(resumed), copies(roles))


# Which are kept


def test_the_newest_are_kept(roles: Roles, tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, roles, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]


def test_a_run_that_went_back_keeps_what_it_saves_and_what_was_there(roles: Roles, tmp_path: Path) -> None:
    """It must never prune the checkpoint that it just wrote, although later steps lie beside it."""
    for step in (100, 200, 300):
        save(tmp_path, roles, step, keep=3)
    for step in (110, 120, 130):
        assert save(tmp_path, roles, step, keep=2).exists()
    assert names(tmp_path) == ["step-00000120", "step-00000130", "step-00000200", "step-00000300"]


# Finding one


def test_find_takes_a_run_folder_or_a_checkpoint(roles: Roles, tmp_path: Path) -> None:
    first, second = save(tmp_path, roles, 9), save(tmp_path, roles, 10)
    assert checkpoint.find(tmp_path) == checkpoint.find(str(tmp_path)) == second
    assert checkpoint.find(first) == first


def test_only_whole_checkpoints_with_a_steps_name_are_committed(saved: Path, tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000008.tmp", "step-9", "best"):
        (saved.parent / name).mkdir()
    for name in ("step-00000008.tmp", "step-9", "best"):
        (saved.parent / name / "meta.json").write_text("{}")
    (saved.parent / "step-00000007").write_text("a file")
    assert checkpoint.committed(tmp_path) == [saved]


@pytest.mark.parametrize("name", ["nowhere", "empty", "file", "file/below"])
def test_a_place_without_a_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=rf"{tmp_path / name}: expected a checkpoint or a run folder .* in .*/checkpoints"
    ):
        checkpoint.find(tmp_path / name)


# Damage


WHOLE_META = {"step": 4, "stream": {}, "num_tensors": {"generator": 2}, "checksums": {"generator": 0}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        json.dumps(WHOLE_META | {"step": "four"}).encode(),
        json.dumps(WHOLE_META | {"num_tensors": 2}).encode(),
        json.dumps(WHOLE_META | {"checksums": {}}).encode(),
        json.dumps(WHOLE_META | {"later": 1}).encode(),
    ],
)
def test_a_damaged_description_is_named(saved: Path, roles: Roles, content: bytes) -> None:
    (saved / "meta.json").write_bytes(content)
    for read in (checkpoint.read_meta, lambda path: checkpoint.load(path, roles)):
        with pytest.raises(
            UserError, match=r"meta\.json: is not a checkpoint's description .*; use another checkpoint"
        ):
            read(saved)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def scramble(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x55 if i % 7 == 0 else byte for i, byte in enumerate(path.read_bytes())))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), cut, scramble])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damaged_tensors_are_one_short_message(
    saved: Path, linear_roles: Callable[..., Roles], name: str, damage: Callable[[Path], None]
) -> None:
    damage(saved / name)
    shapes = {"weight": torch.Size((3, 6)), "bias": torch.Size((3,))}
    for read in (
        lambda: checkpoint.load(saved, linear_roles()),
        lambda: checkpoint.load_tree(saved, "generator", shapes),
    ):
        with pytest.raises(UserError, match=rf"{saved}: is damaged: .+; use another checkpoint") as error:
            read()
        assert "Traceback" not in str(error.value) and len(str(error.value)) < 600


def test_one_changed_number_is_found_by_the_checksum(saved: Path, roles: Roles) -> None:
    meta = json.loads((saved / "meta.json").read_text())
    meta["checksums"]["generator"] += 1
    del meta["sha256"]  # of the description itself
    (saved / "meta.json").write_text(json.dumps(meta))
    shapes = {name: p.shape for name, p in roles["generator"].module.named_parameters()}
    with pytest.raises(UserError, match="is damaged: the checksum of 'generator' differs"):
        checkpoint.load_tree(saved, "generator", shapes)
    with pytest.raises(UserError, match=r"is damaged: checksums .*, expected "):
        checkpoint.load(saved, roles)


# Checkpoints of something else: nothing is damaged, and nobody should be told to remove them


def test_a_network_of_other_sizes_is_named_with_both(saved: Path, linear_roles: Callable[..., Roles]) -> None:
    with pytest.raises(UserError, match=r"is of another network: generator\.weight \(3, 6\), expected \(3, 7\)"):
        checkpoint.load(saved, linear_roles(size=7))
    with pytest.raises(
        UserError, match=r"is of another network: generator\.bias \(3,\), expected \(4,\); use the model"
    ):
        checkpoint.load_tree(saved, "generator", {"weight": torch.Size((3, 6)), "bias": torch.Size((4,))})


def test_a_network_of_other_names_is_named(saved: Path) -> None:
    with pytest.raises(UserError, match=r"is of another network: no generator\.scale; use the model"):
        checkpoint.load_tree(saved, "generator", {"weight": torch.Size((3, 6)), "scale": torch.Size((3,))})
    with pytest.raises(UserError, match="'generator' has 2 tensors, expected 1"):
        checkpoint.load_tree(saved, "generator", {"weight": torch.Size((3, 6))})


def test_a_tree_that_is_not_there_is_named_with_those_that_are(saved: Path) -> None:
    with pytest.raises(UserError, match=r"holds no 'teacher'; it has generator, generator\.optimizer, "):
        checkpoint.load_tree(saved, "teacher", {})


# The copy that is written while training goes on


def test_the_copy_is_in_the_same_memory_from_save_to_save(roles: Roles, optimizer_step: Callable[..., None]) -> None:
    staging, places = Staging(), []
    for step in range(3):
        optimizer_step(roles, "generator", step)
        tree = checkpoint.training_state(roles)
        staging.follow(tree)
        copy = staging.copy(tree)
        assert_equal(copy, tree)
        places.append([tensor.data_ptr() for part in copy.values() for tensor in part.values()])
        optimizer_step(roles, "generator", step)
        assert not torch.equal(copy["generator"]["weight"], roles["generator"].module.weight)
    assert places[0] == places[1] == places[2]


def test_at_most_one_save_is_in_flight_and_its_copy_is_over_before_a_write(roles: Roles, tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, recipe="run: {}\n", keep=1, asynchronous=True)
    for step in (1, 2):
        saver.save(roles, step=step, stream={})
        assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000001"][: step - 1]
        assert saver.is_staging
        saver.wait_staged()
        assert not saver.is_staging
    saver.wait()
    assert names(tmp_path) == ["step-00000002"] and not saver.is_writing and not saver.has_failed
    saver.close()


def test_weights_that_are_not_finite_fail_an_asynchronous_save_once_it_is_asked(roles: Roles, tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, recipe="", keep=1, asynchronous=True)
    roles["generator"].module.weight.data[0, 0] = float("nan")
    saver.save(roles, step=1, stream={})
    with pytest.raises(UserError, match="weights of step 1 are not finite and are not saved"):
        saver.wait()
    saver.close()
    assert checkpoint.committed(tmp_path) == []
