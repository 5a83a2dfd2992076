"""Tiny random causal LMs of several families, tokenizers for them, and encoders whose adapters are
not zero.
"""

import copy
import functools
import json
import string

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm2comp.model.backbone import Backbone
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import position_ids
from llm2comp.recipe import AdapterSettings, PretextStage

VOCABULARY = 320
TOKENS = 300  # of the tokenizer; the model's table has rows to spare, as real ones do
MEMORY = 3

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a causal language model reads a text from left to right",
    "memory tokens hold what the text said",
    "compression keeps what matters and drops the rest",
    "an encoder turns the text into one vector",
]
TEXTS = [
    "the fox reads",
    "memory tokens hold what the lazy dog said over and over",
    "Compression! drops Ünicode 記憶 too?",
    "one vector",
]

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False}
NARROW = {"head_dim": 8, "sliding_window": 8}
SMALL = {k: SIZES[k] for k in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160, **SMALL}
OPT = SMALL | {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "layerdrop": 0.0,
    "init_std": 0.15,
    "pad_token_id": 1,
}
# the default one cannot run in float64
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# family → (name of its configuration, settings)
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": None}),
    "mistral-window": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        GROUPED
        | NARROW
        | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED | NARROW | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    ),
    "phi3": ("Phi3Config", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "granite": (
        "GraniteConfig",
        GROUPED | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "gpt2": ("GPT2Config", GPT2 | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
    "gpt_neox": ("GPTNeoXConfig", SIZES | {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "llama3": (
        "LlamaConfig",
        GROUPED | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "MixtralConfig",
        GROUPED | EXPERTS | {"num_local_experts": 4, "router_jitter_noise": 0.3},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GROUPED
        | EXPERTS
        | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "smollm3": ("SmolLM3Config", GROUPED | {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "opt": ("OPTConfig", OPT | {"dropout": 0.3, "attention_dropout": 0.3}),
    "starcoder2": (
        "Starcoder2Config",
        GROUPED | {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    ),
}
MIXTURES = {"mixtral", "qwen3_moe"}
WITHOUT_BOS = {"qwen2", "qwen3", "qwen3_moe"}
CHAT_TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


@functools.cache
def byte_level_bpe(specials):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer.to_str()


def make_tokenizer(bos=True, chat=False):
    """With BOS: as Llama's (a template puts it before the text).

    Without: as Qwen's, and no pad token either.
    """
    specials = ("<s>", "</s>") if bos else ("<|end|>", "<|start|>")
    tokenizer = Tokenizer.from_str(byte_level_bpe(specials))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {"eos_token": "<|end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def own_tokenizer(family):
    """A tokenizer of the family's own class, as its Hub repositories have it; these set up their
    template by themselves.
    """
    if family in ("qwen2", "gpt2"):
        model = json.loads(byte_level_bpe(("<|endoftext|>", "<|im_end|>")))["model"]
        vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    else:
        specials = {
            "llama": ("<unk>", "<s>", "</s>"),
            "gemma3": ("<pad>", "<eos>", "<bos>", "<unk>"),
        }[family]
        pieces = [
            *specials,
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "\u2581",
            *string.ascii_lowercase,
            "\u2581t",
            "he",
        ]
        vocabulary, merges = (
            {piece: i for i, piece in enumerate(pieces)},
            [("\u2581", "t"), ("h", "e")],
        )
    name, settings = {
        "llama": ("LlamaTokenizer", {"add_bos_token": True}),
        "qwen2": ("Qwen2Tokenizer", {}),
        "gemma3": ("GemmaTokenizer", {"add_bos_token": True}),
        "gpt2": ("GPT2Tokenizer", {}),
    }[family]
    tokenizer = getattr(transformers, name)(vocab=vocabulary, merges=merges, **settings)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def config_of(family, **changes):
    name, settings = FAMILIES[family]
    return getattr(transformers, name)(**settings | changes)


def make_lm(family="llama", seed=0, **changes):
    return lm_from(config_of(family, **changes), seed)


def lm_from(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def stage_1(objective="ctkd", weighting=None, **settings):
    """Settings of stage 1 for a loss alone; its data are never read."""
    data = [{"source": "unused", "response": "response"}]
    tree = {"data": data, "objective": objective, "position_weighting": weighting}
    return PretextStage.model_validate(tree | settings)


def make_backbone(family="llama", attention="bidirectional", chat=False, own=False, **changes):
    tokenizer = own_tokenizer(family) if own else make_tokenizer(family not in WITHOUT_BOS, chat)
    return Backbone(make_lm(family, **changes), tokenizer, attention, family)


def push_adapter(backbone, name, seed=1, dropout=0.0, scale=0.15, **settings):
    """One more adapter; its B weights, zero at the start of a training, are random here."""
    backbone.adapters.add(
        name, AdapterSettings(**{"rank": 4, "alpha": 8, "dropout": dropout} | settings), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.adapters.parameters(name):
        if not parameter.any():
            parameter.data = scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def make_compressor(
    family="llama", stages=("pretext", "ucl"), dropout=0.0, memory=MEMORY, encoder=None, **settings
):
    """An encoder with one non-zero adapter per stage."""
    compressor = Compressor.fresh(
        make_backbone(family, **settings), memory, seed=3, settings=encoder
    )
    for number, name in enumerate(stages):
        push_adapter(compressor.backbone, name, seed=number + 1, dropout=dropout)
    return compressor.eval()


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def untouched(family, **changes):
    """A second copy of the LM that `make_backbone` wraps, never wrapped itself."""
    return copy.deepcopy(make_lm(family, **changes)).requires_grad_(False)


def relative_error(found, expected):
    """|found − expected| / |expected|, and a failure where the expected value is zero."""
    norm = expected.norm()
    assert norm > 0, "vacuous: the expected value is zero"
    return ((found - expected).norm() / norm).item()


def stock_states(lm, backbone, tokens):
    """States of a stock LM over the backbone's inputs, bidirectional: its body called directly."""
    return lm.base_model(
        inputs_embeds=backbone.embed(tokens.ids_BT),
        attention_mask=tokens.mask_BT,
        position_ids=position_ids(tokens.mask_BT),
        is_causal=False,
    ).last_hidden_state
