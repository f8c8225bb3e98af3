"""The stream on a GPU: the right bytes from pinned buffers, one batch ahead, and no buffer reused before its copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgmd_dist.data.buffers import BufferPool
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.data.stream import Stream
from sgmd_dist.data.transfer import Transfer

SHAPE, WIDTH, TEXT_TOKENS = (16, 5, 60, 104), 64, 32


@pytest.mark.gpu
@pytest.mark.parametrize("with_noise", [False, True])
def test_the_stream_delivers_the_same_batches_on_the_gpu_as_on_the_cpu(tmp_path: Path, with_noise: bool) -> None:
    with ShardWriter(tmp_path, latent_shape=SHAPE, bucket="b", samples_per_shard=5) as writer:
        for number in range(23):
            embeds = torch.randn(number % 7 + 1, WIDTH).bfloat16()
            noise = torch.randn(SHAPE).bfloat16() if with_noise else None
            writer.add(f"s{number:03d}", embeds, "caption", latents=torch.randn(SHAPE).bfloat16(), noise=noise)
    write_negative_prompt(tmp_path, torch.ones(2, WIDTH))
    index = consolidate(tmp_path)

    def stream(device: str) -> Stream:
        options = {"seed": 0, "micro_batch_size": 2, "lanes": 2, "window": 8, "text_tokens": TEXT_TOKENS}
        return Stream(index, num_threads=2, device=torch.device(device), **options)

    with stream("cuda") as on_gpu, stream("cpu") as on_cpu:
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(60):
            busy = busy @ busy / busy.norm()  # the copies run beside it
            found, expected = on_gpu.next(), on_cpu.next()
            assert found.keys == expected.keys and found.latents is not None and expected.latents is not None
            assert found.latents.is_cuda and found.prompt_embeds.is_cuda and found.negative_embeds.is_cuda
            assert torch.equal(found.latents.cpu(), expected.latents)
            assert torch.equal(found.prompt_embeds.cpu(), expected.prompt_embeds)
            assert torch.equal(found.valid.cpu(), expected.valid)
            assert (found.noise is not None) == with_noise
            if found.noise is not None and expected.noise is not None:
                assert found.noise.is_cuda and torch.equal(found.noise.cpu(), expected.noise)


@pytest.mark.gpu
def test_a_buffer_is_held_until_its_copy_is_done() -> None:
    pool, transfer = BufferPool(2, pinned=True), Transfer(torch.device("cuda"))
    source = torch.from_numpy(pool.take(1 << 26))
    assert source.is_pinned()
    source.fill_(7)
    address = source.data_ptr()
    torch.cuda.synchronize()
    flight = transfer.begin([source])
    del source
    assert pool.take(1 << 26).ctypes.data != address  # the transfer holds it
    (copy,) = flight.land()
    assert bool((copy == 7).all())
    torch.cuda.synchronize()
    transfer.release()
    held = [pool.take(1 << 26) for _ in range(2)]
    assert address in {buffer.ctypes.data for buffer in held}
