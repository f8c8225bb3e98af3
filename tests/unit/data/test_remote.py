"""Files elsewhere: addresses, secrets, and what each kind of failure becomes."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from file_server import FileServer, serving

from sgmd_dist.data.remote import (
    Remote,
    RemoteFailure,
    RemoteMissing,
    RemoteRefused,
    Stat,
    chunks,
    is_remote,
    local_path_of,
    redacted,
    stat,
)

SECRET = "S3CRET"
DATA = os.urandom(300_000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "a.tar").write_bytes(DATA)
    with serving(tmp_path) as server:
        yield server


def fetched(url: str, timeout_s: float = 5.0) -> bytes:
    return b"".join(chunks(Remote(url), timeout_s))


# Addresses


@pytest.mark.parametrize(
    "entry, remote",
    [
        ("/data/shards", False), ("data-{00..11}.tar", False), ("a:b/c.tar", False),
        ("pipe:cat a.tar", True), ("http://h/a.tar", True), ("s3://b/a.tar", True), ("hf://datasets/o/n/a.tar", True),
    ],
)  # fmt: skip
def test_what_lies_elsewhere(entry: str, remote: bool) -> None:
    assert is_remote(entry) == remote


def test_a_store_without_slashes_is_named_with_its_mend() -> None:
    with pytest.raises(RemoteRefused, match=r"data\.shards: 's3:bucket/a\.tar': write s3://"):
        is_remote("s3:bucket/a.tar")


def test_file_addresses_are_paths() -> None:
    assert local_path_of("file:///data/a%20b.tar") == "/data/a b.tar"
    assert local_path_of("s3://b/a%20b.tar") == "s3://b/a%20b.tar"


def test_neighbours_keep_the_signature() -> None:
    shard = Remote("https://h/f/shard-0.tar?sig=a%2Fb&t=1")
    assert shard.is_shard and shard.name == "shard-0.tar"
    assert shard.sidecar().url == "https://h/f/shard-0.index.json?sig=a%2Fb&t=1"
    assert shard.parent.url == "https://h/f?sig=a%2Fb&t=1"
    assert shard.parent.inside("n 1.tar").url == "https://h/f/n%201.tar?sig=a%2Fb&t=1"
    assert Remote("https://h/f/?s").inside("index.json").url == "https://h/f/index.json?s"
    key = Remote("s3://b/odd?#key/a.tar")
    assert key.sidecar().url == "s3://b/odd?#key/a.index.json" and key.parent.inside("b c").url == "s3://b/odd?#key/b c"
    assert not Remote("https://h/f").is_shard and not Remote("https://h/f?x=a.tar").is_shard
    assert Remote("pipe:cat x").is_shard and Remote("pipe:cat x").parent == Remote("pipe:cat x")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://me:pw@h:8/f/a.tar?sig=S#x", "https://h:8/f/a.tar?***"),
        ("https://h?sig=S", "https://h?***"),
        ("s3://b/f/a.tar", "s3://b/f/a.tar"),
        ("pipe:curl -fsS -H 'Authorization: Bearer S' https://h/a?sig=S", "pipe:curl -fsS -H *** https://h/a?***"),
        ("pipe:curl -u me:S https://h/a", "pipe:curl -u *** https://h/a"),
        ("pipe:TOKEN=S x --api-key=S 'https://a:S@h/b'", "pipe:TOKEN=*** x --api-key=*** 'https://h/b'"),
        ("Max retries exceeded with url: /f/a.tar?sig=S (Caused by X)", "Max retries exceeded with url: /f/a.tar?***"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text).startswith(shown)
    assert "S" not in redacted(text).replace("-fsS", "") and "pw" not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)
    assert str(Remote(text)) == repr(Remote(text)) == f"{Remote(text)}" == redacted(text)


# http


def test_http_brings_the_bytes_and_says_their_number_and_version(server: FileServer, tmp_path: Path) -> None:
    assert fetched(f"{server.url}/a.tar?sig=1") == DATA
    assert server.queries["/a.tar"] == "sig=1"
    assert server.headers["/a.tar"]["Accept-Encoding"] == "identity"
    first = stat(Remote(f"{server.url}/a.tar"))
    assert first.num_bytes == len(DATA) and first.version
    os.utime(tmp_path / "a.tar", (1e9, 1e9))
    assert stat(Remote(f"{server.url}/a.tar")).version != first.version


def test_user_and_password_are_sent(server: FileServer) -> None:
    assert fetched(f"http://me:secret@127.0.0.1:{server.server_port}/a.tar") == DATA
    assert server.headers["/a.tar"]["Authorization"] == "Basic bWU6c2VjcmV0"


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "cut"])
def test_what_may_pass_is_an_oserror_and_passes(server: FileServer, fault: int | str) -> None:
    server.faults["/a.tar"] = [fault]
    with pytest.raises(RemoteFailure) as failure:
        fetched(f"{server.url}/a.tar?sig={SECRET}")
    assert isinstance(failure.value, ConnectionError)
    assert str(failure.value).startswith(f"{server.url}/a.tar?***: ") and SECRET not in str(failure.value)
    assert SECRET not in "".join(traceback.format_exception(failure.value))
    assert fetched(f"{server.url}/a.tar") == DATA


def test_a_silent_server_has_failed(server: FileServer) -> None:
    server.faults["/a.tar"] = ["stall"]
    began = time.monotonic()
    with pytest.raises(RemoteFailure, match=r"a\.tar: .*timed out"):
        fetched(f"{server.url}/a.tar", timeout_s=0.3)
    assert time.monotonic() - began < 5


def test_a_server_that_is_not_there_has_failed() -> None:
    for call in (fetched, lambda url: stat(Remote(url))):
        with pytest.raises(RemoteFailure) as failure:
            call("http://127.0.0.1:9/a.tar?sig=S3CRET")
        assert "refused" in str(failure.value) and "S3CRET" not in str(failure.value)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_is_not_there_or_not_for_us_is_missing(server: FileServer, status: int) -> None:
    server.faults["/a.tar"] = [status]
    with pytest.raises(RemoteMissing, match=rf"/a\.tar: the server says {status} .*check the address"):
        fetched(f"{server.url}/a.tar")
    assert not issubclass(RemoteMissing, OSError)


def test_other_refusals_are_neither_missing_nor_repeated(server: FileServer) -> None:
    server.faults["/a.tar"] = [400]
    with pytest.raises(RemoteRefused, match="the server says 400") as refusal:
        fetched(f"{server.url}/a.tar")
    assert not isinstance(refusal.value, RemoteMissing)
    with pytest.raises(RemoteRefused, match="no valid address"):
        fetched("http:///a.tar")


def test_a_head_that_is_refused_says_nothing(server: FileServer) -> None:
    server.refuse_head = True
    assert stat(Remote(f"{server.url}/a.tar")) == Stat(None, None)
    server.refuse_head = False
    with pytest.raises(RemoteMissing):
        stat(Remote(f"{server.url}/nothing.tar"))


# Commands


def test_a_commands_output_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "a b.tar").write_bytes(DATA)
    assert fetched(f"pipe:cat '{tmp_path}/a b.tar' | cat") == DATA
    assert stat(Remote("pipe:false")) == Stat(None, None)


@pytest.mark.parametrize(
    "command, status",
    [("false", 1), ("echo x; exit 3", 3), ("cat /nowhere | cat", 1), ("(echo x; exit 5) | cat | cat", 5)],
)
def test_a_command_that_fails_anywhere_in_a_pipeline_has_failed(command: str, status: int) -> None:
    with pytest.raises(RemoteFailure, match=f"the command ended with status {status}"):
        fetched(f"pipe:{command}")


def test_a_failing_command_is_quoted_without_secrets() -> None:
    with pytest.raises(RemoteFailure) as failure:
        fetched("pipe:echo no luck at https://h/a?sig=S3 >&2; TOKEN=S3 false")
    assert "(no luck at https://h/a?***)" in str(failure.value) and "S3" not in str(failure.value)


def test_a_program_that_is_not_installed_is_refused() -> None:
    with pytest.raises(RemoteRefused, match=r"status 127 .*no-such-program.*; install the program or mend"):
        fetched("pipe:no-such-program a.tar")


@pytest.mark.parametrize("abandon", [False, True])
def test_a_silent_command_is_ended_with_all_its_processes(tmp_path: Path, abandon: bool) -> None:
    command = f"pipe:echo x; sleep 99 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/shell; wait"
    parts = chunks(Remote(command), 0.5)
    assert next(parts) == b"x\n"
    if abandon:
        while not (tmp_path / "shell").exists():
            time.sleep(0.01)
        parts.close()
    else:
        with pytest.raises(RemoteFailure, match=r"silent for 0\.5 s"):
            next(parts)
    for name in ("child", "shell"):
        assert _ends(int((tmp_path / name).read_text()))


def _ends(process: int) -> bool:
    """Whether the process is gone, or dead and only not waited for."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


# Stores


def test_any_store_of_fsspec_is_read() -> None:
    files = fsspec.filesystem("memory")
    with files.open("/bucket/a.tar", "wb") as file:
        file.write(DATA)
    assert fetched("memory://bucket/a.tar") == DATA
    assert stat(Remote("memory://bucket/a.tar")).num_bytes == len(DATA)
    with pytest.raises(RemoteMissing, match=r"memory://bucket/b\.tar: no such file"):
        fetched("memory://bucket/b.tar")
    with pytest.raises(RemoteMissing):
        stat(Remote("memory://bucket"))


def test_an_unknown_protocol_is_named_with_the_known() -> None:
    with pytest.raises(RemoteRefused, match=r"unknown protocol nonsense://; expected a path, pipe:, http\(s\)://"):
        fetched("nonsense://bucket/a.tar")


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RemoteRefused) as refusal:
        stat(Remote("gs://bucket/a.tar"))
    assert str(refusal.value) == (
        "gs://bucket/a.tar: gs:// needs a package that is not installed; pip install 'sgmd_dist[cloud]'"
    )
