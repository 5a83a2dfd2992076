"""One thread, no network, a cache of its own, and tests/families.py importable by its name."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and their processes inherit it
    os.environ["LLM2COMP_CACHE"] = tempfile.mkdtemp(prefix="llm2comp-cache-")
    atexit.register(shutil.rmtree, os.environ["LLM2COMP_CACHE"], ignore_errors=True)

import torch

torch.set_num_threads(1)


def pytest_configure(config):
    # transformers 5.23 renames it; the old name is what 5.2, our lower bound, knows
    config.addinivalue_line("filterwarnings", "ignore:.*gradient_checkpointing.*:FutureWarning")
