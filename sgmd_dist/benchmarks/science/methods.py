"""The methods that are compared, and the learning rates that each is tried at."""

from __future__ import annotations

from typing import Any

from sgmd_dist.benchmarks.science.training import Method

SGMD, SGMD_FAST_FAKE = "SGMD", "SGMD, fake lr x 5"
DMD2, DMD2_REUSE, DMD2_EQUAL = "DMD2 5:1", "DMD2 5:1 reuse", "DMD2 1:1"


def _sgmd(name: str, *, lr_ratio: float = 1.0, leaks: bool = False, **keys: Any) -> Method:
    return Method(name, {"name": "sgmd", "inner_sample": "reuse", **keys}, lr_ratio, leaks)


def _dmd2(name: str, **keys: Any) -> Method:
    return Method(name, {"name": "dmd2", "fake_updates": 5, **keys})


METHODS = {
    method.name: method
    for method in (
        _sgmd(SGMD),
        _sgmd("SGMD fresh", inner_sample="fresh"),
        _sgmd("SGMD without NR", nr_weight=0.0),
        _sgmd("SGMD, fake lr x 1/5", lr_ratio=0.2),
        _sgmd(SGMD_FAST_FAKE, lr_ratio=5.0),
        _sgmd("SGMD, fake lr x 5, late exits", lr_ratio=5.0, exit_weights=[1.0, 2.0, 3.0, 4.0]),
        _sgmd("SGMD, fake lr x 5, NR x 3", lr_ratio=5.0, nr_weight=0.3),
        _sgmd("SGMD, 2 fake updates", fake_updates=2),
        _sgmd("SGMD, 5 fake updates", fake_updates=5),
        _sgmd("SGMD with FSDP2's leak", leaks=True),
        _dmd2(DMD2),
        _dmd2(DMD2_REUSE, inner_sample="reuse"),
        _dmd2(DMD2_EQUAL, fake_updates=1),
        Method("SiD", {"name": "sid", "inner_sample": "reuse"}),
        Method("SIM", {"name": "sim", "inner_sample": "reuse"}),
    )
}

# Of the generator. A world's networks decide the scale: corrections that start at zero, or a trained transformer.
LEARNING_RATES = {
    "ring": (3e-4, 1e-3, 3e-3),
    "trajectories": (3e-4, 1e-3, 3e-3),
    "tiny_wan": (3e-5, 1e-4),
}
