"""A study over a tiny run, for its tests."""

import yaml

from tiny_run import sentences, write_recipe, write_rows

STUDY = {
    "format_version": 1,
    "name": "tiny-study",
    "overrides": [
        "pretext.steps=3",
        "ucl.steps=2",
        "scl.steps=2",
        "watch={texts: 8, max_tokens: 32}",
    ],
    "seeds": [0, 1],
    "systems": {"long": {}, "short": {"scl.steps": 1}},
    "after": ["ucl", "last"],
}


def write_study(folder, **changes):
    """A study over a recipe and two local sets in `folder`, which it writes."""
    for number, name in enumerate(("One", "Two")):
        place = folder / "sets" / "sts" / name
        place.mkdir(parents=True, exist_ok=True)
        texts = sentences(40, 6, seed=10 + number)
        rows = [
            {"sentence1": texts[2 * i], "sentence2": texts[2 * i + 1], "score": (i * 7) % 6}
            for i in range(20)
        ]
        write_rows(place / "test.jsonl", rows)
    tree = STUDY | {"recipe": str(write_recipe(folder)), "scores": [str(folder / "sets")]} | changes
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def weights(run):
    found = {
        file.relative_to(run).as_posix(): file.read_bytes()
        for file in sorted(run.rglob("*.safetensors"))
    }
    assert len(found) >= 6
    return found
