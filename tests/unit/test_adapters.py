"""Adapters on a small network: names, first values, switching, merging, and blocks that run again or are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgmd_dist import adapters
from sgmd_dist.adapters import Lora, Switch, lora_from
from sgmd_dist.errors import UserError
from sgmd_dist.parallel.recompute import recompute_all_but_attention, recompute_block
from sgmd_dist.recipe import LoraSection

LORA = Lora(rank=2, alpha=6.0, targets=("to_q", "out"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.to_k(self.to_q(x).sin()).tanh())


def block(*names: str, seed: int = 0) -> Block:
    """A block with random adapters of these names."""
    torch.manual_seed(seed)
    made = Block()
    for name in names:
        adapters.inject(made, name, LORA)
    made.to_empty(device="cpu")
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def trainable(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


# Names and values


def test_an_adapter_goes_by_diffusers_names_and_the_base_by_its_own() -> None:
    names = dict(Block().named_parameters()).keys()
    made = block("one", "two")
    expected = {f"{layer}.lora_{matrix}.weight" for layer in LORA.targets for matrix in "AB"}
    for name in ("one", "two"):
        assert adapters.adapter_parameters(made, name).keys() == expected
    assert adapters.base_parameters(made).keys() == names
    assert adapters.adapter_parameters(made, "three") == {} == adapters.adapter_parameters(Block(), "one")
    assert len(list(made.parameters())) == len(names) + 2 * len(expected)


def test_nothing_takes_gradients_and_no_adapter_is_active_at_first() -> None:
    made = Block()
    adapters.inject(made, "one", LORA)
    adapters.inject(made, "two", LORA)
    assert trainable(made) == set() and Switch(made).active is None
    assert {p.device.type for p in adapters.adapter_parameters(made, "one").values()} == {"meta"}


def test_a_new_adapter_adds_nothing_and_follows_from_its_name_and_the_seed() -> None:
    assert not adapters.initial_value("one", "to_q.lora_B.weight", (5, 2), 0).any()
    name, shape = "to_q.lora_A.weight", (64, 300)
    first = adapters.initial_value("one", name, shape, 0)
    assert first.std().item() == pytest.approx((3 * 300) ** -0.5, rel=0.02), "that of peft's uniform default"
    assert torch.equal(first, adapters.initial_value("one", name, shape, 0))
    for other in (("two", name, shape, 0), ("one", "to_k.lora_A.weight", shape, 0), ("one", name, shape, 1)):
        assert not torch.equal(first, adapters.initial_value(*other))


def test_alpha_is_the_rank_by_default_and_targets_are_all() -> None:
    choices = ("to_q", "to_k", "ffn.net.2")
    assert lora_from(LoraSection(rank=8), choices, "key") == Lora(8, 8.0, choices)
    given = lora_from(LoraSection(rank=8, alpha=2, targets=["to_k"]), choices, "key")
    assert given == Lora(8, 2.0, ("to_k",)) and given.scale == 0.25


def test_an_unknown_target_is_named_with_those_that_there_are() -> None:
    message = r"key\.targets: 'to_w' is no layer of a block; allowed: to_q, ffn\.net\.2; did you mean 'to_q'\?"
    with pytest.raises(UserError, match=message):
        lora_from(LoraSection(targets=["to_w"]), ("to_q", "ffn.net.2"), "key")


# Switching


def test_a_switch_adds_the_named_adapter_and_nothing_without_one() -> None:
    made, x = block("one", "two"), torch.randn(3, 4)
    plain = Block()
    plain.load_state_dict(adapters.base_parameters(made))
    assert torch.equal(made(x), plain(x))
    for name in ("one", "two"):
        with Switch(made).using(name):
            found = made(x)
        plain.load_state_dict(
            adapters.merged(adapters.base_parameters(made), adapters.adapter_parameters(made, name), LORA.scale)
        )
        torch.testing.assert_close(found, plain(x))
    assert Switch(made).active is None


def test_a_switch_leaves_alone_what_takes_gradients() -> None:
    """peft's own `set_adapter` does not: a graph that another role's forward follows would lose its gradients."""
    made = block("one", "two")
    for parameter in adapters.adapter_parameters(made, "one").values():
        parameter.requires_grad_(True)
    before = trainable(made)
    switch = Switch(made)
    with switch.using("one"), switch.using("two"), switch.using(None):
        assert trainable(made) == before
    assert switch.active is None and trainable(made) == before
    made.to_q.set_adapter("two")  # pyright: ignore[reportCallIssue]
    assert trainable(made) != before


def test_a_switch_goes_back_after_an_error() -> None:
    switch = Switch(block("one", "two"))
    with switch.using("one"):
        with pytest.raises(ZeroDivisionError), switch.using("two"):
            raise ZeroDivisionError
        assert switch.active == "one"


def test_a_network_without_adapters_has_nothing_to_switch() -> None:
    made = Block()
    switch, forward = Switch(made), made.forward
    with switch.using(None):
        assert switch.active is None and switch.adapters == frozenset()
    assert adapters.pin(made)(forward) is forward


def test_merging_keeps_what_has_no_adapter_and_each_dtype() -> None:
    made = block("one").bfloat16()
    base, adapter = adapters.base_parameters(made), adapters.adapter_parameters(made, "one")
    found = adapters.merged(base, adapter, LORA.scale)
    assert found.keys() == base.keys() and {t.dtype for t in found.values()} == {torch.bfloat16}
    assert {name for name in base if not torch.equal(found[name], base[name])} == {"to_q.weight", "out.weight"}


# One graph through several adapters, with blocks that run again in the backward pass


def gradients(made: Block, prepare: Callable[[Block], object] = lambda made: None) -> dict[str, Tensor]:
    """Of a loss through "one", then "two", with a forward of the base between; the backward runs elsewhere."""
    for name in ("one", "two"):
        for parameter in adapters.adapter_parameters(made, name).values():
            parameter.requires_grad_(True)
    prepare(made)
    switch = Switch(made)
    torch.manual_seed(1)
    x = torch.randn(3, 4, requires_grad=True)
    with switch.using("one"):
        first = made(x)
    with switch.using(None), torch.no_grad():
        target = made(first)
    with switch.using("two"):
        loss = (made(first) - target).square().sum()
    with switch.using("one"):
        loss.backward()
    assert x.grad is not None
    found = {"x": x.grad}
    for name in ("one", "two"):
        for key, p in adapters.adapter_parameters(made, name).items():
            assert p.grad is not None
            found[f"{name}.{key}"] = p.grad
    assert all(p.grad is None for p in adapters.base_parameters(made).values())
    return found


@pytest.mark.parametrize("recompute", [recompute_block, recompute_all_but_attention])
def test_a_checkpointed_block_runs_again_with_the_adapter_of_its_first_run(recompute: Callable[[Block], None]) -> None:
    torch.testing.assert_close(gradients(block("one", "two"), recompute), gradients(block("one", "two")))


def test_without_the_pin_the_gradients_would_be_wrong_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(block("one", "two"))
    monkeypatch.setattr(adapters, "pin", lambda block: lambda forward: forward)
    found = gradients(block("one", "two"), recompute_block)
    assert any((found[name] - expected[name]).abs().max() > 0.1 * expected[name].abs().max() for name in expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_block_has_a_graph_for_each_adapter(checkpointed: bool) -> None:
    graphs = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    def prepare(made: Block) -> None:
        if checkpointed:
            recompute_block(made)
        made.compile(backend=backend)

    expected = gradients(block("one", "two"))
    torch.testing.assert_close(gradients(block("one", "two"), prepare), expected)
    assert len(graphs) == 3, "one, base, two"
