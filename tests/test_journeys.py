"""The three journeys of docs/architecture.md, made here and held against what was called."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llm2comp
from llm2comp.recipe import parse_recipe
from tiny_run import cli, make_tree, write_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
SOURCE = Path(llm2comp.__file__).parent
STOP = re.compile(r"^\d+\. `([\w/]+\.py):([\w.]+)` ", re.M)


def stops(title: str) -> list[tuple[str, str]]:
    """(file, function) of a journey, in order."""
    (part,) = re.findall(rf"^### {title}\n(.*?)(?=^##)", PAGE.read_text(), re.M | re.S)
    return STOP.findall(part)


def calls(work: Callable[[], object]) -> list[tuple[str, str]]:
    """Every call of a function of the package while `work` runs, as (file, function)."""
    found: list[tuple[str, str]] = []
    root = f"{SOURCE}/"

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            found.append((code.co_filename.removeprefix(root), code.co_qualname))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def assert_made(journey: list[tuple[str, str]], made: list[tuple[str, str]]) -> None:
    """The stops occur among the calls in their order, and no file comes twice."""
    assert len(journey) >= 8
    assert len({file for file, _ in journey}) == len(journey)
    left = iter(made)
    for stop in journey:
        assert stop in left, f"{stop} was not called after the stops before it"


def test_a_text_to_its_embedding():
    """Two texts of unlike length, so that there is padding to leave out."""
    texts = ["a text", "a rather longer text, so that the other one is padded"]

    def work():
        llm2comp.embed_texts(llm2comp.load("builtin:general-tiny", "cpu"), texts)

    assert_made(stops("A text to its embedding"), calls(work))


def test_a_batch_through_ctkd(tmp_path):
    tree = make_tree(tmp_path, ucl=None, scl=None, watch=None)
    made = calls(lambda: llm2comp.train(parse_recipe(tree), tmp_path / "run"))
    journey = stops("A batch through CTKD")
    assert_made(journey, made)
    gradient = {file for file, _ in journey[3:]}
    assert len(gradient) <= 5


def test_a_recipe_value_to_the_loss(tmp_path):
    """Another temperature arrives at the KL, through the files named."""
    recipe = write_recipe(tmp_path, ucl=None, scl=None, watch=None)
    said = []
    change = "pretext.temperature=2"
    work = ("train", recipe, change, "--out", tmp_path / "run")
    made = calls(lambda: said.append(cli(*work)))
    assert said[0].code == 0, said
    assert_made(stops("A recipe value to the loss"), made)


def test_a_journey_in_another_order_is_found():
    order = [(f"{letter}.py", "f") for letter in "abcdefgh"]
    assert_made(order, order)
    with pytest.raises(AssertionError, match="was not called"):
        assert_made([*order[:6], order[7], order[6]], order)
