"""Weights from the learner to the engines: the copy plan, transports, vLLM's plugin, verification."""
