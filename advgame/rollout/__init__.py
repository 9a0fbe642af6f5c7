"""Engines that sample players and judges, behind one protocol."""
