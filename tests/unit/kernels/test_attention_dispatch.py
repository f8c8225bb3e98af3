"""Which attention backend is taken, with stand-ins for devices and packages that are not here."""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sgmd_kernels import _attention_math, _attention_sdpa, _attention_table
from sgmd_kernels import attention as module
from sgmd_kernels.attention import (
    ORDER,
    Problem,
    attention,
    attention_backward,
    attention_forward,
    choose,
    unfit_everywhere,
)

FA2, FA3, FA4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface"
A100, L4, H100, B200, RTX5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def fresh_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    caches = (module._resolve, module._reason_missing)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Installs stand-ins for packages, and makes sure that the others are missing."""

    def do(*names: str, **functions) -> None:
        for name in (FA2, FA3, FA4):
            stand_in = ModuleType(name)
            vars(stand_in).update(functions)
            parents = [name.rsplit(".", n)[0] for n in range(name.count("."), 0, -1)] if name in names else []
            for parent in parents:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
            monkeypatch.setitem(sys.modules, name, stand_in if name in names else None)

    return do


def taken(capability, dtype, head_size, *, backend="auto", needs_backward=True, has_one_token=False) -> str:
    device = "cpu" if capability is None else "cuda"
    return module._resolve(backend, Problem(device, capability, dtype, head_size, needs_backward, has_one_token)).name


@pytest.mark.parametrize(
    "capability, installed, dtype, head_size, expected",
    [
        (None, (), F32, 128, "flash"),
        (None, (), F64, 7, "flash"),
        (None, (), torch.float8_e4m3fn, 8, "math"),
        (None, (FA2, FA3, FA4), BF16, 128, "flash"),
        (A100, (), BF16, 128, "cudnn"),
        (A100, (FA2, FA3, FA4), BF16, 128, "cudnn"),
        (A100, (FA2,), BF16, 192, "flash_attn_2"),
        (A100, (), BF16, 192, "flash"),
        (A100, (), F16, 512, "efficient"),
        (A100, (), F32, 128, "efficient"),
        (A100, (), F32, 6, "math"),
        (A100, (), F64, 128, "math"),
        (A100, (), BF16, 12, "math"),
        (L4, (), BF16, 256, "efficient"),
        (H100, (), BF16, 128, "cudnn"),
        (H100, (FA2,), BF16, 128, "cudnn"),
        (H100, (FA4,), BF16, 128, "flash_attn_4"),
        (H100, (FA2, FA3, FA4), BF16, 128, "flash_attn_3"),
        (H100, (FA3, FA4), BF16, 256, "flash_attn_3"),
        (H100, (FA3, FA4), F32, 128, "efficient"),
        (B200, (FA2, FA3, FA4), F16, 64, "flash_attn_4"),
        (B200, (FA3,), F16, 64, "cudnn"),
        (RTX5090, (FA3, FA4), BF16, 128, "cudnn"),
    ],
)
def test_auto_takes_the_first_that_fits(install, capability, installed, dtype, head_size, expected) -> None:
    install(*installed)
    assert taken(capability, dtype, head_size) == expected


def test_forwards_alone_may_take_what_has_no_backward(install) -> None:
    install()
    assert taken(L4, BF16, 256, needs_backward=False) == "flash"
    assert taken(L4, BF16, 256, needs_backward=True) == "efficient"


def test_cudnn_hands_on_sequences_of_one_token_even_when_forced(install) -> None:
    install()
    assert taken(A100, BF16, 64, backend="cudnn") == "cudnn"
    assert taken(A100, BF16, 64, backend="cudnn", has_one_token=True) == "flash"


def test_a_torch_without_cudnn_goes_on(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert taken(A100, BF16, 64) == "flash"


@pytest.mark.parametrize("name", ORDER)
def test_every_backend_can_be_forced_where_it_fits(install, name: str) -> None:
    install(FA2, FA3, FA4)
    assert taken(H100, BF16, 128, backend=name) == name


def test_an_impossible_force_says_what_is_installed_and_why_each_other_is_passed_over(install) -> None:
    install(FA2)
    with pytest.raises(ValueError, match="'flash_attn_3' cannot run") as raised:
        choose("flash_attn_3", torch.device("cpu"), F32, 64)
    message = str(raised.value)
    assert "cannot run on cpu, float32, head size 64, forward and backward: needs a CUDA device" in message
    assert "No package is missing for: cudnn, flash_attn_2, flash, efficient, math." in message
    assert "Would run: flash, math." in message
    for other in ("flash_attn_4", "cudnn", "flash_attn_2", "efficient"):
        assert f"{other}: needs a CUDA device" in message


def test_a_package_that_is_missing_or_broken_is_named(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    with pytest.raises(ValueError, match=r"flash_attn_interface cannot be imported \(ModuleNotFoundError"):
        taken(H100, BF16, 128, backend="flash_attn_3")
    module._reason_missing.cache_clear()

    def broken(name: str) -> None:
        raise OSError(f"{name}: undefined symbol\nmore")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=r"cannot be imported \(OSError: flash_attn_interface: undefined symbol\)"):
        taken(H100, BF16, 128, backend="flash_attn_3")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'flash3': no such backend; expected auto, flash_attn_3"):
        choose("flash3", torch.device("cpu"), F32, 8)


def test_the_choice_says_why_the_faster_ones_were_passed_over_and_is_logged_once(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="sgmd_kernels.attention"):
        first = choose("auto", torch.device("cpu"), F32, 8)
        choose("auto", torch.device("cpu"), F32, 8)
    assert first.name == "flash"
    assert list(first.passed_over) == ["flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2"]
    assert str(first).startswith("flash (passed over: flash_attn_3: needs a CUDA device;")
    kind = "cpu, float32, head size 8, forward and backward"
    assert [record.getMessage() for record in caplog.records] == [f"attention on {kind}: {first}"]


# The packages' calling conventions, on stand-ins that compute with `math`.


def fa2_module() -> dict:
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, causal, softcap, alibi_slopes) == (0.0, q.shape[-1] ** -0.5, False, 0.0, None)
        assert (window_size_left, window_size_right, return_softmax) == (-1, -1, False)
        return *_attention_math.forward(q, k, v), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, causal, softcap) == (0.0, q.shape[-1] ** -0.5, False, 0.0)
        assert (window_size_left, window_size_right, alibi_slopes, deterministic) == (-1, -1, None, False)
        fill((dq, dk, dv), _attention_math.backward(dout, q, k, v, out, softmax_lse))

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def fa3_module() -> dict:
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        assert (softmax_scale, causal, v_descale) == (q.shape[-1] ** -0.5, False, None)
        return *_attention_math.forward(q, k, v), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert (softmax_scale, is_causal, deterministic) == (q.shape[-1] ** -0.5, False, False)
        fill((dq, dk, dv), _attention_math.backward(dout, q, k, v, out, softmax_lse))

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def fa4_module() -> dict:
    def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, *, softmax_scale=None, causal=False, return_lse=False):
        assert (softmax_scale, return_lse) == (q.shape[-1] ** -0.5, True)
        return *_attention_math.forward(q, k, v), None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False):
        assert (softmax_scale, deterministic) == (q.shape[-1] ** -0.5, False)
        return _attention_math.backward(dout, q, k, v, out, lse)

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


def fill(places, values) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


@pytest.mark.parametrize(
    "name, module_name, functions",
    [("flash_attn_2", FA2, fa2_module), ("flash_attn_3", FA3, fa3_module), ("flash_attn_4", FA4, fa4_module)],
)
def test_packages_are_called_by_their_signatures(install, monkeypatch, name, module_name, functions) -> None:
    install(module_name, **functions())
    monkeypatch.setattr(module, "_resolve", lambda *_: SimpleNamespace(name=name))
    q, k, v, grad = (torch.randn(2, n, 3, 8, dtype=F64) for n in (5, 7, 7, 5))
    out, lse = attention_forward(q, k, v)
    expected_out, expected_lse = _attention_math.forward(q, k, v)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    found = attention_backward(grad, q, k, v, out, lse)
    for a, b in zip(found, _attention_math.backward(grad, q, k, v, out, lse), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_torchs_cuda_operators_take_these_arguments(name: str) -> None:
    """On the meta device: schemas and shapes without a GPU."""
    q, k, v, grad = (torch.empty(2, n, 3, 64, dtype=BF16, device="meta") for n in (33, 17, 17, 33))
    backend = _attention_table.BACKENDS[name]
    out, lse = backend.forward(q, k, v)
    assert out.shape == q.shape and (lse.shape, lse.dtype) == ((2, 3, 33), F32)
    assert [g.shape for g in backend.backward(grad, q, k, v, out, lse)] == [q.shape, k.shape, v.shape]


def test_the_memory_efficient_backward_gets_rows_of_infinite_lse_up_to_its_alignment(monkeypatch) -> None:
    seen = {}

    def backward(grad, q, k, v, bias, out, lse, *rest):
        seen["lse"] = lse
        return q, k, v, None

    fake = SimpleNamespace(_scaled_dot_product_efficient_attention_backward=backward)
    monkeypatch.setattr(_attention_sdpa, "_aten", fake)
    q = torch.zeros(1, 33, 2, 8)
    _attention_sdpa.efficient_backward(q, q, q, q, q, torch.zeros(1, 2, 33))
    assert seen["lse"].shape == (1, 2, 64)
    assert torch.isinf(seen["lse"][..., 33:]).all() and not seen["lse"][..., :33].any()


def test_the_table_in_the_docstring_names_every_backend() -> None:
    assert all(f"| `{name}`" in module.__doc__ for name in _attention_table.BACKENDS)


# The packages' own sources, where they are installed. They are read, not imported: that takes a GPU.

SIGNATURES = {
    "flash_attn/flash_attn_interface.py": {
        "_flash_attn_forward": (
            "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
            " return_softmax",
            "",
        ),
        "_flash_attn_backward": (
            "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right"
            " softcap alibi_slopes deterministic rng_state",
            "",
        ),
    },
    "flash_attn_interface.py": {
        "_flash_attn_forward": ("q k v", "softmax_scale causal"),
        "_flash_attn_backward": ("dout q k v out softmax_lse", "deterministic"),
    },
    "flash_attn/cute/interface.py": {
        "_flash_attn_fwd": ("q k v", "softmax_scale return_lse"),
        "_flash_attn_bwd": ("q k v out dout lse", "softmax_scale deterministic"),
    },
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_an_installed_package_has_the_signatures_that_are_called(path: str) -> None:
    """`positional` parameters come first and in this order, `named` ones are somewhere after them."""
    found = next((file for folder in sys.path if (file := Path(folder) / path).is_file()), None)
    if found is None:
        pytest.skip(f"{path} is not installed")
    functions = {node.name: node for node in ast.parse(found.read_text()).body if isinstance(node, ast.FunctionDef)}
    for name, (positional, named) in SIGNATURES[path].items():
        parameters = [argument.arg for argument in functions[name].args.args]
        assert parameters[: len(positional.split())] == positional.split(), name
        assert set(named.split()) <= set(parameters[len(positional.split()) :]), name


@pytest.mark.parametrize(
    "name, dtype, head_size, reason",
    [
        ("cudnn", torch.float32, 64, "needs float16 or bfloat16"),
        ("flash_attn_3", torch.bfloat16, 20, "needs a head size that is a multiple of 8 up to 256"),
        ("efficient", torch.bfloat16, 12, "needs a head size that is a multiple of 8"),
        ("cudnn", torch.bfloat16, 128, None),
        ("flash_attn_4", torch.bfloat16, 128, None),
        ("flash", torch.float32, 20, None),
        ("math", torch.float64, 7, None),
    ],
)
def test_what_no_device_could_run_is_known_without_one(
    name: str, dtype: torch.dtype, head_size: int, reason: str | None
) -> None:
    assert unfit_everywhere(name, dtype, head_size) == reason


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0)])
def test_empty_sequences_are_refused(queries: int, keys: int) -> None:
    q, k = torch.zeros(1, queries, 2, 8), torch.zeros(1, keys, 2, 8)
    with pytest.raises(ValueError, match="expected at least one of each"):
        attention(q, k, k)


def test_integers_are_refused() -> None:
    x = torch.zeros(1, 3, 2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a float dtype"):
        attention(x, x, x)
