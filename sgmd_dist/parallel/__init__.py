"""Meshes, the order in which a network is made parallel, and sharded loading."""
