"""`llm2comp evaluate`: mteb's figures for any model, under names that cannot collide; resumed;
clear when something fails.
"""

import json
import shutil
import warnings
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from mteb.abstasks import AbsTaskClustering
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer

import llm2comp
from llm2comp.errors import DataError, ModelFolderError, RecipeError, RunError
from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
from llm2comp.lab.evaluation.lexical import TfidfEncoder
from llm2comp.lab.evaluation.mteb_encoder import MtebEncoder
from llm2comp.lab.evaluation.paper14 import PAPER14
from llm2comp.lab.evaluation.published import published
from llm2comp.lab.evaluation.running import TaskFailedError, run_task
from llm2comp.lab.evaluation.summary import ModelScores, earlier_rows, read_summary, table
from llm2comp.lab.evaluation.tasks import local_tasks, named_tasks
from llm2comp.model.vectors import AT_ONCE_ON_CPU
from llm2comp.storage.identity import identity
from rehearsal import rehearse
from tiny_run import assert_refused, cli, finished, save_backbone, sentences, write_rows

PAIR_COUNT = 20


@pytest.fixture
def sets(tmp_path):
    """Three local sets: two STS, one retrieval."""
    home = tmp_path / "sets"
    for number, name in enumerate(("One", "Two")):
        folder = home / "sts" / name
        folder.mkdir(parents=True)
        texts = sentences(2 * PAIR_COUNT, 6, seed=10 + number)
        write_rows(folder / "test.jsonl", [sts_row(texts, i) for i in range(PAIR_COUNT)])
    folder = home / "retrieval" / "Found"
    (folder / "qrels").mkdir(parents=True)
    documents = sentences(12, 8, seed=3)
    write_rows(
        folder / "corpus.jsonl",
        [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)],
    )
    write_rows(
        folder / "queries.jsonl",
        [{"_id": f"q{i}", "text": text[:20]} for i, text in enumerate(documents[:6])],
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(6))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return home


def sts_row(texts, i):
    return {"sentence1": texts[2 * i], "sentence2": texts[2 * i + 1], "score": (i * 7) % 6}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def run_local(model, sets, out, **options):
    return evaluate([str(model)], EvaluateOptions(local=(sets,), device="cpu", **options), out)[0]


def scores(row):
    return {task: found["score"] for task, found in row.scores.items()}


def plain_model(folder):
    """A sentence-transformers folder that knows nothing of llm2comp."""
    save_backbone(folder / "lm")
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "lm")
    modules = [
        transformer := Transformer(str(folder / "lm")),
        Pooling(transformer.get_embedding_dimension(), "mean"),
    ]
    SentenceTransformer(modules=modules, device="cpu").save(
        str(folder / "plain"), create_model_card=False
    )
    return folder / "plain"


# ---- figures


def test_exported_folder_run_and_native_encoder_score_alike(tmp_path, sets):
    _, run = finished()
    found = {
        place: run_local(run / place, sets, tmp_path / "out")
        for place in ("", "model", "3-scl", "1-pretext")
    }
    assert set(found[""].scores) == {"Local-One", "Local-Two", "Local-Found"}
    assert scores(found["model"]) == scores(found[""])
    assert scores(found["3-scl"]) == pytest.approx(scores(found["model"]), abs=1e-3)
    assert scores(found["1-pretext"]) != pytest.approx(scores(found["model"]), abs=1e-3), (
        "the stages differ"
    )


def test_scores_are_those_of_the_model_s_own_vectors(tmp_path, sets):
    """Spearman by scipy on `encode`, and queries behind the stored prompt in retrieval."""
    _, run = finished()
    row = run_local(run, sets, tmp_path / "out")
    model = llm2comp.load(run, "cpu")
    data = rows_of(sets / "sts" / "One")
    first, second = (
        model.encode([item[key] for item in data], normalize_embeddings=True)
        for key in ("sentence1", "sentence2")
    )
    expected = spearmanr((first * second).sum(1), [item["score"] for item in data]).statistic
    assert row.scores["Local-One"]["score"] == pytest.approx(expected, abs=1e-5)
    assert row.scores["Local-One"]["metric"] == "cosine_spearman"

    queries = [
        json.loads(line)["text"]
        for line in (sets / "retrieval" / "Found" / "queries.jsonl").read_text().splitlines()
    ]
    documents = [
        json.loads(line)["text"]
        for line in (sets / "retrieval" / "Found" / "corpus.jsonl").read_text().splitlines()
    ]

    def ndcg(prompt):
        a = model.encode(
            [prompt + query for query in queries], prompt="", normalize_embeddings=True
        )
        cosines = a @ model.encode_document(documents, normalize_embeddings=True).T
        ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(cosines)]
        return float(np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks]))

    assert row.scores["Local-Found"]["score"] == pytest.approx(ndcg("find the text:"), abs=1e-4)


def test_any_model(tmp_path, sets):
    folder = plain_model(tmp_path)
    plain = run_local(folder, sets, tmp_path / "out")
    baseline = run_local(f"mean:{folder.parent / 'lm'}", sets, tmp_path / "out")
    assert plain.name == "local/plain"
    assert baseline.name.startswith("llm2comp/mean-")
    assert len(read_summary(tmp_path / "out" / "summary.json")) == 2
    assert scores(baseline) != scores(plain), "BOS is left out of the one mean"


def test_texts_come_back_in_order():
    _, run = finished()
    model = llm2comp.load(run, "cpu")
    encoder = MtebEncoder(model, "a/b", "c", max_tokens_per_batch=40, progress=False)
    texts = [" ".join(["word"] * n) for n in (5, 1, 9, 3, 7, 2, 60)] + sentences(70, 5)
    found = encoder.encode(
        [{"text": texts[:4]}, {"text": texts[4:]}],
        task_metadata=metadata("STS12"),
        hf_split="",
        hf_subset="",
    )
    assert np.allclose(found, model.encode(texts), atol=1e-5)


def metadata(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mteb.get_task(name).metadata


# ---- instructions


def test_who_gets_which_prompt():
    model = llm2comp.load(finished()[1], "cpu")
    query, document = mteb.types.PromptType.query, mteb.types.PromptType.document
    encoder = MtebEncoder(
        model, "a/b", "c", {"SciFact": "find it", "STS12": "alike"}, "[{instruction}] "
    )
    assert encoder._prompt(metadata("SciFact"), query) == "[find it] "
    assert encoder._prompt(metadata("SciFact"), document) == ""
    assert encoder._prompt(metadata("STS12"), None) == "[alike] "
    assert encoder._prompt(metadata("NFCorpus"), query) == "find the text:", (
        "no instruction: the stored prompt"
    )
    assert encoder._prompt(metadata("STS13"), None) is None


def test_the_instruction_reaches_the_texts(tmp_path, sets):
    _, run = finished()
    (tmp_path / "table.yaml").write_text("Local-One: alike or not\n")
    plain = run_local(run, sets, tmp_path / "out")
    told = run_local(
        run,
        sets,
        tmp_path / "out",
        instructions=str(tmp_path / "table.yaml"),
        template="{instruction} = ",
    )
    assert scores(told)["Local-Two"] == scores(plain)["Local-Two"]
    model, data = llm2comp.load(run, "cpu"), rows_of(sets / "sts" / "One")
    first, second = (
        model.encode(["alike or not = " + item[key] for item in data], normalize_embeddings=True)
        for key in ("sentence1", "sentence2")
    )
    expected = spearmanr((first * second).sum(1), [item["score"] for item in data]).statistic
    assert scores(told)["Local-One"] == pytest.approx(expected, abs=1e-5)
    assert scores(told)["Local-One"] != scores(plain)["Local-One"]
    assert told.revision != plain.revision, "other instructions are other results"


@pytest.fixture
def room(monkeypatch):
    """Models read longer queries than those of `finished` do: the paper's instructions fit before a
    text.
    """
    usual = llm2comp.load

    def load(*arguments):
        model = usual(*arguments)
        model.max_seq_length = 150
        return model

    monkeypatch.setattr("llm2comp.lab.evaluation.evaluate.load", load)


@pytest.mark.thorough
def test_an_instruction_that_leaves_no_room_is_refused(tmp_path, monkeypatch):
    rehearse(monkeypatch)
    options = EvaluateOptions(tasks=("STSBenchmark",), device="cpu")
    with pytest.raises(RecipeError, match="instruction of STSBenchmark: the prompt leaves no room"):
        evaluate([str(finished()[1] / "3-scl")], options, tmp_path)
    assert not list(tmp_path.iterdir())


def test_instructions_are_for_models_that_know_them(tmp_path, monkeypatch, room):
    rehearse(monkeypatch)
    _, run = finished()
    options = EvaluateOptions(tasks=("STSBenchmark",), device="cpu")
    none = EvaluateOptions(tasks=("STSBenchmark",), device="cpu", instructions="none")

    def revision(place, chosen):
        return evaluate([str(run / place)], chosen, tmp_path / "out")[0].revision

    assert revision("3-scl", options) != revision("3-scl", none)
    assert revision("", options) != revision("", none)
    assert revision("1-pretext", options) == revision("1-pretext", none), "never saw an instruction"


# ---- names, resume


def test_no_two_checkpoints_share_name_and_revision(tmp_path):
    _, run = finished()
    stages = [
        identity(run / place, llm2comp.load(run / place, "cpu"))
        for place in ("1-pretext", "2-ucl", "3-scl", "")
    ]
    assert len({(who.name, who.revision) for who in stages}) == 4
    other = shutil.copytree(run, tmp_path / run.name)
    recipe = (other / "recipe.yaml").read_text()
    assert "query_max_tokens: 24" in recipe
    (other / "recipe.yaml").write_text(recipe.replace("max_tokens: 24", "max_tokens: 23"))
    first, second = (other / place for place in ("1-pretext", "2-ucl"))
    for stage, who in zip((first, second), stages, strict=False):
        found = identity(stage, llm2comp.load(stage, "cpu"))
        assert found.name == who.name
        assert found.revision != who.revision, "queries are cut elsewhere"
    copy = shutil.copytree(run / "model", tmp_path / "a" / "model")
    twin = shutil.copytree(run / "model", tmp_path / "b" / "model")
    one, same = (identity(folder, llm2comp.load(folder, "cpu")) for folder in (copy, twin))
    assert one == same
    words = next(twin.glob("1_*/*.json"))
    words.write_text(words.read_text().replace("0.33333", "0.33334"))
    assert identity(twin, llm2comp.load(twin, "cpu")) != one
    (copy / "README.md").write_text("another card")
    assert identity(copy, llm2comp.load(copy, "cpu")) == one


def test_what_is_there_is_not_run_again(tmp_path, sets, monkeypatch):
    _, run = finished()
    encoded = []
    encode = MtebEncoder.encode

    def counted(self, inputs, *, task_metadata, **rest):
        encoded.append(task_metadata.name)
        return encode(self, inputs, task_metadata=task_metadata, **rest)

    monkeypatch.setattr(MtebEncoder, "encode", counted)
    out = tmp_path / "out"
    first = run_local(run, sets / "sts" / "One", out)
    assert set(encoded) == {"Local-One"}
    encoded.clear()
    whole = run_local(run, sets, out)
    assert set(encoded) == {"Local-Two", "Local-Found"}, "only what is missing"
    encoded.clear()
    assert run_local(run, sets, out).scores == whole.scores
    assert encoded == []
    assert whole.scores["Local-One"] == first.scores["Local-One"]

    data = sets / "sts" / "One" / "test.jsonl"
    data.write_text(data.read_text().replace('"score": 0', '"score": 5'))
    changed = run_local(run, sets, out)
    assert set(encoded) == {"Local-One"}, "another data set of the same name"
    assert changed.scores["Local-One"] != first.scores["Local-One"]
    encoded.clear()
    (result,) = out.rglob("Local-Two.json")
    result.write_text(result.read_text()[:100])
    assert run_local(run, sets, out).scores == changed.scores
    assert set(encoded) == {"Local-Two"}, "a result that was cut off"
    encoded.clear()
    run_local(run / "1-pretext", sets / "sts" / "Two", out)
    assert set(encoded) == {"Local-Two"}, "another checkpoint"


def test_files_of_another_kind_of_set_are_scored_anew(tmp_path):
    texts = sentences(40, 6)
    rows = [sts_row(texts, i) | {"score": i % 2, "label": i % 2} for i in range(20)]
    for kind in ("sts", "pair_classification"):
        folder = tmp_path / kind / "Both"
        folder.mkdir(parents=True)
        write_rows(folder / "test.jsonl", rows)
        (found,) = run_local("tfidf", folder, tmp_path / "out").scores.values()
        assert found["metric"] == ("cosine_spearman" if kind == "sts" else "cosine_ap")


def test_results_of_a_run_go_into_it(tmp_path, sets):
    run = shutil.copytree(finished()[1], tmp_path / "run")
    said = cli("evaluate", run, "--local", sets, "--device", "cpu")
    assert said.code == 0, said
    assert said.out == ""
    assert "Local-One" in said.err
    row = read_summary(run / "scores" / "summary.json")[0]
    assert f"{100 * row.scores['Local-Found']['score']:.2f}" in said.err
    (result,) = (run / "scores" / "results").rglob("Local-One.json")
    stored = json.loads(result.read_text())
    assert stored["task_name"] == "Local-One"
    (found,) = next(iter(stored["scores"].values()))
    assert found["main_score"] == pytest.approx(row.scores["Local-One"]["score"], abs=1e-5)
    assert row.revision in str(result)


# ---- the paper's 14


@pytest.mark.thorough
def test_the_paper_s_tasks_run_on_made_up_data(tmp_path, monkeypatch, room):
    """End to end on made-up data in all 14 task objects, without network."""
    rehearse(monkeypatch)

    def no_network(*_, **__):
        raise AssertionError("a data set was asked for")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    said = cli(
        "evaluate",
        finished()[1],
        "--tasks",
        "paper14",
        "--compare",
        "--out",
        tmp_path,
        "--device",
        "cpu",
    )
    assert said.code == 0, said
    lines = [line.split() for line in said.err.splitlines() if "/14 " in line]
    assert [words[1] for words in lines] == [f"{task}:" for task in PAPER14]
    (row,) = read_summary(tmp_path / "summary.json")
    assert list(row.scores) == list(PAPER14)
    results = list(tmp_path.rglob("SciFact.json"))
    assert len(results) == 1
    assert {path.stem for path in results[0].parent.glob("*.json")} >= set(PAPER14)


@pytest.mark.thorough
def test_the_paper_s_tasks_are_the_versions_and_figures_it_used(tmp_path, monkeypatch, room):
    tasks = {task.metadata.name: task for task in named_tasks(["paper14"])}
    assert list(tasks) == list(PAPER14)
    assert set(PAPER14) == set(published()[0].scores)
    assert tasks["STS17"].hf_subsets == ["en-en"]
    assert all(task.eval_splits == ["test"] for task in tasks.values())
    renamed = {
        name for name, task in tasks.items() if task.metadata.main_score != PAPER14[name].metric
    }
    assert renamed == {"SprintDuplicateQuestions"}, (
        "mteb 2 takes the best of five similarities there"
    )
    rehearse(monkeypatch)
    row = evaluate(
        [str(finished()[1])], EvaluateOptions(tasks=("paper14",), device="cpu"), tmp_path
    )[0]
    assert {task: found["metric"] for task, found in row.scores.items()} == {
        name: task.metric for name, task in PAPER14.items()
    }
    (file,) = tmp_path.rglob("SprintDuplicateQuestions.json")
    stored = json.loads(file.read_text())["scores"]["test"][0]
    assert row.scores["SprintDuplicateQuestions"]["score"] == pytest.approx(
        stored["cosine_ap"], abs=1e-5
    )


def test_a_task_s_name_in_a_benchmark_and_by_itself_is_one():
    names = [task.metadata.name for task in named_tasks(["STS12", "MTEB(eng, v2)", "STS12"])]
    assert len(names) == len(set(names)) == 41
    assert names[0] == "STS12"


def test_each_model_of_a_call_gets_the_same_random_draws(tmp_path):
    folder = tmp_path / "clustering" / "Topics"
    folder.mkdir(parents=True)
    rows = [{"text": text, "label": n % 4} for n, text in enumerate(sentences(60, 6))]
    write_rows(folder / "test.jsonl", rows)
    (ours,) = local_tasks(folder)
    own = {"metadata": ours.metadata, "max_fraction_of_documents_to_embed": None}
    task = type("Mtebs", (AbsTaskClustering,), own)()
    task.dataset, task.data_loaded = ours.dataset, True
    first, second = (run_task(TfidfEncoder(), task).score for _ in range(2))
    assert first == second


@pytest.mark.thorough
def test_a_typo_names_the_nearest(tmp_path):
    assert_refused(
        cli("evaluate", finished()[1], "--tasks", "SciFacts"), "SciFacts", "did you mean 'SciFact'?"
    )
    assert_refused(
        cli("evaluate", finished()[1], "--tasks", "MTEB(eng,v2)"), "did you mean 'MTEB(eng, v2)'?"
    )
    assert_refused(cli("evaluate", finished()[1], "--tasks", "paper-14"), "did you mean 'paper14'?")


# ---- failures


def test_a_hub_that_fails_stops_only_its_tasks(tmp_path, sets, monkeypatch, room):
    def fail(*_, **__):
        raise ConnectionError("Network is unreachable")

    for kind in (mteb.abstasks.AbsTaskSTS, mteb.abstasks.AbsTaskRetrieval):
        monkeypatch.setattr(kind, "load_data", fail)
    # local sets hold their data already, so nothing of theirs is fetched
    said = cli(
        "evaluate",
        finished()[1],
        "--tasks",
        "SciFact",
        "--tasks",
        "STS17",
        "--local",
        sets,
        "--out",
        tmp_path,
        "--device",
        "cpu",
    )
    assert said.code == 1
    assert "Traceback" not in said.err
    for name in ("SciFact", "STS17"):
        assert (
            f"{name}: left out: {name}: its data cannot be had: ConnectionError: Network "
            "is unreachable" in said.err
        )
    assert "error: 2 tasks could not be run: STS17, SciFact" in " ".join(said.err.split())
    (row,) = read_summary(tmp_path / "summary.json")
    assert set(row.scores) == {"Local-One", "Local-Two", "Local-Found"}
    assert set(row.failed) == {"SciFact", "STS17"}


def test_offline_without_the_data(monkeypatch):
    """The real libraries, told that there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    encoder = MtebEncoder(llm2comp.load(finished()[1], "cpu"), "a/b", "c")
    for task in named_tasks(["STSBenchmark", "SciFact"]):
        with pytest.raises(TaskFailedError, match="its data cannot be had"):
            run_task(encoder, task)


def test_nan_embeddings_stop_with_their_text(tmp_path, sets):
    model = llm2comp.load(finished()[1], "cpu")
    bad = rows_of(sets / "sts" / "One")[3]["sentence2"]
    (ids,) = model.preprocess([bad])["input_ids"].tolist()

    def spoil(_, args, found):
        rows = zip(args[0]["input_ids"], args[0]["attention_mask"], strict=True)
        is_bad = torch.tensor([row[mask.bool()].tolist() == ids for row, mask in rows])
        found["sentence_embedding"][is_bad] = torch.nan
        return found

    model.register_forward_hook(spoil)
    (task,) = local_tasks(sets / "sts" / "One")
    with pytest.raises(DataError, match="not finite") as error:
        run_task(MtebEncoder(model, "a/b", "c"), task, tmp_path)
    assert bad in str(error.value)
    assert not isinstance(error.value, TaskFailedError), "the rest would be as wrong"
    assert not list(tmp_path.rglob("Local-One.json"))


def test_what_mteb_cannot_run_is_one_failed_task(monkeypatch):
    encoder = MtebEncoder(llm2comp.load(finished()[1], "cpu"), "a/b", "c")
    (task,) = named_tasks(["STS12"])
    task.dataset, task.data_loaded = {"default": {}}, True
    with pytest.raises(TaskFailedError, match="mteb cannot score it with this model"):
        run_task(encoder, task)


@pytest.mark.parametrize("tokens", [None, 64])
def test_batches_shrink_until_they_fit_and_stay_small(tokens):
    model, sizes = llm2comp.load(finished()[1], "cpu"), []

    def small(_, args):
        size = args[0]["input_ids"].numel()  # memory tokens among them
        sizes.append(size)
        if size > 50:
            raise torch.OutOfMemoryError("out of memory")

    encoder = MtebEncoder(model, "a/b", "c", max_tokens_per_batch=tokens, progress=False)
    texts = sentences(200, 4)
    arguments = {"task_metadata": metadata("STS12"), "hf_split": "test", "hf_subset": "default"}
    handle = model.register_forward_pre_hook(small)
    try:
        found = encoder.encode([{"text": texts}], **arguments)
        first = list(sizes)
        encoder.encode([{"text": texts[:50]}], **arguments)
    finally:
        handle.remove()
    refused = [size for size in first if size > 50]
    assert sizes[: len(refused)] == refused, "each refusal lowers the budget for good"
    assert all(size <= 50 for size in sizes[len(refused) :])
    assert refused[0] > 0.8 * (tokens or AT_ONCE_ON_CPU)
    assert all(after <= before / 2 for before, after in zip(refused, refused[1:], strict=False))
    assert np.allclose(found, model.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["nothing to evaluate", "--tasks paper14"]),
        (["--tasks", "STS12", "--template", "none"], ["--template", "{instruction}"]),
        (
            ["--tasks", "STS12", "--instructions", "no.yaml"],
            ["no.yaml", "auto, none, or a YAML file"],
        ),
        (["--local", "nowhere"], ["nowhere", "no such folder"]),
    ],
)
def test_bad_options(tmp_path, arguments, parts):
    assert_refused(cli("evaluate", finished()[1], *arguments, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_instructions_that_are_no_table(tmp_path):
    for content in ("- a\n", "a: [b]\n", "a: {\n", "SciFact\n"):
        (tmp_path / "table.yaml").write_text(content)
        said = cli(
            "evaluate", finished()[1], "--tasks", "STS12", "--instructions", tmp_path / "table.yaml"
        )
        assert_refused(said, "table.yaml")


def test_a_malformed_local_set_says_file_and_line(tmp_path, sets):
    file = sets / "sts" / "Two" / "test.jsonl"
    lines = file.read_text().splitlines()
    lines[6] = lines[6].replace('"score"', '"scoore"')
    file.write_text("\n".join(lines) + "\n")
    assert_refused(
        cli("evaluate", finished()[1], "--local", sets, "--out", tmp_path / "out"),
        "Two/test.jsonl",
        "line 7",
        "score",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["no/such-model", "nowhere", "mean:no/such-model", "no-such-folder/"]
)
def test_a_model_that_is_none(tmp_path, sets, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = cli("evaluate", name, "--local", sets, "--out", tmp_path / "out")
    assert said.code == 1
    assert "Traceback" not in said.err
    assert name.removeprefix("mean:").rstrip("/") in said.err
    with pytest.raises((ModelFolderError, llm2comp.errors.BackboneError)):
        llm2comp.load(name)


# ---- the table


def rows_for(*tasks, **failed):
    found = {
        task: {"score": 0.5 + i / 100, "metric": "m", "split": "test"}
        for i, task in enumerate(tasks)
    }
    return ModelScores("mine", "local/mine", "1", found, failed)


def cells(shown):
    return [list(column.cells) for column in shown.columns]


def test_table_averages_only_what_is_whole():
    whole, part = rows_for("A", "B"), rows_for("A", B="no data")
    names, _, first, second = cells(table([whole, part]))
    assert names == ["A", "B", "average"]
    assert first == ["50.00", "51.00", "50.50"]
    assert second == ["50.00", "failed", ""]


def test_compare_shows_the_published_rows():
    shown = table([rows_for(*PAPER14)], compare=True)
    assert len(shown.columns) == 3 + len(published())
    best = next(
        i for i, column in enumerate(shown.columns) if column.header == "LLM2Comp-KL\nSCL, paper"
    )
    assert cells(shown)[best][-1] == "66.78"
    assert cells(shown)[best][list(PAPER14).index("STS17")] == "91.40"
    missing = next(
        i for i, column in enumerate(shown.columns) if str(column.header).startswith("RepLLaMA")
    )
    assert cells(shown)[missing][0] == "–"
    few = table([rows_for("SciFact", "ArguAna")], compare=True)
    assert cells(few)[best] == ["76.79", "59.37", ""], (
        "an average over other tasks would compare what cannot be compared"
    )
    assert len(table([rows_for("Local-One")], compare=True).columns) == 3


def test_models_evaluated_before_are_compared(tmp_path):
    summary = [
        vars(rows_for("A", "B")),
        vars(ModelScores("other", "local/other", "2", rows_for("A", "C").scores)),
    ]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    now = [rows_for("A")]
    (other,) = earlier_rows(now, tmp_path)
    assert other.model == "other"
    assert set(other.scores) == {"A"}
    assert earlier_rows([rows_for("Z")], tmp_path) == []
    (tmp_path / "summary.json").write_text("[{")
    with pytest.raises(RunError, match="summary.json"):
        earlier_rows(now, tmp_path)


def test_the_summary_keeps_other_models_and_other_tasks(tmp_path, sets):
    _, run = finished()
    run_local(run, sets / "sts" / "One", tmp_path)
    run_local(run / "1-pretext", sets / "sts" / "One", tmp_path)
    run_local(run, sets / "sts" / "Two", tmp_path)
    found = {row.name: set(row.scores) for row in read_summary(tmp_path / "summary.json")}
    assert found == {
        "llm2comp/run": {"Local-One", "Local-Two"},
        "llm2comp/run-1-pretext": {"Local-One"},
    }


def test_scores_on_other_data_leave_the_summary(tmp_path, sets):
    _, run = finished()
    run_local(run, sets / "sts", tmp_path)
    file = sets / "sts" / "One" / "test.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    now = run_local(run / "1-pretext", sets / "sts", tmp_path)
    found = {row.name: set(row.scores) for row in read_summary(tmp_path / "summary.json")}
    assert found == {
        "llm2comp/run": {"Local-Two"},
        "llm2comp/run-1-pretext": {"Local-One", "Local-Two"},
    }
    assert [set(row.scores) for row in earlier_rows([now], tmp_path)] == [{"Local-Two"}]


@pytest.mark.parametrize("path", ["a/b", "x"])
def test_hub_ids_keep_their_name(path, monkeypatch):
    model = llm2comp.load(finished()[1], "cpu")
    assert identity(path, model).name == path
    assert not Path(path).exists()
