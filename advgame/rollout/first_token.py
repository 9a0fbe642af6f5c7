"""How long the first token of new weights takes: from the optimiser's last step to when this process sees it."""

from __future__ import annotations

import time


class FirstToken:
    """`seconds` of the newest measurement, 0 before the first. One request, the first after a publish, is watched.

    With requests that continue over a publish (`in_flight: keep`) their next tokens come earlier and are not seen here.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None
        self._claimed = False

    def published(self, since: float) -> None:
        """New weights serve; `since`: `time.perf_counter()` at the end of the step's learning."""
        self._since, self._claimed = since, False

    def claim(self) -> bool:
        """Whether the caller's request is the one to watch."""
        mine = self._since is not None and not self._claimed
        self._claimed |= mine
        return mine

    def sampled(self) -> None:
        """A token of the watched request is there; the first call counts."""
        if self._since is not None:
            self.seconds, self._since = time.perf_counter() - self._since, None

    def release(self) -> None:
        """The watched request is over; if it gave no token, the next one is watched."""
        self._claimed = False
