"""Keep the libraries' bars and advice off the screen."""

from __future__ import annotations

import logging
import warnings

import datasets
import transformers


def quiet_libraries() -> None:
    """Keep the libraries' bars and advice off the screen; their errors still come through."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
