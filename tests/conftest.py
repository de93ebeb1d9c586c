"""Shared set-up of all tests."""

import os
import sys
from pathlib import Path

import torch

# Before anything imports triton: without a GPU its kernels run on the CPU, in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py

# Models of the tests are so small that a second thread only waits. Tests of threading set their own number.
torch.set_num_threads(1)
