"""Red-teaming: what an Attacker, PAIR or TAP gets out of a target, within a budget and on the record."""
