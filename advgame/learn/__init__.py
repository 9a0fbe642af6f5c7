"""Learning: packed batches, objectives over the kernel library, the learner of one player."""
