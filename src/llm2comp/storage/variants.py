"""What servers do otherwise, recomputed: the wrong way whose vectors are the server's is the cause.

Each way is the folder's own modules with one thing changed for the while of a computation.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from llm2comp.storage.probes import Probe
from llm2comp.storage.weights import memory_ids

LIMITS = (32, 64, 128, 256, 384, 512, 1024, 2048, 4096)
Change = Callable[[SentenceTransformer], AbstractContextManager[Any]]


class LastStates(nn.Module):
    """Pooling: the mean of the last `count` states of each text, which is padded on the right."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds `sentence_embedding` (B, D)."""
        mask_BT = features["attention_mask"]
        last_BT = mask_BT * (mask_BT.flip(1).cumsum(1).flip(1) <= self.count)
        states_BTD = features["token_embeddings"].float()
        sums_BD = torch.einsum("btd,bt->bd", states_BTD, last_BT.float())
        return features | {"sentence_embedding": sums_BD / last_BT.sum(1, keepdim=True)}


@dataclass(frozen=True)
class Variant:
    """A wrong way.

    Args:
        cause: what the server does, in words.
        change: the model, or a copy, that does the same, for a while.
        prompts: whether stored prompts are put before the texts.
    """

    cause: str
    change: Change
    prompts: bool = True

    def embed(self, model: Any, probes: Sequence[Probe]) -> Tensor:
        """Embeddings of the probes, the wrong way: embedding_ND."""
        with self.change(model) as changed:
            return embed(model if changed is None else changed, probes, self.prompts)


def embed(model: Any, probes: Sequence[Probe], prompts: bool = True) -> Tensor:
    """Embeddings of probes in their roles by the stock library, embedding_ND in float32."""
    texts = [((model.prompts.get(p.role or "") or "") if prompts else "") + p.text for p in probes]
    with torch.no_grad():
        found: Tensor = model.encode(
            texts, prompt="", convert_to_tensor=True, show_progress_bar=False
        )
    return found.float().cpu()


def variants(model: Any, probes: Sequence[Probe]) -> Iterator[Variant]:
    """The wrong ways that can show in these probes, the likeliest first."""
    roles = {probe.role for probe in probes}
    ways = list(_pooled(model))
    if roles - {None}:
        yield Variant("no prompt: the stored one is not put before the text", _as_is, False)
    if roles - {"query"} and (prompt := model.prompts.get("query")):
        yield Variant(
            "the query's prompt before every text", partial(_prompted, prompt=prompt), False
        )
    yield from ways
    causal = getattr(model[0].auto_model.config, "is_causal", True) is not False
    named = "attention both ways, of a causal encoder" if causal else "causal attention"
    yield Variant(named, partial(_attention, causal=not causal))
    yield Variant("memory tokens left out, the text's last token", _without_memory)
    texts = [probe.text for probe in probes]
    longest = max(map(len, model.tokenizer(texts, truncation=False, verbose=False).input_ids))
    yield from (_cut(n) for n in LIMITS if n < longest and n != model.max_seq_length)
    for dtype in (torch.bfloat16, torch.float16):
        yield Variant(f"computing in {str(dtype)[6:]}", partial(_in_dtype, dtype=dtype))
    if roles - {None}:
        yield from (Variant(f"no prompt, and {way.cause}", way.change, False) for way in ways)


def _pooled(model: Any) -> Iterator[Variant]:
    """Other poolings than the folder's own."""
    weighed = any(isinstance(module, WordWeights) for module in model)
    own = next((m.pooling_mode for m in model if isinstance(m, Pooling)), None)
    width = int(model[0].auto_model.config.hidden_size)
    others = {
        "mean": "the mean of all tokens, where the memory tokens' are meant",
        "lasttoken": "the last token's state alone, where a mean is meant",
        "cls": "the first token's state",
    }
    for mode, cause in others.items():
        if weighed or mode != own:
            yield Variant(cause, partial(_pooling, pooling=Pooling(width, mode)))
    if (count := len(memory_ids(model))) > 1:
        cause = f"the mean of all {count} memory states, other weights than the folder's"
        yield Variant(cause, partial(_pooling, pooling=LastStates(count)))


def _as_is(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _pooling(model: Any, pooling: nn.Module) -> AbstractContextManager[SentenceTransformer]:
    modules: list[Any] = [
        pooling if isinstance(module, Pooling) else module
        for module in model
        if not isinstance(module, WordWeights)
    ]
    changed = SentenceTransformer(modules=modules, device="cpu", prompts=dict(model.prompts))
    changed.truncate_dim = model.truncate_dim
    return nullcontext(changed)


@contextlib.contextmanager
def _prompted(model: Any, prompt: str) -> Iterator[None]:
    preprocess = model[0].preprocess
    model[0].preprocess = lambda texts, **k: preprocess([prompt + text for text in texts], **k)
    try:
        yield
    finally:
        del model[0].preprocess


@contextlib.contextmanager
def _attention(model: Any, causal: bool) -> Iterator[None]:
    config: Any = model[0].auto_model.config
    names = ("is_causal", "use_bidirectional_attention")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    config.is_causal = causal
    if "use_bidirectional_attention" in before:
        config.use_bidirectional_attention = not causal
    try:
        yield
    finally:
        for name in names:
            if name in before:
                setattr(config, name, before[name])
            elif hasattr(config, name):
                delattr(config, name)


@contextlib.contextmanager
def _without_memory(model: Any) -> Iterator[SentenceTransformer]:
    backend: Any = model.tokenizer.backend_tokenizer
    template = backend.post_processor
    bos = model.tokenizer.bos_token
    begins = (
        bos is not None and model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id
    )
    single = f"{bos} $A" if begins else "$A"
    special = [(bos, model.tokenizer.bos_token_id)] if begins else []
    backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
    width = int(model[0].auto_model.config.hidden_size)
    try:
        with _pooling(model, Pooling(width, "lasttoken")) as changed:
            yield changed
    finally:
        backend.post_processor = template


def _cut(limit: int) -> Variant:
    @contextlib.contextmanager
    def shortened(model: Any) -> Iterator[None]:
        before = model.max_seq_length
        model.max_seq_length = limit
        try:
            yield
        finally:
            model.max_seq_length = before

    return Variant(f"truncation: texts are cut at {limit} tokens", shortened)


def _in_dtype(model: Any, dtype: torch.dtype) -> AbstractContextManager[SentenceTransformer]:
    changed = copy.deepcopy(model)
    changed[0].to(dtype)
    return nullcontext(changed)
