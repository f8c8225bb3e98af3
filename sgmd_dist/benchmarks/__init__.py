"""Measurements behind launch/bench.py; each states what it was measured with."""
