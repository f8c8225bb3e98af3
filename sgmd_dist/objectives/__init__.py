"""Objectives: one file each, found by its name (`objective.name` in a recipe)."""
