"""Responses equal a naive greedy loop; shards come whole, are shared out without overlap, and go on
after a stop.
"""

import json

import numpy as np
import pytest
import torch

import llm2comp
from families import make_backbone, make_lm
from llm2comp.data.responses import (
    MANIFEST_FILE,
    read_manifest,
    shard_file,
    source_digest,
    teacher_file,
)
from llm2comp.data.sources import read_responses, read_texts
from llm2comp.errors import DataError, RunError
from llm2comp.recipe import TextData
from llm2comp.training import generate
from llm2comp.training.generate import generate_responses
from llm2comp.training.responder import Responder, ResponseOptions
from tiny_run import assert_refused, cli, save_backbone, sentences, write_rows

TEXTS = ["the fox reads", "memory", "Ünicode 記憶\nof two lines", *sentences(8, words=6)]
SHORT = ResponseOptions(max_new_tokens=9, shard_size=4, batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return str(save_backbone(tmp_path_factory.mktemp("lm") / "backbone"))


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory):
    """(folder, what it says): responses to TEXTS with a teacher's embeddings, made in one go.

    Not to be changed.
    """
    folder = tmp_path_factory.mktemp("made") / "responses"
    return folder, generate_responses(lm, TEXTS, folder, changed(teacher=f"mean:{lm}"))


def changed(**settings):
    return ResponseOptions(**vars(SHORT) | settings)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def greedy(backbone, ids, count, ends):
    """One text, the whole prefix anew for each token: no cache, no padding."""
    ids, found = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            best = int(backbone.lm(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in ends:
            return found, True
        found.append(best)
        ids.append(best)
    return found, False


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_responses_are_those_of_a_naive_greedy_loop(family):
    """Also where the model's own generation settings ask for something else, and where one response
    ends before others.
    """
    backbone = make_backbone(family, "causal")
    plain = make_backbone(family, "causal")
    rows = backbone.tokenise(TEXTS)
    free = [greedy(plain, row, 9, ())[0] for row in rows]
    end = next(
        token for ids in free for token in ids[1:] if not any(token == other[0] for other in free)
    )
    config = backbone.lm.generation_config
    config.eos_token_id, config.repetition_penalty, config.do_sample, config.top_k = (
        [end],
        9.0,
        True,
        2,
    )
    responder = Responder(backbone, SHORT)
    ends = {end, backbone.tokenizer.eos_token_id}
    assert set(responder.eos_ids) == ends
    prompts = [responder.prompt(text) for text in TEXTS]
    assert prompts == [(row, False) for row in rows]
    found, tokens = responder.respond(rows)
    naive = [greedy(plain, row, 9, ends) for row in rows]
    assert {ended for _, ended in naive} == {True, False}, "vacuous: all end, or none"
    assert found == [plain.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in naive]
    assert tokens == sum(len(ids) for ids, _ in naive)
    assert len(set(found)) > 1


def test_shards_hold_texts_and_responses_in_order(lm, made):
    folder, said = made
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [len(path.read_text().splitlines()) for path in sorted(folder.glob("*.jsonl"))] == [
        4,
        4,
        3,
    ]
    assert [row["text"] for row in rows] == TEXTS
    backbone = generate.load_backbone(
        generate.ModelSettings(name=lm, device="cpu", attention="causal")
    )
    naive = [
        greedy(backbone, ids, 9, {backbone.tokenizer.eos_token_id})[0]
        for ids in backbone.tokenise(TEXTS)
    ]
    assert [row["response"] for row in rows] == [
        backbone.tokenizer.decode(ids, skip_special_tokens=True) for ids in naive
    ]
    assert "11 responses, 0 empty; 3 of 3 shards" in said
    teacher = llm2comp.load(f"mean:{lm}", "cpu")
    expected = teacher.encode([row["response"] for row in rows])
    found = np.concatenate([np.load(teacher_file(folder, shard)) for shard in range(3)])
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    answers = read_responses(TextData(source=str(folder), response="response"), teacher=True).rows
    assert [(a.text, a.response) for a in answers] == [
        (row["text"], row["response"]) for row in rows
    ]
    assert np.array_equal(np.stack([a.teacher_D for a in answers]), found.astype(np.float32))
    assert read_texts(TextData(source=str(folder))).rows == TEXTS


class StoppedError(Exception):
    """As a kill would."""


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("after", [1, 2])
def test_a_stopped_run_goes_on_to_identical_files(lm, tmp_path, monkeypatch, temperature, after):
    options = changed(temperature=temperature, teacher=f"mean:{lm}")
    generate_responses(lm, TEXTS, tmp_path / "whole", options)
    written, write = [], generate.write_text

    def stop(path, text):
        if path.suffix == ".jsonl":
            if len(written) == after:
                raise StoppedError
            written.append(path)
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_text", stop)
        with pytest.raises(StoppedError):
            generate_responses(lm, TEXTS, tmp_path / "parts", options)
    assert len(list((tmp_path / "parts").glob("*.jsonl"))) == after
    before = [path.stat().st_mtime_ns for path in written]
    generate_responses(lm, TEXTS, tmp_path / "parts", options)
    assert [path.stat().st_mtime_ns for path in written] == before, "made again"
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert source_digest(tmp_path / "parts") == source_digest(tmp_path / "whole")


def test_drawing_follows_the_seed(lm, tmp_path):
    def drawn(name, **settings):
        generate_responses(lm, TEXTS, tmp_path / name, changed(**settings))
        return [
            answer.response
            for answer in read_responses(
                TextData(source=str(tmp_path / name), response="response")
            ).rows
        ]

    greedy_ones, first, second = (
        drawn("0"),
        drawn("1", temperature=0.9, seed=1),
        drawn("2", temperature=0.9, seed=2),
    )
    assert len({tuple(greedy_ones), tuple(first), tuple(second)}) == 3
    assert drawn("1 again", temperature=0.9, seed=1) == first


def test_shares_are_disjoint_and_complete(lm, made, tmp_path):
    seen = []
    for i in range(1, 5):
        before = set(tmp_path.rglob("*.jsonl"))
        said = generate_responses(
            lm, TEXTS, tmp_path / "shared", changed(teacher=f"mean:{lm}"), (i, 4)
        )
        seen.append({path.name for path in set(tmp_path.rglob("*.jsonl")) - before})
    assert [len(each) for each in seen] == [1, 1, 1, 0]
    assert len(set().union(*seen)) == 3
    assert "3 of 3 shards" in said
    assert content(tmp_path / "shared") == content(made[0])


def test_an_incomplete_folder_is_no_source(lm, tmp_path):
    generate_responses(lm, TEXTS, tmp_path / "r", SHORT, (2, 2))
    with pytest.raises(DataError, match=r"responses-00000.jsonl: a shard is missing"):
        read_responses(TextData(source=str(tmp_path / "r"), response="response"))


def test_empty_responses_stay_in_the_shards_and_are_counted(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Responder, "respond", lambda self, rows: ([" \n"] + ["x"] * (len(rows) - 1), len(rows))
    )
    assert "11 responses, 5 empty" in generate_responses(lm, TEXTS, tmp_path / "r", SHORT)
    loaded = read_responses(TextData(source=str(tmp_path / "r"), response="response"))
    assert len(loaded.rows) == 6
    assert loaded.skipped == {"empty": 5}


def test_chat_template(lm, tmp_path):
    chat = str(save_backbone(tmp_path / "chat", chat=True))
    generate_responses(chat, TEXTS[:4], tmp_path / "with", SHORT)
    generate_responses(chat, TEXTS[:4], tmp_path / "without", changed(chat_template=False))
    assert read_manifest(tmp_path / "with").chat_template.startswith("{% for m in messages %}")
    assert read_manifest(tmp_path / "without").chat_template is None
    assert (
        shard_file(tmp_path / "with", 0).read_bytes()
        != shard_file(tmp_path / "without", 0).read_bytes()
    )
    backbone = make_backbone("llama", "causal", chat=True)
    ids, _ = Responder(backbone, changed(prompt="say: {text}")).prompt("the fox")
    assert (
        ids
        == backbone.tokenizer("<|user|>say: the fox<|end|>", add_special_tokens=False)["input_ids"]
    )
    with pytest.raises(DataError, match="chat template cannot be applied"):
        generate_responses(lm, TEXTS, tmp_path / "none", changed(chat_template=True))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("chat", [False, True])
def test_long_texts_are_cut_at_their_end_so_that_the_prompt_fits(chat):
    backbone = make_backbone("llama", "causal", chat=chat)
    responder = Responder(backbone, changed(max_tokens=40, prompt="say {text} again"))
    long = " ".join(sentences(20))
    ids, cut = responder.prompt(long)
    assert cut
    assert 36 <= len(ids) <= 40
    said = backbone.tokenizer.decode(ids, skip_special_tokens=True)
    start, end = ("<|user|>say ", " again<|end|>") if chat else ("say ", " again")
    assert said.startswith(start)
    assert said.endswith(end)
    assert long.startswith(said[len(start) : -len(end)])
    assert Responder(make_backbone("llama", "causal"), changed(max_new_tokens=100)).max_tokens == 60
    with pytest.raises(DataError, match="no room for a text"):
        Responder(make_backbone("llama", "causal"), changed(max_new_tokens=159))


def test_other_settings_are_refused(lm, made, tmp_path):
    folder, _ = made
    before = content(folder)
    for settings in (
        {"max_new_tokens": 8},
        {"temperature": 1.0},
        {"prompt": "{text}?"},
        {"shard_size": 5},
        {"teacher": None},
    ):
        (name,) = settings
        with pytest.raises(RunError, match=f"made otherwise(.|\n)*{name}: .* there, .* asked for"):
            generate_responses(lm, TEXTS, folder, changed(**{"teacher": f"mean:{lm}"} | settings))
    with pytest.raises(RunError, match="texts_digest"):
        generate_responses(lm, [*TEXTS[:-1], "another"], folder, changed(teacher=f"mean:{lm}"))
    moved = str(save_backbone(tmp_path / "other", lm=make_lm("llama", seed=5)))
    with pytest.raises(RunError, match="weights: "):
        generate_responses(moved, TEXTS, folder, changed(teacher=f"mean:{lm}"))
    assert content(folder) == before


def test_a_folder_goes_on_with_its_own_shards(lm, made, tmp_path):
    """Where none is asked for; a new folder has small ones."""
    folder = tmp_path / "r"
    usual = changed(teacher=f"mean:{lm}", shard_size=None)
    folder.mkdir()
    for name, data in content(made[0]).items():
        if "00001" not in name:
            (folder / name).write_bytes(data)
    generate_responses(lm, TEXTS, folder, usual)
    assert content(folder) == content(made[0])
    generate_responses(lm, TEXTS, tmp_path / "new", changed(shard_size=None, max_new_tokens=1))
    assert read_manifest(tmp_path / "new").shard_size == 200


def test_a_folder_of_something_else_is_refused(lm, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="would replace what is not its own"):
        generate_responses(lm, TEXTS, tmp_path, SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="a folder without responses"):
        read_texts(TextData(source=str(tmp_path)))


def test_damage_is_named(lm, made, tmp_path):
    folder = tmp_path / "r"

    def fresh():
        folder.mkdir(exist_ok=True)
        for name, data in content(made[0]).items():
            (folder / name).write_bytes(data)

    def refused(*parts, teacher=True):
        with pytest.raises(DataError) as error:
            read_responses(TextData(source=str(folder), response="response"), teacher)
        assert all(part in str(error.value) for part in parts), str(error.value)

    fresh()
    shard = shard_file(folder, 1)
    shard.write_bytes(shard.read_bytes()[:-30])
    refused(
        "responses-00001.jsonl: is damaged",
        "malformed JSON",
        "delete responses-00001.jsonl",
        teacher=False,
    )
    with pytest.raises(DataError, match="responses-00001.jsonl: is damaged"):
        generate_responses(lm, TEXTS, folder, changed(teacher=f"mean:{lm}"))
    shard.unlink()
    generate_responses(lm, TEXTS, folder, changed(teacher=f"mean:{lm}"))
    assert content(folder) == content(made[0])
    shard.write_bytes(shard.read_bytes() * 2)
    refused("responses-00001.jsonl: is damaged", "expected: 4 rows", "found: 8")
    fresh()
    file = teacher_file(folder, 2)
    file.write_bytes(file.read_bytes()[:-1])
    refused("responses-00002.npy: is damaged")
    np.save(file, np.zeros((2, 32), np.float16))
    refused("responses-00002.npy: is damaged", "expected: 3 rows")
    np.save(file, np.full((3, 32), np.nan, np.float16))
    assert (
        len(read_responses(TextData(source=str(folder), response="response"), teacher=True).rows)
        == 8
    )
    np.save(file, np.zeros((3, 7), np.float16))
    refused("several widths", "[7, 32]")
    fresh()
    (folder / MANIFEST_FILE).write_text('{"format_version": 1}')
    refused("responses.json: is damaged", "model: Field required")


def test_a_teacher_is_asked_for_that_was_not_there(lm, tmp_path):
    generate_responses(lm, TEXTS, tmp_path / "r", SHORT)
    with pytest.raises(DataError, match="holds no embeddings of a teacher"):
        read_responses(TextData(source=str(tmp_path / "r"), response="response"), teacher=True)


def test_command(lm, made, tmp_path):
    file = write_rows(tmp_path / "texts.jsonl", [{"query": text} for text in TEXTS])
    out = tmp_path / "r"
    usual = [
        "generate-responses",
        "-m",
        lm,
        "--texts",
        file,
        "--column",
        "query",
        "-o",
        out,
        "--device",
        "cpu",
    ]
    usual += [
        "--max-new-tokens",
        9,
        "--shard-size",
        4,
        "--batch-size",
        3,
        "--teacher",
        f"mean:{lm}",
    ]
    assert cli(*usual, "--shards", "1/2").code == 0
    assert len(list(out.glob("*.jsonl"))) == 2
    assert cli(*usual, "--shards", "2/2").code == 0
    assert content(out) == content(made[0])
    assert_refused(cli(*usual, "--shards", "3/2"), "no share", "3/2")
    assert_refused(cli(*usual, "--prompt", "no place"), "--prompt")
    assert_refused(cli(*usual, "--seed", 4), "made otherwise", "seed: '0' there, '4' asked for")
    assert_refused(cli(*usual, "--chat-template"), "chat template")
