"""AdvGame: an Attacker and a Defender trained against each other online, judged in pairs."""

__version__ = "0.1.0"
