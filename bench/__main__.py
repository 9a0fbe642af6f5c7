"""Runs a benchmark by name: `python -m bench kernels --device cpu`."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import bench


def names() -> list[str]:
    """Modules of this package that have a `main(arguments)`."""
    found = (m.name for m in pkgutil.iter_modules(bench.__path__) if not m.name.startswith("_"))
    return [n for n in found if hasattr(importlib.import_module(f"bench.{n}"), "main")]


def main() -> int:
    """Dispatch to bench.<name>.main with the remaining arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        print(f"usage: python -m bench {{{','.join(names())}}} [options]", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
