"""Reads all that a reader has."""

from __future__ import annotations

from sgmd_dist.data.reader import Reader, UnitData


def read_all(reader: Reader) -> list[UnitData]:
    """The units until the last; the reader is closed then."""
    units = []
    with reader:
        while True:
            try:
                units.append(reader.next())
            except StopIteration:
                return units
