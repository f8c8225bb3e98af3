"""Model families: one file each, found by its name (`model.family` in a recipe)."""
