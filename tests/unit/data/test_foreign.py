"""Shards of FastGen and rCM: read without rewriting them, and never executed."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from webdataset.writer import TarWriter

from sgmd_dist.data.foreign import FOREIGN_LAYOUTS, decode_tensor, read_negative_embeds
from sgmd_dist.data.format import CorruptSample, write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.reader import Reader, UnitRequest
from sgmd_dist.data.stream import Stream
from sgmd_dist.data.verify import verify
from sgmd_dist.errors import UserError

SHAPE, WIDTH, TOKENS = (4, 2, 3, 6), 8, 5


def latents_of(number: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))


def embeds_of(number: int) -> Tensor:
    """`[TOKENS, WIDTH]`, zero-padded as FastGen's and rCM's are."""
    embeds = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1000 + number))
    embeds[number % TOKENS + 1 :] = 0
    return embeds


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for sample in samples:
            writer.write(sample)
        writer.close()
    return path


def write_foreign(
    folder: Path, layout: str, count: int = 7, per_shard: int = 3, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Samples 0 ... count - 1; the keys begin anew in every shard, as rCM's and FastGen's writers do."""
    own = FOREIGN_LAYOUTS[layout]
    for shard in range(-(-count // per_shard)):
        samples = []
        for number in range(shard * per_shard, min(count, (shard + 1) * per_shard)):
            sample = {
                "__key__": f"{number - shard * per_shard:06d}",
                own.latents: saved(latents_of(number).to(dtype)),
                own.prompt_embeds: saved(embeds_of(number).to(dtype)),
            }
            if layout == "rcm":
                sample["prompt.txt"] = f"caption {number}".encode()
            samples.append(sample)
        write_tar(folder / f"shard_{shard:06d}.tar", samples)


def read_all(index: ShardIndex, **options: Any) -> list[tuple[Tensor | None, Tensor, CorruptSample | None]]:
    requests = iter([UnitRequest(0, n, 0, np.array([n])) for n in range(index.num_samples)])
    read = []
    with Reader(index, requests, micro_batch_size=1, text_tokens=TOKENS + 2, **options) as reader:
        for _ in range(index.num_samples):
            unit = reader.next()
            latents = None if unit.latents is None else unit.latents[0]
            read.append((latents, unit.prompt_embeds[0], unit.errors[0]))
    return read


@pytest.mark.parametrize("layout", ["fastgen", "rcm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_foreign_shards_are_read_as_they_are(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    write_foreign(tmp_path, layout, dtype=dtype)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    write_negative_prompt(tmp_path, torch.ones(2, WIDTH))
    index = consolidate(tmp_path, num_threads=2)
    assert index.buckets == ["4x2x3x6"] and index.num_samples == 7 and index.embed_dim == WIDTH
    assert index.keys[:4] == ["000000", "000001", "000002", "000000"]
    for check_crc, num_threads in ((True, 2), (False, 1)):
        for number, (latents, embeds, error) in enumerate(
            read_all(index, check_crc=check_crc, num_threads=num_threads)
        ):
            assert error is None and latents is not None
            assert torch.equal(latents, latents_of(number).to(dtype).bfloat16())
            assert torch.equal(embeds[:TOKENS], embeds_of(number).to(dtype).bfloat16()) and not embeds[TOKENS:].any()
    assert {path: path.read_bytes() for path in before} == before
    report = verify([str(tmp_path)])
    assert report.mistakes == [] and report.samples == {"4x2x3x6": 7}


def test_a_stream_mixes_foreign_shards_with_ours(tmp_path: Path, samples: Any) -> None:
    own = samples.write_dataset(tmp_path / "own", count=6)
    write_foreign(tmp_path / "foreign", "fastgen")
    write_negative_prompt(tmp_path / "foreign", samples.embeds_of(3))
    consolidate(tmp_path / "foreign")
    index = ShardIndex.open([own.folder, tmp_path / "foreign"])
    assert index.foreign_place(5) is None and index.foreign_place(6) is not None
    with Stream(index, seed=0, micro_batch_size=1, lanes=1, window=4, text_tokens=TOKENS) as stream:
        batches = [stream.next() for _ in range(13)]
    assert all(bool(batch.valid.all()) for batch in batches)
    # Our writer names its bucket, the foreign shards' is named after the shape: both are there.
    assert sorted(batch.keys[0] for batch in batches) == sorted(index.keys)


def test_other_forms_that_writers_leave(tmp_path: Path) -> None:
    """A batch dimension of 1, another memory order, a view of a larger storage, a Parameter; a folder in the key."""
    wanted = latents_of(0)
    forms = [
        wanted[None],
        wanted.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        torch.stack([latents_of(1), wanted])[1],
        torch.nn.Parameter(wanted),
    ]
    write_tar(
        tmp_path / "s.tar",
        [
            {"__key__": f"clips/{n}", "latent.pth": saved(form), "txt_emb.pth": saved(embeds_of(0)[None]), "txt": b"a"}
            for n, form in enumerate(forms)
        ],
    )
    index = consolidate(tmp_path)
    assert index.keys == ["clips/0", "clips/1", "clips/2", "clips/3"]
    for latents, embeds, error in read_all(index):
        assert error is None and latents is not None and torch.equal(latents, wanted.bfloat16())
        assert torch.equal(embeds[:TOKENS], embeds_of(0).bfloat16())


def test_the_json_of_a_foreign_sample_may_name_the_bucket(tmp_path: Path) -> None:
    sample = {"__key__": "k", "latent.pth": saved(latents_of(0)), "txt_emb.pth": saved(embeds_of(0))}
    write_tar(tmp_path / "s.tar", [{**sample, "json": b'{"bucket": "480p", "score": 5}'}])
    assert consolidate(tmp_path).buckets == ["480p"]


def test_a_sample_that_occurs_twice_is_named_though_keys_may(tmp_path: Path) -> None:
    write_foreign(tmp_path, "rcm")
    (tmp_path / "copy.tar").write_bytes((tmp_path / "shard_000001.tar").read_bytes())
    with pytest.raises(
        UserError, match=r"shard_000001\.tar: sample '000000' at offset \d+: its key is in copy\.tar too"
    ):
        consolidate(tmp_path)


# ------------------------------------------------------------------------------------------------ damage


def test_damage_is_delivered_with_shard_key_and_offset(tmp_path: Path) -> None:
    write_foreign(tmp_path, "fastgen")
    index = consolidate(tmp_path)
    place = index.foreign_place(4)
    assert place is not None
    path = index.paths[1]
    data = bytearray(path.read_bytes())
    data[place.prompt_embeds[0] + place.prompt_embeds[1] // 2] ^= 1
    path.write_bytes(data)
    for number, (latents, _, error) in enumerate(read_all(index)):
        assert (error is not None) == (number == 4)
        if error is not None:
            assert latents is not None and not latents.any()
            assert f"{path}: sample '000001' at offset {index.offset[4]}: crc32 is " in str(error)
    os.truncate(path, place.latents[0] + 5)
    assert "the shard ends at byte" in str(read_all(index)[4][2])
    path.unlink()
    assert "No such file" in str(read_all(index)[4][2])


def test_an_index_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_foreign(tmp_path, "fastgen", count=1)
    consolidate(tmp_path)
    path = tmp_path / "index.json"
    text = path.read_text()
    for old, new, message in (
        ('"latent_shape": [4, 2, 3, 6]', '"latent_shape": [4, 2, 6, 3]', r"latents is \[4, 2, 3, 6\], the index says"),
        ('"embed_dim": 8', '"embed_dim": 9', r"prompt_embeds is \[5, 8\], expected \[n_tokens, 9\]"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        ((_, _, error),) = read_all(ShardIndex.open(tmp_path))
        with pytest.raises(CorruptSample, match=message):
            raise error or AssertionError


def members_that_are_no_samples() -> dict[str, tuple[dict[str, bytes], str]]:
    good = {"latent.pth": saved(latents_of(0)), "txt_emb.pth": saved(embeds_of(0))}
    nan = latents_of(0)
    nan[0, 0, 0, 0] = float("nan")
    return {
        "no text": ({"latent.pth": good["latent.pth"]}, r"has no member k\.txt_emb\.pth, only 'k\.latent\.pth'"),
        "nan": ({**good, "latent.pth": saved(nan)}, "'latents' holds values that are not finite"),
        "shape": ({**good, "latent.pth": saved(nan[0])}, r"latents: holds a tensor \[2, 3, 6\], expected 4 dimensions"),
        "empty": ({**good, "txt_emb.pth": saved(torch.zeros(0, 8))}, r"prompt_embeds: holds a tensor \[0, 8\]"),
        "integers": ({**good, "latent.pth": saved(torch.zeros(SHAPE).long())}, "latents: holds torch.int64"),
        "dict": ({**good, "latent.pth": saved({"latent": latents_of(0)})}, "latents: holds dict, expected one dense"),
        "bytes": ({**good, "latent.pth": b"?" * 100}, "latents: not a file of torch.save in its zip format"),
        "cut": ({**good, "latent.pth": good["latent.pth"][:-40]}, "latents: not a file of torch.save"),
        "legacy": (
            {**good, "latent.pth": saved(latents_of(0), _use_new_zipfile_serialization=False)},
            "latents: not a file of torch.save in its zip format",
        ),
        "npy": ({"latents.npy": b"", "text_embedding.npy": b""}, r"has no member k\.json, only 'k\.latents\.npy'"),
    }


@pytest.mark.parametrize("case", members_that_are_no_samples())
def test_a_member_that_is_no_tensor_is_named(tmp_path: Path, case: str) -> None:
    members, message = members_that_are_no_samples()[case]
    write_tar(tmp_path / "s.tar", [{"__key__": "k", **members}])
    with pytest.raises(UserError, match=rf"s\.tar: sample 'k':? {message}") as error:
        consolidate(tmp_path)
    assert "\n" not in str(error.value)
    assert [str(m) for m in verify([str(tmp_path)]).mistakes if m.key == "k"]


# ------------------------------------------------------------------------------------------------ malice


class Malicious:
    """Creates the file `path` when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (os.fspath(self.path),)


def repacked(data: bytes, compression: int, change: Callable[[bytes], bytes]) -> bytes:
    """A file of torch.save with its pickle changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)
    return out.getvalue()


def test_a_malicious_pickle_is_refused_named_and_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everywhere a foreign member is looked at: while indexing, verifying, training, and as a negative prompt."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = tmp_path / "executed"
    for executable in (
        saved(Malicious(trace)),
        saved([latents_of(0), Malicious(trace)]),
        pickle.dumps(Malicious(trace)),
    ):
        folder = tmp_path / "data"
        write_foreign(folder, "fastgen", count=1)
        index = consolidate(folder)
        good = {"__key__": "000000", "latent.pth": executable, "txt_emb.pth": saved(embeds_of(0))}
        write_tar(folder / "shard_000000.tar", [good])
        ((_, _, error),) = read_all(index, check_crc=False)
        assert error is not None and "sample '000000'" in str(error)
        report = verify([str(folder)])
        assert [m for m in report.mistakes if m.key == "000000" and "latents: " in m.what]
        for path in folder.glob("*.json"):
            path.unlink()
        with pytest.raises(UserError, match=r"shard_000000\.tar: sample '000000': latents: (refused|not a file)"):
            consolidate(folder)
        (tmp_path / "negative.pt").write_bytes(executable)
        with pytest.raises(UserError, match=r"negative\.pt: (refused|not a file)"):
            read_negative_embeds(tmp_path / "negative.pt")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # the proof that it would have
    assert trace.exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_files_that_claim_more_than_they_hold_allocate_nothing(compression: int) -> None:
    """A size of 2^38 in the pickle, and entries that unpack to 64 MB."""
    data = saved(torch.zeros(1, 1, 1, 4))
    if compression == zipfile.ZIP_STORED:
        cases = [
            repacked(
                data, compression, lambda text: text.replace(b"K\x04", b"\x8a\x05" + (1 << 38).to_bytes(5, "little"), 1)
            ),
            repacked(
                data, compression, lambda text: text.replace(b"K\x04", b"\x8a\x05" + (1 << 38).to_bytes(5, "little"))
            ),
            saved(torch.zeros(1).expand(1, 1, 1 << 19, 1 << 19)),
        ]
    else:
        cases = [repacked(saved(torch.zeros(1, 1, 1, 16 << 20)), compression, lambda text: text)]
        assert len(cases[0]) < 1 << 20
    for case in cases:
        tracemalloc.start()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_kb()
        with pytest.raises(CorruptSample):
            decode_tensor(case, 4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        assert peak_kb() - before < 16 << 10
        tracemalloc.stop()


def peak_kb() -> int:
    """The process's peak of resident memory: what C++ allocates is not seen by tracemalloc."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


# ------------------------------------------------------------------------------------------------ negative prompt


def test_a_negative_prompt_is_taken_from_a_folder_a_npy_or_a_pt(tmp_path: Path) -> None:
    embeds = embeds_of(1)
    write_negative_prompt(tmp_path, embeds)
    np.save(tmp_path / "neg_prompt_emb.npy", embeds.numpy())
    (tmp_path / "umT5_wan_negative_emb.pt").write_bytes(saved(embeds[None]))
    for name in (".", "negative_prompt.safetensors", "neg_prompt_emb.npy", "umT5_wan_negative_emb.pt"):
        assert torch.equal(read_negative_embeds(tmp_path / name), embeds.bfloat16()), name
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, message in (
        ("objects.npy", "allow_pickle=False"),
        ("nowhere.npy", "No such file"),
        ("flat.npy", r"holds an array \[3\]"),
    ):
        np.save(tmp_path / "flat.npy", np.zeros(3))
        with pytest.raises(UserError, match=rf"{name}: .*{message}|{message}.*{name}"):
            read_negative_embeds(tmp_path / name)
