"""The command line.

Arguments are named as recipe fields; heavy imports wait until a command needs them.
"""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

from llm2comp.cli import adapting, making, measuring, searching, serving, using, verifying
from llm2comp.cli.options import JUDGE, MAKE, USE, app
from llm2comp.errors import Llm2CompError, missing_extra

__all__ = [
    "adapting",
    "app",
    "main",
    "making",
    "measuring",
    "searching",
    "serving",
    "using",
    "verifying",
]
STOPPED = 130
app.registered_commands.sort(
    key=lambda command: (MAKE, USE, JUDGE).index(command.rich_help_panel or JUDGE)
)
OUT_OF_MEMORY = (
    "lower batch_size, or set gradient_checkpointing: true or (stages 2 and 3) "
    "mini_batch_size: 16; "
    "`--dry-run` estimates what a recipe needs, --max-tokens-per-batch limits embed and evaluate"
)


def main() -> None:
    """Entry point: an error of ours or of the disk is one message and exit code 1, no traceback."""
    # peft imports it where it is installed, used or not
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    try:
        app(prog_name="llm2comp")
    except Llm2CompError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        _fail(str(missing))
    # one that nobody nearer has explained: a full disk, a folder that is not ours
    except OSError as error:
        _fail(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
    except RuntimeError as error:
        # torch's, without importing torch for --help
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(f"out of device memory: {OUT_OF_MEMORY}")
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != STOPPED:
            raise
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(STOPPED)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
