"""Training-free encoders against the plain transformers model, one text at a time; cutting, saving,
loading, wrong settings.
"""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from tokenizers import processors

from families import (
    FAMILIES,
    TEXTS,
    make_backbone,
    make_lm,
    make_tokenizer,
    push_adapter,
    untouched,
)
from llm2comp.errors import BackboneError, ModelFolderError, RecipeError
from llm2comp.lab.analyze import analyze
from llm2comp.model.backbone import Backbone, load_backbone
from llm2comp.model.backbone.sources import TINY
from llm2comp.model.baselines.kinds import NAMES, BaselineSettings, read_saved, variant
from llm2comp.model.baselines.module import BaselineEncoder, baseline, pooling_weights
from llm2comp.model.baselines.prompts import META_EOL, as_sentence, fill
from llm2comp.recipe import ModelSettings
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import load
from llm2comp.use.embed import embed
from oracles import embed_texts
from tiny_run import assert_refused, cli, save_backbone, sentences, write_rows

HOSTILE = [
    "{text}",
    "} {0} {{text}} %s",
    'a "quoted" word"',
    'X, rewritten sentence: X "X" means in one word:"',
    "  blanks  before, between and after   ",
    "\n",
    "Ünicode 記憶 🧠, ",
]
ALL = [*TEXTS, *HOSTILE]
LONG = "memory tokens hold what the Ünicode 記憶 text said; " * 40
LIMIT = 420  # positions: the longest prompt needs some 390 of the test tokenizer's small tokens


def positions(family, count=LIMIT):
    return {"n_positions": count} if family == "gpt2" else {"max_position_embeddings": count}


@functools.cache
def lms(family):
    """Our backbone and a plain model of the same weights."""
    size = positions(family, 1024)
    if FAMILIES[family][1].get("sliding_window"):
        size["sliding_window"] = 64  # one of 8 would not reach back over a prompt to the text
    return make_backbone(family, **size), untouched(family, **size)


def make(name="mean", family="llama", **changes):
    return baseline(lms(family)[0], variant(name, **{"max_tokens": 1024} | changes))


def by_bytes(tokenizer, string, begin, end):
    """Ids of a string, and the places of those that hold one of its characters `begin` to `end`.

    A byte-level token is written with one character per byte, so that sums of lengths say where it
    stands.
    """
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    a, b = len(string[:begin].encode()), len(string[:end].encode())
    places, at = [], 0
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if at < b and at + len(token) > a:
            places.append(place)
        at += len(token)
    assert at == len(string.encode())
    return ids, places


def prepared(text):
    """The rule by hand: full stop unless one of . ? ' or a double quote ends it, single quotes, no
    question mark.
    """
    if text and not text.endswith((".", "?", '"', "'")):
        text = text + "."
    text = "'".join(text.split('"'))
    return text if not text.endswith("?") else text[: len(text) - 1] + "."


@torch.no_grad()
def naive(family, settings, text):
    """The definition: one text, one prompt at a time, a plain forward pass, sums in Python."""
    backbone, lm = lms(family)
    means = []
    for template in settings.templates:
        said = prepared(text) if settings.as_sentence else text
        string = said.join(template.split("{text}"))
        last = len(string) - len(template.split("{text}")[-1])
        first = {
            "text": template.index("{text}"),
            "last_copy": last - len(said),
            "last_token": len(string) - 1,
        }[settings.span]
        assert settings.span != "text" or template.count("{text}") == 1, "the span would have gaps"
        ids, places = by_bytes(backbone.tokenizer, string, first, last)
        bos = (
            [backbone.tokenizer.bos_token_id] if backbone.tokenizer.bos_token_id is not None else []
        )
        states = lm(input_ids=torch.tensor([bos + ids]), output_hidden_states=True).hidden_states[
            settings.layer
        ][0]
        chosen = states[len(bos) :][places] if settings.span != "last_token" else states[-1:]
        n = len(chosen)
        weights = {"mean": [1] * n, "weighted_mean": range(1, n + 1), "last": [0] * (n - 1) + [1]}[
            settings.pooling
        ]
        means.append(
            sum(w * state for w, state in zip(weights, chosen, strict=True)) / sum(weights)
        )
    return sum(means) / len(means)


# ---- what is computed


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_is_that_of_the_text_alone_as_published(family):
    for name in NAMES:
        texts = ALL if name != "meta_eol" else [*TEXTS[:2], HOSTILE[3]]
        model = make(name, family)
        expected = torch.stack([naive(family, model[0].settings, text) for text in texts])
        assert (expected[0] - expected[1]).abs().max() > 0.02, "vacuous: the texts are alike"
        found = embed_texts(model, texts)
        assert (found - expected).abs().max() < 1e-5, name
        assert (
            embed_texts(model, texts[::-1], batch_size=3).flip(0) - expected
        ).abs().max() < 1e-5, name
        assert found.dtype == torch.float32


def test_the_encoders_differ():
    found = torch.stack([embed_texts(make(name), TEXTS[:2]).flatten() for name in NAMES])
    assert torch.cdist(found, found).add(torch.eye(len(NAMES)) * 9).min() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["last_token", "echo", "prompt_eol"])
def test_the_tokenizer_s_padding_side_does_not_matter(name, side):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    model = baseline(Backbone(lms("llama")[0].lm, tokenizer, "causal"), NAMES[name])
    alone = torch.stack([embed_texts(model, [text])[0] for text in ALL])
    assert (embed_texts(model, ALL) - alone).abs().max() < 1e-5
    assert (alone - embed_texts(make(name), ALL)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_layers(family):
    found = {}
    for layer in (-3, -2, -1, 0, 1, 2):
        model = make("weighted_mean", family, layer=layer)
        expected = torch.stack([naive(family, model[0].settings, text) for text in TEXTS])
        found[layer] = embed_texts(model, TEXTS)
        assert (found[layer] - expected).abs().max() < 1e-5, layer
    for a, b in ((-3, 0), (-2, 1), (-1, 2)):
        assert (found[a] - found[b]).abs().max() < 1e-6
    assert min((found[a] - found[b]).abs().max() for a, b in ((0, 1), (1, 2), (0, 2))) > 0.05
    for wrong in (3, -4):
        with pytest.raises(
            BackboneError,
            match=rf"(?s)no such layer.*0 \(the embeddings\) to 2, or -3 to -1.*found: {wrong}",
        ):
            make("mean", family, layer=wrong)


def test_a_layer_within_is_before_the_final_norm_and_the_last_one_behind_it():
    lm = lms("llama")[1]
    x_BTD = lm.get_input_embeddings()(torch.tensor([[0, 40, 50]]))
    mask = torch.ones(1, 3, dtype=torch.int64)
    backbone = lms("llama")[0]
    with torch.no_grad():
        assert torch.equal(backbone.decoder_layer(x_BTD, mask, 0), x_BTD)
        last = backbone.decoder_layer(x_BTD, mask, 2)
        assert torch.equal(last, backbone.decoder_pass(x_BTD, mask))
        assert last.pow(2).mean(-1).sub(1).abs().max() < 1e-2, "root mean square 1"
        assert backbone.decoder_layer(x_BTD, mask, 1).pow(2).mean(-1).sub(1).abs().min() > 0.05


def test_adapters_are_off_and_attention_is_causal():
    backbone = make_backbone("llama", **positions("llama", 1024))
    push_adapter(backbone, "pretext")
    for changes in ({}, {"layer": -2}):
        model = baseline(backbone, variant("weighted_mean", max_tokens=1024, **changes))
        assert (
            embed_texts(model, ALL) - embed_texts(make("weighted_mean", **changes), ALL)
        ).abs().max() < 1e-6
    x_BTD = backbone.embed(torch.tensor([backbone.tokenise(TEXTS[:1])[0]]))
    mask = torch.ones(x_BTD.shape[:2], dtype=torch.int64)
    assert (
        backbone.encoder_pass(x_BTD, mask) - backbone.decoder_pass(x_BTD, mask)
    ).abs().max() > 0.05, "vacuous: the adapter does nothing"


def test_pooling_weights():
    span_BT = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    expected = {
        "mean": [[0, 1 / 3, 1 / 3, 1 / 3, 0], [0.5, 0, 0, 0.5, 0], [0, 0, 1, 0, 0]],
        "weighted_mean": [[0, 1 / 6, 2 / 6, 3 / 6, 0], [1 / 3, 0, 0, 2 / 3, 0], [0, 0, 1, 0, 0]],
        "last": [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]],
    }
    for pooling, weights in expected.items():
        assert torch.allclose(
            pooling_weights(span_BT, pooling), torch.tensor(weights, dtype=torch.float32)
        ), pooling


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_meta_eol_is_the_mean_of_its_prompts(family):
    assert len(META_EOL) == 8
    single = torch.stack(
        [embed_texts(make("meta_eol", family, templates=[one]), TEXTS) for one in META_EOL]
    )
    assert (embed_texts(make("meta_eol", family), TEXTS) - single.mean(0)).abs().max() < 1e-5
    assert (single - single.mean(0)).abs().max() > 0.1


def test_the_published_prompts_are_word_for_word():
    """Digest of `task_prompts` in the authors' file, a line each, `*sent 0*` written {text}."""
    digest = hashlib.sha256("\n".join(META_EOL).encode()).hexdigest()
    assert digest == "9932e15351158a7e54084df96467db39e74f64c96f1db9b62f4d9e8bb5b929d5"
    assert NAMES["prompt_eol"].templates == ('This sentence : "{text}" means in one word:"',)
    assert NAMES["echo"].templates == ("Rewrite the sentence: {text}, rewritten sentence: {text}",)


SENTENCES = {
    "a dog": "a dog.",
    "a dog.": "a dog.",
    "a dog!": "a dog!.",
    "a dog?": "a dog.",
    'say "a dog"': "say 'a dog'",
    "a dog's'": "a dog's'",
    "a dog ": "a dog .",
    "": "",
}


def test_texts_are_prepared_as_the_published_code_does():
    assert {text: as_sentence(text) for text in SENTENCES} == SENTENCES
    assert {text: prepared(text) for text in SENTENCES} == SENTENCES
    plain, asked = make("prompt_eol", as_sentence=False), make("prompt_eol")
    assert {name for name, settings in NAMES.items() if settings.as_sentence} == {
        "prompt_eol",
        "meta_eol",
    }
    for before, after in SENTENCES.items():
        assert (embed_texts(asked, [before]) - embed_texts(plain, [after])).abs().max() < 1e-6
        assert (
            before == after
            or (embed_texts(asked, [before]) - embed_texts(plain, [before])).abs().max() > 1e-3
        )


# ---- which tokens


def test_filling():
    assert fill("a {text} b {text}", "{text}") == ("a {text} b {text}", [(2, 8), (11, 17)])
    assert fill("{text}", "") == ("", [(0, 0)])
    for text in ALL:
        string, copies = fill("{ {text}{0}{text}", text)
        assert [string[a:b] for a, b in copies] == [text, text]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_echo_reads_the_whole_string_and_pools_its_second_copy(family):
    model = make("echo", family)
    tokenizer, start = model.tokenizer, [] if family == "qwen3" else [0]
    assert len(start) == (tokenizer.bos_token_id is not None)
    features = model.preprocess(ALL)
    for text, ids, mask, span in zip(
        ALL, *(features[key] for key in ("input_ids", "attention_mask", "span")), strict=True
    ):
        string = f"Rewrite the sentence: {text}, rewritten sentence: {text}"
        row = ids[mask == 1].tolist()
        assert row == start + tokenizer(string, add_special_tokens=False)["input_ids"]
        assert span[mask == 0].sum() == 0
        pooled = np.flatnonzero(span)
        assert list(pooled) == list(range(pooled[0], len(row))), "to the end, without gaps"
        assert tokenizer.decode(row[pooled[0] :]).removeprefix(" ") == text.removeprefix(" ")


def test_all_copies_can_be_pooled():
    tokenizer = make_tokenizer()
    (ids,), (span,) = (
        make("echo", span="text").preprocess(["the fox"])[key] for key in ("input_ids", "span")
    )
    assert tokenizer.decode(ids[span == 1]) == " the fox the fox"


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "qwen2", "trimmed"])
def test_every_token_of_a_text_counts_and_no_other(kind):
    """Tokenizers of other makes, and one whose blanks have no width in its offsets."""
    if kind == "trimmed":
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        spans = tokenizer("a   b", return_offsets_mapping=True)["offset_mapping"]
        assert any(a == b for a, b in spans), "vacuous: all tokens have a width"
        backbone = Backbone(lms("llama")[0].lm, tokenizer, "causal")
    else:
        size = {} if kind == "gpt2" else {"vocab_size": 340}
        backbone = make_backbone(kind, own=True, **size, **positions(kind))
    model = baseline(backbone, NAMES["mean"])
    features, rows = model.preprocess(ALL), backbone.tokenise(ALL)
    for text, row, span, ids in zip(
        ALL, rows, features["span"].tolist(), features["input_ids"].tolist(), strict=True
    ):
        bos = int(backbone.bos_id is not None)
        assert ids[: len(row)] == row
        assert span == [0] * bos + [1] * (len(row) - bos) + [0] * (len(span) - len(row)), text
    quoted = BaselineEncoder(backbone, variant("mean", templates=["<<{text}>>"])).preprocess(
        ["the fox", "it"]
    )
    for text, ids, span in zip(["the fox", "it"], quoted["input_ids"], quoted["span"], strict=True):
        assert backbone.tokenizer.decode(ids[span == 1]).strip() == text


def test_an_empty_text():
    bos, eos = lms("llama")[0].bos_id, lms("qwen3")[0].tokenizer.eos_token_id
    assert lms("qwen3")[0].bos_id is None
    for family, stand_in in (("llama", bos), ("qwen3", eos)):
        with torch.no_grad():
            expected = lms(family)[1](
                input_ids=torch.tensor([[stand_in]]), output_hidden_states=True
            ).hidden_states[-1][0, 0]
        for name in ("mean", "last_token", "weighted_mean"):
            assert (embed_texts(make(name, family), [""])[0] - expected).abs().max() < 1e-5
            assert (
                embed_texts(make(name, family), ["", TEXTS[1]])[0] - expected
            ).abs().max() < 1e-5
    assert embed_texts(make("echo"), [""]).isfinite().all()
    assert make("echo").preprocess([""])["span"].sum() == 1


# ---- long texts


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_of_a_long_text_the_text_is_cut_and_not_the_prompt(name, family):
    limit = (
        20
        if name in ("mean", "last_token", "weighted_mean")
        else LIMIT
        if name == "meta_eol"
        else 60
    )
    model = baseline(
        make_backbone(family, **positions(family, LIMIT)), variant(name, max_tokens=limit)
    )
    module = model[0]
    features = model.preprocess([LONG])
    cuts = []
    for template, ids, mask in zip(
        module.settings.templates, features["input_ids"], features["attention_mask"], strict=True
    ):
        row = ids[mask == 1].tolist()
        assert len(row) <= limit
        said = model.tokenizer.decode(row, skip_special_tokens=True)
        head, *_, tail = template.split("{text}")
        assert said.startswith(head)
        assert said.endswith(tail)
        kept = [
            n
            for n in range(len(LONG))
            if fill(template, prepared(LONG[:n]) if "eol" in name else LONG[:n])[0] == said
        ]
        assert kept, "both copies are cut alike, or the prompt is cut"
        cuts.append(kept[-1])
        longer = module._read(template, [LONG[: kept[-1] + 8]])[0].ids
        assert len(longer) > limit, "more of the text would have fitted"
    assert min(cuts) >= 4
    expected = torch.stack(
        [
            embed_texts(
                baseline(module.backbone, variant(name, templates=[template])), [LONG[:cut]]
            )[0]
            for template, cut in zip(module.settings.templates, cuts, strict=True)
        ]
    ).mean(0)
    found = embed_texts(model, [LONG, TEXTS[0]])
    assert (found[0] - expected).abs().max() < 1e-5
    assert (found[1] - embed_texts(model, [TEXTS[0]])[0]).abs().max() < 1e-5


def test_the_limit_is_no_more_than_the_lm_s_positions():
    model = baseline(make_backbone("gpt2"), variant("echo", max_tokens=512))
    assert model[0].max_tokens == 160
    assert embed_texts(model, [LONG]).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("name", ["mean", "echo", "prompt_eol"])
def test_bulk_embedding_knows_how_long_a_text_may_be(name, family):
    model = baseline(lms(family)[0], variant(name, max_tokens=90))
    room = model[0].room
    assert room == {"mean": 90 - (family != "qwen3")}.get(name, room)
    words = " ".join(sentences(30))
    ends = [
        end
        for _, end in model.tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
    ]
    fits, over = words[: ends[room - 1]], words[: ends[room]]
    assert embed(model, [fits], long_texts="error").long_texts == 0
    whole = BaselineEncoder(lms(family)[0], variant(name, max_tokens=1024)).preprocess([fits])
    assert model.preprocess([fits])["input_ids"].tolist() == whole["input_ids"].tolist(), "not cut"
    assert embed(model, [over]).long_texts == 1
    parts = embed(model, [over + words], long_texts="chunk-mean").embeddings_ND
    assert np.abs(parts - embed(model, [over + words]).embeddings_ND).max() > 1e-3


def test_too_few_positions_for_the_prompt():
    with pytest.raises(
        BackboneError,
        match=r"(?s)gpt2: too few positions for the prompt \"In this task.*LM's limit 160",
    ):
        baseline(make_backbone("gpt2"), NAMES["meta_eol"])
    least = len(
        BaselineEncoder(lms("llama")[0], NAMES["prompt_eol"])
        ._read(NAMES["prompt_eol"].templates[0], ["a"])[0]
        .ids
    )
    with pytest.raises(
        BackboneError,
        match=rf"(?s)expected: {least} or more.*found: {least - 1}: max_tokens is {least - 1}",
    ):
        make("prompt_eol", max_tokens=least - 1)
    assert embed_texts(make("prompt_eol", max_tokens=least), [LONG]).isfinite().all()


# ---- prompts, settings


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_stands_before_the_text_within_the_template(name):
    model = make(name)
    model.prompts["query"] = "find: "
    expected = torch.stack(
        [naive("llama", model[0].settings, f"find: {text}") for text in TEXTS[:2]]
    )
    for found in (model.encode_query(TEXTS[:2]), model.encode(TEXTS[:2], prompt="find: ")):
        assert (torch.tensor(found) - expected).abs().max() < 1e-5
    assert (torch.tensor(model.encode_document(TEXTS[:2])) - expected).abs().max() > 1e-3


def test_a_variant_is_a_value():
    assert variant("echo") == NAMES["echo"]
    assert variant("prompt_eol", layer=-2, templates=["{text}!"]) == BaselineSettings(
        templates=("{text}!",), span="last_token", pooling="last", layer=-2, as_sentence=True
    )
    with pytest.raises(ValueError, match="frozen"):
        NAMES["echo"].layer = 3


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("echoo", {}, ["no such training-free encoder", "did you mean 'echo'?"]),
        ("echo", {"templtes": ["{text}"]}, ["templtes: unknown key; did you mean 'templates'?"]),
        ("echo", {"zzz": 1}, ["zzz: unknown key; valid keys: templates, span, pooling, layer"]),
        (
            "echo",
            {"templates": ["Rewrite {Text}"]},
            ["templates: a template must contain {text}, found 'Rewrite {Text}'"],
        ),
        ("echo", {"templates": []}, ["templates", "at least 1"]),
        ("echo", {"templates": "{text}"}, ["templates", "valid tuple"]),
        ("echo", {"layer": True}, ["layer", "valid integer"]),
        ("echo", {"layer": "-2"}, ["layer", "valid integer"]),
        ("echo", {"pooling": "max"}, ["pooling", "'weighted_mean'", 'found "max"']),
        (
            "echo",
            {"span": "copy", "max_tokens": 0},
            ["span", "'last_copy'", "max_tokens", "greater than or equal to 1"],
        ),
    ],
)
def test_wrong_settings(name, changes, parts):
    with pytest.raises(RecipeError) as caught:
        variant(name, **changes)
    for part in parts:
        assert part in str(caught.value)


# ---- saving and loading


@pytest.mark.parametrize("kind", NAMES)
def test_every_kind_is_loaded_by_its_name(kind):
    model = load(f"{kind}:builtin:tiny", "cpu")
    assert model[0].settings == NAMES[kind]
    assert not model.training
    assert identity(f"{kind}:builtin:tiny", model).name == f"llm2comp/{kind}-builtin-tiny"


def test_names_are_known_without_torch():
    program = (
        "import sys; from llm2comp.model.baselines.kinds import NAMES; assert 'meta_eol' in NAMES; "
        "heavy = {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("name", "hint"), [("promt_eol:builtin:tiny", "prompt_eol"), ("mena:Qwen/Qwen3-0.6B", "mean")]
)
def test_a_mistyped_kind(name, hint):
    with pytest.raises(
        ModelFolderError, match=rf"(?s){name}: no such folder.*did you mean '{hint}'\?"
    ):
        load(name)
    with pytest.raises(ModelFolderError) as caught:
        load("warp:builtin:tiny")
    assert "did you mean" not in str(caught.value)
    assert ", ".join(NAMES) in str(caught.value)


def test_saved_and_loaded(tmp_path):
    tiny = load("echo:builtin:tiny", "cpu")[0].backbone
    model = baseline(tiny, variant("prompt_eol", layer=-2))
    model.prompts["query"] = "find: "
    model.save(str(tmp_path / "mine"))
    assert not [
        file
        for file in (tmp_path / "mine").rglob("*")
        if file.is_file() and file.stat().st_size > 20_000
    ]
    assert yaml.safe_load((tmp_path / "mine" / "baseline.yaml").read_text()) == {
        "format_version": 1,
        "model": {"name": "builtin:tiny", "revision": None, "dtype": "float32", "bos": "auto"},
        "encoder": variant("prompt_eol", layer=-2).model_dump(mode="json"),
    }
    found = load(tmp_path / "mine", "cpu")
    assert not found.training
    assert found[0].settings == model[0].settings
    assert torch.equal(embed_texts(found, ALL), embed_texts(model, ALL))
    assert np.array_equal(found.encode_query(TEXTS), model.encode_query(TEXTS))
    assert not np.array_equal(found.encode_query(TEXTS), found.encode_document(TEXTS))

    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    (by_hand / "baseline.yaml").write_text(
        "format_version: 1\nmodel: {name: 'builtin:tiny', dtype: bfloat16}\nencoder: "
        "{layer: 2, pooling: last}\n"
    )
    second = load(by_hand, "cpu")
    assert second[0].settings == BaselineSettings(layer=2, pooling="last")
    assert second[0].saved().model.dtype == "bfloat16"
    (tmp_path / "mine" / "config_sentence_transformers.json").write_text("{")
    with pytest.raises(ModelFolderError, match="damaged"):
        load(tmp_path / "mine")


def test_what_was_set_on_it_comes_back(tmp_path):
    """By us and by sentence-transformers alone; and it is another encoder than one without."""
    model = load("echo:builtin:tiny", "cpu")
    seen = {identity("echo:builtin:tiny", model).revision}
    model.prompts["query"] = "find: "
    changes = {"default_prompt_name": "query", "similarity_fn_name": "dot"}
    changes |= {"truncate_dim": 16, "max_seq_length": 9}
    for key, value in changes.items():
        setattr(model, key, value)
        seen.add(identity("echo:builtin:tiny", model).revision)
    assert len(seen) == 1 + len(changes)
    model.save(str(tmp_path / "mine"))
    plain = SentenceTransformer(str(tmp_path / "mine"), device="cpu", trust_remote_code=True)
    for found in (load(tmp_path / "mine", "cpu"), plain):
        assert {key: getattr(found, key) for key in changes} == changes
        assert np.array_equal(found.encode([LONG]), model.encode([LONG]))
    assert found.encode([LONG]).shape == (1, 16)
    config = tmp_path / "mine" / "config_sentence_transformers.json"
    kept = json.loads(config.read_text())
    wrong = {"default_prompt_name": "no", "similarity_fn_name": "no", "truncate_dim": "no"}
    for key, value in wrong.items():
        config.write_text(json.dumps(kept | {key: value}))
        with pytest.raises(ModelFolderError, match="transformers.json: damaged"):
            load(tmp_path / "mine", "cpu")


def test_a_pinned_lm_stays_pinned(tmp_path, monkeypatch):
    """Though main has moved on; and one in 4 bits is loaded in 4 bits."""
    pinned, current = "a" * 40, "b" * 40
    place = tmp_path / "hub" / "models--owner--name"
    for number, commit in enumerate((pinned, current)):
        save_backbone(place / "snapshots" / commit, lm=make_lm(seed=number))
    for ref, commit in (("main", current), ("v1", pinned)):
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = ModelSettings(name="owner/name", revision="v1", device="cpu", attention="causal")
    model = baseline(load_backbone(settings), "mean")
    model.save(str(tmp_path / "mine"), create_model_card=False)
    assert read_saved(tmp_path / "mine" / "baseline.yaml").model.revision == pinned
    assert np.array_equal(load(tmp_path / "mine", "cpu").encode(TEXTS), model.encode(TEXTS))
    model[0].backbone.settings = settings.model_copy(update={"quantization": "nf4"})
    model[0].save(str(tmp_path / "mine"))
    assert read_saved(tmp_path / "mine" / "baseline.yaml").model.settings().quantization == "nf4"


@pytest.mark.thorough
def test_name_and_revision_change_with_all_that_changes_embeddings(tmp_path):
    from safetensors.torch import load_file, save_file

    def saved(name, place="builtin:tiny", prompt="", dtype="float32", **changes):
        module = load(f"mean:{place}", "cpu")[0]
        model = baseline(module.backbone.to(getattr(torch, dtype)), variant(name, **changes))
        model.prompts["query"] = prompt
        model.save(str(tmp_path / "same-name"), create_model_card=False)
        return identity(tmp_path / "same-name", load(tmp_path / "same-name", "cpu"))

    copy = tmp_path / "lm"
    shutil.copytree(TINY, copy)
    weights = load_file(copy / "model.safetensors")
    found = [
        saved("echo"),
        saved("mean"),
        saved("echo", layer=-2),
        saved("echo", max_tokens=300),
        saved("echo", templates=["{text}: {text}"]),
        saved("echo", prompt="find: "),
        saved("echo", dtype="bfloat16"),
        saved("echo", str(copy)),
    ]
    save_file(
        {key: tensor * 2 for key, tensor in weights.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    found.append(saved("echo", str(copy)))
    assert {one.name for one in found} == {"local/same-name"}
    assert len({one.revision for one in found}) == len(found)
    assert saved("echo") == found[0]
    kinds = {
        identity(f"{kind}:builtin:tiny", load(f"{kind}:builtin:tiny", "cpu"))
        for kind in ("mean", "echo")
    }
    assert len({one.name for one in kinds}) == len({one.revision for one in kinds}) == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "format_version: 1\nmodl: {name: x}\nencoder: {}\n",
            ["modl: unknown key; did you mean 'model'?", "model: Field required"],
        ),
        (
            "format_version: 1\nmodel: {name: x}\nencoder: {layr: 1}\n",
            ["encoder.layr: unknown key; did you mean 'layer'?"],
        ),
        (
            "format_version: 1\nmodel: {nme: x}\nencoder: {}\n",
            ["model.nme: unknown key; did you mean 'name'?"],
        ),
        ("model: {name: x}\nencoder: {}\n", ["format_version: Field required"]),
        (
            "format_version: 1\nmodel: {name: x, device: cpu}\nencoder: {}\n",
            ["model.device: unknown key; valid keys: name"],
        ),
        ("format_version: 2\nmodel: {name: x}\nencoder: {}\n", ["format_version", "found 2"]),
        (
            "format_version: 1\nmodel: {name: x}\nencoder: {templates: [x]}\n",
            ["encoder.templates: a template must"],
        ),
        ("[", ["not readable as YAML"]),
        ("", ["a mapping of settings"]),
    ],
)
def test_a_wrong_file(text, parts, tmp_path):
    (tmp_path / "baseline.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_saved(tmp_path / "baseline.yaml")
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.where == str(tmp_path / "baseline.yaml")
    assert_refused(cli("similarity", "a", "b", "--model", tmp_path, "--device", "cpu"), parts[0])


@pytest.fixture(scope="module")
def echo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline") / "my-echo"
    baseline(load("mean:builtin:tiny", "cpu")[0].backbone, variant("echo", layer=-2)).save(
        str(folder)
    )
    return folder


def test_from_the_command_line(tmp_path, echo_folder):
    texts = sentences(12, words=5)
    source = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    for number, model in enumerate(("prompt_eol:builtin:tiny", echo_folder)):
        out = tmp_path / f"{number}.npy"
        said = cli("embed", source, "--model", model, "--out", out, "--device", "cpu")
        assert said.code == 0, said.err
        assert np.abs(np.load(out) - load(model, "cpu").encode(texts)).max() < 1e-5
    said = cli("embed", source, "--model", "promt_eol:builtin:tiny", "--out", tmp_path / "no.npy")
    assert_refused(said, "did you mean 'prompt_eol'?")


def test_analyze_and_evaluate_take_them(tmp_path, echo_folder):
    from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate

    texts = sentences(24, words=5)
    rows = [
        {"sentence1": a, "sentence2": b, "score": i}
        for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    (tmp_path / "sets" / "sts" / "One").mkdir(parents=True)
    write_rows(tmp_path / "sets" / "sts" / "One" / "test.jsonl", rows)
    models = ["weighted_mean:builtin:tiny", str(echo_folder)]
    found = evaluate(
        models, EvaluateOptions(local=(tmp_path / "sets",), device="cpu"), tmp_path / "out"
    )
    assert [row.name for row in found] == ["llm2comp/weighted_mean-builtin-tiny", "local/my-echo"]
    assert [row.failed for row in found] == [{}, {}]
    figures = [row.scores["Local-One"]["score"] for row in found]
    assert np.isfinite(figures).all()
    assert figures[0] != figures[1]
    assert len(json.loads(Path(tmp_path / "out" / "summary.json").read_text())) == 2
    for model, row in zip(models, found, strict=True):
        measured = analyze(model, texts, device="cpu")
        assert measured.collapse.dimensions == 256
        assert (measured.name, measured.clusters) == (row.name, None)
        assert row.revision.startswith(measured.revision)
