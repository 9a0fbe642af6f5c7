"""Engines on other nodes: placed, watched and replaced through Ray. Nothing here is imported by a local run."""
