"""verify names everything that is wrong with a data set, not the first thing alone, and nothing that is right."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from sgmd_dist.data.examine import KIND_IN_WORDS, build_index
from sgmd_dist.data.format import NEGATIVE_PROMPT_NAME, CorruptSample, write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.stream import Stream
from sgmd_dist.data.verify import Report, total_bytes, verify
from sgmd_dist.errors import UserError

Members = dict[str, bytes]


def said(report: Report) -> list[str]:
    lines = [str(mistake) for mistake in report.mistakes]
    assert not any("\n" in line for line in lines)
    return lines


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def index_anew(folder: Path) -> None:
    """The index that somebody made who checked nothing: crc32 and places of what is in the tars."""
    import zlib

    shards = json.loads((folder / "index.json").read_text())["shards"]
    for shard in shards:
        path = folder / shard["shard"]
        with tarfile.open(path) as tar:
            members = {m.name.split(".")[0]: m for m in tar if m.name.endswith(".sample.safetensors")}
        data = path.read_bytes()
        shard |= {
            "tar_bytes": len(data),
            "keys": list(members),
            "offsets": [m.offset_data for m in members.values()],
            "sizes": [m.size for m in members.values()],
            "crc32": [zlib.crc32(data[m.offset_data :][: m.size]) for m in members.values()],
        }
        path.with_suffix(".index.json").write_text(json.dumps(shard))
    (folder / "index.json").write_text(json.dumps({"version": 1, "shards": shards}))


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_clean_data_set_is_clean(two_buckets: ShardIndex, num_threads: int) -> None:
    told: list[int] = []
    report = verify([str(two_buckets.folder)], num_threads=num_threads, on_bytes=told.append)
    assert said(report) == [] and report.samples == {"wide": 23, "tall": 14} and report.num_shards == 8
    tars = [str(path) for path in two_buckets.paths]
    assert sum(told) == report.num_bytes == total_bytes(tars) == sum(os.path.getsize(tar) for tar in tars)
    assert verify(tars).samples == report.samples
    pattern = f"{two_buckets.folder}/shard-{{000000..000004}}.tar"
    assert verify([pattern]).samples == {"wide": 23} and said(verify([pattern])) == []


def test_caption_only_shards_are_clean(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write(tmp_path, 6, with_latents=False)
    write_negative_prompt(tmp_path, samples.embeds_of(3))
    consolidate(tmp_path)
    assert said(verify([str(tmp_path)])) == []


def test_everything_wrong_is_listed_at_once(dataset: ShardIndex) -> None:
    """A flipped bit, a lost shard, a cut one, a damaged sidecar, no negative prompt: five shards, five mistakes."""
    folder, paths = dataset.folder, dataset.paths
    flip(paths[0], int(dataset.offset[1] + dataset.size[1]) - 3)
    paths[1].unlink()
    os.truncate(paths[2], int(dataset.offset[14]) + 40)
    paths[3].with_suffix(".index.json").write_text("{")
    (folder / NEGATIVE_PROMPT_NAME).unlink()
    report = verify([str(folder)], num_threads=2)
    lines = said(report)
    for expected in (
        f"{paths[3].with_suffix('.index.json')}: not valid JSON",
        f"{paths[0]}: sample 's0001' at offset {dataset.offset[1]}: crc32 is ",
        f"{paths[1]}: not found; restore the shard",
        f"{paths[2]}: {int(dataset.offset[14]) + 40} bytes, the index says",
        f"{paths[2]}: sample 's0014' at offset {dataset.offset[14]}: s0014.sample.safetensors of ",
        f"{folder / NEGATIVE_PROMPT_NAME}: not found",
    ):
        assert [line for line in lines if line.startswith(expected)], (expected, lines)
    assert report.samples == {"wide": 4 + 4 + 5 + 3} and report.num_shards == 4


def test_a_damaged_tar_header_costs_one_member_and_no_other(dataset: ShardIndex) -> None:
    """tarfile alone would take it for the end of the archive."""
    path = dataset.paths[0]
    flip(path, int(dataset.offset[2]) - 512 + 20)
    report = verify([str(dataset.folder)])
    begin = int(dataset.offset[2]) - 512
    end = begin + 512 + -(-int(dataset.size[2]) // 512) * 512
    assert said(report) == [
        f"{path}: at offset {begin}: truncated or damaged after key 's0002': bytes {begin} to {end} hold no member; "
        "restore the shard or write it again",
        f"{path}: sample 's0002' at offset {begin - 1024}: has no member s0002.sample.safetensors, only 's0002.json'; "
        "write the shard again (readable are KEY.json with KEY.sample.safetensors, FastGen's KEY.latent.pth with "
        "KEY.txt_emb.pth, rCM's KEY.latent.pt with KEY.embed.pt)",
    ]
    assert report.samples == {"wide": 22}


@pytest.mark.parametrize("where", ["data", "header", "name in tar", "size in tar", "end of tar"])
@pytest.mark.parametrize("bit", [0, 3, 7])
def test_no_flipped_bit_is_silent(dataset: ShardIndex, where: str, bit: int) -> None:
    path, begin = dataset.paths[1], int(dataset.offset[6])
    position = {
        "data": begin + int(dataset.size[6]) - 1,
        "header": begin + 12,
        "name in tar": begin - 512 + 1,
        "size in tar": begin - 512 + 124 + 10,
        "end of tar": path.stat().st_size - 600,
    }[where]
    flip(path, position, bit)
    report = verify([str(dataset.folder)])
    assert [line for line in said(report) if line.startswith(f"{path}:")]
    if where != "end of tar":
        assert "s0006" in " ".join(said(report)) and report.samples == {"wide": 22}


@pytest.mark.parametrize("where", ["at a member", "inside a member", "inside a header", "at a sample"])
def test_no_truncation_is_silent(dataset: ShardIndex, where: str) -> None:
    path, offset, size = dataset.paths[4], int(dataset.offset[21]), int(dataset.size[21])
    end = offset + -(-size // 512) * 512
    length = {
        "at a member": offset - 512,
        "inside a member": offset + 9,
        "inside a header": end + 77,
        "at a sample": end,
    }
    os.truncate(path, length[where])
    lost = [21, 22] if where in ("at a member", "inside a member") else [22]
    for reindexed in (False, True):
        if reindexed:  # the index agrees with the cut tar's size
            index = json.loads((dataset.folder / "index.json").read_text())
            index["shards"][4]["tar_bytes"] = length[where]
            for name in ("keys", "offsets", "sizes", "crc32"):
                del index["shards"][4][name][-len(lost) :]
            (dataset.folder / "index.json").write_text(json.dumps(index))
            path.with_suffix(".index.json").write_text(json.dumps(index["shards"][4]))
        report = verify([str(dataset.folder)])
        assert [line for line in said(report) if "truncated or damaged after key 's002" in line]
        assert report.samples == {"wide": 23 - len(lost)}
        for number in [] if reindexed else lost:
            assert f"sample 's{number:04d}'" in " ".join(said(report))


# ------------------------------------------------------------------------------------------------ content


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Members], Members]:
    """Change the tensors of a safetensors member, or the json."""

    def apply(members: Members) -> Members:
        if name.endswith("json"):
            return {**members, name: json.dumps(change(json.loads(members[name]))).encode()}
        return {**members, name: save_safetensors(change(load_safetensors(members[name])))}

    return apply


TENSORS, JSON = "s0007.sample.safetensors", "s0007.json"


def with_value(name: str, value: float) -> Callable[[Any], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[1] = value
        return tensors

    return change


WRONG_CONTENT: dict[str, tuple[Callable[[Members], Members], str]] = {
    "nan latents": (
        changed(TENSORS, with_value("latents", float("nan"))),
        "'latents' holds values that are not finite",
    ),
    "inf embeds": (
        changed(TENSORS, with_value("prompt_embeds", float("inf"))),
        "'prompt_embeds' holds values that are",
    ),
    "shape": (
        changed(TENSORS, lambda t: {**t, "latents": torch.zeros(4, 2, 6, 3).bfloat16()}),
        f"{KIND_IN_WORDS} is ('wide', [4, 2, 6, 3], True, 8, False, False, []), the index says",
    ),
    "width": (
        changed(TENSORS, lambda t: {**t, "prompt_embeds": torch.zeros(2, 9).bfloat16()}),
        f"{KIND_IN_WORDS} is ('wide', [4, 2, 3, 6], True, 9, False, False, []), the index says",
    ),
    "dtype": (changed(TENSORS, lambda t: {**t, "latents": t["latents"].float()}), "'latents' is torch.float32"),
    "no embeds": (changed(TENSORS, lambda t: {"latents": t["latents"]}), "it has no 'prompt_embeds'"),
    "no tokens": (
        changed(TENSORS, lambda t: {**t, "prompt_embeds": t["prompt_embeds"][:0]}),
        "it has no 'prompt_embeds' [n_tokens, D]",
    ),
    "bucket": (
        changed(JSON, lambda j: {**j, "bucket": "tall"}),
        f"{KIND_IN_WORDS} is ('tall', [4, 2, 3, 6], True, 8, False, False, []), the index says ('wide'",
    ),
    "no bucket": (changed(JSON, lambda j: {"caption": "x"}), "its json has no text field 'bucket'"),
    "caption": (changed(JSON, lambda j: {**j, "caption": 3}), "its json has the caption 3, expected a text"),
    "json": (lambda m: {**m, JSON: b"{"}, "its json cannot be read"),
    "json list": (lambda m: {**m, JSON: b"[]"}, "its json is [], expected an object"),
    "deep json": (lambda m: {**m, JSON: b"[" * 100_000}, "its json cannot be read"),
    "no json": (lambda m: {k: v for k, v in m.items() if k != JSON}, "has no member s0007.json"),
    "not safetensors": (lambda m: {**m, TENSORS: pickle.dumps([1, 2])}, "safetensors header length"),
    "a pickle beside": (
        lambda m: {**m, "s0007.extra.pth": b"?"},
        "has a member .extra.pth: shards of this layout hold no",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONTENT)
def test_wrong_content_with_a_right_crc32_is_named_by_shard_key_and_offset(dataset: ShardIndex, case: str) -> None:
    change, message = WRONG_CONTENT[case]
    path = dataset.paths[1]
    members = change(members_of(path))
    write_tar(path, sorted(members.items()))
    index_anew(dataset.folder)
    lines = said(verify([str(dataset.folder)]))
    where = f"{path}: sample 's0007' at offset "
    assert [line for line in lines if line.startswith(where) and message in line], lines
    others = [line for line in lines if not line.startswith(where)]
    expected = {"shape": ["kinds", "bucket 'wide'"], "width": ["D=9", "kinds"], "bucket": ["kinds"]}.get(case, [])
    assert all(any(word in line for word in expected) for line in others), others
    path.with_suffix(".index.json").unlink()
    if case != "caption":  # no caption is read while training
        with pytest.raises(UserError, match=r"shard-000001\.tar: sample 's000[78]'"):
            build_index(path)


def test_a_pickle_in_one_of_our_shards_is_never_unpickled(dataset: ShardIndex, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (os.fspath(tmp_path / "executed"),)

    executable = pickle.dumps(Malicious())
    path = dataset.paths[1]
    members = {**members_of(path), "s0007.latent.pth": executable, TENSORS: executable}
    write_tar(path, sorted(members.items()))
    index_anew(dataset.folder)
    lines = said(verify([str(dataset.folder)]))
    assert [line for line in lines if "'s0007'" in line and "has a member .latent.pth" in line]
    assert [line for line in lines if "'s0007'" in line and "safetensors header length" in line]
    options: Any = {"seed": 0, "micro_batch_size": 1, "lanes": 1, "window": 9, "text_tokens": 5}
    message = r"shard-000001\.tar: sample 's0007' at offset \d+: safetensors header"
    with Stream(ShardIndex.open(dataset.folder), **options) as stream, pytest.raises(CorruptSample, match=message):
        [stream.next() for _ in range(23)]
    with Stream(ShardIndex.open(dataset.folder), on_error="skip", max_skips=1, **options) as stream:
        assert [b.keys[0] for b in (stream.next() for _ in range(23)) if not b.valid.all()] == ["s0007"]
    assert not (tmp_path / "executed").exists()


def test_not_finite_latents_that_an_index_vouches_for_are_named_when_read(dataset: ShardIndex) -> None:
    """No index of ours does: the writer and `build_index` refuse them."""
    path = dataset.paths[1]
    write_tar(path, sorted(WRONG_CONTENT["nan latents"][0](members_of(path)).items()))
    index_anew(dataset.folder)
    options: Any = {"seed": 0, "micro_batch_size": 1, "lanes": 1, "window": 9, "text_tokens": 5}
    message = r"shard-000001\.tar: sample 's0007' at offset \d+: 'latents' holds values that are not finite"
    with Stream(ShardIndex.open(dataset.folder), **options) as stream, pytest.raises(CorruptSample, match=message):
        [stream.next() for _ in range(23)]
    with Stream(ShardIndex.open(dataset.folder), on_error="skip", max_skips=1, **options) as stream:
        assert [b.keys[0] for b in (stream.next() for _ in range(23)) if not b.valid.all()] == ["s0007"]


@pytest.mark.parametrize("prefix, first", [("", "a.b"), ("./", "./s0005"), ("", "ä"), ("", "a b")])
def test_keys_that_webdataset_would_split_are_named(dataset: ShardIndex, prefix: str, first: str) -> None:
    path = dataset.paths[1]
    members = [(f"{prefix}{name}", content) for name, content in members_of(path).items()]
    write_tar(path, [(name.replace(f"{prefix}s0005", first), content) for name, content in members])
    lines = said(verify([str(path)]))
    assert [line for line in lines if repr(first) in line and ("has a dot" in line or "ASCII" in line)], lines
    with pytest.raises(UserError, match=r"has a dot, where webdataset|must be 1 to 80 ASCII"):
        build_index(path)


# ------------------------------------------------------------------------------------------------ indexes, keys, kinds


def test_an_index_that_differs_from_the_tar_is_named_by_sample(dataset: ShardIndex) -> None:
    index = json.loads((dataset.folder / "index.json").read_text())
    shards = index["shards"]
    shards[0]["crc32"][1] ^= 1
    shards[0]["offsets"][2] += 512
    shards[1]["keys"][0] = "other"
    for name in ("keys", "offsets", "sizes", "crc32"):
        shards[2][name].reverse()
        del shards[3][name][2]
    shards[4]["bucket"] = "tall"
    (dataset.folder / "index.json").write_text(json.dumps(index))
    lines = said(verify([str(dataset.folder)]))
    name = [str(path) for path in dataset.paths]
    for expected in (
        *(f"{path}: index.json and {Path(path).stem}.index.json differ" for path in name),
        f"{name[0]}: sample 's0001' at offset {dataset.offset[1]}: crc32 is",
        f"{name[0]}: sample 's0002' at offset {dataset.offset[2]}: offsets is {dataset.offset[2]}, the index says",
        f"{name[1]}: sample 's0005' at offset {dataset.offset[5]}: is not in the index, which is old",
        f"{name[1]}: sample 'other' at offset {dataset.offset[5]}: is in the index, but not in the tar",
        f"{name[2]}: has its samples in another order than the index",
        f"{name[3]}: sample 's0017' at offset {dataset.offset[17]}: is not in the index",
        f"{name[4]}: sample 's0020' at offset {dataset.offset[20]}: {KIND_IN_WORDS} is",
    ):
        assert [line for line in lines if line.startswith(expected)], (expected, lines)
    assert len(lines) == 5 + 2 + 2 + 1 + 1 + 3


def test_a_missing_or_old_index_is_named(dataset: ShardIndex) -> None:
    extra = dataset.folder / "extra.tar"
    extra.write_bytes(dataset.paths[0].read_bytes())
    lines = said(verify([str(dataset.folder)]))
    assert lines[0].startswith(f"{extra}: is not listed in index.json, which is old; make it with python")
    assert f"{extra}: has no index; make it with" in lines[1]
    assert len(lines) == 2 + 5 and all("its key is in extra.tar too" in line for line in lines[2:])
    (dataset.folder / "index.json").unlink()
    extra.unlink()
    (line,) = said(verify([str(dataset.folder)]))
    assert line.startswith(f"{dataset.folder / 'index.json'}: not found; make it with")


def test_keys_are_compared_over_all_data_sets(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write_dataset(tmp_path / "a", count=7)
    samples.write_dataset(tmp_path / "b", count=3, first=5)
    lines = said(verify([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert [line.split("'")[1] for line in lines] == ["s0005", "s0006"]
    assert all("its key is in shard-000001.tar too" in line for line in lines)


def test_kinds_and_negative_prompts_are_compared_over_all_data_sets(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write_dataset(tmp_path / "a", count=3)
    samples.write_dataset(tmp_path / "b", count=3, first=10, with_latents=False)
    write_negative_prompt(tmp_path / "b", torch.zeros(1, 9))
    lines = said(verify([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert len(lines) == 3
    assert f"'s0010': bucket 'wide' has {KIND_IN_WORDS} ('wide', [4, 2, 3, 6], False, 8, False, False, [])" in lines[0]
    assert "D=9, the shards have D=8" in lines[1] and "differs from" in lines[2]


@pytest.mark.parametrize(
    "entry, message",
    [
        ("nowhere", "nowhere: no such folder, and no .tar"),
        ("s3://bucket/x.tar", "only local folders and tars can be verified"),
        ("", "holds no .tar shards"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        verify([entry if "://" in entry else str(tmp_path / entry)])
