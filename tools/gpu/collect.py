"""Pack what a study made into a few small files: `python tools/gpu/collect.py STUDY OUT NAME`.

Tables, logs and recipes always; with `--weights` also each stage's adapter (in bfloat16) and
memory. Checkpoints and exported folders stay behind. OUT/NAME.tar.xz, cut into pieces of 15 MiB
where it is larger: NAME.tar.xz.00, .01 and so on; `cat NAME.tar.xz.* | tar xJ` puts them together.
"""

from __future__ import annotations

import argparse
import glob
import io
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save

ADAPTER = "adapter_model.safetensors"
PIECE = 15 * 2**20


def packed(study: Path, weights: bool) -> bytes:
    """The archive's bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz", preset=1) as archive:
        for file in sorted(path for path in study.rglob("*") if path.is_file()):
            name = file.relative_to(study)
            if any(part == "model" or part.startswith("checkpoint-") for part in name.parts[:-1]):
                continue
            if file.name == ADAPTER and weights:
                data = save(
                    {key: value.to(torch.bfloat16) for key, value in load_file(file).items()},
                    {"format": "pt"},
                )
                entry = tarfile.TarInfo(str(name))
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
            elif file.suffix != ".safetensors" or weights:
                archive.add(file, str(name))
    return out.getvalue()


def main() -> None:
    """Parse the arguments and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--weights", action="store_true")
    args = parser.parse_args()
    data = packed(args.study, args.weights)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob(f"{glob.escape(args.name)}.tar.xz*"):  # there may be fewer pieces now
        old.unlink()
    if len(data) <= PIECE:
        (args.out / f"{args.name}.tar.xz").write_bytes(data)
        return
    for number, start in enumerate(range(0, len(data), PIECE)):
        (args.out / f"{args.name}.tar.xz.{number:02d}").write_bytes(data[start : start + PIECE])


if __name__ == "__main__":
    main()
