"""What ranks do in the tests of sequence parallelism: a small Wan, its output and all its gradients."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sgmd_dist.assemble import materialize
from sgmd_dist.models.wan import Wan
from sgmd_dist.parallel import sequence
from sgmd_dist.parallel.apply import parallelize
from sgmd_dist.parallel.load import fill
from sgmd_dist.parallel.mesh import Mesh, build_mesh, process_group
from sgmd_dist.layout import Layout
from sgmd_dist.recipe import ParallelSection

BATCH, HEAD_SIZE, TEXT_TOKENS, TEXT_DIM, CHANNELS = 2, 12, 5, 8, 4
# Latents (F, Y, X) with patches (1, 2, 2), by their number of tokens
LATENTS = {27: (3, 6, 6), 45: (5, 6, 6), 24: (2, 6, 8), 1: (1, 2, 2), 2: (2, 2, 2)}


@dataclass(frozen=True)
class Case:
    """A layout and a network; each of `dp_size` parts trains on BATCH samples of its own.

    `chained`: a frozen second network takes the first one's output with its tokens mixed, as the fake score does.
    """

    ring: int = 1
    ulysses: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    length: int = 27
    heads: int = 4
    per_token: bool = False
    checkpointing: bool = False
    compile: bool = False
    chained: bool = False
    attention: str = "auto"

    @property
    def dp_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp_size * self.ring * self.ulysses

    def model(self) -> Wan:
        config = {
            "patch_size": (1, 2, 2), "num_attention_heads": self.heads, "attention_head_dim": HEAD_SIZE,
            "in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 32,
            "num_layers": 2, "rope_max_seq_len": 16,
        }  # fmt: skip
        return Wan(config, None, [], self.per_token, torch.float32)

    def section(self) -> ParallelSection:
        return ParallelSection(
            dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, ring=self.ring, ulysses=self.ulysses,
            activation_checkpointing="block" if self.checkpointing else "none", compile=self.compile,
            attention=self.attention,
        )  # fmt: skip

    def layout(self) -> Layout:
        return Layout(self.world_size, self.dp_replicate, self.dp_shard, self.ring, self.ulysses, 1, 1)


@dataclass
class Outcome:
    """Of one rank: output and input gradient for each data-parallel part, full weight gradients."""

    output: Tensor
    input_gradient: Tensor
    weight_gradients: dict[str, Tensor]


def weight(number: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of a size at which every path of the network shows, output projection and biases included."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 10_000 * number)
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
    return noise * (0.4 if "proj_out" in name else 1) / torch.Size(shape[1:]).numel() ** 0.5


def data(case: Case, part: int) -> dict[str, Tensor]:
    """Inputs of one data-parallel part, and the weights of the loss over its output."""
    generator = torch.Generator().manual_seed(100 + part)
    shape = (BATCH, CHANNELS, *LATENTS[case.length])
    sigma = torch.rand((BATCH, case.length) if case.per_token else (BATCH,), generator=generator)
    return {
        "latents": torch.randn(shape, generator=generator),
        "sigma": sigma,
        "text": torch.randn(BATCH, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "target": torch.randn(shape, generator=generator),
    }


def forward(case: Case, networks: list[nn.Module], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output of the first network, and the loss."""
    output = velocity(networks[0], inputs["latents"], inputs)
    if not case.chained:
        return output, mixing_loss(output, inputs["target"])
    mixed = torch.fft.fftn(output, dim=(2, 3, 4), norm="ortho").real
    return output, mixing_loss(velocity(networks[1], mixed, inputs), inputs["target"])


def velocity(network: nn.Module, latents: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """With per-token timesteps each token has its own."""
    return network(
        hidden_states=latents, timestep=1000 * inputs["sigma"], encoder_hidden_states=inputs["text"], return_dict=False
    )[0]


def mixing_loss(output: Tensor, target: Tensor) -> Tensor:
    """A loss in which every token meets every other: through the output's spectrum over frames and space."""
    spectrum = torch.fft.fftn(output, dim=(2, 3, 4), norm="ortho")
    return ((output - target) ** 2).mean() + (spectrum.abs() ** 3).mean() + (output.mean((2, 3, 4)) ** 2).sum()


def plain(case: Case) -> list[Outcome]:
    """diffusers' networks as they are, in one process: an outcome for each part, weight gradients of their mean."""
    networks = [case.model().build() for _ in range(1 + case.chained)]
    for number, network in enumerate(networks):
        fill(dict(network.named_parameters()), partial(weight, number))
    outcomes = []
    for part in range(case.dp_size):
        inputs = data(case, part)
        inputs["latents"].requires_grad_()
        output, loss = forward(case, networks, inputs)
        (loss / case.dp_size).backward()
        outcomes.append(Outcome(output.detach(), inputs["latents"].grad * case.dp_size, {}))
    for outcome in outcomes:
        outcome.weight_gradients = {name: p.grad for name, p in networks[0].named_parameters()}
    return outcomes


def parallel(cases: list[Case]) -> list[Outcome]:
    """The same on ranks, one case after another."""
    with process_group() as device:
        outcomes = []
        for case in cases:
            mesh = build_mesh(case.layout(), device)
            networks = [parallel_network(case, mesh, number) for number in range(1 + case.chained)]
            inputs = data(case, mesh.dp_rank)
            inputs["latents"].requires_grad_()
            output, loss = forward(case, networks, inputs)
            loss.backward()
            gradients = {name: p.grad.full_tensor() for name, p in networks[0].named_parameters()}
            outcomes.append(Outcome(output.detach(), inputs["latents"].grad, gradients))
            del mesh, networks
            gc.collect()
        return outcomes


def parallel_in_graphs(cases: list[Case]) -> tuple[list[Outcome], int]:
    """`parallel` whose compiled blocks run their graphs, forward and backward, as they are; and how many there were."""
    compiled = nn.Module.compile
    nn.Module.compile = lambda self: compiled(self, backend="aot_eager")
    return parallel(cases), counters["stats"]["unique_graphs"]


def parallel_with_own_gradients(cases: list[Case]) -> list[Outcome]:
    """`parallel` with a gather whose backward keeps what this rank has for its own tokens, and sums nothing."""

    def own(x: Tensor, group: str) -> Tensor:
        return x[dist.get_rank()] * x.shape[0]

    sequence._reduce_scatter = own
    return parallel(cases)


def parallel_network(case: Case, mesh: Mesh, number: int = 0) -> nn.Module:
    """The case's network number `number`, parallel and with its weights; the second one is frozen."""
    model = case.model()
    with torch.device("meta"):
        module = model.build()
    parallelize(module, model, case.section(), mesh=mesh, compute_dtype=torch.float32)
    materialize(module, model, mesh.device)
    fill(dict(module.named_parameters()), partial(weight, number))
    return module.requires_grad_(number == 0)


@dataclass(frozen=True)
class Sent:
    """What this rank's blocks sent in one pass: calls, by the profiler's events, and bytes."""

    all_to_alls: int
    sends: int
    receives: int
    sent_bytes: int


def communication(case: Case) -> tuple[Sent, Sent]:
    """Of one forward and one backward pass."""
    with process_group() as device:
        mesh = build_mesh(case.layout(), device)
        network, inputs = parallel_network(case, mesh), data(case, mesh.dp_rank)
        forward(case, [network], inputs)[1].backward()  # FSDP sets up its own at the first pass
        (_, loss), sent_forward = watched(case, partial(forward, case, [network], inputs))
        _, sent_backward = watched(case, loss.backward)
        del mesh, network, loss
        gc.collect()
        return sent_forward, sent_backward


def watched(case: Case, run: Callable[[], Any]) -> tuple[Any, Sent]:
    hop_bytes, make = [], dist.P2POp

    def recorded(operation: Any, tensor: Tensor, **more: Any) -> dist.P2POp:
        hop_bytes.append(tensor.nbytes if operation is dist.isend else 0)
        return make(operation, tensor, **more)

    dist.P2POp = recorded
    with torch.profiler.profile(record_shapes=True) as profile:
        result = run()
    dist.P2POp = make
    counts = Counter(event.name for event in profile.events())
    exchanged = sum(
        math.prod(event.input_shapes[0]) * 4 * (case.ulysses - 1) // case.ulysses
        for event in profile.events()
        if event.name == "c10d::alltoall_base_"
    )
    calls = (counts[f"c10d::{name}"] for name in ("alltoall_base_", "send", "recv_"))
    return result, Sent(*calls, exchanged + sum(hop_bytes))
