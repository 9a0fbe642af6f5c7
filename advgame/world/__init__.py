"""The tiny world: a closed language in which every attack and every answer can be enumerated."""
