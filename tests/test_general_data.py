"""tools/: the data of the general encoder, its hard negatives, and the packaged encoder, on corpora
and a run made here.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.torch import load_file

from llm2comp.model.backbone import load_backbone
from llm2comp.model.baselines.kinds import NAMES
from llm2comp.model.baselines.module import baseline
from llm2comp.recipe import ModelSettings
from llm2comp.storage.loading import load
from tiny_run import cli, finished, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import general_data
import hard_negatives
import package_encoder

LEAK = "The harbour pilot brought nineteen barges through the narrow lock before noon."
HELD_OUT = "Nobody at the observatory had seen a comet that bright for over thirty years."
TOPICS = ("glass", "copper", "barley", "granite", "linen", "amber", "cedar", "salt")


def prose(topic, seed, sentences=6):
    """A paragraph of some 500 characters on one topic."""
    draw = np.random.default_rng((seed, TOPICS.index(topic)))
    words = [
        "merchants",
        "carried",
        "old",
        "roads",
        "winter",
        "the",
        "towns",
        "traded",
        "with",
        "before",
        "records",
        topic,
    ]
    return " ".join(
        " ".join([topic.capitalize(), *draw.choice(words, 14)]) + "." for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """corpus/, pairs/ and eval/: one leak, one repeated and one held-out paragraph in each corpus,
    leaks among the pairs.
    """
    folder = tmp_path_factory.mktemp("data")
    for part in ("corpus", "pairs", "eval/sts"):
        (folder / part).mkdir(parents=True)
    write_rows(
        folder / "eval" / "sts" / "test.jsonl",
        [{"sentence1": LEAK, "sentence2": "short", "score": 1.0}],
    )
    row = {"source": "s", "license": "CC0"}
    write_rows(folder / "corpus" / "heldout.jsonl", [{**row, "text": HELD_OUT}])
    for number, corpus in enumerate(general_data.CORPORA):
        texts = [
            "\n\n".join([prose(topic, number), prose(topic, 100 + number)]) for topic in TOPICS
        ]
        texts[0] += "\n\n" + f"It began so. {LEAK.upper()} Then they left."
        texts[1] += "\n\n" + HELD_OUT.replace(",", "")
        texts[2] += "\n\n" + prose("glass", number)  # of the first document
        ids = [f"{corpus} {topic} roads#{i}" for i, topic in enumerate(TOPICS)]
        content = "".join(
            json.dumps({**row, "id": i, "text": text}) + "\n"
            for i, text in zip(ids, texts, strict=True)
        )
        (folder / "corpus" / f"{corpus}.jsonl.zst").write_bytes(
            zstandard.compress(content.encode())
        )
    pairs = [
        {"anchor": f"what about {topic} {i}?", "positive": prose(topic, 200 + i)}
        for topic in TOPICS
        for i in range(3)
    ]
    pairs += [
        {"anchor": "who brought the barges?", "positive": LEAK},
        {"anchor": "again", "positive": pairs[0]["positive"]},
    ]
    for name in general_data.GIVEN:
        content = "".join(json.dumps(r) + "\n" for r in pairs).encode()
        (folder / "pairs" / name).write_bytes(
            zstandard.compress(content) if name.endswith(".zst") else content
        )
    return folder


def call(module, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def general(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("general") / "out"
    call(general_data, "--data", data, "--out", out)
    return out


def test_nothing_of_the_evaluation_sets_is_left(general):
    files = sorted(general.glob("*.jsonl"))
    assert {file.stem for file in files} >= {
        "texts",
        "sentences",
        "weak-title",
        "squad",
        "snli",
        "medquad",
        "arxiv",
    }
    for file in files:
        text = general_data.plain(file.read_text())
        assert text, "vacuous: no rows"
        assert general_data.plain(LEAK) not in text
        assert general_data.plain(HELD_OUT) not in text


def test_what_was_dropped_is_counted(general):
    counts = json.loads((general / "counts.json").read_text())
    corpora = len(general_data.CORPORA)
    # later ones repeat it
    assert counts["dropped"]["paragraphs dropped: in an evaluation set"] == 1
    assert (
        counts["dropped"]["paragraphs dropped: repeated or held out"] == 2 * corpora + corpora - 1
    )
    for name in ("snli", "squad", "medquad", "arxiv"):
        assert counts["dropped"][f"{name}: dropped, in an evaluation set"] == 1
        assert counts["dropped"][f"{name}: dropped, repeated anchor or positive"] == 1
        assert counts["rows"][name] == len(rows(general / f"{name}.jsonl")) == 3 * len(TOPICS)


def test_weak_pairs_are_parts_of_one_document(general, data):
    titles = rows(general / "weak-title.jsonl")
    assert {pair["anchor"] for pair in titles} <= {f"{topic} roads" for topic in TOPICS}
    assert all(pair["positive"].lower().startswith(pair["anchor"].split()[0]) for pair in titles)
    for kind in ("sentence", "paragraph"):
        pairs = rows(general / f"weak-{kind}.jsonl")
        assert pairs
        assert all(pair["anchor"].split()[0] == pair["positive"].split()[0] for pair in pairs), (
            "of one topic"
        )
        assert not any(pair["anchor"] in pair["positive"] for pair in pairs)


def test_the_same_again(general, data, tmp_path):
    call(general_data, "--data", data, "--out", tmp_path / "again")
    assert {f.name: f.read_bytes() for f in general.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }


def test_hard_negatives_are_near_and_below_the_margin(general, tmp_path):
    file = shutil.copy(general / "squad.jsonl", tmp_path / "squad.jsonl")
    call(hard_negatives, file, "--model", "mean:builtin:tiny", "--margin", "0.02")
    found = rows(tmp_path / "squad-hard.jsonl")
    assert len(found) > len(TOPICS)
    positive_of = {pair["anchor"]: pair["positive"] for pair in rows(general / "squad.jsonl")}
    model = baseline(
        load_backbone(ModelSettings(name="builtin:tiny", attention="causal")), NAMES["mean"]
    )
    corpus = list(positive_of.values())
    scores = model.similarity(
        model.encode([row["anchor"] for row in found]), model.encode(corpus)
    ).numpy()
    for row, score in zip(found, scores, strict=True):
        assert row["positive"] == positive_of[row["anchor"]]
        limit = score[corpus.index(row["positive"])] * 0.98
        allowed = [
            text
            for text, s in zip(corpus, score, strict=True)
            if s <= limit + 1e-5 and text != row["positive"]
        ]
        best = max(allowed, key=lambda text: score[corpus.index(text)])
        assert score[corpus.index(row["negative"])] == pytest.approx(
            score[corpus.index(best)], abs=2e-5
        )


def test_bad_input_is_one_line(tmp_path, data):
    for module, arguments, told in (
        (general_data, ["--data", tmp_path, "--out", tmp_path / "x"], "no such folder"),
        (general_data, ["--data", data, "--out", tmp_path / "x", "--texts", "0"], "above 0"),
        (hard_negatives, [tmp_path / "none.jsonl", "--model", "mean:builtin:tiny"], "no such file"),
        (
            hard_negatives,
            [data / "pairs" / "snli.jsonl", "--model", "nothing/here/at/all"],
            "--model",
        ),
        (
            package_encoder,
            [tmp_path, "--counts", tmp_path / "c.json", "--out", tmp_path / "x"],
            "not a run",
        ),
    ):
        with pytest.raises(SystemExit, match=told):
            call(module, *arguments)
        assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def packaged(general, tmp_path_factory):
    """An evaluated copy of a finished run, packaged."""
    folder = tmp_path_factory.mktemp("packaged")
    run = shutil.copytree(finished()[1], folder / "run")
    sts = folder / "sts" / "Small"
    sts.mkdir(parents=True)
    pairs = [
        {"sentence1": prose(t, 1, 1), "sentence2": prose(u, 2, 1), "score": float(t == u)}
        for t in TOPICS
        for u in TOPICS
    ]
    write_rows(sts / "test.jsonl", pairs)
    said = cli("evaluate", run, "tfidf", "--local", sts, "--out", run / "scores")
    assert said.code == 0, said.err
    call(
        package_encoder,
        run,
        "--counts",
        general / "counts.json",
        "--out",
        folder / "assets",
        "--float32",
    )
    return run, folder / "assets", said.out


def test_packaged_encoder_is_the_run(packaged):
    run, assets, _ = packaged
    golden = json.loads((assets / "golden.json").read_text())
    expected = load(run / "3-scl").encode(golden["texts"])
    found = load(assets / "3-scl").encode(golden["texts"])
    assert np.array_equal(found, expected)
    assert np.abs(found - np.array(golden["embeddings"])).max() < 1e-5
    assert not list(assets.rglob("metrics.jsonl"))


def test_half_precision_adapters_load_as_what_they_hold(packaged, general, tmp_path):
    run, _, _ = packaged
    call(package_encoder, run, "--counts", general / "counts.json", "--out", tmp_path / "assets")
    weights = load_file(tmp_path / "assets" / "1-pretext" / "adapter" / "adapter_model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.bfloat16"}
    golden = json.loads((tmp_path / "assets" / "golden.json").read_text())
    found = load(tmp_path / "assets" / "3-scl").encode(golden["texts"])
    assert np.abs(found - np.array(golden["embeddings"])).max() < 1e-5
    cosines = (found * load(run / "3-scl").encode(golden["texts"])).sum(1) / np.linalg.norm(
        found, axis=1
    )
    assert (
        cosines / np.linalg.norm(load(run / "3-scl").encode(golden["texts"]), axis=1)
    ).min() > 0.999


def test_card_tells_data_settings_and_scores(packaged):
    run, assets, _ = packaged
    card = (assets / "README.md").read_text()
    summary = json.loads((run / "scores" / "summary.json").read_text())
    assert len(summary) == 2
    for row in summary:
        assert f"{100 * row['scores']['Local-Small']['score']:.1f}" in card
    assert "| Small |" in card
    assert "1 × paragraphs dropped: in an evaluation set" in card
    assert "| pretext | 4 | 4 | 0.01 |" in card
