"""Compressor: texts in, memory states out. The class the paper is about."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from llm2comp.errors import ModelFolderError, RecipeError
from llm2comp.model.backbone import Backbone
from llm2comp.model.backbone.sharded import fill, gathered, header_of, save_whole
from llm2comp.model.memory import (
    MemoryTokens,
    Order,
    embedding_from_memory,
    mean_weights,
    new_projection,
    prefix_weights,
)
from llm2comp.model.tokens import Tokens, room_for_text, wrap
from llm2comp.recipe import EncoderSettings, MemorySettings
from llm2comp.recipe.parts import TEXT

STATE_FILE = "memory.safetensors"
# Weight of BOS in a mean over the text's tokens: as good as none, unless there is nothing else.
BOS_WEIGHT = 1e-6


def too_few_memory_tokens(count: int, asked: int) -> ModelFolderError:
    """What `num_memory` gets from a model with `count` memory tokens."""
    expected = f"1 to {count}" if count else "a model with memory tokens"
    return ModelFolderError(
        "cannot give so many memory states", where="num_memory", expected=expected, found=asked
    )


def rows_of(words: str, backbone: Backbone) -> Tensor:
    """Input embeddings of the tokens of some words, as they stand after a text: rows_ND.

    Raises:
        RecipeError: the tokenizer makes no token of them.
    """
    _, ids = backbone.around(TEXT + words)
    if not ids:
        raise RecipeError(
            "no token to begin as", where="memory.start_as", expected="words", found=repr(words)
        )
    return backbone.embed(torch.tensor(ids, device=backbone.input_table.device))


class Compressor(nn.Module):
    """Encoder f_θ = frozen LM + adapters + memory tokens, or one state pooled from the text's.

    Args:
        backbone: the LM with its adapter stack.
        memory: the memory tokens; none (count 0) where the text's own states are pooled.
        settings: which states are the embedding, and whether a projection stands behind them.
        nesting: `nested` of the memory; its number of tokens is that of `memory`.
        seed: of a projection to another width.

    Raises:
        RecipeError: nested memory, and no memory tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        memory: MemoryTokens,
        settings: EncoderSettings | None = None,
        nesting: MemorySettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory.to(backbone.input_table.device)
        self.settings = settings or EncoderSettings()
        self.before, self.behind = backbone.around(self.settings.prompt)
        self.input_table: nn.Module | None = None
        self.projection: nn.Linear | None = None
        if (size := self.settings.projection) is not None:
            inside, device = backbone.input_table.shape[1], backbone.input_table.device
            self.projection = new_projection(inside, inside if size == "same" else size, seed).to(
                device
            )
        self.register_buffer("weights_K", mean_weights(self.states).to(backbone.input_table.device))
        nested = nesting.nested if nesting else ()
        if nested and not memory.count:
            raise RecipeError(
                "nested memory without memory tokens",
                where="memory",
                expected="encoder.pooling: memory",
                found=self.settings.pooling,
            )
        self.prefixes = tuple(sorted({*nested, self.states}))
        self.order: Order = "last"  # of the prefixes; `load` takes it from the stage

    @classmethod
    def fresh(
        cls,
        backbone: Backbone,
        memory: MemorySettings | int,
        seed: int,
        settings: EncoderSettings | None = None,
    ) -> Compressor:
        """New memory tokens over a backbone, so many or as the settings say.

        None if `settings` pool the text's states.

        Raises:
            RecipeError: the tokenizer makes no token of `start_as`.
        """
        nesting = MemorySettings(tokens=memory) if isinstance(memory, int) else memory
        count = nesting.tokens if settings is None or settings.pooling == "memory" else 0
        tokens = MemoryTokens.like(backbone.input_table, count, seed, backbone.embedding_scale)
        if count and nesting.start_as is not None:
            tokens.begin_as(rows_of(nesting.start_as, backbone)[-count:])
        return cls(backbone, tokens, settings, nesting, seed)

    @property
    def states(self) -> int:
        """K, states per text: one for each memory token, or the pooled one."""
        return self.memory.count or 1

    @property
    def width(self) -> int:
        """Dimensions of an embedding: the LM's, or the projection's."""
        return (
            int(self.backbone.input_table.shape[1])
            if self.projection is None
            else self.projection.out_features
        )

    @property
    def added(self) -> int:
        """Positions that a text takes beside its own tokens: memory and prompt."""
        return self.memory.count + len(self.before) + len(self.behind)

    def memory_states(self, tokens: Tokens) -> Tensor:
        """Memory states m̃_1..m̃_k of left-padded texts, after the final norm: memory_BKD.

        Without memory tokens the pooled state, K = 1.
        """
        tokens = wrap(tokens, self.before, self.behind, self._bos)
        x_BSD, mask_BS = self.memory.append(self.embed(tokens.ids_BT), tokens.mask_BT)
        if self.settings.pooling == "mean":
            return self._mean(self.encoder_pass(x_BSD, mask_BS), tokens)
        needed_BS = torch.zeros_like(mask_BS, dtype=torch.bool)
        needed_BS[:, -self.states :] = True
        return self.encoder_pass(x_BSD, mask_BS, needed_BS)[:, -self.states :]

    def encoder_pass(
        self, x_BSD: Tensor, mask_BS: Tensor, needed_BS: Tensor | None = None
    ) -> Tensor:
        """The backbone's encoder pass on texts with the memory after them."""
        return self.backbone.encoder_pass(x_BSD, mask_BS, needed_BS)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Input embeddings of the encoder pass, x_BTD: the LM's, or the trained copy of them."""
        embed = self.backbone.embed if self.input_table is None else self.input_table
        x_BTD: Tensor = embed(ids_BT).to(self.backbone.input_table.dtype)
        return x_BTD

    def _mean(self, states_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Mean over the text's tokens, B1D.

        BOS weighs `BOS_WEIGHT`, so that an empty text has an embedding; without BOS: 0.
        """
        weights_BT = tokens.mask_BT.float()
        if (bos := self.backbone.bos_id) is not None:
            weights_BT = torch.where(tokens.ids_BT.eq(bos), BOS_WEIGHT * weights_BT, weights_BT)
        states_BTD = states_BTD.masked_fill(tokens.mask_BT[..., None] == 0, 0.0)
        sums_BD = torch.einsum("btd,bt->bd", states_BTD.float(), weights_BT)
        return (sums_BD / weights_BT.sum(1, keepdim=True).clamp_min(1e-9))[:, None].to(
            states_BTD.dtype
        )

    @property
    def _bos(self) -> int:
        return int(self.backbone.bos_id is not None)

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings of left-padded texts, embedding_BD.

        The weighted mean of their memory states, projected if so set.
        """
        return self.pool(self.memory_states(tokens))

    def pool(self, memory_BKD: Tensor) -> Tensor:
        """Memory states, from any device, as embeddings on the encoder's: embedding_BD."""
        weights_K: Tensor = self.get_buffer("weights_K")
        return self.project(embedding_from_memory(memory_BKD.to(weights_K.device), weights_K))

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled states (..., D) behind the projection (..., width), if there is one."""
        return pooled if self.projection is None else self.projection(pooled)

    def use_prefix(self, size: int) -> None:
        """Let the embedding be the mean of so many states. Raises ModelFolderError: too many."""
        if not 1 <= size <= self.memory.count:
            raise too_few_memory_tokens(self.memory.count, size)
        self.get_buffer("weights_K").copy_(prefix_weights(self.memory.count, size, self.order))

    @property
    def last_alone(self) -> bool:
        """Whether the embedding is the last position's state: what last-token pooling gives."""
        others = self.get_buffer("weights_K")[:-1]
        return self.settings.pooling != "mean" and not bool(others.any())

    def learn(self, memory: bool, embeddings: bool = False) -> None:
        """Choose what learns beside the newest adapter.

        Memory tokens and projection; the encoder's own embedding table.
        """
        self.memory.requires_grad_(memory and self.memory.count > 0)
        if self.projection is not None:
            self.projection.requires_grad_(memory)
        if embeddings:
            self._own_table()
        if self.input_table is not None:
            self.input_table.requires_grad_(embeddings)

    def _own_table(self) -> nn.Module:
        if self.input_table is None:
            self.input_table = (
                copy.deepcopy(self.backbone.lm.get_input_embeddings()).float().requires_grad_(False)
            )
        return self.input_table

    def max_tokens(self, asked: int) -> int:
        """Longest text, BOS included, that fits with the memory into the LM's positions: `asked` or
        less.
        """
        return room_for_text(self.backbone.max_positions, self.added, asked)

    def save(self, folder: Path, adapter: str) -> None:
        """Write one adapter and all that is not in adapters: `adapter/`, `memory.safetensors`.

        Among several processes rank 0 writes; where weights are spread over them, all must call it.
        """
        with gathered(self._saved(adapter)):
            tensors = self._beside_adapters() | {"weights": self.get_buffer("weights_K")}
            if self.input_table is not None:
                tensors["embeddings"] = next(self.input_table.parameters())
            save_whole(tensors, folder / STATE_FILE, {"order": self.order})
            self.backbone.adapters.save(adapter, folder / "adapter")

    def _saved(self, adapter: str) -> list[nn.Parameter]:
        beside = [self.memory, *filter(None, (self.projection, self.input_table))]
        return [
            *self.backbone.adapters.parameters(adapter),
            *(p for module in beside for p in module.parameters()),
        ]

    def _beside_adapters(self) -> dict[str, Tensor]:
        """Memory and projection, by their names in a stage's file."""
        projection = (
            {}
            if self.projection is None
            else dict(self.projection.named_parameters(prefix="projection"))
        )
        return {"memory": self.memory.vectors_KD, **projection}

    def load(self, folder: Path, adapter: str) -> None:
        """Read what `save` wrote into an adapter of the stack, the memory and the projection.

        Raises:
            ModelFolderError: a file is missing, truncated or of another shape.
        """
        try:
            tensors = load_file(folder / STATE_FILE)
            ordered = header_of(folder / STATE_FILE).get("order")  # earlier versions: none
            self.order = "last" if ordered == "last" else "first"
            if "embeddings" in tensors:
                self._own_table()
            with gathered(self._saved(adapter)):
                own = self._beside_adapters()
                for name, tensor in own.items():
                    if tensors[name].shape != tensor.shape:
                        raise ModelFolderError(
                            f"{name} of another shape",
                            where=str(folder / STATE_FILE),
                            expected=tuple(tensor.shape),
                            found=tuple(tensors[name].shape),
                        )
                    fill(tensor, tensors[name])
                fill(self.get_buffer("weights_K"), tensors["weights"])
                if "embeddings" in tensors:
                    fill(next(self._own_table().parameters()), tensors["embeddings"])
                self.backbone.adapters.load(adapter, folder / "adapter")
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelFolderError(
                f"cannot be read: {error}",
                where=str(folder),
                fix="copy the folder again or train the stage anew",
            ) from error
