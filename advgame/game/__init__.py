"""The pure game: seeds, trees, prompts, parsing, judging, rewards and pairs. Imports no torch."""
