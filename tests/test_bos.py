"""`model.bos`: one rule says what starts a text, and teacher, encoder, decoder, baselines and the
exported folder follow it.
"""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerFast

from families import MEMORY, TEXTS, make_lm, make_tokenizer, push_adapter
from llm2comp.errors import BackboneError
from llm2comp.measures.context import context_kl
from llm2comp.model.backbone import Backbone, load_backbone
from llm2comp.model.baselines.kinds import NAMES
from llm2comp.model.baselines.module import baseline
from llm2comp.model.compressor import BOS_WEIGHT, Compressor
from llm2comp.model.encoder import as_sentence_transformer, merge_adapters
from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.objectives.loss import decode_from_memory
from llm2comp.recipe import EncoderSettings, ModelSettings
from llm2comp.storage.export import export
from llm2comp.storage.loading import load
from oracles import embed_texts
from tiny_run import assert_refused, cli, make_tree, save_backbone, write_recipe

ASKED = {"auto": "<s>", "none": None, "</s>": "</s>"}


def without_habit():
    """A tokenizer that has a BOS and never puts it anywhere, as GPT-2's and SmolLM2's."""
    tokenizer = make_tokenizer(bos=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|start|>", eos_token="<|end|>"
    )


def compressor_with(bos, **encoder):
    backbone = Backbone(make_lm("llama"), make_tokenizer(), name="llama", bos=bos)
    compressor = Compressor.fresh(backbone, MEMORY, seed=3, settings=EncoderSettings(**encoder))
    push_adapter(backbone, "pretext")
    return compressor.eval()


def test_by_default_it_is_the_tokenizers_own_habit():
    lm = make_lm("llama")
    cases = [(make_tokenizer(), "<s>"), (make_tokenizer(bos=False), None), (without_habit(), None)]
    for tokenizer, expected in cases:
        backbone = Backbone(lm, tokenizer)
        assert backbone.bos_token == expected
        start = [] if expected is None else [tokenizer.bos_token_id]
        assert backbone.tokenise(TEXTS) == [
            start + row for row in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
        ]
        assert backbone.tokenise(["x"]) == tokenizer(["x"])["input_ids"]


def test_a_token_may_be_asked_for_that_is_no_habit():
    backbone = Backbone(make_lm("llama"), without_habit(), bos="<|start|>")
    assert backbone.tokenise([""]) == [[backbone.tokenizer.bos_token_id]]
    assert (
        Backbone(make_lm("llama"), without_habit(), bos="<|end|>").bos_id
        == backbone.tokenizer.eos_token_id
    )


@pytest.mark.parametrize("bos", ["<S>", "fox", "", "null"])
def test_no_such_token(bos, tmp_path):
    """An ordinary word, or the empty one, is none either: a text could hold it."""
    recipe = write_recipe(
        tmp_path, model={"name": str(save_backbone(tmp_path / "lm")), "device": "cpu", "bos": bos}
    )
    assert_refused(cli("train", recipe, "--dry-run"), "model.bos")
    assert_refused(cli("train", recipe, "--out", tmp_path / "run"), "model.bos")
    assert not list(tmp_path.glob("run/*-*/done.json"))
    with pytest.raises(
        BackboneError, match=r"(?s)no such special token.*expected: auto, none, or one of <s>, </s>"
    ):
        Backbone(make_lm("llama"), make_tokenizer(), bos="<S>")


@pytest.mark.parametrize("bos", ASKED)
def test_teacher_decoder_and_encoder_begin_alike(bos):
    compressor = compressor_with(bos)
    backbone, lm = compressor.backbone, make_lm("llama")
    start = [] if ASKED[bos] is None else [backbone.tokenizer.convert_tokens_to_ids(ASKED[bos])]
    own = backbone.tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    (row,) = backbone.tokenise([TEXTS[1]])
    assert row == start + own
    batch = SplitTexts.from_rows([row], [len(row) // 2])
    memory_BKD = compressor.memory_states(batch.context)
    states, _ = decode_from_memory(compressor, memory_BKD, batch.continuation)
    with torch.no_grad():
        table = lm.get_input_embeddings()
        parts = [
            table(torch.tensor([start], dtype=torch.int64)),
            memory_BKD,
            table(batch.continuation.ids_BT),
        ]
        expected = lm.model(inputs_embeds=torch.cat(parts, 1)).last_hidden_state[
            :, len(start) + MEMORY - 1 :
        ]
        assert torch.allclose(states, expected, atol=1e-5)
    assert all(torch.isfinite(torch.tensor(context_kl(compressor, batch)[:2])))
    free = baseline(backbone, NAMES["mean"]).encode([TEXTS[1]], convert_to_tensor=True)
    with torch.no_grad():
        states_TD = lm.model(input_ids=torch.tensor([row])).last_hidden_state[0]
    assert torch.allclose(free[0], states_TD[len(start) :].mean(0), atol=1e-5)


@pytest.mark.parametrize(
    "encoder",
    [{}, {"pooling": "mean"}, {"pooling": "last_token", "prompt": 'the memory "{text}" means: '}],
)
@pytest.mark.parametrize("bos", ["none", "</s>"])
def test_the_exported_folder_follows(tmp_path, bos, encoder):
    texts = [*TEXTS, "", TEXTS[1] * 9]
    model = as_sentence_transformer(compressor_with(bos, **encoder), 40)
    native = embed_texts(model, texts)
    export(model, tmp_path / "folder")
    found = SentenceTransformer(str(tmp_path / "folder"), device="cpu")
    assert torch.allclose(embed_texts(found, texts), native, atol=1e-4)
    first = found.tokenizer.convert_ids_to_tokens(found.tokenizer(TEXTS[0])["input_ids"][0])
    assert first == (ASKED[bos] or "t")
    if ASKED[bos] is not None:
        assert found.tokenizer.bos_token == ASKED[bos]
    merge_adapters(model)
    assert model[0].compressor.backbone.bos_token == ASKED[bos]
    assert torch.allclose(embed_texts(model, texts), native, atol=1e-4)


def test_embeddings_depend_on_it_and_an_empty_text_has_one():
    found = {}
    for bos in ASKED:
        compressor = compressor_with(bos)
        empty, text = (
            compressor(Tokens.pad(compressor.backbone.tokenise([t]), "left"))[0]
            for t in ("", TEXTS[0])
        )
        assert torch.isfinite(empty).all()
        assert empty.norm() > 0.1
        found[bos] = text
    assert (found["auto"] - found["none"]).norm() > 0.01
    assert (found["auto"] - found["</s>"]).norm() > 0.01
    assert BOS_WEIGHT > 0, "with mean pooling an empty text is its BOS alone"


def test_recipes_and_saved_baselines_keep_it(tmp_path):
    folder = save_backbone(tmp_path / "lm")
    plain, none = (
        load_backbone(ModelSettings(name=str(folder), device="cpu", bos=bos))
        for bos in ("auto", "none")
    )
    model = baseline(none, NAMES["echo"])
    model.save(str(tmp_path / "mine"))
    assert "bos: none" in (tmp_path / "mine" / "baseline.yaml").read_text()
    assert torch.equal(
        embed_texts(load(tmp_path / "mine", "cpu"), TEXTS), embed_texts(model, TEXTS)
    )
    assert not torch.equal(
        embed_texts(baseline(plain, NAMES["echo"]), TEXTS), embed_texts(model, TEXTS)
    )
    from llm2comp.recipe import parse_recipe
    from llm2comp.runs.keys import stage_keys

    keys = [
        stage_keys(parse_recipe(make_tree(tmp_path, model={"name": str(folder), "bos": bos})))
        for bos in ("auto", "none")
    ]
    assert all(keys[0][stage] != keys[1][stage] for stage in keys[0])
    assert_refused(cli("train", write_recipe(tmp_path), "model.bos=null"), "model.bos")
