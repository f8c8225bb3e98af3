"""What reading a sample costs: the stream and plain webdataset, held against a raw read of the same bytes."""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from webdataset.compat import WebDataset

from sgmd_dist.benchmarks.report import machine
from sgmd_dist.data.format import TENSORS_SUFFIX, write_negative_prompt
from sgmd_dist.data.index import INDEX_NAME, ShardIndex, consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.data.stream import Stream

BUDGET = 1.5  # times the CPU time of the raw read
_LATENT_SHAPE, _TEXT_TOKENS, _EMBED_DIM = (16, 21, 60, 104), 512, 4096  # 480 x 832 pixels, 81 frames: 8.39 MB
_SMALL_LATENT_SHAPE, _SMALL_EMBED_DIM = (4, 3, 8, 8), 32
_SAMPLES_PER_SHARD = 32
_RAW, _OURS = "raw read", "stream"
_NUM_BUFFERS = 5  # the stream's: four units ahead, and the one in use
_HEAD = ("path", "CPU ms", "median", "GB/s", "x raw")
_IDLE_S, _POLL_S = 0.001, 0.02  # idle is who uses less than the first in the second


@dataclass(frozen=True)
class Cost:
    """One way of reading, for each sample: CPU time of all threads and worker processes, and wall-clock time.

    cpu_ms, wall_ms: minima over the rounds, whose order alternates: other processes of the machine only add to them.
    median_cpu_ms: the median over the rounds.
    """

    path: str
    cpu_ms: float
    median_cpu_ms: float
    wall_ms: float


@dataclass
class Report:
    """All ways of reading in one run."""

    num_samples: int
    bytes_per_sample: int
    rounds: int
    threads: int
    costs: list[Cost]
    is_smoke: bool = False
    machine: dict[str, str] = field(default_factory=lambda: machine())

    @property
    def ratios(self) -> dict[int, float]:
        """By the number of threads: CPU time of the stream without crc over that of the raw read of as many."""
        cpu_ms = {cost.path: cost.cpu_ms for cost in self.costs}
        numbers = sorted({1, self.threads})
        return {number: cpu_ms[_threads(_OURS, number)] / cpu_ms[_threads(_RAW, number)] for number in numbers}

    def table(self) -> str:
        """The costs under a head that names the machine, and the ratio with its budget."""
        raw = self.costs[0].cpu_ms
        head = [
            "data: " + ", ".join(f"{key} {value}" for key, value in self.machine.items()),
            f"{self.num_samples} samples of {self.bytes_per_sample / 1e6:.2f} MB out of the page cache, {self.threads} "
            f"reading threads; for each sample, the least of {self.rounds} rounds",
        ]
        rows = [_HEAD] + [
            (
                cost.path,
                f"{cost.cpu_ms:.3f}",
                f"{cost.median_cpu_ms:.3f}",
                f"{self.bytes_per_sample / cost.wall_ms / 1e6:.2f}",
                f"{cost.cpu_ms / raw:.2f}",
            )
            for cost in self.costs
        ]
        width = max(len(row[0]) for row in rows)
        lines = ["  ".join([row[0].ljust(width), *(cell.rjust(7) for cell in row[1:])]) for row in rows]
        return "\n".join([*head, *lines, self._verdict()])

    def _verdict(self) -> str:
        if self.is_smoke:
            return "samples of a few kilobytes: the benchmark runs, the figures say nothing"
        found = ", ".join(f"{_threads('', number) or '1 thread'}: {ratio:.2f}" for number, ratio in self.ratios.items())
        verdict = "within" if max(self.ratios.values()) <= BUDGET else "OVER"
        return f"stream / raw read, {found}; {verdict} the budget of {BUDGET}"

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self) | {"ratios": self.ratios, "budget": BUDGET}, indent=1) + "\n")


def write_samples(folder: Path, num_samples: int, text_tokens: int, *, small: bool) -> None:
    """Write a data set of random samples that hold so many text tokens each; `small` ones take a few kilobytes."""
    shape, width = (_SMALL_LATENT_SHAPE, _SMALL_EMBED_DIM) if small else (_LATENT_SHAPE, _EMBED_DIM)
    latents, embeds = torch.randn(shape).bfloat16(), torch.randn(text_tokens, width).bfloat16()
    with ShardWriter(folder, latent_shape=shape, bucket="bench", samples_per_shard=_SAMPLES_PER_SHARD) as writer:
        for number in range(num_samples):
            writer.add(f"sample{number:06d}", embeds, "a caption", latents=latents)
    write_negative_prompt(folder, embeds[:1])
    consolidate(folder)


def run(
    folder: Path, *, num_samples: int, rounds: int, threads: int, workers: int, text_tokens: int, small: bool
) -> Report:
    """Read all samples of `folder`, which are written unless a data set is there, in every way in turn.

    Args:
        folder: of the shards.
        num_samples: to write, of `text_tokens` tokens, which the stream pads to 512 where they are fewer.
        rounds: measured ones; one before them warms the page cache, and makes the buffers.
        threads: of the stream.
        workers: worker processes of a further way, webdataset in a DataLoader; 0 leaves it out.
        small: write samples of a few kilobytes, to try the benchmark itself.
    """
    if not (folder / INDEX_NAME).exists():
        write_samples(folder, num_samples, text_tokens, small=small)
    index = ShardIndex.open(folder)
    with ExitStack() as stack:
        ways: dict[str, Callable[[], None]] = {}
        for number in sorted({1, threads}):
            raw = stack.enter_context(_raw(index, number, num_buffers=1 if number == 1 else _NUM_BUFFERS))
            stream = stack.enter_context(_opened(index, number, check_crc=False))
            ways |= {_threads(_RAW, number): raw, _threads(_OURS, number): _stream(stream, index.num_samples)}
        checked = stack.enter_context(_opened(index, threads, check_crc=True))
        ways[_threads(_OURS, threads) + ", crc"] = _stream(checked, index.num_samples)
        ways["webdataset"] = lambda: _drain(_webdataset(index))
        if workers:
            loader = DataLoader(_webdataset(index), batch_size=None, num_workers=workers)
            ways[f"webdataset, {workers} workers"] = lambda: _drain(loader)
        for way in ways.values():
            _measure(way)
        found: dict[str, list[tuple[float, float]]] = {path: [] for path in ways}
        for number in range(rounds):
            for path in list(ways)[:: 1 if number % 2 == 0 else -1]:
                found[path].append(_measure(ways[path]))
    return Report(
        num_samples=index.num_samples,
        bytes_per_sample=int(index.size.mean()),
        rounds=rounds,
        threads=threads,
        costs=[_cost(path, times, index.num_samples) for path, times in found.items()],
        is_smoke=small,
    )


def _threads(path: str, number: int) -> str:
    """A way of reading, named with its threads where it has several."""
    return path if number == 1 else f"{path}, {number} threads".removeprefix(", ")


@contextmanager
def _raw(index: ShardIndex, num_threads: int, num_buffers: int) -> Iterator[Callable[[], None]]:
    """One read for each sample into buffers that are used again, in the order of the shards.

    One buffer stays in the cache of the processor; as many as the stream has do not.
    """
    files = [index.open_shard(shard) for shard in range(len(index.paths))]
    buffers = [np.empty(int(index.size.max()), dtype=np.uint8).data for _ in range(num_buffers)]
    places = list(zip(index.shard.tolist(), index.offset.tolist(), index.size.tolist(), strict=True))

    def read_each(first: int) -> None:
        for number in range(first, len(places), num_threads):
            shard, offset, size = places[number]
            buffer = buffers[number % num_buffers][:size]
            if (num_bytes := os.preadv(files[shard], [buffer], offset)) != size:
                raise OSError(f"{index.paths[shard]}: {num_bytes} of {size} bytes read at {offset}")

    def read() -> None:
        list(threads.map(read_each, range(num_threads)))

    with ThreadPoolExecutor(num_threads) as threads:
        try:
            yield read
        finally:
            for file in files:
                os.close(file)


def _opened(index: ShardIndex, threads: int, *, check_crc: bool) -> Stream:
    return Stream(
        index,
        seed=0,
        micro_batch_size=1,
        lanes=4,
        window=64,
        text_tokens=_TEXT_TOKENS,
        num_threads=threads,
        check_crc=check_crc,
    )


def _stream(stream: Stream, num_samples: int) -> Callable[[], None]:
    def read() -> None:
        for _ in range(num_samples):
            stream.next()

    return read


def _webdataset(index: ShardIndex) -> IterableDataset[dict[str, Tensor]]:
    """Plain webdataset, which decodes with safetensors' own loader."""
    dataset = WebDataset([str(path) for path in index.paths], shardshuffle=False)
    return dataset.map(_decoded)  # pyright: ignore[reportReturnType]


def _decoded(sample: dict[str, bytes]) -> dict[str, Tensor]:
    return load_safetensors(sample[TENSORS_SUFFIX])


def _drain(samples: Iterable[dict[str, Tensor]]) -> None:
    for _ in samples:
        pass


def _measure(way: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall-clock seconds of a round; the CPU time counts until nothing more is read ahead."""
    cpu_s, began = _cpu_s(), time.perf_counter()
    way()
    wall_s = time.perf_counter() - began
    idle_since = float("-inf")
    while time.process_time() - idle_since > _IDLE_S:
        idle_since = time.process_time()
        time.sleep(_POLL_S)
    return _cpu_s() - cpu_s, wall_s


def _cpu_s() -> float:
    """CPU time of this process's threads and of the processes that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _cost(path: str, times: list[tuple[float, float]], num_samples: int) -> Cost:
    cpu_ms, wall_ms = ([1000 * seconds / num_samples for seconds in column] for column in zip(*times, strict=True))
    return Cost(path, min(cpu_ms), statistics.median(cpu_ms), min(wall_ms))
