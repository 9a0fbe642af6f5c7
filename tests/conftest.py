"""Shared settings of all tests: helpers beside the tests are importable, torch runs on one thread.

Without a GPU, Triton kernels run in Triton's interpreter; that is decided here, before any test imports them.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
