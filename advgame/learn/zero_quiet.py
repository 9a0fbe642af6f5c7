"""DeepSpeed prints to standard output, from compilers that it starts too; ours is for the run folder."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, nothing reaches standard output; afterwards DeepSpeed logs errors alone, to standard error."""
    sys.stdout.flush()
    # new names of collectives that DeepSpeed still calls by the old ones
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    kept = os.dup(1)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            logger.setLevel(logging.ERROR)
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
