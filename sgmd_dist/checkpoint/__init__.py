"""Checkpoints: torch DCP folders that appear whole or not at all, and load at any world size.

    checkpoints/step-00001000/    .metadata  __*.distcp  meta.json  recipe.yaml

A save writes into `step-00001000.tmp`; the rename that commits it comes last, and older checkpoints and what killed
saves left are pruned only after it. Tensors are DTensors or replicated, never one rank's own; there is no
random-number state.
"""

from sgmd_dist.checkpoint.agreement import together
from sgmd_dist.checkpoint.folder import (
    FOLDER,
    RECIPE_FILE,
    ROLLBACKS_FILE,
    DamagedCheckpoint,
    Meta,
    committed,
    find,
    present,
    read_meta,
    set_damaged_aside,
)
from sgmd_dist.checkpoint.inspection import Inspection, inspect
from sgmd_dist.checkpoint.loading import Loaded, load, load_newest, load_tree
from sgmd_dist.checkpoint.saving import Saver, save
from sgmd_dist.checkpoint.state import Tree, checksums, training_state

__all__ = [
    "FOLDER",
    "RECIPE_FILE",
    "ROLLBACKS_FILE",
    "DamagedCheckpoint",
    "Inspection",
    "Loaded",
    "Meta",
    "Saver",
    "Tree",
    "checksums",
    "committed",
    "find",
    "inspect",
    "load",
    "load_newest",
    "load_tree",
    "present",
    "read_meta",
    "save",
    "set_damaged_aside",
    "together",
    "training_state",
]
