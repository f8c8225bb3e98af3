"""prepare.py index and verify: from another project's shards to a data set that training takes, and its damage."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from commands import REPO, run_forked
from webdataset.writer import TarWriter

from sgmd_dist.data.index import ShardIndex


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    """launch/prepare.py as a module: its `main` without the seconds of a new process."""
    spec = importlib.util.spec_from_file_location("launch_prepare", REPO / "launch/prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fastgen(tmp_path: Path) -> Path:
    """Two shards of FastGen's layout with its neg_prompt_emb.npy, as they are downloaded."""
    folder = tmp_path / "fastgen"
    folder.mkdir()
    for shard in range(2):
        with open(folder / f"{shard:06d}.tar", "wb") as file:
            writer = TarWriter(file, encoder=False)
            for number in range(3):
                sample: dict[str, object] = {"__key__": f"{shard:06d}_{number:06d}"}
                for name, shape in (("latent.pth", (3, 2, 4, 4)), ("txt_emb.pth", (8, 32))):
                    torch.save(torch.randn(shape).bfloat16(), buffer := io.BytesIO())
                    sample[name] = buffer.getvalue()
                writer.write(sample)
            writer.close()
    np.save(folder / "neg_prompt_emb.npy", np.ones((8, 32), dtype=np.float32))
    return folder


def call(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    return prepare.main()


def test_foreign_shards_become_a_data_set_and_verify_is_clean(fastgen: Path) -> None:
    done = run_forked(f"python launch/prepare.py index {fastgen} --negative-prompt-from {fastgen}/neg_prompt_emb.npy")
    assert done.code == 0 and f"{fastgen}/index.json: 2 shards, 6 samples by bucket: 3x2x4x4 6" in done.output
    assert ShardIndex.open(fastgen).negative_prompt().shape == (8, 32)
    done = run_forked(f"python launch/prepare.py verify {fastgen} --threads 2")
    assert done.code == 0
    assert done.output.splitlines()[-1] == "no mistakes in 2 shards, 0.000 GB; good samples by bucket: 3x2x4x4 6"


def test_verify_lists_every_mistake_and_exits_with_1(
    fastgen: Path, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(prepare, monkeypatch, "index", fastgen) == 0
    assert "negative_prompt.safetensors: missing, training needs it; call again with" in capsys.readouterr().out
    index = ShardIndex.open(fastgen)
    for number in (1, 4):
        path = index.paths[index.shard[number]]
        data = bytearray(path.read_bytes())
        data[index.offset[number] + 700] ^= 4
        path.write_bytes(data)
    assert call(prepare, monkeypatch, "verify", fastgen) == 1
    *mistakes, last = capsys.readouterr().out.splitlines()
    for number, key in ((1, "000000_000001"), (4, "000001_000001")):
        where = f"{index.paths[number // 3]}: sample '{key}' at offset {index.offset[number]}: crc32 is "
        assert [line for line in mistakes if line.startswith(where)], mistakes
    assert [line for line in mistakes if "negative_prompt.safetensors: not found" in line]
    assert last == f"{len(mistakes)} mistakes in 2 shards, 0.000 GB; good samples by bucket: 3x2x4x4 4"


def test_the_negative_prompt_is_encoded_where_it_is_missing(
    fastgen: Path, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(prepare, monkeypatch, "index", fastgen, "--text-encoder", REPO / "recipes/tiny_wan") == 0
    first = ShardIndex.open(fastgen).negative_prompt()
    assert first.shape[1] == 32
    assert call(prepare, monkeypatch, "index", fastgen, "--negative-prompt-from", fastgen / "neg_prompt_emb.npy") == 0
    assert torch.equal(ShardIndex.open(fastgen).negative_prompt(), first)  # it is there already
    assert call(prepare, monkeypatch, "verify", fastgen) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_tars_are_indexed_without_a_folder_index(
    fastgen: Path, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(prepare, monkeypatch, "index", f"{fastgen}/{{000000..000001}}.tar", "--threads", 2) == 0
    assert not (fastgen / "index.json").exists()
    assert ShardIndex.open(f"{fastgen}/{{000000..000001}}.tar").num_samples == 6


@pytest.mark.parametrize(
    "damage, arguments, message",
    [
        ("cut", [], "000001.tar: truncated or damaged after key '000001_000000'"),
        ("", ["{folder}/nowhere"], "nowhere: no such folder or shard"),
        ("", ["{folder}/../fastgen/000009.tar"], "000009.tar: no such folder or shard"),
        ("", ["--negative-prompt-from", "{folder}/nowhere.npy"], "nowhere.npy"),
        (
            "narrow",
            ["--negative-prompt-from", "{folder}/neg_prompt_emb.npy"],
            "is 16 wide, the shards' prompt_embeds 32",
        ),
    ],
)
def test_what_cannot_be_indexed_is_one_message(
    fastgen: Path,
    prepare: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
    arguments: list[str],
    message: str,
) -> None:
    if damage == "cut":
        path = fastgen / "000001.tar"
        path.write_bytes(path.read_bytes()[:8000])
    if damage == "narrow":
        np.save(fastgen / "neg_prompt_emb.npy", np.ones((8, 16), dtype=np.float32))
    assert call(prepare, monkeypatch, "index", fastgen, *(text.format(folder=fastgen) for text in arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
