"""The fused Triton kernels: in Triton's interpreter, through its compiler without a GPU, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fused_cases import CASES, DTYPES, TOLERANCE, Case, errors

from sgmd_kernels import adaln, dispatch, qk_rope, residual, sgmd_loss

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not dispatch.triton_installed(), reason="triton is not installed")
WIDTHS = {"1.3B": 1536, "5B": 3072, "14B": 5120}
FLOAT32_ARGUMENTS = {"scale", "shift", "gate", "dscale", "dshift", "dgate", "cos", "sin", "partial", "cotangent",
                     "normalizer", "sigma", "fisher", "nr"}  # fmt: skip
HALF_ARGUMENTS = {"x", "y", "grad", "dx", "dy", "out", "weight", "x0_fake", "x0_teacher", "x_g"}
FLOATS = {"eps", "fisher_weight", "nr_weight"}


@needs_triton
def test_the_kernels_in_the_interpreter():
    """The variable must be set before triton is imported, and would change what other tests see."""
    whole_network = HERE.parent / "models" / "test_wan_fused.py::test_a_fused_network_gives_diffusers_numbers"
    tests = [str(HERE / "interpreted_kernels.py"), str(whole_network)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def argument_type(name: str) -> str:
    if name in FLOATS:
        return "fp32"
    if name in FLOAT32_ARGUMENTS:
        return "*fp32"
    return "*bf16" if name in HALF_ARGUMENTS else "i32"


@needs_triton
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(
    "module, direction",
    [(module, direction) for module in (adaln, residual, qk_rope) for direction in ("forward", "backward")]
    + [(sgmd_loss, "forward")],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else value,
)
def test_a_kernel_compiles_for_hopper(module: Any, direction: str, width: int):
    """What the interpreter accepts and the compiler refuses would be seen on a GPU only."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    kernel = getattr(module._kernels(), direction)
    block = dispatch.block_size(width)
    flags = {"BLOCK": block, "HALF_HEAD": 64, "MODULATION_GRADS": True, "GATE_GRAD": True, "WEIGHT_GRAD": True}
    constants = {name: value for name, value in flags.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else argument_type(name) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    done = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": dispatch.num_warps(block)})
    assert done.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_on_the_gpu_gives_the_numbers_of_float64(case: Case, dtype: torch.dtype):
    assert dispatch.runs_triton(*(tensor.cuda() for tensor in case.inputs(dtype)))
    found = errors(case, dtype, "cuda")
    assert max(found.values()) <= TOLERANCE[dtype], found
