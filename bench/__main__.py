"""Runs a benchmark by name: `python -m bench kernels --device cpu`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def names() -> list[str]:
    """Modules of this folder with a `main(arguments)`, found without importing what others need."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return [f.stem for f in files if "\ndef main(arguments" in f.read_text(encoding="utf-8")]


def main() -> int:
    """Dispatch to bench.<name>.main with the remaining arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        print(f"usage: python -m bench {{{','.join(names())}}} [options]", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
