"""Shards of pairs: latents with the noise that a teacher made them of; other shards stay as they were."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from webdataset.writer import TarWriter

from sgmd_dist.data.examine import build_index
from sgmd_dist.data.format import TENSORS_SUFFIX, safetensors_layout, write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.reader import Reader, UnitRequest
from sgmd_dist.data.record import ShardRecord, sidecar_path
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.data.stream import Stream
from sgmd_dist.data.verify import verify
from sgmd_dist.errors import UserError

SHAPE = (4, 2, 3, 6)
TOKENS = 5


def noise_of(number: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(-1 - number)).bfloat16()


@pytest.fixture
def pairs(tmp_path: Path, samples: SimpleNamespace) -> ShardIndex:
    """12 pairs in 3 shards."""
    folder = tmp_path / "pairs"
    with ShardWriter(folder, latent_shape=SHAPE, bucket="pairs", samples_per_shard=5) as writer:
        for number in range(12):
            latents, noise = samples.latents_of(number), noise_of(number)
            writer.add(f"p{number:04d}", samples.embeds_of(number), "x", latents=latents, noise=noise)
    write_negative_prompt(folder, samples.embeds_of(3))
    return consolidate(folder)


def stream_of(index: ShardIndex, micro_batch_size: int = 4) -> Stream:
    return Stream(index, seed=0, micro_batch_size=micro_batch_size, lanes=2, window=4, text_tokens=TOKENS)


# -- the format -------------------------------------------------------------------------------------------------


def test_noise_is_a_third_tensor_whose_data_begin_aligned(pairs: ShardIndex, samples: SimpleNamespace) -> None:
    assert pairs.has_noise("pairs") and pairs.has_latents("pairs")
    for number in range(pairs.num_samples):
        data = pairs.local_path(int(pairs.shard[number])).read_bytes()[pairs.offset[number] :][: pairs.size[number]]
        tensors = load_safetensors(data)
        assert sorted(tensors) == ["latents", "noise", "prompt_embeds"]
        assert torch.equal(tensors["noise"], noise_of(number))
        assert torch.equal(tensors["latents"], samples.latents_of(number))
        assert safetensors_layout(memoryview(data), len(data))[0].begin % 64 == 0


def test_the_index_of_a_tar_without_its_sidecar_is_the_writers(pairs: ShardIndex) -> None:
    for shard in range(3):
        tar = pairs.local_path(shard)
        assert build_index(tar).to_json() == json.loads(sidecar_path(tar).read_text())


def test_shards_without_noise_have_the_index_and_the_fingerprint_that_they_had(
    dataset: ShardIndex, tmp_path: Path
) -> None:
    """An index says nothing of noise where there is none, so that checkpoints find their data set unchanged."""
    content = json.loads((tmp_path / "data/index.json").read_text())
    assert not any("has_noise" in record for record in content["shards"])
    assert not dataset.has_noise("wide")
    for record in content["shards"]:
        record["has_noise"] = False
    (tmp_path / "data/index.json").write_text(json.dumps(content))
    assert ShardIndex.open(tmp_path / "data").fingerprint == dataset.fingerprint


def test_an_index_that_does_not_speak_of_noise_has_none(pairs: ShardIndex, tmp_path: Path) -> None:
    record = json.loads(sidecar_path(pairs.local_path(0)).read_text())
    assert record["has_noise"] is True
    assert ShardRecord.from_json(record, tmp_path).has_noise
    del record["has_noise"]
    assert not ShardRecord.from_json(record, tmp_path).has_noise


@pytest.mark.parametrize(
    "change, message",
    [
        ({"has_noise": 1}, "has_noise of .* is 1, expected a boolean"),
        ({"has_latents": False}, "has_noise of .* is true, expected false without latents"),
        ({"layout": "rcm", "embed_offsets": [0] * 5, "embed_sizes": [0] * 5}, "expected false .* in layout rcm"),
    ],
)
def test_an_index_that_lies_about_noise_is_refused(pairs: ShardIndex, change: dict[str, object], message: str) -> None:
    record = json.loads(sidecar_path(pairs.local_path(0)).read_text())
    with pytest.raises(UserError, match=message):
        ShardRecord.from_json(record | change, Path("index.json"))


def test_the_writer_takes_noise_with_latents_for_all_or_for_none(tmp_path: Path, samples: SimpleNamespace) -> None:
    embeds, latents = samples.embeds_of(0), samples.latents_of(0)
    with ShardWriter(tmp_path, latent_shape=SHAPE, bucket="b") as writer:
        with pytest.raises(UserError, match="noise belongs to the latents"):
            writer.add("a", embeds, "x", noise=noise_of(0))
        with pytest.raises(UserError, match=r"noise are \[4, 2, 3, 5\]"):
            writer.add("a", embeds, "x", latents=latents, noise=noise_of(0)[..., :5])
        with pytest.raises(UserError, match=r"noise .* must be floating point and finite"):
            writer.add("a", embeds, "x", latents=latents, noise=noise_of(0) / 0)
        writer.add("a", embeds, "x", latents=latents, noise=noise_of(0))
        with pytest.raises(UserError, match="noise must be given for all samples"):
            writer.add("b", embeds, "x", latents=latents)


def test_a_bucket_holds_pairs_or_none(pairs: ShardIndex, tmp_path: Path, samples: SimpleNamespace) -> None:
    with ShardWriter(tmp_path / "pairs", latent_shape=SHAPE, bucket="pairs", prefix="z") as writer:
        writer.add("z", samples.embeds_of(0), "x", latents=samples.latents_of(0))
    with pytest.raises(UserError, match=r"bucket 'pairs' has .* latents, in .* latents, noise; .*its own bucket name"):
        consolidate(tmp_path / "pairs")


# -- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_batch_has_each_samples_noise_beside_its_latents(
    pairs: ShardIndex, samples: SimpleNamespace, num_threads: int
) -> None:
    seen = set()
    with stream_of(pairs) as stream:
        for _ in range(6):
            batch = stream.next()
            assert batch.noise is not None and batch.latents is not None
            assert batch.noise.shape == batch.latents.shape and batch.noise.dtype == torch.bfloat16
            for row, key in enumerate(batch.keys):
                number = int(key[1:])
                assert torch.equal(batch.noise[row], noise_of(number))
                assert torch.equal(batch.latents[row], samples.latents_of(number))
                embeds = samples.embeds_of(number)[:TOKENS]
                assert torch.equal(batch.prompt_embeds[row, : len(embeds)], embeds)
                assert not batch.prompt_embeds[row, len(embeds) :].any()
                seen.add(number)
    assert seen == set(range(12))


def test_a_short_unit_repeats_the_noise_of_its_last_sample(pairs: ShardIndex) -> None:
    with stream_of(pairs, micro_batch_size=16) as stream:
        batch = stream.next()
    assert batch.noise is not None and batch.valid.tolist() == [True] * 12 + [False] * 4
    assert torch.equal(batch.noise[12:], batch.noise[11:12].expand(4, -1, -1, -1, -1))
    moved = batch.to("meta").noise
    assert moved is not None and moved.device.type == "meta"


def test_a_batch_of_shards_without_noise_has_none(dataset: ShardIndex) -> None:
    with stream_of(dataset) as stream:
        batch = stream.next()
    assert batch.noise is None and batch.to("cpu").noise is None
    assert batch.latents is not None and batch.latents.untyped_storage().nbytes() < 2 * batch.latents.nbytes


def test_buckets_with_and_without_pairs_are_one_data_set(pairs: ShardIndex, dataset: ShardIndex) -> None:
    both = ShardIndex.open([pairs.folder, dataset.folder])
    assert [both.has_noise(bucket) for bucket in both.buckets] == [True, False]
    requests = [UnitRequest(0, 0, 0, np.array([3, 4])), UnitRequest(0, 1, 1, np.array([12, 13]))]
    with Reader(both, iter(requests), micro_batch_size=2, text_tokens=TOKENS) as reader:
        first, second = reader.next(), reader.next()
    assert first.noise is not None and torch.equal(first.noise[1], noise_of(4))
    assert second.noise is None and second.latents is not None


def test_damaged_noise_is_delivered_as_zeros_with_its_reason(pairs: ShardIndex) -> None:
    with open(pairs.local_path(0), "r+b") as file:
        file.seek(int(pairs.offset[1]) + int(pairs.size[1]) // 2)  # in the noise: between latents and text
        file.write(b"\x55\x55")
    request = UnitRequest(0, 0, 0, np.array([0, 1]))
    with Reader(pairs, iter([request]), micro_batch_size=2, text_tokens=TOKENS) as reader:
        unit = reader.next()
    assert unit.errors[0] is None and "crc32" in str(unit.errors[1])
    assert unit.noise is not None and torch.equal(unit.noise[0], noise_of(0)) and not unit.noise[1].any()


class Copies:
    """Stands for the copies to a device, in the order of the tensors that it is given."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = [tensor.clone() for tensor in tensors]

    def land(self) -> list[torch.Tensor]:
        return self.tensors


@pytest.mark.parametrize("folder", ["pairs", "data"])
def test_what_a_device_gets_is_what_was_read(
    pairs: ShardIndex, dataset: ShardIndex, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"pairs": pairs, "data": dataset}[folder]
    with stream_of(index) as there, stream_of(index) as here:
        reader = there._open_reader()
        monkeypatch.setattr(reader, "_transfer", SimpleNamespace(begin=Copies))
        monkeypatch.setattr(there, "_reader", reader)
        for _ in range(6):
            found, expected = there.next(), here.next()
            assert found.keys == expected.keys and torch.equal(found.prompt_embeds, expected.prompt_embeds)
            assert found.latents is not None and expected.latents is not None
            assert torch.equal(found.latents, expected.latents)
            assert (found.noise is None) == (expected.noise is None) == (folder == "data")
            if found.noise is not None and expected.noise is not None:
                assert torch.equal(found.noise, expected.noise) and not torch.equal(found.noise, found.latents)


# -- verifying --------------------------------------------------------------------------------------------------


def rewritten(index: ShardIndex, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> list[str]:
    """What `verify` says of the first shard with its second sample changed, under an index that is not."""
    path = index.local_path(0)
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with open(path, "wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for (name, description), (_, data) in zip(members[::2], members[1::2], strict=True):
            key = name.partition(".")[0]
            if key == "p0001":
                data = save_safetensors(change(load_safetensors(data)))
            writer.write({"__key__": key, "json": description, TENSORS_SUFFIX: data})
        writer.close()
    return [str(mistake) for mistake in verify([str(index.folder)]).mistakes]


def test_verify_finds_nothing_wrong_with_pairs(pairs: ShardIndex) -> None:
    report = verify([str(pairs.folder)])
    assert report.mistakes == [] and report.samples == {"pairs": 12}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: {**t, "noise": t["noise"] / 0}, "'noise' holds values that are not finite"),
        (lambda t: {**t, "noise": t["noise"].float()}, "'noise' is torch.float32, must be bfloat16"),
        (
            lambda t: {**t, "noise": t["noise"][..., :5].clone()},
            "'noise' is [4, 2, 3, 5] beside 'latents' [4, 2, 3, 6]",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "latents"}, "'noise' is [4, 2, 3, 6] beside no 'latents'"),
        (lambda t: {k: v for k, v in t.items() if k != "noise"}, "True, 8, False, False, []), the index says"),
    ],
)
def test_verify_names_wrong_noise_by_shard_and_key(
    pairs: ShardIndex, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str
) -> None:
    lines = [line for line in rewritten(pairs, change) if "sample 'p0001'" in line and said in line]
    assert len(lines) == 1 and lines[0].startswith(str(pairs.local_path(0)))
