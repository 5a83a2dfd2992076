"""No command replaces what it did not write, nor its input; others can read what is written; paths
are tried first.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm2comp.errors import RunError
from llm2comp.storage.compiled import compile_folder
from llm2comp.storage.reweighting import reweight
from llm2comp.system.folders import MARK_FILE
from tiny_run import assert_refused, cli, finished, make_tree, sentences, write_recipe, write_rows

FOREIGN = "would replace what is not its own"


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def refused(folder, *command, parts=(FOREIGN,)):
    """The command says no, and nothing in the folder is other than before."""
    before = contents(folder)
    assert_refused(cli(*command), *parts)
    assert contents(folder) == before


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of an exported model, the stage that it is of)."""
    stage = finished()[1] / "3-scl"
    folder = tmp_path_factory.mktemp("exported") / "m"
    assert cli("export", folder, "-m", stage).code == 0
    return folder, stage


@pytest.fixture
def copied(exported, tmp_path):
    return Path(shutil.copytree(exported[0], tmp_path / "copy"))


def put(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("years of work")
    return folder


# ---- export


def test_export_replaces_an_export_alone(copied, exported, tmp_path):
    stage = exported[1]
    assert cli("export", copied, "-m", stage).code == 0, "its own"
    (copied / MARK_FILE).unlink()
    assert cli("export", copied, "-m", stage).code == 0, "one from before there were marks"
    run = Path(shutil.copytree(finished()[1], tmp_path / "run"))
    refused(
        run,
        "export",
        run,
        "-m",
        stage,
        parts=(FOREIGN, "1-pretext", "expected: a new or empty folder, or an exported model"),
    )
    refused(
        run, "export", run / "3-scl", "-m", run / "3-scl", parts=(FOREIGN, "memory.safetensors")
    )
    thesis = put(tmp_path / "m", "thesis.txt")
    refused(thesis, "export", thesis, "-m", stage, parts=(FOREIGN, "thesis.txt"))
    (tmp_path / "link").symlink_to(thesis)
    refused(thesis, "export", tmp_path / "link", "-m", stage)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    "name", ["thesis.txt", "1_Pooling/notes.md", ".git/HEAD", "openvino/mine.xml", "results.json"]
)
def test_export_does_not_take_a_users_file_along(copied, exported, name, marked):
    put(copied, name)
    if not marked:
        (copied / MARK_FILE).unlink()
    refused(copied, "export", copied, "-m", exported[1], parts=(FOREIGN, name))


def test_reweighting_keeps_what_stands_in_the_folder(copied):
    put(copied, "thesis.txt")
    reweight(copied, [0.2, 0.3, 0.5])
    assert (copied / "thesis.txt").read_text() == "years of work"


def test_a_graph_of_others_is_not_replaced(copied):
    pytest.importorskip("openvino")
    put(copied, "openvino/openvino_model.xml")
    with pytest.raises(RunError, match=FOREIGN):
        compile_folder(copied)
    shutil.rmtree(copied / "openvino")
    compile_folder(copied)
    compile_folder(copied)
    put(copied, "openvino/mine.txt")
    with pytest.raises(RunError, match=r"(?s)not its own.*mine\.txt"):
        compile_folder(copied)


# ---- the others


def test_a_run_does_not_take_the_place_of_its_own_recipe(tmp_path):
    file = write_recipe(tmp_path, pretext=None, scl=None)
    file.write_text("# my notes\n" + file.read_text())
    refused(tmp_path, "train", file, "--out", tmp_path, parts=(FOREIGN, "backbone", "recipe.yaml"))


def test_a_stage_folder_of_a_run_holds_no_file_of_others(tmp_path):
    file, run = write_recipe(tmp_path, pretext=None, scl=None), tmp_path / "run"
    assert cli("train", file, "ucl.steps=1", "--out", run).code == 0
    put(run, "2-ucl/notes.md")
    (run / "2-ucl" / "done.json").unlink()
    refused(run, "train", file, "ucl.steps=1", "--out", run, parts=(FOREIGN, "notes.md"))
    (run / "2-ucl" / "notes.md").unlink()
    put(run, "model/notes.md")
    (run / "model" / "done.json").unlink()
    refused(run, "train", file, "ucl.steps=1", "--out", run, parts=(FOREIGN, "notes.md"))
    put(run, "notes.md")
    (run / "model" / "notes.md").unlink()
    assert cli("train", file, "ucl.steps=1", "--out", run).code == 0, (
        "beside its stages anything may stand"
    )
    assert (run / "notes.md").exists()


def test_an_analysis_does_not_take_the_place_of_other_plots(tmp_path, exported):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(40)])
    out = put(tmp_path / "out", "spectrum.png")
    refused(
        out, "analyze", exported[0], "--texts", texts, "--out", out, parts=(FOREIGN, "spectrum.png")
    )
    (out / "spectrum.png").rename(out / "mine.png")
    for _ in range(2):
        assert cli("analyze", exported[0], "--texts", texts, "--out", out).code == 0
    assert (out / "mine.png").read_text() == "years of work"


def test_scores_do_not_take_the_place_of_anothers_summary(tmp_path):
    (tmp_path / "sets/sts/A").mkdir(parents=True)
    pair = {"sentence1": "a", "sentence2": "b"}
    write_rows(
        tmp_path / "sets/sts/A/test.jsonl",
        [pair | {"score": 1}, pair | {"sentence1": "c", "score": 2}],
    )
    out = put(tmp_path / "out", "summary.json")
    assert_refused(
        cli("evaluate", "tfidf", "--local", tmp_path / "sets", "--out", out),
        str(out / "summary.json"),
    )
    assert contents(out) == {Path("summary.json"): b"years of work"}


@pytest.mark.thorough
def test_a_report_replaces_reports_alone(tmp_path):
    run = Path(shutil.copytree(finished()[1], tmp_path / "run"))
    out = tmp_path / "page.html"
    for _ in range(2):
        assert cli("report", run, "--out", out).code == 0
    for place in (run / "recipe.yaml", put(tmp_path, "thesis.html") / "thesis.html"):
        refused(tmp_path, "report", run, "--out", place, parts=(FOREIGN, str(place)))
    refused(tmp_path, "report", run, "--out", run, parts=("a folder stands there",))


def test_a_study_and_responses_want_a_folder_of_their_own(tmp_path):
    make_tree(tmp_path)
    recipe = write_recipe(tmp_path)
    study = tmp_path / "mine" / "study.yaml"
    study.parent.mkdir()
    study.write_text(
        f"# my notes\nformat_version: 1\nname: s\nrecipe: {recipe}\nsystems: {{a: "
        f"{{}}}}\nscores: [{tmp_path / 'sets'}]\n"
    )
    pair = {"sentence1": "a", "sentence2": "b"}
    (tmp_path / "sets/sts/A").mkdir(parents=True)
    write_rows(
        tmp_path / "sets/sts/A/test.jsonl",
        [pair | {"score": 1}, pair | {"sentence1": "c", "score": 2}],
    )
    refused(tmp_path, "study", study, "--out", study.parent, parts=(FOREIGN, "study.yaml"))
    texts = ("--texts", tmp_path / "texts.jsonl", "--max-new-tokens", 1, "--limit", 2)
    thesis = put(tmp_path / "other", "thesis.txt")
    refused(
        tmp_path,
        "generate-responses",
        "-m",
        tmp_path / "backbone",
        *texts,
        "-o",
        thesis,
        parts=(FOREIGN, "thesis.txt"),
    )


# ---- modes


def test_all_files_of_a_run_can_be_read_by_others(tmp_path):
    """Weights, folders that are renamed into their place, and small files alike."""
    before = os.umask(0o022)
    try:
        run = tmp_path / "run"
        assert (
            cli(
                "train", write_recipe(tmp_path, pretext=None, scl=None), "ucl.steps=1", "--out", run
            ).code
            == 0
        )
    finally:
        os.umask(before)
    modes = {
        path.relative_to(run): path.stat().st_mode & 0o777
        for path in run.rglob("*")
        if path.name != ".lock"
    }
    assert {
        Path("2-ucl/memory.safetensors"),
        Path("2-ucl/adapter"),
        Path("model/model.safetensors"),
    } <= set(modes)
    assert {
        path: mode
        for path, mode in modes.items()
        if mode != (0o755 if (run / path).is_dir() else 0o644)
    } == {}


# ---- before anything heavy is imported


def test_paths_that_do_not_exist_are_told_before_heavy_imports(tmp_path):
    recipe = write_recipe(tmp_path)
    tree = json.dumps(str(tmp_path / "no.txt"))
    out = str(tmp_path / "out.npy")
    (tmp_path / "thesis").mkdir()
    put(tmp_path, "thesis/thesis.txt")
    commands = [
        ["embed", "no.txt", "-o", out],
        ["embed", "recipe.yaml", "-o", "recipe.yaml"],
        ["embed", "no.txt", "-o", "out/"],
        ["embed", "texts.jsonl", "-o", "thesis/"],
        ["embed", "texts.jsonl", "-o", "out/", "--keep", "id"],
        ["analyze", "--texts", "no.jsonl"],
        ["analyze", "--texts", "texts.jsonl", "--pairs", "no.csv"],
        ["generate-responses", "-m", "builtin:tiny", "--texts", "no.csv", "-o", "out"],
        ["generate-responses", "-m", "builtin:tiny", "--texts", "texts.jsonl", "-o", "thesis"],
        ["train", "no.yaml"],
        ["train", str(recipe), f"scl.data.0.source={tree}"],
        ["train", str(recipe), f"pretext.data.0.source={tree}", "--dry-run"],
        ["study", "no.yaml"],
        ["study", "objectives", "--local", "nowhere"],
        ["evaluate", "--local", "nowhere"],
        ["report", "nowhere"],
        ["verify", "nowhere"],
        ["export", "thesis"],
        ["export", "new", "--for", "tei", "--multi-vector"],
        ["verify", "thesis", "--url", "host:80"],
        ["serve", "./nowhere"],
        ["serve", "--api-key-file", "no.txt"],
        ["serve", "--host", "no.such.host.invalid"],
        ["index", "nowhere", "--db", "db"],
        ["index", "thesis", "--db", "thesis"],
        ["index", "--db", "db", "--migrate", "builtin:tiny"],
        ["search", "words", "--db", "nowhere"],
    ]
    program = f"""
import sys
from llm2comp.cli import main
for command in {commands!r}:
    sys.argv = ["llm2comp", *command]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 1, (command, stop.code)
    else:
        raise AssertionError(command)
    names = "torch transformers sentence_transformers peft datasets"
    heavy = set(names.split()) & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(commands)
    assert "Traceback" not in done.stderr
