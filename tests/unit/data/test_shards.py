"""The shard format: what is written, that plain webdataset reads it, and what every kind of damage is called."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import webdataset as wds
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from sgmd_dist.data.examine import build_index
from sgmd_dist.data.format import CorruptSample, parse_safetensors, read_negative_prompt, write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.errors import UserError


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rewrite_tar(path: Path, keep: Callable[[str], bool], **renamed: str) -> None:
    """Write `path` again with the members whose name `keep` accepts, and without its sidecar."""
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            if keep(member.name):
                content = old.extractfile(member)
                member.name = renamed.get(member.name.split(".")[0], member.name.split(".")[0]) + member.name[5:]
                new.addfile(member, content)
    path.write_bytes(out.getvalue())
    path.with_suffix(".index.json").unlink()


# ------------------------------------------------------------------------------------------------ writing


def test_a_sample_is_a_json_and_a_safetensors_member_that_plain_webdataset_reads(
    dataset: ShardIndex, samples: SimpleNamespace
) -> None:
    pipeline = wds.WebDataset([os.fspath(path) for path in dataset.paths], shardshuffle=False, empty_check=False)
    read = list(pipeline)
    assert [sample["__key__"] for sample in read] == dataset.keys
    for number, sample in enumerate(read):
        description = json.loads(sample["json"])
        crc32 = zlib.crc32(sample["sample.safetensors"])
        fields = {"caption": f"caption {number}", "bucket": "wide", "source": "", "number": number}
        assert description == {**fields, "crc32": crc32}
        tensors = load_safetensors(sample["sample.safetensors"])
        assert torch.equal(tensors["latents"], samples.latents_of(number))
        assert torch.equal(tensors["prompt_embeds"], samples.embeds_of(number))


def test_the_index_points_at_the_safetensors_bytes(dataset: ShardIndex, samples: SimpleNamespace) -> None:
    assert [path.name for path in dataset.paths] == [f"shard-{i:06d}.tar" for i in range(5)]
    assert dataset.num_samples == 23 and dataset.buckets == ["wide"]
    assert dataset.latent_shape("wide") == dataset.latent_shape(0) == samples.latent_shapes["wide"]
    assert dataset.shard.tolist() == [i // 5 for i in range(23)]
    for i in range(23):
        data = dataset.paths[dataset.shard[i]].read_bytes()[dataset.offset[i] :][: dataset.size[i]]
        assert torch.equal(parse_safetensors(memoryview(data))["latents"], samples.latents_of(i))


def test_the_tensors_begin_at_a_multiple_of_64_in_the_tar(dataset: ShardIndex) -> None:
    for i in range(23):
        data = dataset.paths[dataset.shard[i]].read_bytes()[dataset.offset[i] :][: dataset.size[i]]
        start_of_data = 8 + int.from_bytes(data[:8], "little")
        assert (dataset.offset[i] + start_of_data) % 64 == 0


def test_writing_twice_gives_equal_bytes(tmp_path: Path, samples: SimpleNamespace) -> None:
    first, second = (samples.write_dataset(tmp_path / name) for name in ("a", "b"))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    with tarfile.open(first.paths[0]) as tar:
        assert all(member.mtime == 0 and not member.pax_headers for member in tar)


def test_building_the_index_from_the_tar_gives_the_writers_sidecar(tmp_path: Path, samples: SimpleNamespace) -> None:
    for name, with_latents in (("latents", True), ("captions", False)):
        samples.write(tmp_path / name, 7, with_latents=with_latents)
        for tar in sorted((tmp_path / name).glob("*.tar")):
            sidecar = json.loads(tar.with_suffix(".index.json").read_text())
            assert build_index(tar).to_json() == sidecar


def test_caption_only_samples_name_their_latent_shape(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write(tmp_path, 3, with_latents=False)
    index = consolidate(tmp_path)
    assert index.latent_shape("wide") == samples.latent_shapes["wide"] and not index.has_latents("wide")
    with tarfile.open(index.paths[0]) as tar:
        member = tar.extractfile("s0000.json")
        assert member is not None
        assert json.load(member)["latent_shape"] == list(samples.latent_shapes["wide"])


def test_floating_point_tensors_are_stored_as_bf16(tmp_path: Path) -> None:
    embeds = torch.randn(3, 4)
    with ShardWriter(tmp_path, latent_shape=(1, 1, 1, 1), bucket="b") as writer:
        writer.add("a", embeds, "x", latents=torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64))
    index = consolidate(tmp_path)
    data = index.paths[0].read_bytes()[index.offset[0] :][: index.size[0]]
    assert torch.equal(load_safetensors(data)["prompt_embeds"], embeds.bfloat16())


def test_max_bytes_closes_a_shard(tmp_path: Path, samples: SimpleNamespace) -> None:
    with ShardWriter(tmp_path, latent_shape=samples.latent_shapes["wide"], bucket="wide", max_bytes=600) as writer:
        for number in range(6):
            writer.add(f"s{number}", samples.embeds_of(0), "x", latents=samples.latents_of(number))
    index = consolidate(tmp_path)
    assert index.shard.tolist() == [0, 0, 1, 1, 2, 2]  # 400 to 600 bytes each


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "ä", "k" * 81, "a\nb", "a\\b"])
def test_keys_that_webdataset_would_split_are_refused(tmp_path: Path, samples: SimpleNamespace, key: str) -> None:
    writer = ShardWriter(tmp_path, latent_shape=samples.latent_shapes["wide"], bucket="wide")
    with writer, pytest.raises(UserError, match="must be 1 to 80 ASCII characters without") as error:
        writer.add(key, samples.embeds_of(0), "x", latents=samples.latents_of(0))
    assert repr(key) in one_line(error)
    assert list(tmp_path.iterdir()) == []


def bad_samples() -> dict[str, tuple[dict[str, Any], str]]:
    good, nan = torch.zeros(2, 8), torch.full((2, 8), float("nan"))
    latents = torch.zeros(4, 2, 3, 6)
    return {
        "shape": (
            {"latents": torch.zeros(4, 2, 6, 3)},
            r"latents are \[4, 2, 6, 3\], bucket 'wide' takes \[4, 2, 3, 6\]",
        ),
        "none": ({"latents": None}, "latents must be given for all samples of a writer or for none"),
        "text shape": ({"prompt_embeds": good[0]}, r"prompt_embeds is \[8\], expected \[n_tokens, D\]"),
        "no tokens": ({"prompt_embeds": good[:0]}, r"prompt_embeds is \[0, 8\], expected"),
        "text width": ({"prompt_embeds": good[:, :4]}, "D=4, samples before 8"),
        "nan": ({"prompt_embeds": nan}, "prompt_embeds .* must be floating point and finite"),
        "integers": ({"latents": latents.long()}, r"latents \(torch.int64\) must be floating point"),
        "twice": ({"key": "first"}, "key 'first' was added before"),
        "reserved": ({"bucket": "x"}, "json field 'bucket' is written by the writer itself"),
        "not json": ({"extra": {1, 2}}, "json fields cannot be stored"),
    }


@pytest.mark.parametrize("case", bad_samples())
def test_a_wrong_sample_is_refused_by_key_and_leaves_no_trace(tmp_path: Path, case: str) -> None:
    change, message = bad_samples()[case]
    good = {"key": "k", "prompt_embeds": torch.zeros(2, 8), "caption": "x", "latents": torch.zeros(4, 2, 3, 6)}
    with ShardWriter(tmp_path, latent_shape=(4, 2, 3, 6), bucket="wide") as writer:
        writer.add(**{**good, "key": "first"})
        with pytest.raises(UserError, match=message) as error:
            writer.add(**{**good, **change})
        assert f"key '{change.get('key', 'k')}'" in one_line(error)
        writer.add(**{**good, "key": "last"})
    assert consolidate(tmp_path).keys == ["first", "last"]


def test_an_error_discards_the_shard_in_work_and_keeps_the_finished_ones(
    tmp_path: Path, samples: SimpleNamespace
) -> None:
    def write_three_and_fail() -> None:
        shape = samples.latent_shapes["wide"]
        with ShardWriter(tmp_path, latent_shape=shape, bucket="wide", samples_per_shard=2) as writer:
            for number in range(3):
                writer.add(f"s{number}", samples.embeds_of(number), "x", latents=samples.latents_of(number))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_three_and_fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.index.json", "shard-000000.tar"]
    with pytest.raises(UserError, match=r"index\.json: not found; make it with"):
        ShardIndex.open(tmp_path)


def test_a_failing_rename_leaves_nothing_visible(
    tmp_path: Path, samples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        samples.write(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_visible_shard(tmp_path: Path) -> None:
    script = """
import os, signal, sys, torch
from sgmd_dist.data.shards import ShardWriter
with ShardWriter(sys.argv[1], latent_shape=(1, 1, 64, 64), bucket="b", samples_per_shard=4) as writer:
    for number in range(6):
        writer.add(f"s{number}", torch.zeros(2, 8), "x", latents=torch.zeros(1, 1, 64, 64))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    repository = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=repository, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    visible = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".tmp")}
    assert visible == {"shard-000000.tar", "shard-000000.index.json"}
    write_negative_prompt(tmp_path, torch.zeros(1, 8))
    assert consolidate(tmp_path).num_samples == 4


def test_an_existing_shard_is_never_overwritten(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write(tmp_path, 2)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"shard-000000\.tar: exists already; .* another prefix"):
        samples.write(tmp_path, 2)
    assert files_of(tmp_path) == before


# ------------------------------------------------------------------------------------------------ opening


def test_folders_patterns_and_lists_open_the_same_samples(dataset: ShardIndex) -> None:
    folder = dataset.folder
    pattern = f"{folder}/shard-{{000000..000004}}.tar"
    listed = [os.fspath(path) for path in dataset.paths]
    for shards in (str(folder), folder, pattern, listed):
        opened = ShardIndex.open(shards)
        assert opened.keys == dataset.keys and opened.fingerprint == dataset.fingerprint
    assert ShardIndex.open([listed[3], listed[0]]).keys == dataset.keys[15:20] + dataset.keys[:5]


def test_the_fingerprint_knows_content_and_order_but_not_the_place(
    dataset: ShardIndex, tmp_path: Path, samples: SimpleNamespace
) -> None:
    moved = shutil.copytree(dataset.folder, tmp_path / "elsewhere")
    assert ShardIndex.open(moved).fingerprint == dataset.fingerprint
    paths = [os.fspath(path) for path in dataset.paths]
    others = [
        ShardIndex.open([*paths[1:], paths[0]]),
        ShardIndex.open(paths[:-1]),
        samples.write_dataset(tmp_path / "other_cut", samples_per_shard=6),
        samples.write_dataset(tmp_path / "other_content", first=1),
    ]
    samples.write(tmp_path / "other_bytes", 23, bucket="wide")
    for sidecar in (tmp_path / "other_bytes").glob("*.index.json"):  # the same keys and sizes
        record = json.loads(sidecar.read_text())
        record["crc32"][0] ^= 1
        sidecar.write_text(json.dumps(record))
    others.append(consolidate(tmp_path / "other_bytes"))
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_a_tar_without_sidecar_gets_one_on_consolidation(dataset: ShardIndex) -> None:
    before = files_of(dataset.folder)
    for path in dataset.folder.glob("*index.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"index\.json: not found; make it with python launch/prepare\.py index"):
        ShardIndex.open(dataset.folder)
    with pytest.raises(UserError, match=r"shard-000000\.index\.json: not found"):
        ShardIndex.open(os.fspath(dataset.paths[0]))
    consolidate(dataset.folder)
    assert files_of(dataset.folder) == before


def test_what_is_missing_is_named(tmp_path: Path, dataset: ShardIndex) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, str]] = [
        (tmp_path / "nowhere", "nowhere: no such folder; check data.shards"),
        (tmp_path / "empty", "empty: holds no .tar shards"),
        (f"{dataset.folder}/shard-{{000003..000005}}.tar", r"shard-000005\.tar: no such shard"),
        ([], "data.shards: names no shard"),
    ]
    for shards, message in cases:
        with pytest.raises(UserError, match=message) as error:
            ShardIndex.open(shards)
        one_line(error)


def test_a_missing_added_or_resized_shard_is_named(dataset: ShardIndex) -> None:
    victim = dataset.paths[2]
    data = victim.read_bytes()
    victim.write_bytes(data[:-512])
    for shards in (dataset.folder, victim):
        with pytest.raises(UserError, match=rf"{victim.name}: {len(data) - 512} bytes, the index says {len(data)}"):
            ShardIndex.open(shards)
    with pytest.raises(UserError, match="the shard is truncated or was replaced"):
        consolidate(dataset.folder)
    victim.unlink()
    with pytest.raises(UserError, match=rf"{victim.name}: listed in the index but not found"):
        ShardIndex.open(dataset.folder)
    victim.write_bytes(data)
    victim.with_name("extra.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"extra\.tar: not listed in index\.json, which is old"):
        ShardIndex.open(dataset.folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "not valid JSON"),
        (b"[]", "holds no list 'shards'"),
        (b'{"shards": [{"version": 99}]}', "index version is 99, expected 1"),
        (b'{"shards": [{"version": 1, "shard": "x"}]}', "index lacks tar_bytes, bucket"),
        (b'{"shards": [3]}', "index version is 3"),
    ],
)
def test_a_damaged_index_is_named_with_its_mend(dataset: ShardIndex, content: bytes, message: str) -> None:
    (dataset.folder / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        ShardIndex.open(dataset.folder)
    assert "index.json" in one_line(error) and "prepare.py index" in one_line(error)


def test_index_lists_of_different_lengths_are_refused(dataset: ShardIndex) -> None:
    path = dataset.folder / "index.json"
    index = json.loads(path.read_text())
    index["shards"][1]["crc32"].pop()
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"crc32 of shard-000001\.tar differ in length"):
        ShardIndex.open(dataset.folder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("shard", "../elsewhere.tar", r"shard is '\.\./elsewhere\.tar', .*expected a file name"),
        ("shard", 3, "shard is 3, expected a text"),
        ("bucket", "", "bucket is '', expected a text"),
        ("has_latents", 1, "has_latents 1, expected .* a boolean"),
        ("tar_bytes", -1, r"tar_bytes of shard-000001\.tar is -1, expected integers >= 0"),
        ("embed_dim", 8.0, "embed_dim of .* is 8.0, expected integers >= 0"),
        ("latent_shape", [4, 2, 3], r"latent_shape of .* is \[4, 2, 3\], expected \[C, F, H, W\]"),
        ("keys", [1, 2, 3, 4, 5], r"keys of .* is \[1, 2, 3, 4, 5\], expected a list of texts"),
        ("offsets", [True, 0, 0, 0, 0], r"offsets of .* is \[True, 0, 0, 0, 0\]"),
        ("offsets", [1 << 64, 0, 0, 0, 0], "offsets of .* expected integers >= 0"),
        ("sizes", [1 << 50, 0, 0, 0, 0], r"a sample of .* ends at byte \d+, the tar at \d+"),
        ("crc32", [1 << 40, 0, 0, 0, 0], "crc32 of .* holds 1099511627776, which takes more than 32 bits"),
        ("layout", "zip", "layout is 'zip', expected safetensors, fastgen or rcm"),
        ("layout", "rcm", "keys, offsets, .*embed_offsets and embed_sizes of .* differ in length"),
    ],
)
def test_values_that_no_writer_of_an_index_would_give_are_named(
    dataset: ShardIndex, field: str, value: Any, message: str
) -> None:
    path = dataset.folder / "index.json"
    index = json.loads(path.read_text())
    index["shards"][1] |= {"embed_offsets": [], "embed_sizes": [], field: value}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as error:
        ShardIndex.open(dataset.folder)
    assert "index.json: " in one_line(error) and "prepare.py index" in one_line(error)


def test_a_bucket_has_one_latent_shape_and_all_shards_one_text_width(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write_dataset(tmp_path / "a")
    for name, bucket, shape, width, message in (
        ("b", "wide", (4, 2, 6, 3), 8, r"bucket 'wide' has latent shape \[4, 2, 6, 3\]"),
        ("c", "other", (4, 2, 6, 3), 9, r"prompt_embeds have D=9, .* has D=8"),
    ):
        with ShardWriter(tmp_path / name, latent_shape=shape, bucket=bucket) as writer:
            writer.add("k", torch.zeros(2, width), "x", latents=torch.zeros(shape))
        consolidate(tmp_path / name)
        with pytest.raises(UserError, match=message):
            ShardIndex.open([tmp_path / "a", tmp_path / name])


def test_a_key_in_two_shards_is_refused_on_consolidation(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write(tmp_path, 3)
    samples.write(tmp_path, 3, prefix="again")
    with pytest.raises(
        UserError, match=r"shard-000000\.tar: sample 's0000' at offset 1536: its key is in again-0+\.tar too"
    ):
        consolidate(tmp_path)


# ------------------------------------------------------------------------------------------------ damaged tars


@pytest.mark.parametrize("extension", ["json", "sample.safetensors"])
def test_a_missing_member_is_named(dataset: ShardIndex, extension: str) -> None:
    rewrite_tar(dataset.paths[1], lambda name: name != f"s0007.{extension}")
    with pytest.raises(UserError, match=rf"shard-000001\.tar: sample 's0007' has no member s0007\.{extension}"):
        consolidate(dataset.folder)


def test_a_key_twice_in_a_tar_is_named(dataset: ShardIndex) -> None:
    rewrite_tar(dataset.paths[1], lambda _: True, s0007="s0006")
    with pytest.raises(
        UserError, match=r"shard-000001\.tar: sample 's0006' at offset \d+: has two members s0006\.json"
    ):
        build_index(dataset.paths[1])


@pytest.mark.parametrize("where", ["in data", "at a member", "in a header", "at the end"])
def test_a_truncated_tar_is_named_with_the_last_whole_key(dataset: ShardIndex, where: str) -> None:
    path, offset, size = dataset.paths[0], int(dataset.offset[2]), int(dataset.size[2])
    member_end = offset + -(-size // 512) * 512
    length = {"in data": offset + 10, "at a member": member_end, "in a header": member_end + 100, "at the end": None}[
        where
    ]
    data = path.read_bytes()
    end = int(dataset.offset[4]) + -(-int(dataset.size[4]) // 512) * 512
    path.write_bytes(data[: end + 512 if length is None else length])
    with pytest.raises(UserError, match=r"shard-000000\.tar: .*truncated or damaged after key 's000\d'"):
        build_index(path)


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(dataset: ShardIndex) -> None:
    path = dataset.paths[0]
    data = bytearray(path.read_bytes())
    data[int(dataset.offset[2]) - 512 + 20] ^= 1  # in the member's name: its header checksum fails
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged after key 's0002'"):
        build_index(path)


def test_wrong_content_of_a_tar_is_named_by_key(tmp_path: Path) -> None:
    embeds, latents = torch.zeros(2, 8).bfloat16(), torch.zeros(1, 2, 3, 4).bfloat16()
    good = {"latents": latents, "prompt_embeds": embeds}
    cases = [
        (b"{}", save_safetensors(good), "sample 'k': its json has no text field 'bucket'"),
        (b"{", save_safetensors(good), "sample 'k': its json cannot be read: Expecting"),
        (b'{"bucket": "b"}', save_safetensors({"prompt_embeds": embeds}), r"latent shape is None"),
        (b'{"bucket": "b"}', save_safetensors({"latents": latents}), "it has no 'prompt_embeds'"),
        (b'{"bucket": "b"}', save_safetensors({**good, "latents": latents.float()}), "must be bfloat16"),
        (b'{"bucket": "b"}', save_safetensors(good)[:-1], "sample 'k': safetensors header describes"),
    ]
    for description, data, message in cases:
        path = tmp_path / "shard.tar"
        with tarfile.open(path, "w") as tar:
            for name, content in (("k.json", description), ("k.sample.safetensors", data)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        with pytest.raises(UserError, match=message) as error:
            build_index(path)
        assert "shard.tar" in one_line(error)


def test_samples_of_two_kinds_in_a_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    data = save_safetensors(
        {"latents": torch.zeros(1, 2, 3, 4).bfloat16(), "prompt_embeds": torch.zeros(2, 8).bfloat16()}
    )
    with tarfile.open(path, "w") as tar:
        for key, bucket in (("k", "one"), ("l", "two")):
            for name, content in (
                (f"{key}.json", b'{"bucket": "%s"}' % bucket.encode()),
                (f"{key}.sample.safetensors", data),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r"shard\.tar: sample 'l' has .*'two'.*the shard's first sample .*'one'"):
        build_index(path)


# ------------------------------------------------------------------------------------------------ safetensors


def test_parsing_gives_what_safetensors_gives_as_views_of_the_buffer() -> None:
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.arange(5),
        "c": torch.tensor([True, False, True]),
        "d": torch.randn(3, 1, 2).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    buffer = bytearray(save_safetensors(tensors, metadata={"note": "x"}))
    parsed = parse_safetensors(memoryview(buffer))
    assert parsed.keys() == tensors.keys()
    assert all(
        torch.equal(parsed[name], tensors[name]) and parsed[name].dtype == tensors[name].dtype for name in tensors
    )
    buffer[buffer.index(tensors["a"].numpy().tobytes()) + 3] ^= 0x80  # the sign of a[0, 0]
    assert parsed["a"][0, 0] == -tensors["a"][0, 0]


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: str = "BF16", shape: Any = (4,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "at least 8 bytes, this one has 0"),
        (b"1234567", "at least 8 bytes, this one has 7"),
        ((1 << 60).to_bytes(8, "little") + b"{}", f"header length {1 << 60} is longer than the 10 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "header length 3 is longer than the 10 bytes"),
        ((2).to_bytes(8, "little") + b"{]", "header is not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "header is a JSON list, expected an object"),
        (header(x=3), "tensor 'x' has dtype None"),
        (header(x=entry(dtype="F4")) + bytes(8), "tensor 'x' has dtype 'F4', expected one of BF16"),
        (header(x=entry(shape=(-4,))) + bytes(8), r"has shape \[-4\]"),
        (header(x=entry(shape=(4.0,))) + bytes(8), r"has shape \[4.0\]"),
        (header(x=entry(shape=None)) + bytes(8), "has shape None"),
        (header(x=entry(offsets=(0, 8, 9))) + bytes(8), r"data_offsets \[0, 8, 9\]"),
        (header(x=entry(offsets=(0, 6))) + bytes(8), r"'x' \[4\] BF16 needs 8 bytes, data_offsets \[0, 6\]"),
        (
            header(x=entry(shape=(1 << 62, 4))) + bytes(8),
            r"has shape \[4611686018427387904, 4\]: more than 8 dims or \d+ elements",
        ),
        (header(x=entry(offsets=(2, 10))) + bytes(10), "expected .*: gap or overlap"),
        (header(x=entry(), y=entry()) + bytes(8), "tensor 'y' starts at byte .* gap or overlap"),
        (header(x=entry()) + bytes(7), "header describes .* bytes, there are"),
        (header(x=entry()) + bytes(9), "header describes .* bytes, there are"),
    ],
)
def test_bad_safetensors_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(CorruptSample, match=message) as error:
        parse_safetensors(memoryview(data))
    one_line(error)


def test_every_damaged_header_byte_is_refused_or_harmless() -> None:
    """No flipped byte of the header crashes the parser or makes it read elsewhere."""
    data = save_safetensors({"latents": torch.arange(6.0).reshape(2, 3), "t": torch.arange(4)})
    start = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for position in range(start):
        for bit in (0, 4, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            try:
                tensors = parse_safetensors(memoryview(damaged))
            except CorruptSample:
                refused += 1
            else:
                assert sum(t.numel() * t.element_size() for t in tensors.values()) == len(data) - start
    assert refused > 2 * start


# ------------------------------------------------------------------------------------------------ negative prompt


def test_the_negative_prompt_is_one_for_all_folders(tmp_path: Path, samples: SimpleNamespace) -> None:
    one, two = samples.write_dataset(tmp_path / "one"), samples.write_dataset(tmp_path / "two", first=50)
    both = ShardIndex.open([one.folder, two.folder])
    assert torch.equal(both.negative_prompt(), samples.embeds_of(3))
    write_negative_prompt(two.folder, samples.embeds_of(4))
    with pytest.raises(UserError, match=r"two/negative_prompt\.safetensors: differs from .*one"):
        both.negative_prompt()
    write_negative_prompt(one.folder, torch.zeros(2, 9))
    with pytest.raises(UserError, match="D=9, the shards have D=8"):
        one.negative_prompt()


def test_a_missing_or_damaged_negative_prompt_is_named(tmp_path: Path) -> None:
    path = re.escape(str(tmp_path / "negative_prompt.safetensors"))
    with pytest.raises(UserError, match=f"{path}: not found; make it with .* --text-encoder"):
        read_negative_prompt(tmp_path)
    for content, message in (
        (b"1234", "at least 8 bytes"),
        (save_safetensors({"other": torch.zeros(2)}), "holds no bfloat16 'prompt_embeds'"),
        (save_safetensors({"prompt_embeds": torch.zeros(2, 3)}), "holds no bfloat16 'prompt_embeds'"),
    ):
        (tmp_path / "negative_prompt.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: .*{message}"):
            read_negative_prompt(tmp_path)
    with pytest.raises(UserError, match=r"negative prompt is \[3\]"):
        write_negative_prompt(tmp_path, torch.zeros(3))


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken: cannot be made \(.*\); choose another folder"):
        ShardWriter(tmp_path / "taken", latent_shape=(3, 2, 4, 4), bucket="small")
