"""One thread, no network, a cache of its own (the user's lends it the real LM), tests/families.py
importable by its name.
"""

import atexit
import contextlib
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and their processes inherit it
    os.environ["USERS_CACHE"] = os.environ.get("LLM2COMP_CACHE", "")
    os.environ["LLM2COMP_CACHE"] = tempfile.mkdtemp(prefix="llm2comp-cache-")
    atexit.register(shutil.rmtree, os.environ["LLM2COMP_CACHE"], ignore_errors=True)

import pytest
import torch

torch.set_num_threads(1)


# By `make test PYTEST_ADDOPTS=--durations=0`: more than 40 s each.
LONGEST = ("general_encoder", "study_workers", "run", "benchmarks", "gpu_parts", "store")
# Of the families of tests/families.py, those of `make test`: grouped heads, windows with capped
# scores, learned positions, a mixture of experts.
QUICK_FAMILIES = ("llama", "gemma2", "gpt2", "mixtral")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items):
    """What is proven family by family is thorough on all but four of them. And the files that take
    longest come first: no process is left with one at the end.
    """
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if given.get("family", "llama") not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.thorough)
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def pytest_collection_finish():
    """What is imported by now stays: the garbage collections after each training leave it out."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    # transformers 5.23 renames it; the old name is what 5.2, our lower bound, knows
    config.addinivalue_line("filterwarnings", "ignore:.*gradient_checkpointing.*:FutureWarning")


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@pytest.fixture(scope="session")
def smollm2():
    """The real `builtin:smollm2`, lent from the user's cache; without it the test is skipped."""
    from llm2comp.model.backbone.gguf import is_whole
    from llm2comp.model.backbone.smollm2 import NAME, SHA256, smollm2_place

    own = smollm2_place()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM2COMP_CACHE", os.environ["USERS_CACHE"])
        users = smollm2_place()
    if not is_whole(users, SHA256):
        pytest.skip("builtin:smollm2 is not in the user's cache: llm2comp fetch")
    own.parent.mkdir(parents=True, exist_ok=True)
    if not own.exists():
        # Links of the files, not of the folder: what a test makes anew must not take the user's
        # place.
        mine = own.with_name(f"{own.name}.{os.getpid()}")  # another worker may be at it, too
        shutil.copytree(users, mine, copy_function=_link)
        with contextlib.suppress(OSError):
            mine.rename(own)
    return NAME
