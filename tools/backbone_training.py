"""Parts of the training of the embedded backbone: optimizers, rates, rows of tokens,
checkpoints.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from backbone_store import write_json

Optimizers = dict[str, torch.optim.Optimizer]


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon with its `match_rms_adamw` rates and Nesterov momentum, all matrices of one
    shape at a time.

    A step is some fifty kernels in place of thousands, which a small model on a GPU would wait for.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not used."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                buffers = [self._buffer(p) for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                update_NRC = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
                update_NRC = orthogonalise(
                    update_NRC, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(
                    parameters, list(update_NRC.to(parameters[0].dtype).unbind()), alpha=-rate
                )

    def _buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]  # type: ignore[no-any-return]


def orthogonalise(
    update_NRC: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz iteration in bfloat16 towards the nearest semi-orthogonal matrix of each of the
    N (Jordan 2024).
    """
    a, b, c = coefficients
    tall = update_NRC.shape[1] > update_NRC.shape[2]
    x = (update_NRC.mT if tall else update_NRC).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model: torch.nn.Module, rate: float, device: torch.device) -> Optimizers:
    """Muon for the matrices, AdamW for embeddings and norms, at one rate."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    fused = True if device.type == "cuda" else None
    return {
        "muon": BatchedMuon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    }


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 2 % of the budget, then linear decay to 2 % of the peak."""
    return peak * min(progress / 0.02, 1.0) * (0.02 + 0.98 * (1 - progress))


def forward_flops_per_token(config: Any, context: int) -> int:
    """FLOPs of the forward pass for one token of a row: 2·N_matmul + 4·layers·hidden·context.

    N_matmul counts the weights of the layers' matrices and the output matrix (tied, but used as a
    matrix there only); the second term is queries × keys and weights × values over the whole row,
    as is the custom, though half is masked.
    """
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    matmul = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return int(2 * matmul + 4 * config.num_hidden_layers * config.hidden_size * context)


def measured_peak(device: torch.device, size: int = 1024, seconds: float = 0.5) -> float:
    """TFLOP/s of bfloat16 products of two square matrices on this machine."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    a @ b
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        a @ b
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - begin) / 1e12


class Rows:
    """The token stream as rows of one context length, each starting with BOS, in an order that
    (seed, epoch) fixes.
    """

    def __init__(self, tokens_N: npt.NDArray[np.uint16], bos: int, context: int, seed: int) -> None:
        count = len(tokens_N) // (context - 1)
        if count == 0:
            raise SystemExit(
                f"the data holds {len(tokens_N)} tokens, less than one row of {context}: "
                "make more data"
            )
        self.body_RT = tokens_N[: count * (context - 1)].reshape(count, context - 1)
        self.bos, self.seed, self.epoch, self.order = bos, seed, -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.body_RT)

    def batch(self, position: int, count: int) -> torch.Tensor:
        """ids_BT of `count` rows, the first being the `position`-th since training began (epochs
        counted through).
        """
        parts = []
        while count > 0:
            epoch, at = divmod(position, len(self))
            if epoch != self.epoch:
                self.epoch, self.order = (
                    epoch,
                    np.random.default_rng((self.seed, epoch)).permutation(len(self)),
                )
            parts.append(self.order[at : at + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        body_BT = self.body_RT[np.concatenate(parts)].astype(np.int64)
        return torch.from_numpy(np.insert(body_BT, 0, self.bos, axis=1))


def prefetched(
    rows: Rows, position: int, count: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Endless batches from `position` on, each read and pinned by a thread while the one before is
    trained on.
    """

    def read(position: int) -> torch.Tensor:
        ids_BT = rows.batch(position, count)
        return ids_BT.pin_memory() if device.type == "cuda" else ids_BT

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(read, position)
        while True:
            ready = waiting.result()
            position += count
            waiting = pool.submit(read, position)
            yield ready.to(device, non_blocking=True)


@dataclass
class State:
    """How far training has come; with the weights and optimizer states, all that going on needs."""

    step: int = 0
    rows: int = 0  # position in the data
    tokens: int = 0
    cpu_minutes: float = 0.0
    minutes: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)


def save_checkpoint(
    folder: Path,
    state: State,
    settings: dict[str, Any],
    model: torch.nn.Module,
    optimizers: Optimizers,
) -> None:
    """Write weights and optimizer states, then the JSON that names them: what stood there counts
    until then.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for kind, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}.{index}.{key}": value for key, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"state-{state.step:08d}.safetensors"
    part = file.with_name(f".{file.name}.part")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, part)
    part.replace(file)
    write_json(
        folder / "checkpoint.json",
        {"tensors": file.name, "settings": settings, "state": asdict(state)},
    )
    for other in (*folder.glob("state-*.safetensors"), *folder.glob(".state-*.part")):
        if other != file:
            other.unlink()


def load_checkpoint(
    folder: Path, settings: dict[str, Any], model: torch.nn.Module, optimizers: Optimizers
) -> State:
    """Put the last checkpoint's tensors into model and optimizers.

    Returns its state; a fresh one if there is none.

    Raises:
        SystemExit: the checkpoint was made with other data, another model or another schedule.
    """
    file = folder / "checkpoint.json"
    if not file.is_file():
        return State()
    saved = json.loads(file.read_text(encoding="utf-8"))
    if wrong := [
        f"{k} was {saved['settings'].get(k)}, now {v}"
        for k, v in settings.items()
        if saved["settings"].get(k) != v
    ]:
        raise SystemExit(
            f"{folder}: of another training ({'; '.join(wrong)}); name another "
            "--checkpoint or delete it"
        )
    tensors = load_file(folder / saved["tensors"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for kind, optimizer in optimizers.items():
        states: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            if name.startswith(f"{kind}."):
                _, index, key = name.split(".")
                states[int(index)][key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(states)})
    return State(
        **{**saved["state"], "curve": [(step, loss) for step, loss in saved["state"]["curve"]]}
    )


class StopSignals:
    """Within `with`: the first SIGTERM or SIGINT is kept in `caught` (0 until then); a second one
    has its usual effect.
    """

    def __init__(self) -> None:
        self.caught = 0

    def __enter__(self) -> StopSignals:
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.caught = number
        signal.signal(number, signal.SIG_DFL)
