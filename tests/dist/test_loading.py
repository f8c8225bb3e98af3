"""Pretrained weights go from the files straight into the shards: no rank holds more, and all of it arrives."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from ranks import run_ranks

from sgmd_dist.assemble import materialize
from sgmd_dist.checksum import sum_of_bits, wrap
from sgmd_dist.models.wan import Section, build
from sgmd_dist.parallel.apply import parallelize
from sgmd_dist.parallel.load import Loaded, load_safetensors
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.layout import Layout
from sgmd_dist.recipe import ParallelSection

SLACK_BYTES = 12 * 2**20  # Python's own objects, the list of the files' tensors


@pytest.fixture(scope="module")
def large_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """51 million float32 parameters in several files with an index."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, ffn_dim=4096, num_layers=8, text_dim=32, freq_dim=32
    )
    module.save_pretrained(folder, max_shard_size="60MB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


class Peak:
    """The largest private memory of this process while a block runs, in bytes, as a thread sees it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()

    @contextmanager
    def watch(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.0005):
            self.bytes = max(self.bytes, private_bytes())


def private_bytes() -> int:
    """Resident memory that belongs to no file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def load(folder: Path, dtype: torch.dtype) -> tuple[Loaded, int, int, int]:
    """What was loaded, this rank's bytes of parameters, the largest slice, and what memory peaked above the shards."""
    torch.zeros(1).sum()
    with process_group() as device:
        size = world_size()
        layout = Layout(size, dp_replicate=1, dp_shard=size, ring=1, ulysses=1, num_units=size, accumulation=1)
        model = build(Section(compute_dtype="float32"), str(folder), "model.pretrained")
        before, peak = private_bytes(), Peak()
        with peak.watch():
            with torch.device("meta"):
                module = torch.nn.Module.to(model.build(), dtype)
            mesh = build_mesh(layout, device)
            parallelize(module, model, ParallelSection(), mesh=mesh, compute_dtype=torch.float32)
            materialize(module, model, device)
            loaded = load_safetensors(dict(module.named_parameters()), model.weight_files())
        local = [parameter.to_local() for parameter in module.parameters()]
        own = sum(tensor.nbytes for tensor in local)
        largest = max(tensor.numel() for tensor in local) * 4
        del module, mesh
    return loaded, own, largest, peak.bytes - before - own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_the_shards_and_one_slice_of_memory(large_wan: Path, dtype: torch.dtype) -> None:
    for loaded, own, largest, above in run_ranks(2, load, large_wan, dtype):
        assert loaded.num_bytes > 200e6
        assert own == pytest.approx(loaded.num_bytes / 2 * dtype.itemsize / 4, rel=0.01)
        assert above <= largest + SLACK_BYTES, f"{above / 2**20:.1f} MiB above the shards of {own / 2**20:.1f} MiB"


def test_what_was_loaded_is_summed_alike_on_any_number_of_ranks_and_in_any_dtype(large_wan: Path) -> None:
    state = WanTransformer3DModel.from_pretrained(large_wan).state_dict()
    expected = Loaded(
        len(state), sum(t.nbytes for t in state.values()), wrap(sum(sum_of_bits(t) for t in state.values()))
    )
    assert run_ranks(1, load, large_wan, torch.float32)[0][0] == expected
    assert {rank[0] for rank in run_ranks(3, load, large_wan, torch.bfloat16)} == {expected}
