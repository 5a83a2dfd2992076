"""Objectives on one copy of the weights against a naive oracle that has three, and the trainer's
means over a step.

The oracle is written out here: encoder, teacher and decoder are copies of the LM, each text goes
alone and unpadded, the full logits exist, one ordinary backward pass runs through decoder and
encoder. Where an objective works from the text's own states it loops over masked places, or over
the set of a target's tokens, one at a time.
"""

import copy
import inspect
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional

from families import (
    FAMILIES,
    SENTENCES,
    make_compressor,
    push_adapter,
    relative_error,
    stage_1,
    untouched,
)
from llm2comp.data.pretext import Masking
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import SplitTexts
from llm2comp.objectives import count_items, stage_loss
from llm2comp.objectives.loss import objective as file_of
from llm2comp.recipe import PretextStage
from llm2comp.recipe.objectives import OBJECTIVES, Need, ObjectiveName
from llm2comp.recipe.pretext_stage import BagPrompts
from llm2comp.training.stages import RunOptions, run_pretext

LENGTHS, SITES = (17, 9, 23, 12), (9, 4, 5, 11)
FROM_MEMORY = {name for name, row in OBJECTIVES.items() if "decoder" in row.needs}
FROM_TEXT = [name for name, row in OBJECTIVES.items() if "memory" not in row.needs]
# Objectives on texts alone; the others need responses to them (test_response.py).
ON_TEXTS = [name for name in OBJECTIVES if name not in ("response", "alignment")]
CASES = [
    (objective, weighting) for objective in ON_TEXTS for weighting in ("sample_mean", "token_mean")
]
# Every objective with both means; with its own also under checkpointing.
WITH_CHECKPOINTING = [
    *((*case, False) for case in CASES),
    *((name, OBJECTIVES[name].mean, True) for name in ON_TEXTS),
]
MIXED = {"ctkd": 1.0, "reconstruction": 0.3, "continuation": 2.0}
BOTH_KINDS = MIXED | {"mntp": 0.5, "ebae_ebar": 0.7}
MASKING = Masking(rate=0.3, mask_id=290, vocabulary=300, bert=True, seed=2)
PROMPTS = BagPrompts(itself="so {text} the text", next="{text} and then")


def weights_of(objective):
    """One objective's name, or several with their weights."""
    return {objective: 1.0} if isinstance(objective, str) else objective


def rows_for(compressor):
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(2, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    bos = compressor.backbone.bos_id
    return rows if bos is None else [[bos, *row[1:]] for row in rows]


def batch_for(rows, sites=SITES, samples=range(4), pad_id=0):
    return SplitTexts.from_rows(
        rows, sites, pad_id, [MASKING(row, i) for row, i in zip(rows, samples, strict=True)]
    )


def oracle(family, compressor, objective, weighting, temperature=1.0):
    """Loss, and gradients of every adapter weight, of the memory and of the encoder's own
    embeddings if it has some.
    """
    encoder, frozen = copy.deepcopy(compressor), untouched(family)
    parts = {name: [] for name in weights_of(objective)}
    for i, (row, site) in enumerate(zip(rows_for(compressor), SITES, strict=True)):
        if parts.keys() & FROM_MEMORY:
            memory_losses(encoder, frozen, row, site, temperature, parts)
        if "mntp" in parts:
            parts["mntp"] += [masked_losses(encoder, row, MASKING(row, i))]
        if "ebae_ebar" in parts:
            parts["ebae_ebar"] += bag_losses(encoder, row, site)
    loss = 0.0
    for name, weight in weights_of(objective).items():
        means = [losses.mean() for losses in parts[name]]
        mean = (
            torch.cat(parts[name]).mean()
            if weighting == "token_mean"
            else torch.stack(means).mean()
        )
        loss = loss + weight * mean
    loss.backward()
    return loss.item(), gradients(encoder)


def memory_losses(encoder, frozen, row, site, temperature, parts):
    """Adds the losses of one text at every position, by objective."""
    lm = encoder.backbone.lm
    embed = encoder.input_table or lm.get_input_embeddings()
    table = frozen.get_input_embeddings()
    bos = start_of(encoder)
    context, continuation = torch.tensor([row[:site]]), torch.tensor([row[site:]])
    read = torch.cat([embed(context), encoder.memory.vectors_KD[None]], 1)
    memory = lm.base_model(
        inputs_embeds=read, use_cache=False, **attention_of(encoder)
    ).last_hidden_state[:, site:]
    start = table(torch.tensor([bos], dtype=torch.int64))
    for name in parts.keys() & FROM_MEMORY:
        said = context[:, len(bos) :] if name == "reconstruction" else continuation
        decoded = frozen(
            inputs_embeds=torch.cat([start, memory, table(said)], 1), use_cache=False
        ).logits[0]
        student = decoded[len(bos) + memory.shape[1] - 1 :]
        if name == "ctkd":
            teacher = frozen(torch.tensor([row]), use_cache=False).logits[0, site - 1 :].detach()
            logs = [
                functional.log_softmax(logits / temperature, -1) for logits in (student, teacher)
            ]
            parts[name].append(functional.kl_div(*logs, reduction="none", log_target=True).sum(-1))
        else:
            parts[name].append(functional.cross_entropy(student[:-1], said[0], reduction="none"))


def masked_losses(encoder, row, replaced):
    """−log p of each masked token at the place before it, the text read with its masks."""
    read = [token if new < 0 else new for token, new in zip(row, replaced, strict=True)]
    logs = log_probabilities(encoder, read)
    return torch.stack(
        [-logs[place - 1, row[place]] for place, new in enumerate(replaced) if new >= 0]
    )


def bag_losses(encoder, row, site):
    """−log p of each token of the context's set, and of the continuation's, at the last token of
    their prompts.
    """
    bos = start_of(encoder)
    losses = []
    for prompt, target in ((PROMPTS.itself, row[len(bos) : site]), (PROMPTS.next, row[site:])):
        before, behind = (
            encoder.backbone.tokenizer(part)["input_ids"][len(bos) :]
            for part in prompt.split("{text}")
        )
        logs = log_probabilities(encoder, [*bos, *before, *row[len(bos) : site], *behind])
        losses.append(torch.stack([-logs[-1, token] for token in set(target)]))
    return losses


def log_probabilities(encoder, ids):
    """Of the LM's own logits, adapters on, at each place of one text."""
    embed = encoder.input_table or encoder.backbone.lm.get_input_embeddings()
    read = embed(torch.tensor([ids]))
    logits = encoder.backbone.lm(
        inputs_embeds=read, use_cache=False, **attention_of(encoder)
    ).logits[0]
    return functional.log_softmax(logits, -1)


def start_of(encoder):
    return [] if encoder.backbone.bos_id is None else [encoder.backbone.bos_id]


def attention_of(encoder):
    return {"is_causal": False} if encoder.backbone.attention == "bidirectional" else {}


def gradients(compressor):
    found = {
        name: p.grad for name, p in compressor.backbone.lm.named_parameters() if p.grad is not None
    }
    if compressor.memory.vectors_KD.grad is not None:
        found["memory"] = compressor.memory.vectors_KD.grad
    if compressor.input_table is not None:
        found["embeddings"] = compressor.input_table.weight.grad
    return found


def ours(compressor, objective, weighting, temperature=1.0):
    loss = loss_of(compressor, objective, weighting, temperature=temperature)
    loss.backward()
    return loss.item(), gradients(compressor)


def loss_of(compressor, objective, weighting, batch=None, items=None, temperature=1.0):
    batch = batch or batch_for(rows_for(compressor), pad_id=compressor.backbone.pad_id)
    stage = stage_1(objective, weighting, temperature=temperature, bag_prompts=PROMPTS)
    return stage_loss(compressor, batch, stage, items)


def assert_equal(found, expected, lora_weights):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[0] > 5e-3
    assert set(found[1]) == set(expected[1])
    learned = [name for name in found[1] if name not in ("memory", "embeddings")]
    assert len(learned) == lora_weights
    assert all("lora_" in name and ".ucl" in name for name in learned), (
        "the newest adapter alone, nothing of the base"
    )
    for name, gradient in expected[1].items():
        assert relative_error(found[1][name], gradient) < 1e-4, name


def make(family, checkpointing=False, dropout=0.0, **settings):
    """Two adapters, the older one frozen; the newer one and the memory learn."""
    compressor = make_compressor(family, dropout=dropout, **settings).train()
    compressor.learn(memory=True)
    compressor.backbone.set_checkpointing(checkpointing)
    return compressor


def count_calls(compressor):
    """How often the first layer's attention runs."""
    assert compressor.backbone.savings, "tried before the count begins"
    named = compressor.backbone.lm.named_modules()
    name = next(n for n, _ in named if n.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention"))
    calls = []
    compressor.backbone.lm.get_submodule(name).register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


# Objective → passes that a gradient goes through (recomputed under checkpointing), and the
# teacher's.
PASSES = {
    "ctkd": (2, 1),
    "continuation": (2, 0),
    "reconstruction": (2, 0),
    "mntp": (1, 0),
    "ebae_ebar": (2, 0),
}


def test_every_objective_of_a_recipe_is_tested():
    assert set(get_args(ObjectiveName)) == set(OBJECTIVES)
    assert set(OBJECTIVES) - set(ON_TEXTS) == {"response", "alignment"}
    assert set(ON_TEXTS) == set(PASSES) == set(BOTH_KINDS) >= set(FROM_TEXT)
    assert file_of("response").loss is file_of("continuation").loss


def test_an_objective_is_a_file_a_row_and_a_line_of_the_docs():
    folder = Path(inspect.getfile(stage_loss)).parent
    files = {file.stem for file in folder.glob("*.py")} - {"__init__", "loss", "kl"}
    assert files == set(OBJECTIVES)
    for name, row in OBJECTIVES.items():
        found = [
            list(inspect.signature(f).parameters)
            for f in (file_of(name).loss, file_of(name).positions)
        ]
        assert found == [
            ["decoder" if "decoder" in row.needs else "passes", "mean"],
            ["batch", "bos"],
        ]
        assert "memory" in row.needs or "decoder" not in row.needs
    docs = (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8")
    told = [
        f"| `{name}` | {', '.join(need for need in get_args(Need) if need in row.needs)} "
        f"| `{row.mean}` | {row.about} |"
        for name, row in OBJECTIVES.items()
    ]
    assert "\n".join(["|---|---|---|---|", *told, ""]) in docs


@pytest.mark.parametrize(("objective", "weighting", "checkpointing"), WITH_CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_the_oracle(family, objective, weighting, checkpointing):
    compressor = make(family, checkpointing)
    expected = oracle(family, make(family), objective, weighting)
    calls = count_calls(compressor)
    found = ours(compressor, objective, weighting)
    assert_equal(found, expected, len(list(compressor.backbone.adapters.parameters("ucl"))))
    assert ("memory" in found[1]) == (objective in FROM_MEMORY)
    learning, teaching = PASSES[objective]
    assert len(calls) == learning * (2 if checkpointing else 1) + teaching


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("weighting", ["sample_mean", "token_mean"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_several_objectives_share_one_encoding(family, weighting, checkpointing):
    """Those from memory do; the others have passes of their own."""
    expected = oracle(family, make(family), BOTH_KINDS, weighting)
    compressor = make(family, checkpointing)
    calls = count_calls(compressor)
    found = ours(compressor, BOTH_KINDS, weighting)
    assert_equal(found, expected, len(list(compressor.backbone.adapters.parameters("ucl"))))
    one_encoding, others = 1, 3
    decoders = 2  # of the continuation for both that need it, and of the context
    assert len(calls) == (one_encoding + decoders + others) * (2 if checkpointing else 1) + 1


@pytest.mark.parametrize("weighting", ["sample_mean", "token_mean"])
def test_temperature(weighting):
    expected = oracle("llama", make("llama"), "ctkd", weighting, temperature=2.5)
    compressor = make("llama")
    assert_equal(
        ours(compressor, "ctkd", weighting, 2.5),
        expected,
        len(compressor.backbone.adapters.parameters("ucl")),
    )


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("objective", ["ctkd", *FROM_TEXT])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_encoder(family, objective, checkpointing):
    compressor = make(family, checkpointing, attention="causal")
    expected = oracle(family, make(family, attention="causal"), objective, "sample_mean")
    found = ours(compressor, objective, "sample_mean")
    assert_equal(found, expected, len(compressor.backbone.adapters.parameters("ucl")))
    assert abs(found[0] - ours(make(family), objective, "sample_mean")[0]) > 1e-3, (
        "vacuous: attention makes no difference"
    )


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    ("objective", "weighting"),
    [("ctkd", "sample_mean"), ("continuation", "token_mean"), ("ebae_ebar", "sample_mean")],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_own_embeddings_learn_and_the_base_table_does_not(
    family, objective, weighting, checkpointing
):
    """`train_embeddings: all`, also where the base's table is its head (Qwen2, Gemma 3, GPT-2)."""

    def own(checkpointing):
        compressor = make(family, checkpointing)
        compressor.learn(memory=True, embeddings=True)
        generator = torch.Generator().manual_seed(5)
        compressor.input_table.weight.data += 0.05 * torch.randn(
            compressor.input_table.weight.shape, generator=generator
        )
        return compressor

    compressor = own(checkpointing)
    expected = oracle(family, own(False), objective, weighting)
    found = ours(compressor, objective, weighting)
    assert "embeddings" in found[1]
    assert_equal(found, expected, len(compressor.backbone.adapters.parameters("ucl")))
    rows = rows_for(compressor)
    words = (
        compressor.backbone.tokenise(["so", " the text", " and then"])
        if objective == "ebae_ebar"
        else []
    )
    read = sorted(
        {i for row, site in zip(rows, SITES, strict=True) for i in row[:site]}.union(*words)
    )
    touched = found[1]["embeddings"].abs().sum(1).nonzero().flatten().tolist()
    assert touched == read, "exactly the rows of context tokens"
    torch.optim.SGD([p for p in compressor.parameters() if p.requires_grad], lr=1.0).step()
    table = compressor.backbone.input_table
    assert torch.equal(table, untouched(family).get_input_embeddings().weight)
    assert table.grad is None
    assert not torch.equal(compressor.input_table.weight, table)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_layers_drop_what_they_dropped(family):
    """Adapter and attention dropout on: checkpointing changes no bit of what was drawn, in encoder
    and decoder.
    """
    results = []
    for checkpointing in (False, True):
        compressor = make(family, checkpointing, dropout=0.3)
        compressor.backbone.set_attention_dropout(0.2)
        torch.manual_seed(11)
        results.append(ours(compressor, BOTH_KINDS, "sample_mean"))
        assert compressor.training
    assert_equal(results[1], results[0], len(compressor.backbone.adapters.parameters("ucl")))
    torch.manual_seed(12)
    other = ours(make(family, dropout=0.3), BOTH_KINDS, "sample_mean")
    assert abs(other[0] - results[0][0]) > 1e-4, "vacuous: dropout does nothing"


def test_value_without_gradient_is_the_same():
    compressor = make("llama")
    with_gradient = ours(compressor, BOTH_KINDS, "sample_mean")[0]
    with torch.no_grad():
        assert loss_of(compressor, BOTH_KINDS, "sample_mean").item() == pytest.approx(
            with_gradient, rel=1e-6
        )


def test_loss_ignores_padding_and_batch_mates():
    """Each text alone, weighted as in the batch, adds up to the batch's loss."""
    compressor = make("llama").eval()
    rows = rows_for(compressor)
    for objective, weighting in CASES:
        whole = batch_for(rows, pad_id=5)
        bos = compressor.backbone.bos_id is not None
        items = count_items(stage_1(objective, weighting), whole, bos)
        with torch.no_grad():
            together = loss_of(compressor, objective, weighting, whole, items).item()
            alone = [
                loss_of(
                    compressor, objective, weighting, batch_for([row], [site], [i]), items
                ).item()
                for i, (row, site) in enumerate(zip(rows, SITES, strict=True))
            ]
        assert sum(alone) == pytest.approx(together, rel=1e-5)


def test_count_items():
    masks = [[-1, 9, -1, -1, 0], [-1, -1, 2]]
    batch = SplitTexts.from_rows([[1, 2, 3, 4, 3], [1, 2, 2]], [2, 2], 0, masks)

    def counted(weighting, bos):
        return count_items(stage_1(dict.fromkeys(OBJECTIVES, 1.0), weighting), batch, bos)

    assert counted("sample_mean", bos=True) == dict.fromkeys(OBJECTIVES, 2)
    expected = {
        "ctkd": 6,
        "continuation": 4,
        "response": 4,
        "reconstruction": 2,
        "mntp": 3,
        "ebae_ebar": (1 + 2) + (1 + 1),
        "alignment": 2,
    }
    assert counted("token_mean", bos=True) == expected
    without = expected | {"reconstruction": 4, "ebae_ebar": (2 + 2) + (2 + 1)}
    assert counted("token_mean", bos=False) == without


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    lines = [
        " ".join(SENTENCES[(i + j) % 5] for j in range(1 + i % 4)) + f" {i}" for i in range(40)
    ]
    file.write_text("\n".join(lines))
    return str(file)


def fresh():
    compressor = Compressor.fresh(make_compressor(stages=()).backbone, 3, seed=3)
    push_adapter(compressor.backbone, "pretext", dropout=0.0)
    return compressor


@pytest.mark.thorough
@pytest.mark.parametrize(("objective", "weighting"), [*CASES, (BOTH_KINDS, "token_mean")])
def test_accumulation_equals_one_large_batch(texts, tmp_path, objective, weighting):
    """4 × 2 = 8 × 1 through the real stage: ragged texts, so means over micro-batches would be
    another thing.
    """
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        compressor = fresh()
        before = torch.cat(
            [p.detach().flatten() for p in compressor.backbone.adapters.parameters("pretext")]
        )
        stage = PretextStage(
            data=[{"source": texts}],
            objective=objective,
            position_weighting=weighting,
            steps=2,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=None,
            min_characters=0,
            max_tokens=128,
            site_margin_tokens=4,
            group_by_length=False,  # else the three runs meet the texts in other orders
            log_every_steps=1,
            schedule={"learning_rate": 1e-2, "warmup": "linear"},
        )
        folder = tmp_path / f"{batch_size}"
        folder.mkdir()
        run_pretext(compressor, stage, folder, seed=5, options=RunOptions())
        after = torch.cat(
            [p.detach().flatten() for p in compressor.backbone.adapters.parameters("pretext")]
        )
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == [1, 2]
        results.append(
            (after - before, [row["loss"] for row in log], [row["grad_norm"] for row in log])
        )
    update, losses, norms = results[0]
    for other_update, other_losses, other_norms in results[1:]:
        assert other_losses == pytest.approx(losses, rel=1e-4)
        assert other_norms == pytest.approx(norms, rel=1e-4)
        assert relative_error(other_update, update) < 1e-2
