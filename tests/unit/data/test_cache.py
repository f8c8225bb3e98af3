"""The node cache: each shard comes once, whole, within the budget, whoever asks, dies or fails meanwhile."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import pytest
from file_server import FileServer, serving
from forking import context, keep_what_was_imported

from sgmd_dist.data.cache import ShardCache, Wanted, default_folder
from sgmd_dist.data.record import ShardRecord, sidecar_record
from sgmd_dist.data.remote import Remote, RemoteFailure, RemoteMissing, RemoteRefused
from sgmd_dist.errors import UserError

NUM_BYTES = 100_000
NUM_SHARDS = 6


def name_of(number: int) -> str:
    return f"shard-{number}.tar"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of files that serve as shards here: nobody looks into them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(NUM_SHARDS):
        (folder / name_of(number)).write_bytes(os.urandom(NUM_BYTES))
    return folder


@pytest.fixture
def server(source: Path) -> Iterator[FileServer]:
    with serving(source) as server:
        yield server


@pytest.fixture
def wanted(server: FileServer) -> Callable[[int], Wanted]:
    return lambda number: Wanted(Remote(f"{server.url}/{name_of(number)}?sig=S3"), f"{number:064}", NUM_BYTES)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10 * NUM_BYTES, silence_s=5, retries=2)


def tars(cache: ShardCache) -> list[int]:
    """The numbers of the shards that are kept."""
    return sorted(int(path.stem) for path in cache.folder.glob("*.tar"))


def no_part_is_left(cache: ShardCache) -> bool:
    return not list(cache.folder.glob("*.part"))


def use(cache: ShardCache, wanted: Wanted) -> Path:
    """Ask for a shard, later than for the last one by the clock of the file system."""
    time.sleep(0.01)
    return cache.path(wanted)


# One shard


def test_a_shard_is_fetched_once_and_whole(
    cache: ShardCache, wanted: Callable[[int], Wanted], server: FileServer, source: Path
) -> None:
    path = cache.path(wanted(0))
    assert path.read_bytes() == (source / name_of(0)).read_bytes()
    assert cache.path(wanted(0)) == path
    assert server.asked == {"GET /shard-0.tar": 1}
    again = ShardCache(cache.folder, cache.max_bytes)
    descriptor = again.open(wanted(0))
    assert os.pread(descriptor, NUM_BYTES, 0) == path.read_bytes()
    os.close(descriptor)
    assert server.asked == {"GET /shard-0.tar": 1} and no_part_is_left(cache)


def test_one_content_is_one_file_whatever_its_address(samples: SimpleNamespace, tmp_path: Path) -> None:
    index = samples.write_dataset(tmp_path / "data", 7)
    records = [sidecar_record(path) for path in index.paths]
    one = Wanted.of(Remote("http://a/x.tar?sig=1"), records[0])
    assert one.name == Wanted.of(Remote("s3://b/y.tar"), replace(records[0], shard="y.tar")).name
    assert one.num_bytes == records[0].tar_bytes
    others = [records[1], replace(records[0], crc32=[0, *records[0].crc32[1:]]), replace(records[0], tar_bytes=1)]
    assert len({one.name} | {Wanted.of(one.remote, record).name for record in others}) == 4


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_failure_leaves_nothing_and_the_next_attempt_succeeds(
    cache: ShardCache, wanted: Callable[[int], Wanted], server: FileServer, source: Path, fault: int | str
) -> None:
    server.faults["/shard-0.tar"] = [fault]
    with pytest.raises(RemoteFailure) as failure:
        cache.path(wanted(0))
    assert isinstance(failure.value, OSError) and "S3" not in str(failure.value)
    assert tars(cache) == [] and no_part_is_left(cache)
    assert cache.path(wanted(0)).read_bytes() == (source / name_of(0)).read_bytes()


@pytest.mark.parametrize("difference", [-1, 1])
def test_another_size_than_the_index_says_is_refused(
    cache: ShardCache, wanted: Callable[[int], Wanted], server: FileServer, difference: int
) -> None:
    want = replace(wanted(0), num_bytes=NUM_BYTES + difference)
    with pytest.raises(RemoteRefused, match=rf"shard-0\.tar\?\*\*\*: .*{NUM_BYTES + difference}.*ind"):
        cache.path(want)
    assert tars(cache) == [] and no_part_is_left(cache)


def test_a_pipe_that_prints_less_has_failed(cache: ShardCache, source: Path) -> None:
    want = Wanted(Remote(f"pipe:head -c 10 {source}/{name_of(0)}"), "0", NUM_BYTES)
    with pytest.raises(RemoteFailure, match=f"10 bytes, the index says {NUM_BYTES}: the transfer was cut"):
        cache.path(want)


def test_a_kept_shard_that_lost_bytes_is_fetched_anew(
    cache: ShardCache, wanted: Callable[[int], Wanted], source: Path
) -> None:
    path = cache.path(wanted(0))
    for ask in (cache.path, lambda want: os.close(cache.open(want))):
        os.truncate(path, 10)
        ask(wanted(0))
        assert path.read_bytes() == (source / name_of(0)).read_bytes()


def test_a_full_disk_is_named_with_its_mends(
    cache: ShardCache, wanted: Callable[[int], Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sgmd_dist.data.cache.publish", full)
    with pytest.raises(
        RemoteRefused, match=r"cache: cannot keep http.*No space left.*lower data\.cache_gb, or set data"
    ):
        cache.path(wanted(0))
    assert tars(cache) == [] and no_part_is_left(cache)


# The budget


def test_the_least_recently_used_goes_first(
    cache: ShardCache, wanted: Callable[[int], Wanted], server: FileServer
) -> None:
    cache = ShardCache(cache.folder, 3 * NUM_BYTES)
    for number in (0, 1, 2, 0, 3):
        use(cache, wanted(number))
    assert tars(cache) == [0, 2, 3]
    use(cache, wanted(2))
    use(cache, wanted(4))
    assert tars(cache) == [2, 3, 4]
    use(cache, wanted(0))
    assert tars(cache) == [0, 2, 4]
    assert server.asked["GET /shard-0.tar"] == 2 and server.asked["GET /shard-2.tar"] == 1
    assert len(list(cache.folder.glob("*.lock"))) == len(tars(cache)) + 1, "locks of the given up are given up"


def test_an_open_shard_goes_last_and_stays_readable(
    cache: ShardCache, wanted: Callable[[int], Wanted], source: Path
) -> None:
    cache = ShardCache(cache.folder, 2 * NUM_BYTES)
    oldest = cache.open(wanted(0))
    for number in (1, 2, 3):
        use(cache, wanted(number))
        assert tars(cache) == [0, number]
    youngest = cache.open(wanted(3))
    use(cache, wanted(4))
    assert tars(cache) == [3, 4]
    assert os.fstat(oldest).st_nlink == 0
    assert os.pread(oldest, NUM_BYTES, 0) == (source / name_of(0)).read_bytes()
    os.close(oldest)
    os.close(youngest)
    use(cache, wanted(5))
    assert tars(cache) == [4, 5]


def test_a_shard_larger_than_the_budget_is_named(cache: ShardCache, wanted: Callable[[int], Wanted]) -> None:
    small = ShardCache(cache.folder, NUM_BYTES - 1)
    with pytest.raises(
        UserError, match=r"data\.cache_gb = 9\.9999e-05: http.*shard-0\.tar\?\*\*\* alone has 0\.0001 GB"
    ):
        small.path(wanted(0))
    assert ShardCache(cache.folder, NUM_BYTES).path(wanted(0)).exists()


def test_the_budget_holds_at_any_moment_with_many_at_once(
    cache: ShardCache, wanted: Callable[[int], Wanted], source: Path
) -> None:
    """Parts count from the beginning of their way; who finds no room waits for those who have it."""
    cache, most, stop = ShardCache(cache.folder, 2 * NUM_BYTES), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            sizes = []
            for path in [*cache.folder.glob("*.tar"), *cache.folder.glob("*.part")]:
                try:
                    found = path.stat()
                    sizes.append(min(found.st_size, found.st_blocks * 512))  # blocks are rounded up
                except FileNotFoundError:
                    continue
            most[0] = max(most[0], sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(5) as threads:
            opened = list(threads.map(lambda number: (number, cache.open(wanted(number))), [*range(5)] * 4))
    finally:
        stop.set()
        watcher.join()
    for number, descriptor in opened:
        assert os.pread(descriptor, NUM_BYTES, 0) == (source / name_of(number)).read_bytes()
        os.close(descriptor)
    assert len(tars(cache)) == 2 and no_part_is_left(cache)
    assert 0 < most[0] <= 3 * NUM_BYTES, "two lists of names are taken one after the other: a shard may count twice"


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    size = 128 * 2**20
    folder = tmp_path / "large"
    folder.mkdir()
    with open(folder / "a.tar", "wb") as file:
        file.truncate(size)
    with serving(folder) as server:
        for address in (f"{server.url}/a.tar", f"pipe:cat {folder}/a.tar"):
            cache = ShardCache(tmp_path / hashlib.sha256(address.encode()).hexdigest())
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = memory("VmRSS")
            assert cache.path(Wanted(Remote(address), "a", size)).stat().st_size == size
            assert memory("VmHWM") - before < 40 * 2**20


def memory(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


# Several at once


def ask(folder: Path, max_bytes: int, url: str, numbers: list[int], begin: Barrier, answers: Connection) -> None:
    """A process that asks for shards, in this order, and says what they hold."""
    keep_what_was_imported()
    cache = ShardCache(folder, max_bytes)
    begin.wait()
    for number in numbers:
        file = cache.open(Wanted(Remote(f"{url}/{name_of(number)}"), f"{number:064}", NUM_BYTES))
        answers.send(hashlib.sha256(os.pread(file, NUM_BYTES, 0)).hexdigest())
        os.close(file)


def asking(
    cache: ShardCache, server: FileServer, numbers: list[int], count: int
) -> tuple[list[BaseProcess], list[Connection]]:
    """`count` processes that have begun to `ask` at one moment, and the ends where they answer."""
    begin, processes, ends = context.Barrier(count + 1), [], []
    for _ in range(count):
        end, answers = context.Pipe(duplex=False)
        words = (cache.folder, cache.max_bytes, server.url, numbers, begin, answers)
        processes.append(context.Process(target=ask, args=words))
        processes[-1].start()
        answers.close()
        ends.append(end)
    begin.wait(120)
    return processes, ends


def test_racing_processes_fetch_each_shard_once(cache: ShardCache, server: FileServer, source: Path) -> None:
    numbers = list(range(NUM_SHARDS))
    processes, ends = asking(cache, server, numbers, 4)
    for process, end in zip(processes, ends, strict=True):
        answers = [end.recv() for _ in numbers]
        assert answers == [hashlib.sha256((source / name_of(n)).read_bytes()).hexdigest() for n in numbers]
        process.join(60)
        assert process.exitcode == 0
    assert server.asked == {f"GET /{name_of(n)}": 1 for n in numbers}
    assert tars(cache) == numbers and no_part_is_left(cache)


def test_racing_threads_fetch_each_shard_once(
    cache: ShardCache, wanted: Callable[[int], Wanted], server: FileServer
) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: cache.path(wanted(number)), [0, 1] * 8))
    assert server.asked == {"GET /shard-0.tar": 1, "GET /shard-1.tar": 1}


def test_a_killed_fetcher_harms_nothing(
    cache: ShardCache, wanted: Callable[[int], Wanted], server: FileServer, source: Path
) -> None:
    server.faults["/shard-0.tar"] = ["stall"]
    (process,), _ = asking(cache, server, [0], 1)
    wait_for(lambda: not server.faults["/shard-0.tar"])  # it is in the middle
    (part,) = cache.folder.glob("*.part")
    assert part.stat().st_size == NUM_BYTES
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and part.exists()
    path = cache.path(wanted(0))
    assert path.read_bytes() == (source / name_of(0)).read_bytes()
    assert server.asked["GET /shard-0.tar"] == 2 and no_part_is_left(cache)


def test_leftovers_of_others_give_their_room_back(cache: ShardCache, wanted: Callable[[int], Wanted]) -> None:
    cache = ShardCache(cache.folder, NUM_BYTES)
    cache.folder.mkdir()
    (cache.folder / f"{7:064}.xyz.part").write_bytes(bytes(NUM_BYTES))
    cache.path(wanted(0))
    assert tars(cache) == [0] and no_part_is_left(cache)


def wait_for(has_come: Callable[[], bool]) -> None:
    for _ in range(6000):
        if has_come():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


# Small files and shards without an index


def test_an_index_is_fetched_again_only_when_it_changed(cache: ShardCache, server: FileServer, source: Path) -> None:
    remote, path = Remote(f"{server.url}/index.json"), source / "index.json"
    for content, gets in ((b"one\nline", 1), (b"one\nline", 1), (b"two", 2)):
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
            os.utime(path, (1e9 + gets, 1e9 + gets))
        for _ in range(2):
            process = ShardCache(cache.folder)
            assert process.read(remote) == process.read(remote) == content
        assert server.asked["GET /index.json"] == gets
    assert server.asked["HEAD /index.json"] == 6


def test_reading_is_patient_but_not_endlessly(
    cache: ShardCache, server: FileServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgmd_dist.data.cache._FIRST_PAUSE_S", 0.01)
    (source / "index.json").write_bytes(b"{}")
    remote = Remote(f"{server.url}/index.json?sig=S3")
    server.faults["/index.json"] = [503, "cut"]
    assert cache.read(remote) == b"{}"
    server.faults["/index.json"] = [503, 500, 502]
    with pytest.raises(UserError, match=r"index\.json\?\*\*\*: the server says 502 .*\(attempt 3\); try again later"):
        ShardCache(cache.folder / "other", retries=2).read(remote)
    with pytest.raises(RemoteMissing):
        cache.read(Remote(f"{server.url}/nothing.json"))
    assert server.asked["HEAD /nothing.json"] == 1


@pytest.fixture
def foreign(samples: SimpleNamespace, source: Path) -> ShardRecord:
    """A real shard in `source` without an index beside it; its record."""
    index = samples.write_dataset(source / "made", 4)
    record = sidecar_record(index.paths[0])
    os.rename(index.paths[0], source / "foreign.tar")
    return record


@pytest.mark.parametrize("head", ["told", "refused"])
def test_a_shard_without_an_index_is_read_once(
    cache: ShardCache, server: FileServer, foreign: ShardRecord, head: str
) -> None:
    server.refuse_head = head == "refused"
    remote = Remote(f"{server.url}/foreign.tar?sig=1")
    for process in (cache, ShardCache(cache.folder), ShardCache(cache.folder)):
        record = process.record_of(remote)
        assert record == replace(foreign, shard="foreign.tar")
        assert process.path(Wanted.of(remote, record)).stat().st_size == record.tar_bytes
    assert server.asked["GET /foreign.tar"] == 1 and no_part_is_left(cache)


def test_a_replaced_shard_without_an_index_is_read_anew(
    cache: ShardCache, server: FileServer, foreign: ShardRecord, source: Path, samples: SimpleNamespace
) -> None:
    remote = Remote(f"{server.url}/foreign.tar")
    first = cache.record_of(remote)
    other = samples.write_dataset(source / "other", 4, first=50)
    os.replace(other.paths[0], source / "foreign.tar")
    os.utime(source / "foreign.tar", (1e9, 1e9))
    second = ShardCache(cache.folder).record_of(remote)
    assert second.keys == ["s0050", "s0051", "s0052", "s0053"] != first.keys
    assert cache.path(Wanted.of(remote, second)).stat().st_size == second.tar_bytes


def test_a_commands_shard_is_read_once(cache: ShardCache, foreign: ShardRecord, source: Path, tmp_path: Path) -> None:
    remote = Remote(f"pipe:echo x >> {tmp_path}/ran; cat {source}/foreign.tar | cat")
    for process in (cache, ShardCache(cache.folder)):
        assert process.record_of(remote) == replace(foreign, shard="output")
    assert (tmp_path / "ran").read_text() == "x\n"
    small = ShardCache(tmp_path / "small", foreign.tar_bytes - 1)
    with pytest.raises(UserError, match=rf"more bytes than the {foreign.tar_bytes - 1} that data\.cache_gb allows"):
        small.record_of(remote)
    assert no_part_is_left(small)


def test_what_is_no_shard_is_named_by_its_address(cache: ShardCache, server: FileServer) -> None:
    with pytest.raises(UserError) as error:
        cache.record_of(Remote(f"{server.url}/shard-0.tar?sig=S3"))
    assert str(error.value).startswith(f"{server.url}/shard-0.tar?***: ") and str(cache.folder) not in str(error.value)
    assert tars(cache) == [] and no_part_is_left(cache)


# The folder


def test_the_default_folder_is_this_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: FileServer) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = ShardCache()
    assert cache.folder == default_folder() == tmp_path / f"sgmd_dist-shards-{os.geteuid()}"
    assert not cache.folder.exists()
    want = Wanted(Remote(f"{server.url}/shard-0.tar"), "0", NUM_BYTES)
    assert cache.path(want).exists()
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.folder.rename(tmp_path / "elsewhere")
    cache.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"does not belong to you; set data\.cache"):
        ShardCache().path(replace(want, name="1"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache: .*file/cache: cannot be made \(Not a directory\)"):
        ShardCache(tmp_path / "file" / "cache").read(Remote("http://h/x"))
