"""Shared set-up of all tests."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py

# Models of the tests are so small that a second thread only waits. Tests of threading set their own number.
torch.set_num_threads(1)
