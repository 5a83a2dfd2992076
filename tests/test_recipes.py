"""The recipes that ship, and what the recipe reader refuses."""

from pathlib import Path

import pytest

from llm2comp.errors import RecipeError
from llm2comp.recipe import load_recipe, parse_recipe, shipped_recipes

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(
    file for file in RECIPES.rglob("*.yaml") if file.parent.name not in ("studies", "launch")
)

MINIMAL = """\
format_version: 1
name: minimal
model: {name: builtin:tiny}
pretext:
  data: [{source: texts.jsonl}]
ucl:
  data: [{source: texts.jsonl}]
  steps: 5
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    file = tmp_path / "minimal.yaml"
    file.write_text(MINIMAL)
    return file


def test_recipes_are_there():
    assert len(FILES) >= 3
    assert not list(RECIPES.rglob("*.yml")), "one suffix: .yaml"


@pytest.mark.parametrize(
    "file", FILES, ids=[file.relative_to(RECIPES).as_posix() for file in FILES]
)
def test_recipe_parses(file: Path):
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert recipe.stages


SAMPLES = {
    "llama2-7b-paper": (32_000, 128_000, 204_800),
    "llama2-7b-release": (128_000, 128_000, 204_800),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_papers_recipes_have_its_batches_and_samples(name: str):
    """On one device, and on four by the command that stands in the recipe."""
    (command,) = [
        line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if "launch" in line
    ]
    processes = int(command.split("--num_processes ")[1].split()[0])
    overrides = command.partition(f"train {name}")[2].split()
    for recipe, devices in ((load_recipe(name), 1), (load_recipe(name, overrides), processes)):
        stages = recipe.stages.values()
        batches = tuple(stage.batch_size * devices for stage in stages)
        assert batches == (4, 128, 1024)
        seen = tuple(stage.steps * batch for stage, batch in zip(stages, batches, strict=True))
        assert seen == SAMPLES[name]


def test_names_are_unique():
    names = [file.stem for file in FILES]
    assert sorted(set(names)) == sorted(names)


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = {file.stem for file in FILES if file.parent == RECIPES}
    assert here
    assert here == set(shipped_recipes())
    name = min(here)
    monkeypatch.chdir(tmp_path)
    assert (
        load_recipe(name)
        == load_recipe(f"recipes/{name}.yaml")
        == load_recipe(RECIPES / f"{name}.yaml")
    )


def test_missing_recipe_names_nearest():
    name = min(file.stem for file in FILES if file.parent == RECIPES)
    with pytest.raises(RecipeError, match=f"did you mean '{name}'"):
        load_recipe(name + "x")


def test_written_recipe_reads_back(minimal: Path, tmp_path: Path):
    recipe = load_recipe(minimal)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("addition", "location", "hint"),
    [
        ("memry: {tokens: 4}", "memry", "did you mean 'memory'?"),
        ("  step: 5", "ucl.step", "did you mean 'steps'?"),
        (
            "  schedule: {learning_rate: 1, warm_up_steps: 1}",
            "ucl.schedule.warm_up_steps",
            "did you mean 'warmup_steps'?",
        ),
        ("  zzz: 5", "ucl.zzz", "valid keys: steps, batch_size, "),
    ],
)
def test_unknown_key_names_nearest(minimal: Path, addition: str, location: str, hint: str):
    minimal.write_text(MINIMAL + addition)
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal)
    message = str(caught.value)
    assert message.startswith(str(minimal))
    assert f"{location}: unknown key; {hint}" in message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["pretext.site_margin_tokens=300", "pretext.max_tokens=512"], "no split site exists"),
        (
            ["ucl.schedule={learning_rate: 1.0e-6, floor_learning_rate: 1.0e-5}"],
            "above learning_rate",
        ),
        (["ucl.schedule={floor_learning_rate: 5.0e-5}"], "above the rate of learning_rate auto"),
        (["pretext=null", "ucl=null"], "at least one of pretext, ucl, scl"),
        (
            ["scl={data: [{source: pairs.jsonl}], query_prompt: 'query: '}"],
            "must contain {instruction}",
        ),
    ],
)
def test_contradictions_raise(minimal: Path, overrides: list[str], says: str):
    assert load_recipe(minimal)
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal, overrides)
    assert says in str(caught.value)


def test_a_floor_below_the_stage_s_own_auto_is_taken(minimal: Path):
    floors = ["pretext.schedule={floor_learning_rate: 1.0e-4}", "ucl.schedule={decay: constant}"]
    assert load_recipe(minimal, floors).stages["pretext"].schedule.learning_rate == "auto"


@pytest.mark.parametrize(
    "override",
    [
        "format_version=2",
        "name=a/b",
        "seed=-1",
        "ucl.batch_size=1",
        "ucl.temperature=0",
        "ucl.steps=many",
        "pretext.data=[]",
    ],
)
def test_values_that_do_not_fit_name_their_field(minimal: Path, override: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal, [override])
    assert f"{override.partition('=')[0]}: " in str(caught.value)


def test_overrides_apply(minimal: Path):
    recipe = load_recipe(
        minimal,
        [
            "seed=7",
            "ucl.steps=9",
            "pretext.data.0.source=other.txt",
            "scl={data: [{source: p.jsonl}]}",
        ],
    )
    assert (recipe.seed, recipe.stages["ucl"].steps) == (7, 9)
    assert recipe.pretext is not None
    assert recipe.pretext.data[0].source == "other.txt"
    assert list(recipe.stages) == ["pretext", "ucl", "scl"]
    assert load_recipe(minimal).seed == 0, "an override lasts for one call"


@pytest.mark.parametrize(
    "override", ["seed", "=7", "seed=[", "name.first=x", "pretext.data.5.source=x", "ucl.stepz=3"]
)
def test_broken_overrides_raise(minimal: Path, override: str):
    with pytest.raises(RecipeError):
        load_recipe(minimal, [override])


@pytest.mark.parametrize("addition", ["seed: 1\nseed: 2\n", "memory:\n  tokens: 4\n  tokens: 8\n"])
def test_key_given_twice_is_an_error(minimal: Path, addition: str):
    minimal.write_text(MINIMAL + addition)
    with pytest.raises(RecipeError, match="is given twice"):
        load_recipe(minimal)


@pytest.mark.parametrize(
    "content",
    [b"", b"- a\n- b\n", b"just text", b"a: [", b"\xff\xfe\x00", b"!!python/object:os.system {}"],
)
def test_garbage_is_refused(minimal: Path, content: bytes):
    minimal.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal)
    assert str(minimal) in str(caught.value)


def test_recipe_is_frozen(minimal: Path):
    recipe = load_recipe(minimal)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


@pytest.mark.parametrize("objective", [{}, {"ctkd": 0.0}, {"ctkd": -1}, {"ctdk": 1.0}, "ctdk", []])
def test_objectives_that_are_none(objective):
    recipe = load_recipe("tiny").model_dump(mode="json")
    recipe["pretext"]["objective"] = objective
    with pytest.raises(RecipeError, match=r"pretext\.objective"):
        parse_recipe(recipe)


def test_objectives_and_their_name():
    recipe = load_recipe("tiny", ["pretext.objective={reconstruction: 0.1, ctkd: 1}"])
    assert recipe.pretext.objectives == {"ctkd": 1.0, "reconstruction": 0.1}
    assert recipe.pretext.objective_name == "1 ctkd + 0.1 reconstruction"
    assert load_recipe("tiny").pretext.objectives == {"ctkd": 1.0}
