import ast
import hashlib
import inspect
import os
import re
import subprocess
import sys

import pytest

from llm2comp.data import docstrings, python_docs
from llm2comp.data.docstrings import Entry, normalise


@pytest.fixture(scope="module")
def by_name():
    return {entry.name: entry for entry in python_docs.entries()}


def digest():
    import hashlib
    import json

    from llm2comp.data import python_docs as docs

    task = docs.retrieval()
    relevant = {key: sorted(found) for key, found in task.relevant.items()}
    parts = [
        docs.pairs(True),
        docs.pairs(False),
        docs.passages(),
        task.queries,
        task.documents,
        task.names,
        relevant,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def held_out_texts():
    task = python_docs.retrieval()
    return [normalise(text) for text in (*task.queries.values(), *task.documents.values())]


def test_entries_come_from_all_three_places(by_name):
    assert list(by_name) == sorted(by_name)
    assert len(by_name) > 5_000
    assert by_name["topic:for"].summary == 'The "for" statement'
    assert by_name["topic:for"].body.startswith('The "for" statement is used to iterate')
    assert by_name["json.dumps"].summary == "Serialize ``obj`` to a JSON formatted ``str``."
    assert by_name["json"].kind == "module"
    assert by_name["len"].summary == "Return the number of items in a container."
    assert by_name["str.split"].body
    assert by_name["heapq.heappush"].kind == "member"  # the C and the Python version are one entry
    assert "_heapq.heappush" not in by_name
    assert {"os.stat", "math.gcd", "datetime.datetime"} <= by_name.keys()
    assert 1.5 < sum(len(entry.text) for entry in by_name.values()) / 1e6 < 5


def test_entries_leave_out_tests_installed_packages_and_inherited_docs(by_name):
    assert not [
        name
        for name in by_name
        if name.startswith(("test.", "pytest", "numpy", "unittest.test", "site-packages"))
    ]
    assert not [
        name
        for name in by_name
        if name.endswith((".__repr__", ".__eq__")) and name.startswith(("int.", "str."))
    ]
    assert not [entry.name for entry in by_name.values() if not entry.summary.strip()]


def test_docs_in_finds_methods_and_conditional_definitions():
    source = '''
class A:
    """A class."""
    async def run(self):
        """Run it."""
        def inner():
            """Not listed."""
    class B:
        """Nested."""
try:
    import fast
except ImportError:
    def slow():
        """Only here."""
'''
    found = [(name, doc) for name, _, doc in docstrings._docs_in(ast.parse(source), "m") if doc]
    assert found == [
        ("m.A", "A class."),
        ("m.A.run", "Run it."),
        ("m.A.B", "Nested."),
        ("m.slow", "Only here."),
    ]


@pytest.mark.parametrize(
    ("doc", "entry"),
    [
        (
            "One\n    line.\n\n    Body\n      kept.\n\n    More.\n",
            Entry("n", "One line.", "Body\n  kept.\n\nMore."),
        ),
        ("pop(x[, y]) -> item\npop() => item\n\nTake one.", Entry("n", "Take one.", "")),
        (
            "get(k) -> v, remove the key and return it",
            Entry("n", "get(k) -> v, remove the key and return it", ""),
        ),
        ("acquire() -> None", None),
        ("  \n ", None),
        ("Lone \ud800 surrogate.", Entry("n", "Lone ? surrogate.", "")),
    ],
)
def test_entry_cleans_a_doc(doc, entry):
    assert docstrings._entry("n", "member", doc) == entry


def test_pairs_have_a_sentence_and_some_prose():
    for summary, body in python_docs.pairs(heldout=False) + python_docs.pairs(heldout=True):
        assert 4 <= len(summary.split()) <= 60
        assert "\n" not in summary
        assert len(body) >= 80


def test_a_fifth_is_held_out():
    train, held_out = python_docs.pairs(heldout=False), python_docs.pairs(heldout=True)
    assert len(train) > 1_000
    assert 0.14 < len(held_out) / (len(train) + len(held_out)) < 0.26
    assert len(set(train)) == len(train)


def test_split_follows_the_stated_rule():
    split = python_docs._split()
    groups = {}
    for entry in python_docs.entries():
        if entry.kind != "topic":
            ends = {normalise(entry.summary), normalise(entry.body or entry.summary)}
            for text in ends:
                groups.setdefault(text, set()).update(ends)
    some = [text for text in sorted(groups) if len(groups[text]) > 2][::7]
    assert len(some) > 20
    for text in [*some, *sorted(groups)[::97]]:
        group, grown = set(), {text}
        while grown != group:
            group, grown = grown, set().union(*(groups[member] for member in grown))
        number = int.from_bytes(hashlib.blake2b(min(group).encode(), digest_size=8).digest(), "big")
        assert {split[member] for member in group} == {number % 5 == 0}


def test_no_summary_or_body_on_both_sides():
    sides = [python_docs.pairs(heldout=heldout) for heldout in (False, True)]
    for part in (0, 1):
        train, held_out = ({normalise(pair[part]) for pair in side} for side in sides)
        assert not train & held_out


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["passages", "pairs"])
def test_training_texts_quote_nothing_held_out(kind):
    texts = (
        python_docs.passages()
        if kind == "passages"
        else ["\n\n".join(pair) for pair in python_docs.pairs(heldout=False)]
    )
    everything = "\n".join(normalise(text) for text in texts)
    found = [text for text in held_out_texts() if text in everything]
    # whole words only
    assert not [text for text in found if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", everything)]
    paragraphs = (
        part for body in python_docs.retrieval().documents.values() for part in body.split("\n\n")
    )
    assert not [
        part for part in paragraphs if len(part.split()) >= 20 and normalise(part) in everything
    ]


def test_something_was_there_to_be_kept_out():
    held_out = {normalise(text) for pair in python_docs.pairs(heldout=True) for text in pair}
    others = [
        e for e in python_docs.entries() if not {normalise(e.summary), normalise(e.body)} & held_out
    ]
    quoting = [entry for entry in others if python_docs.quotes_held_out(entry.text)]
    assert len(quoting) > 20  # they would leak if only whole entries were compared


def test_quotes_are_found_whatever_the_punctuation():
    summary, body = python_docs.pairs(heldout=True)[0]
    assert python_docs.quotes_held_out(f"see also:\n  * {summary.upper()}\n  * more")
    assert python_docs.quotes_held_out(f"before {body.replace(' ', chr(10))} after")
    assert not python_docs.quotes_held_out(" ".join(body.split()[::-1]))
    assert not python_docs.quotes_held_out("")
    assert all(len(start) == 4 for start in python_docs._held_out_phrases())


def test_passages_are_distinct_and_of_fair_length():
    passages = python_docs.passages()
    assert len({normalise(passage) for passage in passages}) == len(passages)
    assert sum(600 <= len(passage) <= 1_800 for passage in passages) > 400
    assert max(map(len, passages)) < 2_500


def test_cut_at_paragraphs_and_inside_long_ones_at_lines():
    short, long = "word " * 100, "\n".join(["line of a table"] * 300)
    pieces = list(python_docs._cut("\n\n".join([short] * 7 + [long])))
    assert [piece.count("word") for piece in pieces] == [300, 300, 100, 0, 0]
    assert "".join("".join(pieces).split()) == "".join((short * 7 + long).split())
    assert max(map(len, pieces)) <= 1_800
    assert list(python_docs._cut("one text")) == ["one text"]


def test_retrieval_is_the_held_out_fifth():
    task, pairs = python_docs.retrieval(), python_docs.pairs(heldout=True)
    assert len(task.queries) == len({normalise(summary) for summary, _ in pairs}) > 200
    assert len(task.documents) == len({normalise(body) for _, body in pairs})
    assert task.queries.keys() == task.relevant.keys()
    assert set().union(*task.relevant.values()) == task.documents.keys() == task.names.keys()
    assert sum(map(len, task.relevant.values())) == len(pairs)
    assert max(map(len, task.relevant.values())) > 1
    entries = {entry.name: entry for entry in python_docs.entries()}
    for docid, name in task.names.items():
        assert normalise(entries[name].body) == normalise(task.documents[docid])


def test_functions_are_distinct_members():
    functions = dict(python_docs.functions())
    assert len({normalise(text) for text in functions.values()}) == len(functions) > 4_000
    assert functions["json.dumps"].startswith("Serialize ``obj`` to a JSON formatted ``str``.\n\n")
    assert "json" not in functions
    assert "topic:for" not in functions


def test_callers_cannot_change_what_others_get():
    python_docs.pairs(heldout=True).clear()
    python_docs.passages().clear()
    assert python_docs.pairs(heldout=True)
    assert python_docs.passages()


@pytest.mark.thorough
def test_same_in_every_process():
    program = f"{inspect.getsource(digest)}\nprint(digest())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest()
