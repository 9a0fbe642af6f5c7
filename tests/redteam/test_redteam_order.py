"""The claim of docs/redteam.md, by the command that made its table: in the hard world, at equal cost and with exact
verdicts, the trained Attacker beats PAIR and TAP driven by the untrained one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_trained_attacker_beats_pair_and_tap_of_the_untrained_one(tmp_path):
    words = [sys.executable, ROOT / "scripts/redteam-table.py", ROOT / "configs/tiny-hard.yaml", "--out", tmp_path]
    words += ["--sampling-seeds", "3", "--only", "trained", "pair", "tap"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*map(str, words)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "table.json").read_text())
    assert {name: rate["n"] for name, rate in figures["rates"].items()} == {"trained": 24, "pair": 24, "tap": 24}
    assert figures["trained_minus"]["pair"]["value"] > 0
    assert figures["trained_minus"]["tap"]["value"] > 0
    spent = [json.loads(file.read_text())["cells"] for file in sorted(tmp_path.glob("sampling-*/transfer.json"))]
    assert len(spent) == 3
    assert all(cell["figures"]["queries"] <= 24 * 8 for cells in spent for cell in cells)
    assert "| trained minus tap | +" in done.stdout
