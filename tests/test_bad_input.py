"""Whatever a user gets wrong at the command line: one message, exit code 1, nothing
half-written.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file

import llm2comp
from families import lm_from, make_lm
from llm2comp.errors import ModelFolderError
from tiny_run import (
    assert_refused,
    cli,
    finished,
    make_tree,
    save_backbone,
    sentences,
    write_recipe,
    write_rows,
)

GARBAGE = b"\x93\xff\x00 no such format \xfe" * 40


@pytest.fixture
def model(tmp_path):
    """A copy of a finished model folder, to be damaged."""
    return Path(shutil.copytree(finished()[1] / "model", tmp_path / "model"))


def files_in(folder):
    return (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        if folder.exists()
        else []
    )


def train(folder, *overrides, **changes):
    return cli("train", write_recipe(folder, **changes), *overrides, "--out", folder / "run")


def only(*stages, **changes):
    """Changes that leave a recipe with these stages."""
    return {stage: None for stage in ("pretext", "ucl", "scl") if stage not in stages} | changes


# ---- recipes


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            b"format_version: 1\nname: x\nmodell: {name: y}\n",
            ("modell: unknown key; did you mean 'model'?",),
        ),
        (b"format_version: 1\nname: [unclosed\n", ("not readable as YAML", "line")),
        (b"\x93\x00\xff", ("not readable as YAML",)),
        (b"name: 2020-13-45\n", ("not readable as YAML",)),
        (b"? [a]\n: b\n", ("not readable as YAML",)),
        (b"1: 2\n", ("1: ",)),
    ],
)
def test_recipe_files_that_are_none(tmp_path, content, parts):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert_refused(cli("train", file, "--out", tmp_path / "run"), str(file), *parts)
    assert files_in(tmp_path) == ["recipe.yaml"]


def test_missing_recipe_file(tmp_path):
    assert_refused(
        cli("train", tmp_path / "tinny.yaml", "--out", tmp_path / "run"),
        "no such recipe",
        "tinny.yaml",
    )
    assert_refused(cli("train", "tinny", "--out", tmp_path / "run"), "did you mean 'tiny'?")
    assert_refused(cli("train", tmp_path, "--out", tmp_path / "run"), "no such recipe")
    assert files_in(tmp_path) == []
    (tmp_path / "my-tiny.yaml").touch()
    said = cli("train", tmp_path / "mytiny.yaml", "--out", tmp_path / "run")
    assert_refused(said, "did you mean 'my-tiny.yaml'?")
    run = tmp_path / "before"
    run.mkdir()
    (run / "recipe.yaml").touch()
    said = cli("train", run, "--out", tmp_path / "run")
    assert_refused(said, f"did you mean '{run / 'recipe.yaml'}'?")


def test_a_file_where_a_folder_is_to_be(tmp_path):
    (tmp_path / "mine.txt").write_text("a text\n")
    said = cli("train", "tiny", "--out", tmp_path / "mine.txt")
    assert_refused(said, "cannot write", "a file stands in the way: move it or choose another")
    assert (tmp_path / "mine.txt").read_text() == "a text\n"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("ucl.stepz=3", "ucl.stepz: unknown key; did you mean 'steps'?"),
        ("ucl.data.7.source=x", "no such place in the list"),
        ("ucl.data.x.source=x", "no such place in the list"),
        ("name.first=x", "lies under a plain value"),
        ("seed", "not an override"),
        ("seed=[", "value is not YAML"),
        ("seed=2020-13-45", "value is not YAML"),
        ("ucl.steps=many", "ucl.steps: "),
        ("pretext.site_margin_tokens=30", "no split site exists"),
    ],
)
def test_overrides_that_do_not_fit(tmp_path, override, part):
    assert_refused(train(tmp_path, override), part)
    assert not (tmp_path / "run").exists()


# ---- data


@pytest.mark.parametrize("stage", ["pretext", "scl"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("source={folder}/texst.jsonl", ("no such file", "did you mean 'texts.jsonl'?")),
        ("source=builtin:python-doc", ("no such builtin", "builtin:python-docs")),
        ("column", ("no column 'nowhere'", "columns ")),
    ],
)
def test_data_that_is_missing_is_found_before_any_training(tmp_path, stage, change, parts):
    key = {"pretext": "column", "scl": "anchor"}[stage]
    change = f"{key}=nowhere" if change == "column" else change.format(folder=tmp_path)
    assert_refused(train(tmp_path, f"{stage}.data.0.{change}"), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_bad_rows_are_counted_and_kept_out(tmp_path):
    rows = [json.dumps({"text": text}).encode() for text in sentences(12)]
    bad = [
        b"",
        b'{"text": ""}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "too short"}',
        b'{"text": "broken',
    ]
    (tmp_path / "texts.jsonl").write_bytes(b"\n".join(bad + rows))
    tree = make_tree(tmp_path)
    (tmp_path / "texts.jsonl").write_bytes(b"\n".join(bad + rows))
    said = train(
        tmp_path, **only("pretext", "ucl", pretext=tree["pretext"] | {"min_characters": 30})
    )
    assert said.code == 0, said
    assert (
        "texts.jsonl: 13 rows; left out: 2 empty (line 1, line 2), 1 not UTF-8 (line 3), "
        "1 malformed JSON (line 5)" in said.err
    )
    assert "stage 1: 12 texts of up to 48 tokens; left out: 1 under 30 characters" in said.err
    assert "stage 2: 12 texts of 20 characters or more" in said.err


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("skip", "10 texts of up to 48 tokens; left out: 2 over 48 tokens"),
        ("truncate", "12 texts of up to 48 tokens"),
        ("chunk", "texts of up to 48 tokens"),
    ],
)
def test_texts_over_the_limit(tmp_path, policy, told):
    tree = make_tree(tmp_path)
    texts = sentences(10, 8, seed=9) + [" ".join(sentences(20, seed=n)) for n in range(2)]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    said = train(
        tmp_path, **only("pretext", pretext=tree["pretext"] | {"long_texts": policy, "steps": 1})
    )
    assert said.code == 0, said
    assert told in said.err
    if policy == "chunk":
        count = int(said.err.split("stage 1: ")[1].split()[0])
        assert count > 20


def test_no_text_can_be_split(tmp_path):
    tree = make_tree(tmp_path)
    write_rows(tmp_path / "texts.jsonl", [{"text": "the lazy dog reads"}] * 30)
    pretext = tree["pretext"] | {"min_characters": 1, "site_margin_tokens": 24}
    said = train(tmp_path, **only("pretext", pretext=pretext))
    assert_refused(said, "no text is fit for stage 1", "30 under 48 tokens")


def test_duplicates_are_one_row(tmp_path):
    make_tree(tmp_path)
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(1) * 10])
    assert_refused(train(tmp_path, **only("ucl")), "too few", "found: 1")


# ---- backbones

FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "new_decoder_architecture": False,
}
CAUSAL = {
    "falcon": lambda: lm_from(transformers.FalconConfig(**FALCON, bos_token_id=0, eos_token_id=1)),
    "bloom": lambda: lm_from(
        transformers.BloomConfig(
            vocab_size=320, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
        )
    ),
    "gptj": lambda: lm_from(
        transformers.GPTJConfig(
            vocab_size=320,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=160,
            rotary_dim=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("family", CAUSAL)
def test_a_backbone_that_stays_causal(tmp_path, family):
    save_backbone(tmp_path / "causal", lm=CAUSAL[family]())
    model = {"name": str(tmp_path / "causal"), "device": "cpu"}
    said = train(tmp_path, model=model, adapter={"rank": 2, "targets": "all-linear"})
    assert_refused(
        said,
        f"model_type {family}",
        "the first state ignores the last token",
        "set model.attention: causal",
    )
    targets = {"gptj": ["q_proj", "v_proj", "fc_in"]}.get(
        family, ["query_key_value", "dense_h_to_4h"]
    )
    changes = only(
        "pretext", model=model | {"attention": "causal"}, adapter={"rank": 2, "targets": targets}
    )
    said = train(tmp_path, "pretext.steps=1", **changes)
    assert said.code == 0, said.err


@pytest.mark.thorough
@pytest.mark.parametrize("targets", [["no_such"], ["q_proj", "no_such"], []])
def test_lora_targets_that_match_nothing(tmp_path, targets):
    said = train(tmp_path, f"adapter.targets={json.dumps(targets)}")
    assert_refused(said, "adapter" if not targets else "no_such")
    assert "[]" in said.err or "q_proj" in said.err
    assert train(tmp_path, "pretext.steps=1", **only("pretext")).code == 0, (
        "a run that never began does not claim its folder"
    )


def test_a_backbone_with_nan_weights_is_not_called_causal(tmp_path):
    lm = make_lm()
    lm.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    save_backbone(tmp_path / "nan", lm=lm)
    assert_refused(
        train(tmp_path, model={"name": str(tmp_path / "nan"), "device": "cpu"}), "not finite"
    )


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_garbage(path):
    path.write_bytes(GARBAGE)


def damage_empty(path):
    path.write_bytes(b"")


def damage_brackets(path):
    path.write_bytes(b"[]")


def damage_remove(path):
    path.unlink()


DAMAGES = [damage_truncate, damage_garbage, damage_empty, damage_brackets, damage_remove]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_backbone(tmp_path, name, damage):
    make_tree(tmp_path)
    damage(tmp_path / "backbone" / name)
    assert_refused(train(tmp_path), str(tmp_path / "backbone"), "cannot be loaded")
    assert "done.json" not in files_in(tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.parametrize("content", [b"---\nlicense: [unclosed\n---\n", GARBAGE, b""])
def test_a_card_that_cannot_be_read_stops_nothing(tmp_path, content):
    make_tree(tmp_path)
    (tmp_path / "backbone" / "README.md").write_bytes(content)
    said = train(tmp_path, "ucl.steps=1", **only("ucl"))
    assert said.code == 0, said
    assert "| licence | unknown |" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_weights_that_lack_a_tensor(tmp_path):
    make_tree(tmp_path)
    file = tmp_path / "backbone" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert_refused(train(tmp_path), "lm_head.weight")


def test_pickled_weights_are_refused(tmp_path, model):
    make_tree(tmp_path)
    for folder in (tmp_path / "backbone", model):
        file = folder / "model.safetensors"
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    assert_refused(train(tmp_path), "safetensors")
    assert_refused(cli("similarity", "a", "b", "-m", model), "safetensors")


def test_names_that_mean_nothing(tmp_path):
    assert_refused(
        train(tmp_path, "model.name=builtin:huge"), "no such builtin model", "builtin:tiny"
    )
    assert_refused(train(tmp_path, "model.device=warp"), "no such device here", "warp")
    assert_refused(train(tmp_path, "model.device=cuda:99"), "no such device here", "cuda:99")
    assert_refused(train(tmp_path, f"model.name={tmp_path}/nothing"), "cannot be loaded", "nothing")
    assert_refused(
        train(tmp_path, "model.name=owner/no-such-model"), "cannot be loaded", "owner/no-such-model"
    )
    assert_refused(train(tmp_path, "memory.tokens=160"), "no room")


# ---- run directories


def test_a_run_directory_of_another_recipe_names_the_fields(tmp_path):
    run = tmp_path / "run"
    assert train(tmp_path, **only("ucl")).code == 0
    before = {path: (run / path).read_bytes() for path in files_in(run) if (run / path).is_file()}
    said = train(tmp_path, "ucl.steps=5", "seed=3", **only("ucl"))
    assert_refused(
        said,
        "belongs to another recipe",
        "seed: 0 there, 3 asked for",
        "ucl.steps: 4 there, 5 asked for",
    )
    assert {
        path: (run / path).read_bytes() for path in files_in(run) if (run / path).is_file()
    } == before


def test_a_directory_that_is_no_run_is_left_as_it_was(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert_refused(train(tmp_path), "would replace what is not its own", "thesis.txt")
    assert files_in(tmp_path / "run") == ["thesis.txt"]


@pytest.mark.parametrize("out", ["texts.jsonl", "texts.jsonl/run", "/proc/nothing/run"])
def test_places_where_no_run_can_be(tmp_path, out):
    assert_refused(cli("train", write_recipe(tmp_path), "--out", tmp_path / out), "cannot write")


def test_a_run_in_use(tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert_refused(train(tmp_path), "another process is training here")
    assert files_in(tmp_path / "run") in ([".lock"], [])


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["pretext", "ucl", "scl"])
def test_a_learning_rate_that_runs_away(tmp_path, stage):
    overrides = (f"{stage}.schedule.learning_rate=1.0e+38", f"{stage}.schedule.warmup_steps=0")
    said = train(tmp_path, *overrides, "watch=null", **only(stage))
    assert_refused(
        said, f"{stage}, step ", "the loss is not finite", f"lower {stage}.schedule.learning_rate"
    )
    shutil.rmtree(tmp_path / "run")
    said = train(tmp_path, *overrides, "watch.every_steps=1", **only(stage))
    assert_refused(
        said,
        f"{stage}, step 1: the watch found",
        "not finite",
        f"lower {stage}.schedule.learning_rate",
    )
    assert not list((tmp_path / "run").glob("*/done.json"))


# ---- model folders


def commands(folder, tmp_path):
    (tmp_path / "in.txt").write_text("a text\n")
    return {
        "verify": ["verify", folder],
        "similarity": ["similarity", "a", "b", "-m", folder],
        "embed": ["embed", tmp_path / "in.txt", "-m", folder, "-o", tmp_path / "out.npy"],
    }


@pytest.mark.parametrize("command", ["verify", "similarity", "embed"])
def test_truncated_weights(tmp_path, model, command):
    damage_truncate(model / "model.safetensors")
    assert_refused(
        cli(*commands(model, tmp_path)[command]), str(model), "cannot be loaded", "damaged"
    )
    with pytest.raises(ModelFolderError, match="cannot be loaded"):
        llm2comp.load(model)
    assert not (tmp_path / "out.npy").exists()


# nobody reads them
HARMLESS = {".llm2comp.json", "README.md", "done.json", "1_WordWeights/model.safetensors"}


@pytest.mark.thorough
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_model_damaged(tmp_path, damage):
    whole = finished()[1] / "model"
    names = [name for name in files_in(whole) if (whole / name).is_file() and name not in HARMLESS]
    assert len(names) >= 8
    for name in names:
        folder = Path(shutil.copytree(whole, tmp_path / name.replace("/", "-")))
        damage(folder / name)
        said = cli("verify", folder)
        assert (
            said.code == 0 if unnoticed(name, damage) else not assert_refused(said, str(folder))
        ), (name, said)
        if name != "golden.json":
            said = cli("similarity", "a", "b", "-m", folder)
            assert "Traceback" not in said.err
            if said.code:
                assert_refused(said, str(folder))


def unnoticed(name, damage):
    """Files that sentence-transformers has good defaults for."""
    absent = damage is damage_remove and name in (
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    )
    return absent or (damage is damage_brackets and name == "sentence_bert_config.json")


def test_weights_of_another_model(model):
    tensors = load_file(model / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].flip(0)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert_refused(cli("verify", model), "gives other embeddings than when it was saved", "cosine")


def test_nan_embeddings_name_the_text(tmp_path, model):
    tensors = load_file(model / "model.safetensors")
    tensors["norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "in.txt").write_text("the first text\nthe second text\n")
    said = cli("embed", tmp_path / "in.txt", "-m", model, "-o", tmp_path / "out.npy")
    assert_refused(said, "text 1: the embedding is not finite", "'the first text', and 1 more")
    assert not (tmp_path / "out.npy").exists()
    assert_refused(
        cli("similarity", "a", "b", "-m", model), "text 1: the embedding is not finite", "'a'"
    )
    assert_refused(cli("verify", model), "gives other embeddings")


@pytest.mark.parametrize("what", ["nowhere", "empty", "file", "unfinished"])
def test_folders_that_are_no_model(tmp_path, what):
    place = tmp_path / what
    if what == "file":
        place.write_text("text")
    elif what != "nowhere":
        place.mkdir()
    if what == "unfinished":
        shutil.copy(finished()[1] / "recipe.yaml", place)
    problem = {
        "empty": "not a sentence-transformers folder",
        "unfinished": "the run is not finished",
    }.get(what, "no such folder")
    assert_refused(cli("similarity", "a", "b", "-m", place), problem, str(place))
    unchecked = {"empty": "cannot be checked"}.get(what, problem)
    assert_refused(cli("verify", place), unchecked, str(place))


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["1-pretext", "2-ucl"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_stage_folders(tmp_path, stage, damage):
    run = Path(shutil.copytree(finished()[1], tmp_path / "run"))
    for name in ("memory.safetensors", "adapter/adapter_model.safetensors", "done.json"):
        copy = Path(shutil.copytree(run, tmp_path / name.replace("/", "-")))
        damage(copy / stage / name)
        said = cli("similarity", "a", "b", "-m", copy / "2-ucl")
        if name != "done.json" or damage is damage_remove:
            assert_refused(said, str(copy / stage))


# ---- texts and outputs


def test_outputs_that_cannot_be(tmp_path):
    model = finished()[1]
    (tmp_path / "in.txt").write_text("a text\n")
    (tmp_path / "folder.npy").mkdir()
    for out, problem in {
        "out.csv": "unknown format",
        "out": "no suffix",
        "folder.npy": "no file can be written there",
        "in.txt/out.npy": "no file can be written there",
    }.items():
        assert_refused(
            cli("embed", tmp_path / "in.txt", "-m", model, "-o", tmp_path / out),
            problem,
            str(tmp_path / out),
        )
    assert files_in(tmp_path) == ["folder.npy", "in.txt"]


def test_texts_that_cannot_be_embedded(tmp_path):
    model, out = finished()[1], tmp_path / "out.npy"
    assert_refused(
        cli("similarity", "alone", "-m", model), "nothing to compare", "two texts or more"
    )
    assert_refused(
        cli("embed", "-", "-m", model, "-o", out),
        "standard input",
        "no usable row",
        "nothing in it",
    )
    assert_refused(
        cli("embed", "-", "-m", model, "-o", out, stdin=b"\n \n"), "standard input", "nothing in it"
    )
    assert_refused(
        cli("similarity", "a", "\udcff", "-m", model), "text 2: not a Unicode text", "udcff"
    )
    assert_refused(cli("embed", tmp_path / "no.txt", "-m", model, "-o", out), "no such file")
    assert_refused(
        cli("similarity", "a", "b", "-m", model, "--device", "warp"), "no such device here", "warp"
    )
    long = b"short\n" + b"memory " * 200
    said = cli("embed", "-", "-m", model, "-o", out, "--long-texts", "error", stdin=long)
    assert_refused(said, "text 2: 1 texts are longer than the model reads")
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", "x.txt"],
        ["embed", "x.txt", "-m", "m", "-o", "o.npy", "--long-texts", "cut"],
        ["trian"],
    ],
)
def test_usage_errors_are_told_by_the_command_line(arguments):
    said = cli(*arguments)
    assert said.code == 2
    assert "Usage" in said.err
    assert "Traceback" not in said.err


def test_a_process_of_its_own_ends_the_same_way(tmp_path):
    (tmp_path / "recipe.yaml").write_text("format_version: 1\nname: x\nmodell: {name: y}\n")
    command = [sys.executable, "-m", "llm2comp", "train", "recipe.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: recipe.yaml: ")
    assert "modell: unknown key; did you mean 'model'?" in done.stderr
    assert done.stdout == ""
    assert files_in(tmp_path) == ["recipe.yaml"]
