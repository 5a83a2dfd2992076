"""Weak pairs of documents: the rules, what is held out, what is too near to it."""

import re
from pathlib import Path

import pytest

from document_files import pdf_bytes
from llm2comp.data.documents import Report, documents
from llm2comp.data.weak_pairs import (
    Seen,
    Task,
    Weak,
    WeakPair,
    hold_out,
    opening,
    read_units,
    training_pairs,
)
from llm2comp.errors import DataError

REST = "The rest goes on for a while, so that it is long enough to be worth finding at all."
GUIDE = f"""# The garden

Gardens want water every day. {REST}

## How to prune roses?

Cut them back in spring, above a bud that looks outward. Old wood goes first, then all that is
dead or crosses other twigs; what is left gets air and light. Young plants need less of it than old
ones do, and climbing ones nearly none in their first three summers.

## Notes

Some words about tools that one needs, such as a spade, a rake, shears and a can. These last long.

# The kitchen

## Notes

Other words, about pans and pots of iron. They are heavy, keep the heat, and rust when wet for long.
"""


def words(text):
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def folder_of(folder, count, prefix="note"):
    folder.mkdir(exist_ok=True)
    for n in range(count):
        own = " ".join(f"word{n}x{i}" for i in range(30))
        (folder / f"{prefix}{n}.md").write_text(
            f"# About matter {n}\n\nThis is case {n} of it. {own}.\n"
        )
    return folder


def units_of(folder):
    return read_units(str(folder), Report(str(folder)))


def test_each_rule_makes_its_pairs(tmp_path):
    (tmp_path / "guide.md").write_text(GUIDE)
    units = units_of(tmp_path)
    found = list(Weak(units, words, 40).pairs(units))
    asked = {(pair.kind, pair.query) for pair in found if pair.kind != "next"}
    assert ("question", "How to prune roses?") in asked
    assert ("heading", "The garden") in asked
    assert ("heading", "The garden: Notes") in asked, "one of two is put behind its title"
    assert not any(query == "Notes" for _, query in asked)
    first = next(pair for pair in found if pair.kind == "opening")
    assert first.query == "Gardens want water every day."
    assert first.passage == REST
    cut = [pair for pair in Weak(units, words, 25).pairs(units) if pair.kind == "next"]
    assert any("Cut them" in pair.query and "Young" in pair.passage for pair in cut)


def test_an_opening_is_a_sentence_or_a_summary_and_not_a_piece():
    assert opening(f"Return the sum of all.\n\n{REST}") == ("Return the sum of all.", REST)
    assert opening(f"This is the first one. {REST}") == ("This is the first one.", REST)
    for text in (REST, f"and so it went on here. {REST}", f"| a | table |\n\n{REST}", "A b c. d"):
        assert opening(text) is None


def test_names_of_source_code_are_no_queries(tmp_path):
    (tmp_path / "code.py").write_text(
        f'def add_all():\n    """Add all the numbers given.\n\n    {REST}\n    """\n'
    )
    units = units_of(tmp_path)
    found = list(Weak(units, words, 60).pairs(units))
    assert [(pair.kind, pair.query) for pair in found] == [
        ("opening", "Add all the numbers given.")
    ]


def test_pages_of_a_pdf_are_asked_for_by_their_openings_not_their_numbers(tmp_path):
    pytest.importorskip("pypdfium2", reason="needs the extra search")
    (tmp_path / "book.PDF").write_bytes(pdf_bytes(f"Roses want a lot of water. {REST}", REST))
    weak = Weak(units_of(tmp_path), words, 60)
    asked = [("opening", "Roses want a lot of water.")]
    assert [(pair.kind, pair.query) for pair in weak.pairs(units_of(tmp_path))] == asked
    assert list(weak.task(units_of(tmp_path), 9, 9).queries.values()) == [asked[0][1]]


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    folder = folder_of(tmp_path / "a", 40)
    split = hold_out(units_of(folder), "a")
    assert (len(split.test), len(split.validation), len(split.train)) == (8, 3, 29)
    other = folder_of(tmp_path / "b", 40)
    for file in sorted(other.iterdir()):
        file.rename(other / f"z{hash(file.name) % 97:02}-{file.name}")
    again = hold_out(units_of(other)[::-1], "b")

    def texts(part):
        return [unit.blocks[0].text for unit in part]

    assert texts(again.test) == texts(split.test)
    assert texts(again.validation) == texts(split.validation)
    folder_of(folder, 1, prefix="copy")
    assert texts(hold_out(units_of(folder), "a").train) == texts(split.train), "a copy is one text"


def test_of_few_documents_sections_are_held_out(tmp_path):
    parts = "".join(f"# Part {n} of it\n\nWords {n} are here, {n} of them.\n\n" for n in range(15))
    (tmp_path / "book.md").write_text(parts)
    split = hold_out(units_of(tmp_path), "book")
    assert (split.of, len(split.test), len(split.validation)) == ("sections", 3, 1)
    (tmp_path / "book.md").write_text(parts[:200])
    with pytest.raises(DataError, match="too few documents"):
        hold_out(units_of(tmp_path), "book")


def test_rows_of_jsonl_are_documents(tmp_path):
    rows = "".join(
        f'{{"question": "What is {n} of all?", "answer": "It is {n}. {REST}"}}\n' for n in range(12)
    )
    (tmp_path / "faq.jsonl").write_text(rows)
    units = units_of(tmp_path)
    assert len(units) == 12
    pairs = list(Weak(units, words, 60).pairs(units[:1]))
    assert ("question", "What is 0 of all?") in {(pair.kind, pair.query) for pair in pairs}


def test_a_task_asks_for_passages_that_do_not_hold_the_query(tmp_path):
    (tmp_path / "guide.md").write_text(GUIDE)
    units = units_of(tmp_path)
    task = Weak(units, words, 40).task(units, 99, 99)
    assert set(task.relevant) == set(task.queries)
    asked = {query: task.relevant[name] for name, query in task.queries.items()}
    assert len(asked["How to prune roses?"]) == 2, "all passages of the section are right"
    for name, query in task.queries.items():
        for document in task.relevant[name]:
            assert query not in task.documents[document]
    few = Weak(units, words, 40).task(units, 1, 99)
    assert len(few.queries) <= 2


def test_a_heading_over_more_passages_than_are_judged_asks_for_none(tmp_path):
    def section(heading, passages):
        texts = [" ".join(f"{heading}{n}x{i}" for i in range(39)) + "." for n in range(passages)]
        return f"# About {heading}\n\n" + "\n\n".join(texts) + "\n\n"

    (tmp_path / "guide.md").write_text(section("few", 10) + section("many", 11))
    units = units_of(tmp_path)
    task = Weak(units, words, 40).task(units, 99, 99)
    assert len(task.documents) == 21
    assert {query: len(task.relevant[name]) for name, query in task.queries.items()} == {
        "About few": 10
    }


def test_nothing_near_to_what_is_held_out_is_trained_on():
    held = f"Everybody knows that seven brown foxes live behind this old house. {REST}"
    task = Task({"q": "What lives behind it?"}, {"d": held}, {"q": {"d"}})
    other = f"Quite another text, about ships and harbours, and long enough. {REST[::-1]} by us."
    pairs = [
        WeakPair("heading", "Foxes", held.replace("brown", "red")),
        WeakPair("heading", "what lives  BEHIND it?", other),
        WeakPair("next", held, other),
        WeakPair("heading", "Ships", other),
        WeakPair("heading", "Ships again", other.replace("by us", "by all")),
        WeakPair("opening", "Boats", other),
        WeakPair("heading", "Short", "too short"),
    ]
    found = training_pairs(pairs, [task], 10)
    assert [(pair.kind, pair.query) for pair in found] == [
        ("heading", "Ships"),
        ("opening", "Boats"),
    ]
    assert len(training_pairs(pairs, [task], 1)) == 1
    assert not Seen().alike("anything"), "vacuous: nothing was seen"


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(DataError, match="it is empty"):
        units_of(tmp_path)
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"broken\.pdf"):
        units_of(tmp_path)
    assert list(documents(Path(tmp_path), Report("x"))) == []
