"""One thread, no network, and tests/families.py importable by its name."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)


def pytest_configure(config):
    # transformers 5.23 renames it; the old name is what 5.2, our lower bound, knows
    config.addinivalue_line("filterwarnings", "ignore:.*gradient_checkpointing.*:FutureWarning")
