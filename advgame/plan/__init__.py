"""What a cluster would do with a config: memory, time and energy, each number traceable to an assumption."""
