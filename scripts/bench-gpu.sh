#!/usr/bin/env bash
# On a GPU: the tests that look at the card, then every benchmark for one; results lie in bench/results.
#   scripts/bench-gpu.sh [PART...]   of check kernels ema publish step-7b step-0.5b; all of them without PART
# A part that fails or takes too long does not stop the others; the last lines name it, and the exit code is 1.
# Python is $PYTHON or python3, with torch, triton and what pyproject.toml asks for. A machine without a package index:
# make build/gpu-site where there is one (`make gpu-site`), and bring it along. A copy of the repository without its
# history says which commit it is in ADVGAME_COMMIT.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/build/gpu-site
"$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
  { echo "bench-gpu: $python has no torch that sees a GPU; set PYTHON to one that does" >&2; exit 2; }

parts="check kernels ema publish step-7b step-0.5b"
for one in "$@"; do
  [[ " $parts " == *" $one "* ]] || { echo "bench-gpu: no part $one; there are: $parts" >&2; exit 2; }
done
trap 'exit 130' INT TERM

failed=()
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  [[ ${#wanted[@]} -gt 0 && " ${wanted[*]} " != *" $name "* ]] && return
  echo "== $name: $*"
  timeout --foreground --kill-after=10 "$limit" "$@" || failed+=("$name (exit code $?)")
  echo "== $name: $((SECONDS - began)) s"
}
wanted=("$@")

# the host side of publishing; kernels for a GPU need no compiler
"$python" setup.py -q build_ext --inplace || echo "bench-gpu: the C++ extensions were not built"
part check 200 "$python" -m pytest tests/kernels tests/publish tests/run/test_energy.py tests/learn/test_streams.py \
  -m "gpu or not slow" -n 8 -p no:cacheprovider
part kernels 150 "$python" -m bench kernels --device cuda --out bench/results
part ema 40 "$python" -m bench ema --device cuda --out
part publish 60 "$python" -m bench publish --device cuda --out
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
part step-7b 90 "$python" -m bench step --device cuda --size 7b --rounds 2 --out
part step-0.5b 60 "$python" -m bench step --device cuda --size 0.5b --rounds 2 --ways published ours --out
for one in ${failed[@]+"${failed[@]}"}; do echo "bench-gpu: failed: $one" >&2; done
[[ ${#failed[@]} -eq 0 ]]
