"""Numbers by row on disk: which rows a run has, which are done. Memory does not grow with the number of rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator


class RowIndex:
    """A mapping of 63-bit row digests to 63-bit numbers, in a temporary file that vanishes with the object.

    SQLite keeps small ones in memory and writes what is beyond its cache (2 MB) to the system's temporary folder.
    """

    def __init__(self) -> None:
        # the empty name is SQLite's own for a file that nobody else sees; nothing in it has to survive a crash
        self._table = sqlite3.connect("", isolation_level=None)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA cache_size = -2000")
        self._table.execute("CREATE TABLE rows (key INTEGER PRIMARY KEY, value INTEGER)")
        self._table.execute("BEGIN")

    def __del__(self) -> None:
        self._table.close()

    def __setitem__(self, key: int, value: int) -> None:
        self._table.execute("INSERT OR REPLACE INTO rows VALUES (?, ?)", (key, value))

    def add(self, key: int) -> None:
        """As of a set."""
        self[key] = 0

    def __getitem__(self, key: int) -> int:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def get(self, key: int) -> int | None:
        found = self._table.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        return None if found is None else int(found[0])

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and self.get(key) is not None

    def __iter__(self) -> Iterator[int]:
        """The keys, in order. Nothing may be written meanwhile."""
        return (int(key) for (key,) in self._table.execute("SELECT key FROM rows ORDER BY key"))

    def __len__(self) -> int:
        return int(self._table.execute("SELECT COUNT(*) FROM rows").fetchone()[0])
