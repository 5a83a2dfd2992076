"""Compressor: texts in, memory states out. The class the paper is about."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2comp.backbone import Backbone
from llm2comp.errors import BackboneError, ModelFolderError, RecipeError
from llm2comp.memory import MemoryTokens, embedding_from_memory, mean_weights, prefix_weights, separate_sight
from llm2comp.recipe import EncoderSettings, MemorySettings
from llm2comp.recipe.parts import TEXT
from llm2comp.tokens import Tokens, wrap

STATE_FILE = "memory.safetensors"
# Weight of BOS in a mean over the text's tokens: as good as none, unless there is nothing else.
BOS_WEIGHT = 1e-6


def room_for_text(positions: int | None, memory: int, asked: int) -> int:
    """Tokens of the longest text that fits with `memory` tokens into `positions` (None: no limit): `asked` or less.

    Raises:
        BackboneError: the memory leaves no room for BOS and a token.
    """
    room = asked if positions is None else min(asked, positions - memory)
    if room < 2:
        raise BackboneError(
            "no room for a text beside the memory",
            where="memory.tokens",
            expected=f"{positions} positions of the model, less 2 or more for a text",
            found=memory,
        )
    return room


def too_few_memory_tokens(count: int, asked: int) -> ModelFolderError:
    """What `num_memory` gets from a model with `count` memory tokens."""
    expected = f"1 to {count}" if count else "a model with memory tokens"
    return ModelFolderError("cannot give so many memory states", where="num_memory", expected=expected, found=asked)


class Compressor(nn.Module):
    """Encoder f_θ = frozen LM + adapters + memory tokens (METHOD 1); or, without these, one state pooled from the text's.

    Args:
        backbone: the LM with its adapter stack.
        memory: the memory tokens; none (count 0) where the text's own states are pooled.
        settings: which states are the embedding.
        nesting: `nested` and `attention` of the memory; its number of tokens is that of `memory`.

    Raises:
        RecipeError: nested or separate memory, and no memory tokens.
        BackboneError: a family that does not obey the mask of separate memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        memory: MemoryTokens,
        settings: EncoderSettings | None = None,
        nesting: MemorySettings | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory.to(backbone.embedding_table.device)
        self.settings = settings or EncoderSettings()
        self.before, self.behind = self._around(self.settings.prompt)
        self.embedding: nn.Module | None = None
        self.register_buffer("weights_K", mean_weights(self.states).to(backbone.embedding_table.device))
        nested, attention = (nesting.nested, nesting.attention) if nesting else ((), "full")
        if (nested or attention == "separate") and not memory.count:
            raise RecipeError(
                f"{'nested' if nested else attention} memory without memory tokens",
                where="memory",
                expected="encoder.pooling: memory",
                found=self.settings.pooling,
            )
        self.prefixes = tuple(sorted({*nested, self.states}))
        # Under causal attention nothing sees what comes later: no mask is needed.
        self.separate = attention == "separate" and backbone.attention == "bidirectional"
        if self.separate:
            probe_separate(self)

    @classmethod
    def fresh(
        cls, backbone: Backbone, memory: MemorySettings | int, seed: int, settings: EncoderSettings | None = None
    ) -> Compressor:
        """New memory tokens, so many or as the settings say, over a backbone (none if `settings` pool the text's states)."""
        nesting = MemorySettings(tokens=memory) if isinstance(memory, int) else memory
        count = nesting.tokens if settings is None or settings.pooling == "memory" else 0
        return cls(backbone, MemoryTokens.like(backbone.embedding_table, count, seed), settings, nesting)

    @property
    def states(self) -> int:
        """K, states per text: one for each memory token, or the pooled one."""
        return self.memory.count or 1

    @property
    def added(self) -> int:
        """Positions that a text takes beside its own tokens: memory and prompt."""
        return self.memory.count + len(self.before) + len(self.behind)

    def encode(self, tokens: Tokens) -> Tensor:
        """Memory states m̃_1..m̃_k of left-padded texts, after the final norm: memory_BKD; or the pooled state, K = 1."""
        tokens = wrap(tokens, self.before, self.behind, self._bos)
        states_BSD = self.read(*self.memory.append(self.embed(tokens.ids_BT), tokens.mask_BT))
        if self.settings.pooling == "mean":
            return self._mean(states_BSD, tokens)
        return states_BSD[:, -self.states :]

    def read(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """The backbone's encoder pass on texts with the memory behind them, under the mask of separate memory if asked."""
        with self._mask(separate_sight(mask_BS, self.memory.count)) if self.separate else contextlib.nullcontext():
            return self.backbone.read(x_BSD, mask_BS)

    @contextlib.contextmanager
    def _mask(self, sees_BSS: Tensor) -> Iterator[None]:
        """Inside, the LM's body gets a 4-D additive mask in place of the padding mask."""

        def replace(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            dtype = kwargs["inputs_embeds"].dtype
            mask_B1SS = torch.zeros_like(sees_BSS, dtype=dtype).masked_fill(~sees_BSS, torch.finfo(dtype).min)[:, None]
            return args, kwargs | {"attention_mask": mask_B1SS}

        with contextlib.ExitStack() as hooks:
            for body in filter(None, (self.backbone.lm.base_model, self.backbone.copy)):
                hooks.callback(body.register_forward_pre_hook(replace, with_kwargs=True).remove)
            yield

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Input embeddings of the encoder pass, x_BTD: the LM's, or the trained copy of them."""
        embed = self.backbone.embed if self.embedding is None else self.embedding
        x_BTD: Tensor = embed(ids_BT).to(self.backbone.embedding_table.dtype)
        return x_BTD

    def _mean(self, states_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Mean over the text's tokens, B1D. BOS weighs `BOS_WEIGHT`, so that an empty text has an embedding; without BOS: 0."""
        weights_BT = tokens.mask_BT.float()
        if (bos := self.backbone.bos_id) is not None:
            weights_BT = torch.where(tokens.ids_BT.eq(bos), BOS_WEIGHT * weights_BT, weights_BT)
        states_BTD = states_BTD.masked_fill(tokens.mask_BT[..., None] == 0, 0.0)
        sums_BD = torch.einsum("btd,bt->bd", states_BTD.float(), weights_BT)
        return (sums_BD / weights_BT.sum(1, keepdim=True).clamp_min(1e-9))[:, None].to(states_BTD.dtype)

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        """Token ids before and behind a text; these parts are tokenised each for itself."""
        if prompt == TEXT:
            return [], []
        before, behind = self.backbone.tokenise(prompt.split(TEXT))
        return before[self._bos :], behind[self._bos :]

    @property
    def _bos(self) -> int:
        return int(self.backbone.bos_id is not None)

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings of left-padded texts: the weighted mean of their memory states, embedding_BD."""
        weights_K: Tensor = self.get_buffer("weights_K")
        return embedding_from_memory(self.encode(tokens), weights_K)

    def use_first(self, first: int) -> None:
        """Let the embedding be the mean of the first memory states. Raises ModelFolderError: there are not so many."""
        if not 1 <= first <= self.memory.count:
            raise too_few_memory_tokens(self.memory.count, first)
        self.get_buffer("weights_K").copy_(prefix_weights(self.memory.count, first))

    def learn(self, memory: bool, embeddings: bool = False) -> None:
        """Choose what learns beside the newest adapter: memory tokens; the encoder's own copy of all input embeddings."""
        self.memory.requires_grad_(memory and self.memory.count > 0)
        if embeddings:
            self._own_embedding()
        if self.embedding is not None:
            self.embedding.requires_grad_(embeddings)

    def _own_embedding(self) -> nn.Module:
        if self.embedding is None:
            self.embedding = copy.deepcopy(self.backbone.lm.get_input_embeddings()).float().requires_grad_(False)
        return self.embedding

    def max_tokens(self, asked: int) -> int:
        """Longest text, BOS included, that fits with the memory into the LM's positions: `asked` or less."""
        return room_for_text(self.backbone.max_positions, self.added, asked)

    def save(self, folder: Path, adapter: str) -> None:
        """Write one adapter and all that is not in adapters: `adapter/`, `memory.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"memory": self.memory.vectors_KD, "weights": self.get_buffer("weights_K")}
        if self.embedding is not None:
            tensors["embeddings"] = next(self.embedding.parameters())
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / STATE_FILE)
        self.backbone.adapters.save(adapter, folder / "adapter")

    def load(self, folder: Path, adapter: str) -> None:
        """Read what `save` wrote into an adapter of the stack and into the memory.

        Raises:
            ModelFolderError: a file is missing, truncated or of another shape.
        """
        try:
            tensors = load_file(folder / STATE_FILE)
            if tensors["memory"].shape != self.memory.vectors_KD.shape:
                raise ModelFolderError(
                    "memory of another shape",
                    where=str(folder / STATE_FILE),
                    expected=tuple(self.memory.vectors_KD.shape),
                    found=tuple(tensors["memory"].shape),
                )
            with torch.no_grad():
                self.memory.vectors_KD.copy_(tensors["memory"])
                self.get_buffer("weights_K").copy_(tensors["weights"])
                if "embeddings" in tensors:
                    next(self._own_embedding().parameters()).copy_(tensors["embeddings"])
            self.backbone.adapters.load(adapter, folder / "adapter")
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelFolderError(
                f"cannot be read: {error}", where=str(folder), fix="copy the folder again or train the stage anew"
            ) from error


PROBED = (6, 2)  # text and memory tokens of a probe


@torch.no_grad()
def probe_separate(compressor: Compressor) -> None:
    """Check on a few random tokens that the LM obeys the mask of separate memory, and that a mask that hides nothing is none.

    Raises:
        BackboneError: a sliding window (a mask of ours would replace it), or a mask that is refused or not obeyed.
    """
    backbone, (texts, count) = compressor.backbone, PROBED
    where = f"{backbone.name} (model_type {backbone.config.model_type})"
    fix = "set memory.attention: full, or model.attention: causal, which needs no such mask"
    window, table = getattr(backbone.config, "sliding_window", None), backbone.embedding_table
    if window is not None and window < (backbone.max_positions or window + 1):
        problem = "cannot keep its sliding window under memory.attention: separate"
        raise BackboneError(problem, where=where, found=f"a window of {window}", fix=fix)
    ids_BS = torch.randint(len(table), (1, texts + count), generator=torch.Generator().manual_seed(0)).to(table.device)
    mask_BS = torch.ones_like(ids_BS)

    def states(changed: int | None, sees_BSS: Tensor | None) -> Tensor:
        other_BS = ids_BS.clone()
        if changed is not None:
            other_BS[0, changed] = (ids_BS[0, changed] + len(table) // 2) % len(table)
        with compressor._mask(sees_BSS) if sees_BSS is not None else contextlib.nullcontext():
            return backbone.read(backbone.embed(other_BS), mask_BS)[0].float()

    sight_BSS = separate_sight(mask_BS, count)
    try:
        plain_SD, open_SD = states(None, None), states(None, torch.ones_like(sight_BSS))
        first, last_text, last_memory = 0, texts - 1, texts + count - 1
        moved_3S = torch.stack([states(n, sight_BSS) for n in (first, last_text, last_memory)]) - states(None, sight_BSS)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise BackboneError(f"cannot be run under memory.attention: separate: {error}", where=where, fix=fix) from error
    scale = plain_SD.abs().max().item()
    by_text_2S, by_memory_1S = moved_3S.abs().amax(-1).div(scale).split([2, 1])
    still = 1e-6 if table.dtype == torch.float32 else 1e-2
    obeyed = by_text_2S.min() > 1e-6 and by_memory_1S[0, -1] > 1e-6 and by_memory_1S[0, :-1].max() < still
    if not obeyed or (open_SD - plain_SD).abs().max().item() > 0.05 * scale:
        raise BackboneError("does not obey the mask of memory.attention: separate", where=where, fix=fix)
