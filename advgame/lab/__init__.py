"""The laboratory: every variant of the game in the tiny world, over seeds, with the exact worst case known."""
