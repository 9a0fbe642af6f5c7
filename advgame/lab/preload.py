"""What a server imports from which a lab's runs are forked: their code and commit are those of the lab's start."""

import advgame.cli
import advgame.entry
import advgame.run.commands  # noqa: F401
from advgame.run.environment import code_state

code_state()
