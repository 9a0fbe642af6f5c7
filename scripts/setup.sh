#!/usr/bin/env bash
# Makes the local virtual environment: scripts/setup.sh VENV EXTRA (EXTRA: train or dev).
# torch comes first and stays pinned, because an open range would pull another build over it.
set -euo pipefail
venv=$1 extra=$2
torch=$(sed -n 's/^torch==//p' constraints.txt)
python=${PYTHON:-python3}

"$python" - <<'PY' || { echo "setup: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

have_torch() { "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null; }

install_torch() {
  if command -v nvidia-smi >/dev/null 2>&1; then
    pip install -q "torch==$torch"
    return
  fi
  # The CPU build: from the configured index if it has one, else from PyTorch's own, whose address uv knows.
  pip install -q "torch==$torch+cpu" 2>/dev/null && return
  pip install -q uv
  "$venv/bin/uv" pip install -q --python "$venv/bin/python" --torch-backend cpu "torch==$torch" && return
  pip install -q "torch==$torch"
}

have_torch || { echo "setup: installing torch $torch"; install_torch; }
echo "setup: installing advgame[$extra]"
pip install -q -c constraints.txt -e ".[$extra]"
