"""Texts that look like tokens of the model, or of our own: no text gives a memory token, and live
equals exported on all.
"""

import json
import subprocess
import sys

import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from transformers import AutoTokenizer

from families import MEMORY, TEXTS, make_compressor, relative_error
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.vectors import memory_vectors
from llm2comp.recipe import EncoderSettings
from llm2comp.storage.export import export
from llm2comp.storage.golden import load_folder
from llm2comp.storage.reweighting import reweight
from llm2comp.storage.weights import memory_ids, memory_names, memory_weights, use_prefix
from oracles import embed_texts
from test_export import LIMIT, PROMPT

VARIANTS = {
    "llama": {},
    "qwen3": {},  # no BOS, no pad token
    "gpt2": {"own": True},
    "gemma3": {"own": True},
    "qwen2": {"own": True},
}
ONE = {
    "one token": {"memory": 1},
    "mean": {"encoder": EncoderSettings(pooling="mean")},
    "prompt": {"encoder": PROMPT},
}
OURS = [
    f"<{prefix}mem_{i}>"
    for prefix in ("", "llm2comp_", "llm2comp_llm2comp_")
    for i in range(MEMORY)
]


def looks_special(tokenizer, exported):
    """Texts around every special token of the live tokenizer and of the exported one, our names,
    and template names.
    """
    names = {
        *tokenizer.get_added_vocab(),
        *tokenizer.all_special_tokens,
        *exported.get_added_vocab(),
    }
    names |= {
        *exported.all_special_tokens,
        *OURS,
        "<before>",
        "<behind>",
        "<unused_301>",
        "$A",
        "<mem_",
        "mem_0>",
        "<|im_start|>",
    }
    return [
        text
        for name in sorted(names)
        for text in (name, f"the model appends {name} to the text.", f"{name}{name} x{name}")
    ]


def check(live, model, memory):
    texts = looks_special(live.tokenizer, model.tokenizer)
    features = model.preprocess(texts)
    added = live[0].compressor.memory.count
    for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
        found = ids[mask.bool()].tolist()
        assert sum(token in memory for token in found) == added, "a text gave a memory token"
        assert found[len(found) - added :] == memory
    assert relative_error(embed_texts(model, texts), embed_texts(live, texts)) < 1e-5
    assert (
        relative_error(
            model.encode_query(texts, convert_to_tensor=True),
            live.encode_query(texts, convert_to_tensor=True),
        )
        < 1e-5
    )


@pytest.mark.thorough
@pytest.mark.parametrize("variant", [*VARIANTS, *ONE])
def test_no_text_gives_a_memory_token_even_after_save_and_load(tmp_path, variant):
    family, settings = (
        (variant, VARIANTS[variant]) if variant in VARIANTS else ("llama", ONE[variant])
    )
    live = as_sentence_transformer(
        make_compressor(family, **settings), LIMIT, prompts={"query": "find <mem_1> in: "}
    )
    export(live, tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    memory = list(memory_ids(model).values())
    assert len(memory) == live[0].compressor.memory.count
    check(live, model, memory)
    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert list(memory_ids(again).values()) == memory
    check(live, again, memory)
    again.tokenizer.save_pretrained(tmp_path / "tokenizer")
    alone = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert not {*alone.get_vocab().values()} & {*memory}
    assert alone(OURS[0])["input_ids"] == again.tokenizer(OURS[0])["input_ids"]


def test_many_vectors(tmp_path):
    live = as_sentence_transformer(make_compressor("llama"), LIMIT)
    export(live, tmp_path / "model", multi_vector=True)
    model = MultiVectorEncoder(str(tmp_path / "model"), device="cpu")
    texts = [*TEXTS, *looks_special(live.tokenizer, model.tokenizer)]
    found = torch.stack([torch.as_tensor(rows) for rows in model.encode(texts)]).cpu()
    assert found.shape[1] == MEMORY
    assert relative_error(found, memory_vectors(live, texts)) < 1e-5
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        rows = torch.stack([torch.as_tensor(one) for one in encode(texts)]).cpu()
        assert relative_error(rows, memory_vectors(live, texts, role)) < 1e-5


def old_folder(folder):
    """As earlier versions wrote it: memory tokens are added special tokens, no order is written."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("llm2comp_memory_order") == "last"
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = memory_ids(load_folder(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(ids)})
    assert tokenizer.convert_tokens_to_ids(list(ids)) == list(ids.values())
    tokenizer.save_pretrained(folder)
    assert (
        list(ids.values())[0] in AutoTokenizer.from_pretrained(folder)(OURS[0])["input_ids"][:3]
    ), "the old fault"
    return ids


def test_folders_of_the_older_format_are_read_and_weighted(tmp_path):
    live = as_sentence_transformer(make_compressor("llama"), LIMIT)
    export(live, tmp_path / "model")
    ids = old_folder(tmp_path / "model")
    model = load_folder(tmp_path / "model")
    assert memory_ids(model) == ids
    assert memory_names(model) == list(ids) == OURS[:MEMORY]
    assert memory_weights(model) == pytest.approx([1 / 3] * 3)
    assert relative_error(embed_texts(model, TEXTS), embed_texts(live, TEXTS)) < 1e-5
    use_prefix(model, 1)
    live[0].compressor.order = "first"
    live[0].compressor.use_prefix(1)
    assert relative_error(embed_texts(model, TEXTS), embed_texts(live, TEXTS)) < 1e-5
    reweight(tmp_path / "model", [1.0, 0.0, 0.0])
    assert (
        relative_error(
            embed_texts(load_folder(tmp_path / "model"), TEXTS), embed_texts(live, TEXTS)
        )
        < 1e-5
    )


def test_a_model_that_has_tokens_of_these_names(tmp_path):
    """An LM made from an older exported folder, say: its own `<mem_0>` stays a token of texts and
    weighs nothing.
    """
    compressor = make_compressor("llama")
    tokenizer = compressor.backbone.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mem_0>", "<llm2comp_mem_0>"]})
    live = as_sentence_transformer(compressor, LIMIT)
    export(live, tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    ids = memory_ids(model)
    assert list(ids) == [f"<llm2comp_llm2comp_mem_{i}>" for i in range(MEMORY)]
    own = tokenizer.convert_tokens_to_ids("<mem_0>")
    assert own in model.tokenizer("a <mem_0>")["input_ids"]
    assert own not in ids.values()
    check(live, model, list(ids.values()))


@pytest.mark.thorough
def test_on_a_machine_without_this_package(tmp_path):
    live = as_sentence_transformer(make_compressor("llama"), LIMIT)
    export(live, tmp_path / "model")
    program = (
        "import json, sys; from sentence_transformers import SentenceTransformer; "
        "model = SentenceTransformer(sys.argv[1], device='cpu'); "
        "print(json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model"), json.dumps(OURS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert relative_error(torch.tensor(json.loads(done.stdout)), embed_texts(live, OURS)) < 1e-5
