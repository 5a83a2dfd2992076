"""The report page: its tables hold the figures of the files, names cannot break out of it, and it
needs nothing else.
"""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml

from llm2comp.errors import Llm2CompError, RunError
from llm2comp.lab.report import page, report
from llm2comp.lab.report.blocks import NONE, duration, number
from synthetic_run import WARNING, write_run

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use"}
HOSTILE = "<script>alert(1)</script>&\"'</style>{{ 7*7 }}$x$"


class Page(HTMLParser):
    """Tables by caption, every attribute, the text, and whether each element is closed."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.attributes, self.tags, self.open, self.text = {}, [], [], [], []
        self.caption, self.rows = "", []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.caption, self.rows = "", []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            assert tag == "td" or dict(attrs)["scope"] in ("row", "col")
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            assert self.caption
            assert len({len(row) for row in self.rows}) == 1, self.caption
            self.tables.setdefault(self.caption, []).append(self.rows)

    def handle_data(self, data):
        self.text.append(data)
        if "caption" in self.open:
            self.caption += data.strip()
        elif "th" in self.open or "td" in self.open:
            self.rows[-1][-1] += data

    def table(self, beginning):
        (found,) = [
            tables[0] for caption, tables in self.tables.items() if caption.startswith(beginning)
        ]
        return found

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A synthetic run with all its parts. Not to be changed: copy it."""
    return write_run(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def text(run):
    return page([run])


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def light(tmp_path):
    """A run of stage 1 alone, to be changed: a third of the plots."""
    return write_run(tmp_path / "light", ["ucl=null", "scl=null"])


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def column(table, name):
    return [row[table[0].index(name)] for row in table[1:]]


@pytest.mark.thorough
def test_metrics_table_holds_the_file(run, text):
    for folder, title in (("1-pretext", "CTKD"), ("2-ucl", "UCL"), ("3-scl", "SCL")):
        table = Page(text).table(f"synthetic, {title}: loss")
        rows = lines(run / folder / "metrics.jsonl")
        assert len(rows) >= 3
        assert column(table, "step") == [str(row["step"]) for row in rows]
        assert [float(cell) for cell in column(table, "loss")] == pytest.approx(
            [row["loss"] for row in rows], rel=1e-3
        )
        rates = [float(cell) for cell in column(table, "learning rate")]
        assert rates == pytest.approx([row["learning_rate"] for row in rows], rel=1e-3)
        assert set(column(table, "tokens/s")) == {"1,870"}


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("effective rank", ["effective rank", "participation ratio"]),
        ("context recovered", ["context recovered"]),
        ("uniformity and alignment", ["uniformity", "alignment"]),
        ("anisotropy", ["anisotropy"]),
    ],
)
def test_watch_tables_hold_the_file(run, text, caption, names):
    table = Page(text).table(f"synthetic, UCL: {caption}")
    rows = lines(run / "2-ucl" / "watch.jsonl")
    assert table[0] == ["step", *names]
    assert column(table, "step") == [str(row["step"]) for row in rows]
    for name in names:
        want = [row[name.replace(" ", "_")] for row in rows]
        assert [float(cell) for cell in column(table, name)] == pytest.approx(want, abs=5e-3)


def test_tasks_memory_and_spectrum_tables_hold_the_file(run, text):
    rows = lines(run / "3-scl" / "watch.jsonl")
    table = Page(text).table("synthetic, SCL: evaluation sets")
    for task in ("Local-STSBenchmark", "Local-MRPC"):
        assert [float(x) for x in column(table, task)] == pytest.approx(
            [100 * row["tasks"][task] for row in rows], abs=5e-3
        )
    memory = Page(text).table("synthetic, SCL: mean cosine between memory tokens")[1:]
    found = [[float(cell) for cell in row[1:]] for row in memory]
    assert sum(found, []) == pytest.approx(sum(rows[-1]["memory_correlation"], []), abs=5e-4)
    table = Page(text).table("Singular values")
    assert table[0] == ["direction", "before training", "after CTKD", "after UCL", "after SCL"]
    spectra = [lines(run / "1-pretext" / "watch.jsonl")[0]["spectrum"]]
    spectra += [
        lines(run / folder / "watch.jsonl")[-1]["spectrum"]
        for folder in ("1-pretext", "2-ucl", "3-scl")
    ]
    for name, values in zip(table[0][1:], spectra, strict=True):
        cells = [float(cell) for cell in column(table, name)]
        assert cells == pytest.approx(values, rel=5e-3)


def test_course_and_cards_tell_from_where_to_where(run, text):
    table = Page(text).table("Measured on the same 256 texts")
    assert column(table, "encoder") == ["before training", "after CTKD", "after UCL", "after SCL"]
    first, last = (
        lines(run / "1-pretext" / "watch.jsonl")[0]["effective_rank"],
        lines(run / "3-scl" / "watch.jsonl")[-1]["effective_rank"],
    )
    assert column(table, "effective rank")[0] == f"{first:.2f}"
    assert column(table, "effective rank")[-1] == f"{last:.2f}"
    assert f"{first:.1f} → {last:.1f}" in text
    assert "8.0 → 35.0" in text, "nDCG@10 of scores/python-docs.json"
    assert "3 min 7 s" in text, "61.2 + 62.2 + 63.2 seconds"


@pytest.mark.thorough
def test_kept_step_is_the_result(tmp_path):
    run = write_run(tmp_path / "kept", ["scl.keep_best=effective_rank", "pretext=null", "ucl=null"])
    rows = lines(run / "3-scl" / "watch.jsonl")
    found = Page(page([run]))
    assert (
        column(found.table("Measured"), "effective rank")[-1] == f"{rows[-1]['effective_rank']:.2f}"
    )
    assert found.table("The stages")[1][2] == "64"
    rows[2] |= {"best": True, "effective_rank": 99.25}
    (run / "3-scl" / "watch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    (run / "3-scl" / "done.json").write_text(
        json.dumps({"steps": 64, "seconds": 1.0, "kept_step": rows[2]["step"]})
    )
    found = Page(page([run]))
    assert column(found.table("Measured"), "effective rank")[-1] == "99.25"
    assert (
        found.table("The stages")[1][2]
        == f"{rows[3]['step']} of 64, stopped early, step {rows[2]['step']} kept"
    )
    memory = found.table("kept, SCL: mean cosine between memory tokens")
    assert float(memory[1][2]) == pytest.approx(rows[2]["memory_correlation"][0][1], abs=5e-4)


def test_scores_tables_hold_the_files(run, text):
    demo = Page(text).table("Finding held-out Python documentation")
    assert demo[1] == ["backbone, mean-pooled", "8.00", "6.00", "23.80"]
    assert demo[-1] == ["BM25", "61.92", "57.99", "–"]
    evaluation = Page(text).table("Evaluation")
    assert evaluation[0] == ["task", "mean-pooled", "demo", "metric"]
    summary = json.loads((run / "scores" / "summary.json").read_text())
    for model in summary:
        for task, score in model["scores"].items():
            cells = column(evaluation, model["model"])
            assert cells[column(evaluation, "task").index(task)] == f"{100 * score['score']:.2f}"
    assert [evaluation[3][i] for i in (0, 1, 3)] == [
        "Local-Cranfield",
        "failed",
        "ndcg_at_10, test",
    ]
    assert Page(text).table("Tasks that failed")[1] == [
        "Local-Cranfield",
        "mean-pooled",
        "SYNTHETIC: a document is empty",
    ]
    assert not [row for row in evaluation if row[0].startswith("mean of")], (
        "not over different tasks"
    )


def test_mean(light):
    file = light / "scores" / "summary.json"
    summary = json.loads(file.read_text())[1:]
    file.write_text(json.dumps(summary))
    table = Page(page([light])).table("Evaluation")
    assert table[0][1] == "demo"
    scores = [score["score"] for score in summary[0]["scores"].values()]
    assert table[-1][:2] == ["mean of 3", f"{100 * sum(scores) / 3:.2f}"]


def test_runs_that_were_scored_on_other_data_are_not_set_side_by_side(light, tmp_path):
    other = shutil.copytree(light, tmp_path / "other")
    for run, data in ((light, "aa"), (other, "bb")):
        file = run / "scores" / "summary.json"
        summary = json.loads(file.read_text())
        for row in summary:
            for task, score in row["scores"].items():
                score["data"] = "cc" if task == "Local-MRPC" else data
        file.write_text(json.dumps(summary))
    table = Page(page([light, other])).table("Evaluation")
    cells = {row[0]: row[1:5] for row in table[1:]}
    assert NONE not in cells["Local-MRPC"]
    assert cells["Local-STSBenchmark, data aa"][2:] == [NONE, NONE]
    assert cells["Local-STSBenchmark, data bb"][:2] == [NONE, NONE]
    assert "Local-STSBenchmark" not in cells


def test_what_was_trained_where_and_how(text):
    table = Page(text).table("The stages")
    assert table[1] == ["CTKD", "builtin:python-docs", "100", "16", "0.001 to 0.0001", "1 min 1 s"]
    words = " ".join(Page(text).text)
    for fact in (
        "builtin:tiny",
        "LoRA, rank 16, alpha 32",
        "Synthetic x86_64, 2 cores",
        "2026-01-02T03:04:05+0000",
    ):
        assert fact in words
    assert "llm2comp train recipes/tiny.yaml 'name=a b'" in words
    assert ["torch", "2.13.0"] in Page(text).table("Packages")


def test_warnings_are_told_once_with_their_steps(text):
    assert f"CTKD, steps 20, 40, 60, 80: {WARNING}: 33.1 at step 0, now 22.0" in " ".join(
        Page(text).text
    )
    assert text.count(WARNING) == 1


def test_published_figures_are_there(text):
    published = pytest.importorskip("llm2comp.lab.evaluation.published").published()
    table = Page(text).table("The paper's table")
    assert len(table) == len(published) + 1 > 10
    for cells, row in zip(table[1:], published, strict=True):
        shown = dict(zip(table[0], cells, strict=True))
        assert (shown["model"], shown["stage"], shown["samples"]) == (
            row.model,
            row.stage,
            row.samples,
        )
        assert {task: shown[task] for task in row.scores} == {
            task: f"{x:.2f}" for task, x in row.scores.items()
        }


def test_page_stands_alone(text):
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(found.tags)
    for name in ("src", "srcset", "data", "poster", "action", "xlink:href", "ping"):
        assert found.values(name) == []
    ids = set(found.values("id"))
    links = [value for _, key, value in found.attributes if key == "href"]
    assert len(links) > 50
    assert [
        link
        for link in links
        if not (link.startswith("#") and link[1:] in ids or link.startswith("data:"))
    ] == []
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")
        assert target[1:] in ids
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert not [value for value in found.values("style") if "http" in value]
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 2])
def test_ids_are_unique_and_references_hold(text, light, tmp_path, count):
    found = Page(text if count == 1 else page([light, shutil.copytree(light, tmp_path / "other")]))
    ids = found.values("id")
    assert len(ids) == len(set(ids)) > 500
    named = {part for value in found.values("aria-labelledby") for part in value.split()}
    assert named
    assert named <= set(ids)
    plots = [value for tag, key, value in found.attributes if (tag, key) == ("svg", "aria-label")]
    assert (
        len(plots)
        == len(set(plots))
        == found.tags.count("svg")
        == found.values("role").count("img")
        >= 16
    )
    assert found.tags.count("figure") == found.tags.count("figcaption") == found.tags.count("svg")


@pytest.mark.thorough
def test_same_folder_same_page(light, tmp_path):
    text = page([light])
    out = report([light], tmp_path / "deep" / "report.html")
    assert out == tmp_path / "deep" / "report.html"
    assert out.read_text(encoding="utf-8") == text
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_hostile_names_stay_text(light):
    summary = json.loads((light / "scores" / "summary.json").read_text())
    summary[1]["model"], summary[1]["failed"] = HOSTILE, {HOSTILE: HOSTILE}
    (light / "scores" / "summary.json").write_text(json.dumps(summary))
    environment = json.loads((light / "environment.json").read_text())
    environment |= {"machine": HOSTILE, "command": [HOSTILE], "packages": {HOSTILE: HOSTILE}}
    (light / "environment.json").write_text(json.dumps(environment))
    rows = lines(light / "1-pretext" / "watch.jsonl")
    for row in rows:
        row["tasks"], row["warnings"] = {HOSTILE: 0.5, "other": 0.25}, [HOSTILE]
    (light / "1-pretext" / "watch.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    recipe = yaml.safe_load((light / "recipe.yaml").read_text())
    recipe["pretext"]["data"][0]["source"] = recipe["model"]["name"] = HOSTILE
    (light / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = light.rename(light.with_name("<b>&'\"run"))
    text = page([run])
    found = Page(text)
    assert "<script" not in text
    assert "<b>" not in text
    assert text.count("</style>") == 1
    words = "".join(found.text)
    assert words.count(HOSTILE) >= 8, (
        "model, source, warning, task in plot and table, failure, machine, command, package"
    )
    assert HOSTILE in found.table("Evaluation")[0]
    assert "<b>&'\"run" in words


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        (["*/watch.jsonl"], ["Measured on", "Spectrum", "Effective rank", "Anisotropy"]),
        (["*/metrics.jsonl"], ["Loss"]),
        (["scores/python-docs.json"], ["Finding held-out"]),
        (["scores/summary.json"], ["Evaluation, main score"]),
        (["environment.json"], ["Packages"]),
        (["*/*", "environment.json"], ["Stage 1", "Packages", "Scores", "training time"]),
    ],
)
def test_missing_parts_are_left_out(light, text, missing, absent):
    for pattern in missing:
        for path in list(light.glob(pattern)):
            path.unlink()
    found = Page(page([light]))
    begins, before = ({line.strip() for line in each.text} for each in (found, Page(text)))
    for part in absent:
        assert [line for line in before if line.startswith(part)], "looked for in vain"
        assert not [line for line in begins if line.startswith(part)]
    assert "What was trained" in begins
    assert ("svg" in found.tags) == (missing[0] != "*/*")


@pytest.mark.thorough
def test_unfinished_run_says_so(tmp_path):
    run = write_run(tmp_path / "stopped", unfinished=("ucl",), scores=False)
    found = Page(page([run]))
    assert column(found.table("The stages"), "steps") == [
        "100",
        "13 of 26, not finished",
        "0 of 64, not begun",
    ]
    assert column(found.table("Measured"), "encoder") == [
        "before training",
        "after CTKD",
        "UCL, step 13",
    ]


def test_null_figures_are_left_out_of_plots(light):
    for file in light.glob("*/watch.jsonl"):
        rows = [
            row | {"alignment": None, "context_recovered": None, "loss": None, "tasks": {}}
            for row in lines(file)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Page(page([light]))
    assert not [
        caption
        for caption in found.tables
        if "context recovered" in caption or "evaluation sets" in caption
    ]
    assert found.table("light, CTKD: uniformity and alignment")[0] == ["step", "uniformity"]
    assert "alignment" not in found.table("Measured")[0]


def test_loss_that_is_no_number_is_shown(light):
    file = light / "1-pretext" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 101, "loss": NaN}\n')
    table = Page(page([light])).table("light, CTKD: loss")
    assert table[-1][:3] == ["101", "nan", "–"]


@pytest.mark.parametrize(
    ("file", "line", "content", "told"),
    [
        ("2-ucl/metrics.jsonl", 3, '{"step": 20, "loss": 1.', "line 3"),
        ("2-ucl/metrics.jsonl", 2, "", "line 2"),
        ("2-ucl/metrics.jsonl", 1, '{"step": 1}', "loss: Field required"),
        (
            "2-ucl/metrics.jsonl",
            1,
            '{"step": 1, "loss": "low"}',
            "loss: Input should be a valid number",
        ),
        ("1-pretext/watch.jsonl", 2, '{"step": 1}', "effective_rank: Field required"),
        ("1-pretext/watch.jsonl", 2, "[1]", "line 2"),
        ("1-pretext/watch.jsonl", 2, "\udcff\udcfe", "line 2"),
        ("3-scl/done.json", 1, "{}", "steps: Field required"),
        ("environment.json", 1, "none", "environment.json"),
        ("scores/summary.json", 1, '[{"model": "x"}]', "0.name: Field required"),
        ("scores/python-docs.json", 1, '{"model": "x"}', "python-docs.json"),
    ],
)
def test_damage_is_named(copy, file, line, content, told):
    rows = (copy / file).read_text().splitlines()
    rows[line - 1] = content
    (copy / file).write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    with pytest.raises(RunError) as error:
        page([copy])
    assert told in str(error.value)
    assert str(copy / file) in str(error.value)
    assert "to do: " in str(error.value)


def test_matrix_that_is_no_square_is_named(copy):
    file = copy / "1-pretext" / "watch.jsonl"
    rows = lines(file)
    rows[1]["memory_correlation"][0].pop()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match=r"(?s)line 2.*8 rows of 7, 8"):
        page([copy])


def test_what_is_no_run_is_refused(copy, tmp_path):
    for folder in (tmp_path / "nowhere", copy / "1-pretext"):
        with pytest.raises(RunError, match="not a run directory"):
            page([folder])
    with pytest.raises(RunError, match="no run to report"):
        page([])
    with pytest.raises(RunError, match="more than once"):
        page([copy, copy / ".." / copy.name])
    (copy / "recipe.yaml").write_text("name: [")
    with pytest.raises(Llm2CompError, match=r"recipe\.yaml"):
        page([copy])


def test_report_that_cannot_be_written_is_explained(light, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        report([light], tmp_path / "file" / "report.html")


@pytest.mark.thorough
def test_runs_are_compared(run, tmp_path):
    changed = ["ucl.temperature=0.1", "seed=7", "name=other-name"]
    other = write_run(tmp_path / "other", changed, seed=1, unfinished=("scl",), scores=False)
    found = Page(page([run, other]))
    settings = found.table("Settings that differ")
    assert settings == [
        ["setting", "synthetic", "other"],
        ["seed", "0", "7"],
        ["ucl.temperature", "0.05", "0.1"],
    ]
    final = {row[0]: row[1:] for row in found.table("Where each run ended")}
    assert final["SCL, steps"] == ["64", "32"]
    for name, folder in (("CTKD", "1-pretext"), ("SCL", "3-scl")):
        losses = [lines(place / folder / "metrics.jsonl")[-1]["loss"] for place in (run, other)]
        assert [float(cell) for cell in final[f"{name}, last loss"]] == pytest.approx(
            losses, rel=1e-3
        )
    ranks = [lines(place / "3-scl" / "watch.jsonl")[-1]["effective_rank"] for place in (run, other)]
    assert final["effective rank"] == [f"{rank:.2f}" for rank in ranks]
    assert final["Python documentation, nDCG@10 × 100"] == ["35.00", "–"]
    assert found.table("All runs: loss of stage 2")[0] == ["step", "synthetic", "other"]
    assert found.table("Evaluation")[0] == [
        "task",
        "synthetic: mean-pooled",
        "synthetic: demo",
        "metric",
    ]
    assert len([caption for caption in found.tables if caption.startswith("other, ")]) >= 15


def test_runs_of_one_name_and_one_recipe(light, tmp_path):
    other = shutil.copytree(light, tmp_path / "deep" / "light")
    found = Page(page([light, other]))
    assert found.table("Where each run ended")[0] == ["figure", str(light), str(other)]
    assert "The recipes of these runs are the same." in " ".join(found.text)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (119.7, "2 min 0 s"),
        (3599.0, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (None, "–"),
        (0.0, "0.0000"),
        (3e-5, "3e-05"),
        (-0.51234, "-0.5123"),
        (9.5, "9.5000"),
        (32.777, "32.78"),
        (1870.5, "1,870"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_number(x, said):
    assert number(x) == said
