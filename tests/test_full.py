"""`adapter.kind: full`: a trained copy of the LM encodes, the LM itself stays teacher and decoder,
bit for bit.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import llm2comp
from families import (
    FAMILIES,
    SENTENCES,
    make_backbone,
    relative_error,
    snapshot,
    stage_1,
    untouched,
)
from llm2comp.errors import BackboneError, RecipeError
from llm2comp.measures.context import context_recovered
from llm2comp.measures.readout import read_out
from llm2comp.model.backbone.full import FullCopy
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.tokens import SplitTexts, Tokens, position_ids
from llm2comp.objectives import stage_loss
from llm2comp.recipe import AdapterSettings, SclStage, parse_recipe
from llm2comp.runs.folder import FOLDERS
from llm2comp.storage.export import export
from llm2comp.storage.golden import verify
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.plan import plan
from llm2comp.training.run import train
from oracles import embed_texts
from tiny_run import make_tree

FULL = AdapterSettings(kind="full")


def make_full(family, moved=True, **settings):
    """An encoder whose copy has moved away from the LM."""
    compressor = Compressor.fresh(make_backbone(family, **settings), 3, seed=3)
    compressor.backbone.add_adapter("pretext", FULL)
    if moved:
        generator = torch.Generator().manual_seed(1)
        for parameter in compressor.backbone.adapters.parameters("pretext"):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return compressor.eval()


def ctkd(compressor, batch):
    return stage_loss(compressor, batch, stage_1("ctkd"), {"ctkd": 2.0})


def split_batch(compressor):
    rows = compressor.backbone.tokenise([" ".join(SENTENCES[i : i + 3]) for i in (0, 2)])
    return SplitTexts.from_rows(
        rows, [len(rows[0]) // 2, len(rows[1]) // 3], compressor.backbone.pad_id
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_copy_reads_as_the_lm_and_the_lm_never_changes(family):
    compressor = make_full(family, moved=False)
    backbone, plain = compressor.backbone, make_backbone(family)
    backbone.savings = plain.savings = frozenset()  # bits are compared, at padding too
    tokens = Tokens.pad(backbone.tokenise(SENTENCES[:3]), "left", backbone.pad_id)
    x = backbone.embed(tokens.ids_BT)
    assert torch.equal(
        backbone.encoder_pass(x, tokens.mask_BT), plain.encoder_pass(x, tokens.mask_BT)
    )
    before = snapshot(backbone.lm)
    compressor.learn(memory=True)
    compressor.train()
    optimizer = torch.optim.SGD([p for p in compressor.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        ctkd(compressor, split_batch(compressor)).backward()
        optimizer.step()
    after = snapshot(backbone.lm)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert not torch.allclose(
            backbone.encoder_pass(x, tokens.mask_BT),
            plain.encoder_pass(x, tokens.mask_BT),
            atol=1e-4,
        )
        reference = (
            untouched(family)
            .base_model(
                inputs_embeds=x,
                attention_mask=tokens.mask_BT,
                position_ids=position_ids(tokens.mask_BT),
            )
            .last_hidden_state
        )
        assert torch.equal(backbone.decoder_pass(x, tokens.mask_BT), reference)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradient_is_that_of_two_separate_models(family, checkpointing):
    """Oracle: encoder and frozen LM as two models, one plain backward pass through both."""
    compressor = make_full(family)
    batch = split_batch(compressor)
    encoder, frozen = copy.deepcopy(compressor), Compressor.fresh(make_backbone(family), 3, seed=3)
    compressor.learn(memory=True)
    compressor.train()
    compressor.backbone.set_checkpointing(checkpointing)
    loss = ctkd(compressor, batch)
    loss.backward()

    backbone, lm = frozen.backbone, untouched(family)
    encoder.learn(memory=True)
    memory = encoder.memory_states(batch.context)
    total = 0.0
    for i in range(2):
        text = batch.text.ids_BT[i][batch.text.mask_BT[i].bool()][None]
        context = int(batch.context.mask_BT[i].sum())
        teacher = lm(input_ids=text).logits[0, context - 1 :].float()
        bos = [] if backbone.bos_id is None else [backbone.embed(torch.tensor([[backbone.bos_id]]))]
        x = torch.cat([*bos, memory[i : i + 1], backbone.embed(text[:, context:])], 1)
        student = lm(inputs_embeds=x).logits[0, -len(teacher) :].float()
        kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
        total = total + kl.mean() / 2
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    pairs = [(compressor.memory.vectors_KD.grad, encoder.memory.vectors_KD.grad)]
    mine, theirs = (
        dict(c.backbone.adapters.copy.named_parameters()) for c in (compressor, encoder)
    )
    pairs += [
        (mine[name].grad, theirs[name].grad)
        for name in mine
        if theirs[name].grad is not None and theirs[name].grad.any()
    ]
    assert len(pairs) > 10
    assert all(relative_error(found, expected) < 1e-3 for found, expected in pairs)
    assert not any(parameter.grad is not None for parameter in compressor.backbone.lm.parameters())


@pytest.mark.parametrize("objective", ["ctkd", "continuation", "reconstruction"])
def test_a_copy_over_a_half_precision_lm(objective):
    """As it is on every GPU: the copy stays float32, the LM bfloat16; the figures are those of
    float32, roughly.
    """
    halves, whole = make_full("llama"), make_full("llama")
    halves.backbone.lm.to(torch.bfloat16)
    assert next(halves.backbone.copy.parameters()).dtype == torch.float32
    losses = []
    for compressor in (halves, whole):
        compressor.learn(memory=True)
        loss = stage_loss(compressor, split_batch(compressor), stage_1(objective))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    found, expected = (c.memory.vectors_KD.grad for c in (halves, whole))
    assert relative_error(found, expected) < 0.3, "bfloat16 has 8 bits"
    learned = [p.grad.dtype for p in halves.backbone.copy.parameters() if p.grad is not None]
    assert set(learned) == {torch.float32}


def test_what_is_read_from_a_copy_over_a_half_precision_lm():
    halves, whole = make_full("llama"), make_full("llama")
    halves.backbone.lm.to(torch.bfloat16)
    found = [context_recovered(c, [split_batch(c)]) for c in (halves, whole)]
    assert found[0] == pytest.approx(found[1], abs=0.1)
    assert len(read_out(halves, SENTENCES[0], 40).words) == 3


def test_kinds_do_not_mix():
    backbone = make_backbone()
    backbone.add_adapter("pretext", AdapterSettings(rank=2))
    with pytest.raises(BackboneError, match="cannot mix"):
        backbone.add_adapter("ucl", FULL)
    other = make_backbone()
    other.add_adapter("pretext", FULL)
    with pytest.raises(BackboneError, match="cannot mix"):
        other.add_adapter("ucl", AdapterSettings(rank=2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_export_equals_native(family, tmp_path):
    compressor = make_full(family)
    compressor.learn(memory=True, embeddings=True)
    with torch.no_grad():
        next(compressor.input_table.parameters()).add_(0.01)
    model = as_sentence_transformer(compressor, 40)
    export(model, tmp_path / "model")
    assert verify(tmp_path / "model") > 0.9999
    found = embed_texts(llm2comp.load(tmp_path / "model", "cpu"), SENTENCES)
    assert torch.allclose(found, embed_texts(model, SENTENCES), atol=1e-4)
    plain = as_sentence_transformer(make_full(family, moved=False), 40)
    assert not torch.allclose(found, embed_texts(plain, SENTENCES), atol=1e-2), (
        "vacuous: nothing was trained"
    )


def full_tree(folder):
    tree = make_tree(folder, adapter={"kind": "full"})
    for stage in ("pretext", "ucl", "scl"):
        tree[stage] = tree[stage] | {"attention_dropout": 0.2, "schedule": {"learning_rate": 1e-3}}
    tree["pretext"]["train_embeddings"] = "all"
    tree["scl"] |= {"train_embeddings": True, "train_memory": True, "matryoshka_dims": [8, 16]}
    return tree


def test_a_run_from_end_to_end(tmp_path):
    """All stages, the plan's count, stages loaded back, done before, exported."""
    recipe = parse_recipe(full_tree(tmp_path))
    run = train(recipe, tmp_path / "run")
    weights = [
        load_file(run / place / "adapter" / "encoder.safetensors") for place in FOLDERS.values()
    ]
    tables = [
        load_file(run / place / "memory.safetensors")["embeddings"] for place in FOLDERS.values()
    ]
    assert weights[0].keys() == weights[2].keys()
    for one, other in ((0, 1), (1, 2)):
        assert all(not torch.equal(weights[one][key], weights[other][key]) for key in weights[0]), (
            "every layer learns"
        )
    assert torch.equal(tables[0], tables[1]), "UCL was not asked to train the embeddings"
    assert not torch.equal(tables[1], tables[2])
    live, model = llm2comp.load(run / "3-scl", "cpu"), llm2comp.load(run, "cpu")
    assert isinstance(live[0].compressor.backbone.adapters, FullCopy)
    assert torch.allclose(embed_texts(live, SENTENCES), embed_texts(model, SENTENCES), atol=1e-4)
    earlier = llm2comp.load(run / "2-ucl", "cpu")
    assert not torch.allclose(
        embed_texts(live, SENTENCES), embed_texts(earlier, SENTENCES), atol=1e-2
    )
    plans, _ = plan(recipe)
    memory, table = 3 * 32, tables[0].numel()
    layers = sum(tensor.numel() for tensor in weights[0].values())
    assert [p.trainable for p in plans] == [
        layers + memory + table,
        layers,
        layers + memory + table,
    ]
    before = (run / "1-pretext" / "done.json").read_text()
    assert train(recipe, tmp_path / "run") == run
    assert (run / "1-pretext" / "done.json").read_text() == before
    assert json.loads(before)["steps"] == 4


def test_matryoshka_sums_the_loss_over_first_dimensions():
    compressor = make_full("llama")
    model = as_sentence_transformer(compressor, 40)
    data = {"data": [{"source": "unused"}]}
    texts = (SENTENCES[:4], [text + " indeed" for text in SENTENCES[:4]])
    features = [model.preprocess(list(column)) for column in texts]

    def loss(**settings):
        with torch.no_grad():
            return contrastive_loss(model, SclStage(**data, **settings))(
                [dict(f) for f in features], None
            ).item()

    first, second = (embed_texts(model, column).double() for column in texts)

    def naive(width):
        a, b = (torch.nn.functional.normalize(x[:, :width], dim=-1) for x in (first, second))
        return torch.nn.functional.cross_entropy(a @ b.T / 0.05, torch.arange(4)).item()

    assert loss(matryoshka_dims=[8, 16]) == pytest.approx(
        naive(32) + naive(16) + naive(8), rel=1e-3
    )
    assert loss() == pytest.approx(naive(32), rel=1e-3)
    assert naive(8) != pytest.approx(naive(32), rel=1e-2)
    with pytest.raises(RecipeError, match="more dimensions"):
        contrastive_loss(model, SclStage(**data, matryoshka_dims=[64]))
