"""One run: its folder, records, metrics, views, checkpoints and the loop that drives them."""
