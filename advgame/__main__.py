"""`python -m advgame`, which is what `torchrun -m advgame` starts."""

import sys

from advgame.cli import main

sys.exit(main())
