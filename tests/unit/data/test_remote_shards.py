"""Data sets that lie elsewhere: opened, read and checked like those of a local folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from file_server import FileServer, serving

from sgmd_dist.assemble import build_model
from sgmd_dist.batch import Batch
from sgmd_dist.data import sources
from sgmd_dist.data.cache import ShardCache
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.sources import check_sources, latent_shape_of, open_shards
from sgmd_dist.data.stream import Stream
from sgmd_dist.errors import UserError
from sgmd_dist.recipe import Recipe

NEGATIVE = "negative_prompt.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, samples: SimpleNamespace) -> ShardIndex:
    """23 samples in 5 shards, in a folder that no test changes."""
    return samples.write_dataset(tmp_path_factory.mktemp("elsewhere") / "a set")


@pytest.fixture
def server(data: ShardIndex) -> Iterator[FileServer]:
    with serving(data.folder.parent) as server:
        yield server


@pytest.fixture
def bare(data: ShardIndex, tmp_path: Path) -> Path:
    """A folder with the tars alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in data.paths:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", retries=1)


def more_than_an_epoch(index: ShardIndex) -> list[Batch]:
    """23 samples take 12 units."""
    with Stream(index, seed=1, micro_batch_size=2, lanes=2, window=4, text_tokens=5, num_threads=2) as stream:
        return [stream.next() for _ in range(14)]


def assert_same(index: ShardIndex, local: ShardIndex) -> None:
    assert index.fingerprint == local.fingerprint
    for ours, theirs in zip(more_than_an_epoch(index), more_than_an_epoch(local), strict=True):
        assert ours.keys == theirs.keys and bool(ours.valid.all()) == bool(theirs.valid.all())
        assert ours.latents is not None and theirs.latents is not None
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.prompt_embeds, theirs.prompt_embeds)
        assert torch.equal(ours.negative_embeds, theirs.negative_embeds)


def asked_for_tars(server: FileServer) -> list[int]:
    return [count for what, count in server.asked.items() if what.startswith("GET") and what.endswith(".tar")]


# Opening and reading


@pytest.mark.parametrize("where", ["a%20set", "a%20set/", "a%20set?sig=1", "a%20set/shard-{000000..000004}.tar?sig=1"])
def test_a_set_on_a_server_is_the_same_set(data: ShardIndex, server: FileServer, cache: ShardCache, where: str) -> None:
    index = ShardIndex.open(f"{server.url}/{where}", cache)
    assert asked_for_tars(server) == [], "opening takes indexes only"
    assert_same(index, data)
    assert asked_for_tars(server) == [1] * 5
    assert set(server.queries.values()) == {"sig=1" if "sig" in where else ""}
    assert_same(ShardIndex.open(f"{server.url}/{where}", ShardCache(cache.folder)), data)
    assert asked_for_tars(server) == [1] * 5


def test_local_files_are_given_as_they_lie(data: ShardIndex, server: FileServer, cache: ShardCache) -> None:
    index = ShardIndex.open([str(data.paths[0]), f"file://{data.paths[1]}", f"{server.url}/a%20set"], cache)
    assert index.local_path(0) == data.paths[0] and index.local_path(1) == data.paths[1]
    fetched = index.local_path(2)
    assert fetched.parent == cache.folder and fetched.read_bytes() == Path(data.paths[0]).read_bytes()
    for shard in (0, 2):
        descriptor = index.open_shard(shard)
        assert os.pread(descriptor, 10**6, 0) == fetched.read_bytes()
        os.close(descriptor)


def test_shards_without_indexes_are_fetched_at_opening(data: ShardIndex, bare: Path, cache: ShardCache) -> None:
    with serving(bare) as server:
        shutil.copy(data.folder / NEGATIVE, bare)
        index = ShardIndex.open(f"{server.url}/shard-{{000000..000004}}.tar", cache)
        assert asked_for_tars(server) == [1] * 5
        assert_same(index, data)
        assert asked_for_tars(server) == [1] * 5


def test_commands_print_shards(data: ShardIndex, bare: Path, cache: ShardCache) -> None:
    shards = f"pipe:cat '{bare}/shard-{{000000..000004}}.tar' | cat"
    with pytest.raises(
        UserError, match=r"^pipe:cat .*there is no negative_prompt.safetensors beside the shards; write"
    ):
        ShardIndex.open(shards, cache).negative_prompt()
    index = ShardIndex.open([shards, str(data.paths[0])], cache)
    assert torch.equal(index.negative_prompt(), data.negative_prompt())
    only = ShardIndex.open(shards, cache)
    assert only.fingerprint == data.fingerprint and only.keys == data.keys
    assert [only.local_path(i).read_bytes() for i in range(5)] == [Path(path).read_bytes() for path in data.paths]


def test_a_failing_command_is_named_at_opening(bare: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgmd_dist.data.cache._FIRST_PAUSE_S", 0.01)
    with pytest.raises(
        UserError, match=r"cat /nowhere/a\.tar \| cat: the command ended with status 1 \(cat: .*attempt 2"
    ):
        ShardIndex.open("pipe:cat /nowhere/a.tar | cat", cache)
    with pytest.raises(UserError, match=r"no end of archive|truncated|holds no samples"):
        ShardIndex.open(f"pipe:head -c 3000 {bare}/shard-000000.tar", cache)


@pytest.mark.parametrize(
    "where, message",
    [
        ("nowhere", r"/nowhere/index\.json: the server says 404 .*needs index\.json there"),
        ("nowhere/a.tar", r"/nowhere/a\.tar: the server says 404"),
        ("a%20set/shard-{0.tar", r"shard-\{0\.tar': unbalanced braces.*a pattern is written"),
    ],
)
def test_what_is_missing_is_named(server: FileServer, cache: ShardCache, where: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShardIndex.open(f"{server.url}/{where}", cache)


def test_damaged_indexes_are_named(bare: Path, cache: ShardCache) -> None:
    with serving(bare) as server:
        for content, message in (
            (b"{", "not valid JSON"), (b"[]", "holds no list 'shards'"), (b'{"shards": [{}]}', "index version is None")
        ):  # fmt: skip
            (bare / "index.json").write_bytes(content)
            with pytest.raises(UserError, match=rf"^{server.url}/index\.json\?\*\*\*: .*{message}"):
                ShardIndex.open(f"{server.url}?sig=S3", ShardCache(cache.folder / str(len(content))))


def test_a_cache_smaller_than_a_shard_is_named_at_opening(server: FileServer, cache: ShardCache) -> None:
    with pytest.raises(UserError, match=r"data\.cache_gb = 1e-06: .*shard-000000\.tar alone has"):
        ShardIndex.open(f"{server.url}/a%20set", ShardCache(cache.folder, 1000))
    assert asked_for_tars(server) == []


def test_reading_goes_on_in_a_cache_of_two_shards(data: ShardIndex, server: FileServer, cache: ShardCache) -> None:
    largest = max(Path(path).stat().st_size for path in data.paths)
    small = ShardCache(cache.folder, 2 * largest)
    assert_same(ShardIndex.open(f"{server.url}/a%20set", small), data)
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 2 * largest


def test_negative_prompts_must_agree(data: ShardIndex, bare: Path, server: FileServer, cache: ShardCache) -> None:
    from sgmd_dist.data.format import write_negative_prompt

    write_negative_prompt(bare, torch.ones(2, 8))
    with serving(bare) as other:
        shards = [f"{server.url}/a%20set", f"{other.url}/shard-000000.tar?sig=S3"]
        with pytest.raises(UserError, match=rf"^{other.url}\?\*\*\*/{NEGATIVE}: differs from {server.url}"):
            ShardIndex.open(shards, cache).negative_prompt()


# Failures while reading


def test_a_shard_that_vanished_is_delivered_as_an_error(data: ShardIndex, tmp_path: Path, cache: ShardCache) -> None:
    folder = shutil.copytree(data.folder, tmp_path / "copy")
    with serving(folder) as server:
        index = ShardIndex.open(f"{server.url}?sig=S3", cache)
        (folder / "shard-000002.tar").unlink()
        options: dict[str, Any] = {"seed": 1, "micro_batch_size": 1, "lanes": 1, "window": 1, "text_tokens": 5}
        with Stream(index, **options) as stream, pytest.raises(UserError) as error:
            list(iter(stream.next, None))
        text = str(error.value)
        assert text.startswith(f"{server.url}/shard-000002.tar?***: sample 's00") and "404" in text and "S3" not in text
        with Stream(index, **options, on_error="skip", max_skips=5) as stream:
            valid = [bool(stream.next().valid) for _ in range(23)]
        assert valid.count(False) == 5 == stream.skipped


# Stores


@pytest.fixture(scope="module")
def bucket(data: ShardIndex) -> Iterator[str]:
    """The data set in a bucket of a local S3 server."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import fsspec
    import s3fs

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "me"),
            ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        files.put(str(data.folder), "bucket/set", recursive=True)
        yield "s3://bucket/set"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.parametrize("where", ["", "/shard-{000000..000004}.tar"])
def test_a_set_in_a_bucket_is_the_same_set(data: ShardIndex, bucket: str, cache: ShardCache, where: str) -> None:
    index = ShardIndex.open(bucket + where, cache)
    assert list(cache.folder.glob("*.tar")) == [], "opening takes indexes only"
    assert str(index.paths[0]) == f"{bucket}/shard-000000.tar"
    assert_same(index, data)


def test_what_a_bucket_lacks_is_named(bucket: str, cache: ShardCache) -> None:
    for shards, message in (
        (f"{bucket}/nowhere", r"nowhere/index\.json: no such file.*needs index\.json there"),
        (f"{bucket}/shard-000009.tar", r"shard-000009\.tar: no such file"),
        ("s3://other/set", r"s3://other/set/index\.json: "),
    ):
        with pytest.raises(UserError, match=message):
            ShardIndex.open(shards, cache)


# Recipes


@pytest.fixture
def fitting(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes whose model takes the data set."""
    model = ["in_channels=4", "out_channels=4", "text_dim=8", "patch_size=[1, 3, 3]"]
    words = [f"data.cache={tmp_path / 'cache'}", "data.retries=0", *(f"model.config.{word}" for word in model)]
    return lambda *overrides: tiny_recipe(*words, *overrides)


def test_a_recipe_names_a_server(
    data: ShardIndex, server: FileServer, fitting: Callable[..., Recipe], tmp_path: Path, samples: SimpleNamespace
) -> None:
    recipe = fitting(f"data.shards='{server.url}/a%20set?sig=1'", "data.cache_gb=0.5")
    model = build_model(recipe, "generator")
    check_sources(recipe, model, "objective.name")
    assert latent_shape_of(recipe, model) == samples.latent_shapes["wide"]
    assert asked_for_tars(server) == [] and not Path(recipe.run.dir).exists()
    assert server.asked["GET /a%20set/index.json"] == server.asked["HEAD /a%20set/index.json"] == 1
    index = open_shards(recipe, model)
    assert index.fingerprint == data.fingerprint and index.local_path(0).parent == tmp_path / "cache"
    cache = sources.shard_cache(recipe)
    assert cache.max_bytes == 5 * 10**8 and cache is sources.shard_cache(recipe)


def test_one_entry_with_a_negative_prompt_is_enough(
    data: ShardIndex, bare: Path, fitting: Callable[..., Recipe]
) -> None:
    pipe = f"pipe:cat {bare}/shard-000000.tar"
    recipe = fitting(f"data.shards=['{pipe}', '{data.paths[1]}']")
    model = build_model(recipe, "generator")
    check_sources(recipe, model)
    assert open_shards(recipe, model).num_samples == 10
    lacking = fitting(f"data.shards=['{pipe}']")
    for call in (check_sources, open_shards):
        with pytest.raises(UserError, match=r"there is no negative_prompt\.safetensors beside the shards"):
            call(lacking, model)


def test_a_recipes_secrets_are_not_shown(server: FileServer, fitting: Callable[..., Recipe]) -> None:
    recipe = fitting(f"data.shards='{server.url}/a%20set?sig=S3'", "model.config.text_dim=16")
    with pytest.raises(UserError, match=r"sig|\?\*\*\*': prompt embeddings are 8 wide") as error:
        check_sources(recipe, build_model(recipe, "generator"))
    assert "S3" not in str(error.value)
