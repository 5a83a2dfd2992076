"""Pre-train the embedded backbone (`model: builtin:tiny`), a small Llama, on two CPU cores or on
one GPU.

    python tools/backbone_data.py --corpus DIR --out DATA python tools/train_tiny_backbone.py --data
    DATA --out src/llm2comp/assets/tiny --budget-cpu-minutes 90

1. read and check the data folder, unpacking its shards; build the model that the sizes and the
   tokenizer ask for
2. next-token prediction on rows of `--context` tokens that start with BOS, in an order that (seed,
   epoch) fixes; `--batch-tokens` a step, in as many parts as memory asks for; bfloat16 autocast,
   gradients clipped at norm 1; Muon on matrices, AdamW on the rest; warm-up over 2 % of the budget
   (tokens, CPU time or wall time), then linear decay to 2 %, so that the budget is kept whatever
   the machine's speed. Compiling counts as spent time
3. every `--checkpoint-minutes`, on SIGTERM, on SIGINT and at the end: a checkpoint. The same
   command goes on from it with the same batches; with a token budget the result is then that of a
   training never stopped
4. held-out perplexity per word by source; model (bfloat16 safetensors), tokenizer, model card
   written to `--out`

Lines tell the model FLOPs utilisation: tokens/s · FLOPs a token / peak, where a token costs
6·N_matmul + 12·layers·hidden·context (forward and twice that backward; N_matmul: all matrices'
weights, the output matrix included; the whole row of attention counted, no recomputation, no
optimizer). The peak is `--peak-tflops`, by default 989 on a GPU (H200, dense bfloat16) and the
measured rate of a matrix product on a CPU. It needs torch, numpy, transformers and safetensors
only.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from backbone_card import check_size, perplexity_per_word, write_model
from backbone_store import (
    MIB,
    Data,
    Parser,
    command,
    open_data,
    positive,
    positive_int,
    refuse_foreign,
)
from backbone_training import (
    Rows,
    StopSignals,
    forward_flops_per_token,
    learning_rate,
    load_checkpoint,
    make_optimizers,
    measured_peak,
    prefetched,
    save_checkpoint,
)

CURVE_STEPS = 20  # steps between two values of the loss curve
H200_TFLOPS = 989.0


class Training:
    """Model, optimizers and state, and the loop over them."""

    def __init__(
        self, args: argparse.Namespace, model: Any, data: Data, device: torch.device
    ) -> None:
        self.args, self.model, self.device, self.settings = (
            args,
            model,
            device,
            make_settings(args, model.config, data),
        )
        self.checkpoint = args.checkpoint or args.out.with_name(f"{args.out.name}.checkpoint")
        self.optimizers = make_optimizers(model, args.lr, device)
        self.rows = Rows(data.tokens_N, data.about["ids"]["bos"], args.context, args.seed)
        self.state = load_checkpoint(self.checkpoint, self.settings, model, self.optimizers)
        self.forward = torch.compile(model, dynamic=False) if args.compile else model
        rows = max(1, args.batch_tokens // args.context)
        self.part_rows = max(
            part for part in range(1, min(rows, rows_at_once(args, device)) + 1) if rows % part == 0
        )
        self.batch_rows = rows

    def progress(self) -> float:
        """Spent part of the budget, 0 to 1."""
        kind, amount = self.settings["budget"]
        return float(min(1.0, getattr(self.state, kind) / amount))

    def step(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """One update. Returns the mean loss of the batch, still on the device."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.progress(), self.args.lr)
        parts, total = ids_BT.split(self.part_rows), torch.zeros((), device=self.device)
        for part_BT in parts:
            # no use_cache=False: it would make a mask, and slow sdpa
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.forward(input_ids=part_BT, labels=part_BT).loss / len(parts)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return total

    def run(self) -> None:
        """Train until the budget is spent.

        Raises SystemExit after a signal, a checkpoint being written first.
        """
        state, lines = self.state, Lines(self)
        cpu, wall = (
            time.process_time() - 60 * state.cpu_minutes,
            time.monotonic() - 60 * state.minutes,
        )
        saved = time.monotonic()
        batches = prefetched(self.rows, state.rows, self.batch_rows, self.device)
        self.model.train()
        with StopSignals() as stop:
            while self.progress() < 1:
                ids_BT = next(batches)
                loss = self.step(ids_BT)
                state.step, state.rows, state.tokens = (
                    state.step + 1,
                    state.rows + len(ids_BT),
                    state.tokens + ids_BT.numel(),
                )
                if state.step % CURVE_STEPS == 1:
                    state.curve.append((state.step, round(loss.item(), 4)))
                state.cpu_minutes, state.minutes = (
                    (time.process_time() - cpu) / 60,
                    (time.monotonic() - wall) / 60,
                )
                lines.after_step(loss)
                if (
                    stop.caught
                    or self.progress() == 1
                    or time.monotonic() - saved > 60 * self.args.checkpoint_minutes
                ):
                    self.save(loss)
                    saved = time.monotonic()
                if stop.caught and self.progress() < 1:
                    print(
                        f"stopped by {signal.Signals(stop.caught).name} after step "
                        f"{state.step}; the same command goes on"
                    )
                    raise SystemExit(128 + stop.caught)

    def save(self, loss: torch.Tensor) -> None:
        """Write a checkpoint.

        Raises SystemExit, keeping the one before, if the loss is not a finite number.
        """
        if not math.isfinite(loss.item()):
            raise SystemExit(
                f"step {self.state.step}: the loss is {loss.item()}; train again with a "
                "smaller --lr"
            )
        save_checkpoint(self.checkpoint, self.state, self.settings, self.model, self.optimizers)

    def figures(self) -> dict[str, Any]:
        """What training.json and the model card tell of the training."""
        state = self.state
        return {
            "settings": self.settings,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": state.step,
            "tokens": state.tokens,
            "epochs": round(state.rows / len(self.rows), 3),
            "cpu_minutes": round(state.cpu_minutes, 1),
            "wall_minutes": round(state.minutes, 1),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "final_loss": round(float(np.mean([loss for _, loss in state.curve[-10:]])), 3),
            "curve": state.curve,
        }


class Lines:
    """Prints how training goes, every `--print-seconds`."""

    def __init__(self, training: Training) -> None:
        self.training, args = training, training.args
        default = H200_TFLOPS if training.device.type == "cuda" else None
        self.peak = 1e12 * (args.peak_tflops or default or measured_peak(training.device))
        self.flops = 3 * forward_flops_per_token(training.model.config, args.context)
        self.begin = self.last = time.monotonic()
        self.first, self.tokens = training.progress(), training.state.tokens
        parts = f"{training.batch_rows} rows a step in parts of {training.part_rows}"
        print(f"{len(training.rows):,} rows, {parts}")
        print(f"{self.flops / 1e6:.1f} MFLOP a token, peak {self.peak / 1e12:.2f} TFLOP/s")
        if training.state.step:
            print(
                f"going on after step {training.state.step}, {100 * self.first:.1f} % of "
                "the budget spent",
                flush=True,
            )

    def after_step(self, loss: torch.Tensor) -> None:
        """A line if it is time for one: loss of the last step, speed since the line before."""
        state, done = self.training.state, self.training.progress()
        if time.monotonic() - self.last < self.training.args.print_seconds and done < 1:
            return
        value = loss.item()  # waits for the device, so the clock is read after it
        now = time.monotonic()
        rate = (state.tokens - self.tokens) / (now - self.last)
        left = (now - self.begin) / 60 * (1 - done) / max(done - self.first, 1e-9)
        self.last, self.tokens = now, state.tokens
        print(
            f"step {state.step} loss {value:.3f} {state.tokens / 1e6:.2f} M tokens {rate:,.0f} "
            f"tokens/s MFU {100 * rate * self.flops / self.peak:.1f} % {100 * done:.1f} % done, "
            f"{left:.1f} min left",
            flush=True,
        )


def rows_at_once(args: argparse.Namespace, device: torch.device) -> int:
    """Rows that go through the model together."""
    return int(args.part_rows or (64 if device.type == "cuda" else 8))


def make_settings(args: argparse.Namespace, config: Any, data: Data) -> dict[str, Any]:
    """All that decides which weights come out; a checkpoint goes on only with the same."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    budgets = {
        "tokens": args.budget_tokens,
        "cpu_minutes": args.budget_cpu_minutes,
        "minutes": args.budget_minutes,
    }
    return {
        "data": data.about["hash"],
        **{name: getattr(config, name) for name in names},
        **{name: getattr(args, name) for name in ("context", "batch_tokens", "lr", "seed")},
        "budget": next([kind, amount] for kind, amount in budgets.items() if amount),
    }


def make_model(args: argparse.Namespace, data: Data) -> Any:
    """A fresh Llama.

    Raises SystemExit for sizes that do not go together or a file that would be too large.
    """
    heads = args.heads or max(1, args.hidden // 64)
    if args.hidden % (2 * heads):
        raise SystemExit(f"--hidden {args.hidden}: expected an even multiple of --heads {heads}")
    config = LlamaConfig(
        vocab_size=data.about["vocab"],
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        **{f"{name}_token_id": number for name, number in data.about["ids"].items()},
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {2 * parameters / MIB:.1f} MiB in bfloat16")
    check_size(2 * parameters / MIB, args.max_mib)
    return model


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that tools/backbone_data.py wrote")
    add("--out", type=Path, required=True, help="folder to write model, tokenizer and card to")
    add(
        "--checkpoint",
        type=Path,
        help="folder of the checkpoint (default: OUT.checkpoint); may be deleted at the end",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-tokens", type=positive_int, help="tokens to train on")
    budget.add_argument(
        "--budget-cpu-minutes",
        type=positive,
        help="CPU time to spend on training, all cores counted",
    )
    budget.add_argument("--budget-minutes", type=positive, help="wall time to spend on training")
    add("--hidden", type=positive_int, default=256)
    add("--intermediate", type=positive_int, default=704)
    add("--layers", type=positive_int, default=4)
    add("--heads", type=positive_int, help="default: hidden / 64")
    add("--context", type=positive_int, default=512, help="tokens per row")
    add("--batch-tokens", type=positive_int, default=4096, help="tokens per step")
    add(
        "--part-rows",
        type=positive_int,
        help="most rows at once, for memory (default: 8 on a CPU, 64 on a GPU)",
    )
    add("--lr", type=positive, default=4e-3)
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--peak-tflops",
        type=positive,
        help="what 100 %% MFU is (default: 989 on a GPU, measured on a CPU)",
    )
    add("--checkpoint-minutes", type=positive, default=5.0)
    add("--print-seconds", type=positive, default=5.0)
    add("--max-mib", type=positive, default=32.0, help="largest model.safetensors allowed")
    return parser


def train(args: argparse.Namespace, words: str) -> None:
    """The four steps."""
    refuse_foreign(args.out, "training.json")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type != args.device != "auto":
        raise SystemExit("--device cuda: no GPU on this machine")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    data = open_data(args.data)
    training = Training(args, make_model(args, data).to(device), data, device)
    training.run()
    figures = {"command": words, **training.figures()}
    figures["perplexity_per_word"] = perplexity_per_word(
        training.model, data, args.context, rows_at_once(args, device)
    )
    print(json.dumps({key: value for key, value in figures.items() if key != "curve"}, indent=1))
    size = write_model(args.out, training.model, data, figures, args.max_mib)
    print(f"{args.out}: model.safetensors has {size:.1f} MiB; {training.checkpoint} may be deleted")


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and train. Raises SystemExit with one line on a bad argument or file."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.context < 2:
        raise SystemExit("--context: expected at least 2 tokens")
    try:
        train(args, command("train_tiny_backbone.py", parser, args))
    except OSError as error:
        raise SystemExit(f"{error.filename or args.out}: {error.strerror or error}") from error


if __name__ == "__main__":
    main()
