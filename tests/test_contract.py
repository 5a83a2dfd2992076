"""What users set on a sentence-transformers model works on live encoders, exported folders and
baselines, or is refused.
"""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import llm2comp
from families import TEXTS, make_compressor, relative_error
from llm2comp.errors import BackboneError, DataError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import EncoderSettings
from llm2comp.storage.export import export
from llm2comp.storage.golden import verify
from llm2comp.use.embed import embed
from oracles import embed_texts
from test_export import LONG, PROMPT
from tiny_run import save_backbone

PROMPTS = {"query": "find: ", "document": "", "other": "compare: "}
VARIANTS = {
    "memory": {},
    "one": {"memory": 1},
    "prompt": {"encoder": PROMPT},
    "mean": {"encoder": EncoderSettings(pooling="mean")},
}


def live(variant="memory", family="llama"):
    return as_sentence_transformer(
        make_compressor(family, **VARIANTS[variant]),
        100,
        {"query": 60, "document": 80},
        dict(PROMPTS),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("contract")
    for variant in VARIANTS:
        export(live(variant), root / variant)
    return root


def pair(folders, variant="memory"):
    return live(variant), SentenceTransformer(str(folders / variant), device="cpu")


def same(a, b, texts=(*TEXTS, LONG)):
    assert relative_error(embed_texts(a, texts), embed_texts(b, texts)) < 1e-5
    assert (
        relative_error(*(torch.tensor(embed(model, list(texts)).embeddings_ND) for model in (a, b)))
        < 1e-5
    )
    assert (
        relative_error(torch.tensor(embed(a, list(texts)).embeddings_ND), embed_texts(b, texts))
        < 1e-5
    )


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("room", [1, 5, 30])
def test_max_seq_length_cuts_alike(folders, variant, room):
    model, exported = pair(folders, variant)
    compressor = model[0].compressor
    whole = embed_texts(model, [LONG])
    for one in (model, exported):
        one.max_seq_length = compressor.added + 1 + room
        assert one.max_seq_length == compressor.added + 1 + room
    same(model, exported)
    row = compressor.backbone.tokenise([LONG], 1 + room)
    expected = compressor(Tokens.pad(row, "left")).detach()
    assert relative_error(embed_texts(exported, [LONG]), expected) < 1e-5
    assert relative_error(embed_texts(model, [LONG]), expected) < 1e-5
    assert relative_error(whole, expected) > 1e-3, "vacuous: nothing is cut"
    roles = [
        encode([LONG], prompt="", convert_to_tensor=True)
        for encode in (model.encode_query, model.encode_document)
    ]
    assert all(relative_error(found, expected) < 1e-5 for found in roles), "for all roles alike"


def test_a_limit_can_be_raised_and_taken_away(folders):
    model, exported = pair(folders)
    for value in (12, 100, None, 10**6):
        model.max_seq_length = value
        assert model.max_seq_length == min(value or 10**9, 160), "the LM's own limit stays"
    exported.max_seq_length = 160
    same(model, exported)


@pytest.mark.parametrize("value", [0, -3, 4, "64", 6.5, True])
def test_a_limit_that_leaves_no_room_is_refused(folders, value):
    model, exported = pair(folders)
    before = embed_texts(model, TEXTS)
    with pytest.raises(BackboneError, match="5 or more") as refused:
        model.max_seq_length = value
    assert "\n" not in str(refused.value).splitlines()[0]
    assert torch.equal(embed_texts(model, TEXTS), before)
    if type(value) is int and value > 0:  # stock code: the tokenizers library cuts nothing then
        exported.max_seq_length = value
        with pytest.raises(DataError, match="leaves no room"):
            embed(exported, TEXTS)


def test_other_settings(folders):
    model, exported = pair(folders)
    plain = embed_texts(model, TEXTS)
    for one in (model, exported):
        one.truncate_dim = 8
    same(model, exported)
    assert embed(model, TEXTS, normalise=True).embeddings_ND.shape == (len(TEXTS), 8)
    assert relative_error(embed_texts(model, TEXTS), plain[:, :8]) < 1e-5
    for one in (model, exported):
        one.truncate_dim, one.default_prompt_name = None, "other"
    same(model, exported)
    assert relative_error(embed_texts(model, TEXTS), plain) > 1e-3
    expected = model.encode(TEXTS, prompt="compare: ", convert_to_tensor=True)
    assert relative_error(embed_texts(exported, TEXTS), expected) < 1e-5
    for one in (model, exported):
        one.default_prompt_name, one.prompts = None, {"query": "another: "}
    found = [one.encode_query(TEXTS, convert_to_tensor=True) for one in (model, exported)]
    assert relative_error(*found) < 1e-5
    assert (
        relative_error(torch.tensor(embed(model, TEXTS, role="query").embeddings_ND), found[1])
        < 1e-5
    )
    for name in ("dot", "euclidean", "manhattan", "cosine"):
        for one in (model, exported):
            one.similarity_fn_name = name
        scores = [one.similarity(plain, plain[:1]) for one in (model, exported)]
        assert torch.equal(*scores)


def test_what_was_set_goes_into_the_folder(tmp_path):
    model = live()
    model.max_seq_length, model.truncate_dim, model.default_prompt_name = 30, 16, "other"
    model.similarity_fn_name = "dot"
    expected = embed_texts(model, [*TEXTS, LONG])
    export(model, tmp_path / "model")
    found = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert (found.max_seq_length, found.truncate_dim, found.default_prompt_name) == (
        30,
        16,
        "other",
    )
    assert found.similarity_fn_name == "dot"
    assert found.prompts == PROMPTS
    assert relative_error(embed_texts(found, [*TEXTS, LONG]), expected) < 1e-5
    assert verify(tmp_path / "model") > 0.99999


@pytest.mark.parametrize("kind", ["mean", "echo", "last_token"])
def test_a_baseline_obeys_too(tmp_path, kind):
    model = llm2comp.load(f"{kind}:{save_backbone(tmp_path / 'lm')}", "cpu")
    most, by_itself = model.max_seq_length, len(model.tokenizer("")["input_ids"])
    ids = model.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    model.max_seq_length = by_itself + 6
    assert model.max_seq_length == by_itself + 6
    cut = model.tokenizer.decode(ids[:6])
    assert LONG.startswith(cut)
    found = embed_texts(model, [LONG])
    assert np.allclose(embed(model, [LONG]).embeddings_ND, found.numpy(), atol=1e-5)
    model.max_seq_length = None
    assert model.max_seq_length == most
    assert relative_error(found, embed_texts(model, [cut])) < 1e-5
    assert relative_error(found, embed_texts(model, [LONG])) > 1e-3
    with pytest.raises(BackboneError, match="leaves no room"):
        model.max_seq_length = by_itself
