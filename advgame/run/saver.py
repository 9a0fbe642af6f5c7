"""Checkpoints written beside the run: the next step waits until they are copied, not until they are on the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from advgame.run.checkpoint import begin_checkpoint, finish_checkpoint, save_checkpoint
from advgame.run.folder import RunFolder
from advgame.run.train_state import TrainState, frozen


class Saver:
    """Writes a run's checkpoints, one at a time. beside: in a thread, from copies in host memory, as all ranks do.

    One that cannot be written is known at the next call of any method but `close`, which raises CheckpointError.
    """

    def __init__(self, folder: RunFolder, keep: int, *, beside: bool):
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "save") if beside else None
        self._writing: Future[Path] | None = None

    def save(self, state: TrainState) -> None:
        """Has `state` as it is now written; waits for the one before."""
        self.wait()
        if self._thread is None:
            save_checkpoint(self._folder, state, self._keep)
        else:
            begun = begin_checkpoint(self._folder, frozen(state), beside=True)
            self._writing = self._thread.submit(finish_checkpoint, self._folder, begun, self._keep)

    def check(self) -> None:
        """Raises what has become of the last one, if that is known."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last one is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """The last one is written, or has failed."""
        if self._thread is not None:
            with suppress(Exception):  # something else ends the run
                self.wait()
            self._thread.shutdown()
