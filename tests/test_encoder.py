"""Texts → embeddings through sentence-transformers: padding, company, order, limits, prompts, chat
templates.
"""

import pytest
import torch

from families import CHAT_TEMPLATE, FAMILIES, MEMORY, TEXTS, make_compressor, make_tokenizer
from llm2comp.model.encoder import MemoryEncoder, as_sentence_transformer
from llm2comp.model.tokens import Tokens
from oracles import embed_texts

LONG = "memory tokens hold what the text said; " * 60
LIMIT = 20


@torch.no_grad()
def alone(compressor, ids):
    """Embedding of one text, unpadded."""
    return compressor(Tokens(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_is_that_of_the_text_alone(family):
    compressor = make_compressor(family)
    model = as_sentence_transformer(compressor, 64)
    expected = torch.stack([alone(compressor, row) for row in compressor.backbone.tokenise(TEXTS)])
    assert (expected[0] - expected[1]).abs().max() > 0.05
    assert (embed_texts(model, TEXTS) - expected).abs().max() < 1e-5
    assert (embed_texts(model, TEXTS, batch_size=1) - expected).abs().max() < 1e-5
    assert (embed_texts(model, TEXTS, batch_size=3) - expected).abs().max() < 1e-5
    assert (embed_texts(model, TEXTS[::-1]).flip(0) - expected).abs().max() < 1e-5
    assert (embed_texts(model, [*TEXTS, LONG])[:-1] - expected).abs().max() < 1e-5


def test_texts_are_padded_on_the_left():
    module = MemoryEncoder(make_compressor(), 64)
    features = module.preprocess(TEXTS)
    rows = module.compressor.backbone.tokenise(TEXTS)
    assert features["input_ids"].shape[1] == max(map(len, rows))
    for ids, mask, row in zip(
        features["input_ids"].tolist(), features["attention_mask"].tolist(), rows, strict=True
    ):
        assert ids[-len(row) :] == row
        assert mask == [0] * (len(ids) - len(row)) + [1] * len(row)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_truncation_keeps_all_memory_tokens(family, monkeypatch):
    compressor = make_compressor(family)
    model = as_sentence_transformer(compressor, LIMIT)
    widths = []
    read = compressor.backbone.encoder_pass

    def watched(x_BSD, mask_BS, *others):
        assert torch.equal(
            x_BSD[:, -MEMORY:], compressor.memory.vectors_KD.expand(len(x_BSD), -1, -1)
        )
        assert mask_BS[:, -MEMORY:].all()
        widths.append(x_BSD.shape[1])
        return read(x_BSD, mask_BS, *others)

    monkeypatch.setattr(compressor.backbone, "encoder_pass", watched)
    cut = compressor.backbone.tokenise([LONG])[0][:LIMIT]
    assert len(compressor.backbone.tokenise([LONG])[0]) > 20 * LIMIT
    found = embed_texts(model, [LONG, TEXTS[0]])
    assert widths == [LIMIT + MEMORY]
    assert (found[0] - alone(compressor, cut)).abs().max() < 1e-5
    assert model.max_seq_length == LIMIT + MEMORY
    assert not torch.allclose(found[0], alone(compressor, cut[:-1]), atol=1e-3), (
        "vacuous: the last token has no effect"
    )


def test_limit_is_no_more_than_the_lm_s_positions():
    model = as_sentence_transformer(make_compressor("gpt2"), 512)
    assert model.max_seq_length == 160
    assert embed_texts(model, [LONG]).isfinite().all()


def test_roles_have_limits_and_prompts_of_their_own():
    compressor = make_compressor()
    prompts = {"query": "find: ", "document": ""}
    model = as_sentence_transformer(compressor, LIMIT, {"query": 12, "document": LIMIT}, prompts)
    query, document = (compressor.backbone.tokenise([text])[0] for text in (f"find: {LONG}", LONG))
    expected = {
        "query": alone(compressor, query[:12]),
        "document": alone(compressor, document[:LIMIT]),
    }
    found = {"query": model.encode_query(LONG), "document": model.encode_document(LONG)}
    for role, embedding in expected.items():
        assert (torch.tensor(found[role]) - embedding).abs().max() < 1e-5, role
    assert (expected["query"] - expected["document"]).abs().max() > 1e-2
    assert (torch.tensor(model.encode(LONG)) - expected["document"]).abs().max() < 1e-5


def test_prompts_stand_before_the_text():
    compressor = make_compressor()
    model = as_sentence_transformer(compressor, 64, prompts={"query": "find: "})
    expected = alone(compressor, compressor.backbone.tokenise([f"find: {TEXTS[0]}"])[0])
    for embedding in (
        model.encode_query(TEXTS[0]),
        model.encode(TEXTS[0], prompt_name="query"),
        model.encode(TEXTS[0], prompt="find: "),
        model.encode(f"find: {TEXTS[0]}"),
    ):
        assert (torch.tensor(embedding) - expected).abs().max() < 1e-5
    assert (torch.tensor(model.encode(TEXTS[0])) - expected).abs().max() > 1e-2


def test_a_chat_template_is_never_applied():
    plain, chat = make_compressor(), make_compressor(chat=True)
    assert chat.backbone.tokenizer.chat_template == CHAT_TEMPLATE
    assert make_tokenizer().chat_template is None
    assert "<|user|>" in chat.backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    first, second = (MemoryEncoder(c, 64) for c in (plain, chat))
    assert torch.equal(first.preprocess(TEXTS)["input_ids"], second.preprocess(TEXTS)["input_ids"])
    models = [as_sentence_transformer(c, 64, prompts={"query": "find: "}) for c in (plain, chat)]
    assert torch.equal(*(embed_texts(model, TEXTS) for model in models))
    assert torch.equal(*(torch.tensor(model.encode_query(TEXTS)) for model in models))


def test_a_live_encoder_is_not_saved_by_halves(tmp_path):
    model = as_sentence_transformer(make_compressor(), 64)
    with pytest.raises(NotImplementedError, match=r"llm2comp\.export"):
        model.save(str(tmp_path / "model"))
