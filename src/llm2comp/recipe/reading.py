"""Reading a recipe: strict YAML, overrides, errors that name the field and the nearest key."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llm2comp.errors import RecipeError
from llm2comp.recipe.paths import expanded
from llm2comp.recipe.recipe import Recipe
from llm2comp.system.files import to_json


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or the name of a shipped recipe) and apply `key.sub=value` overrides.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value does not fit;
            names the field.
    """
    file = find_recipe(path)
    tree = read_yaml(file, "recipe")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, where=str(file))


def read_yaml(file: Path, kind: str) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises RecipeError: unreadable, no mapping, or a key given twice.
    """
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    # no UTF-8, a 45th day of a month
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"not readable as YAML: {error}", where=str(file)) from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"not a {kind}",
            where=str(file),
            expected="a mapping of settings",
            found=type(tree).__name__,
        )
    return tree


def change_recipe(recipe: Recipe, overrides: typing.Sequence[str]) -> Recipe:
    """A recipe with `key.sub=value` overrides. Raises RecipeError as `load_recipe` does."""
    # without defaults: an override `start_from` has others to inherit
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises RecipeError that lists every field at fault."""
    return checked(Recipe, tree, where)


Checked = TypeVar("Checked", bound=BaseModel)


def checked(kind: type[Checked], tree: Any, where: str) -> Checked:
    """Settings of some kind from plain data. Raises RecipeError that lists every field at fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        items = error.errors()
        locations = [item["loc"] for item in items]
        # a list whose items are at fault is reported as too short as well: say it once
        telling = [
            i
            for i in items
            if i["type"] != "too_short" or not any(len(i["loc"]) < len(x) for x in locations)
        ]
        raise RecipeError(
            "\n  ".join(_explain(kind, item) for item in telling or items), where=where
        ) from None


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Plain data as dotted name → value; a container without content is a value."""
    if not isinstance(tree, dict | list) or not tree:
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        k: v
        for key, value in items
        for k, v in leaves(value, f"{path}.{key}" if path else str(key)).items()
    }


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    return shipped_files("recipes")


def shipped_files(place: str) -> dict[str, Path]:
    """YAML files of a folder that comes with the package, by name.

    It is beside the package in a checkout, inside it when installed.
    """
    here = Path(__file__).resolve().parents[1]
    folders = (here / place, here.parents[1] / place)
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that name."""
    file = expanded(path)
    if file.is_file():
        return file
    shipped = shipped_recipes()
    name = file.stem if file.suffix in (".yaml", ".yml") else file.name
    if name in shipped and not file.parent.is_dir() or str(path) in shipped:
        return shipped[name]
    raise RecipeError(
        "no such recipe",
        where=str(path),
        expected=f"a YAML file or one of: {', '.join(shipped)}",
        fix=_likely(file) or nearest(name, shipped),
    )


def _likely(file: Path) -> str | None:
    """The recipe of a run that was given in its place, or a file beside it with nearly its name."""
    if (file / "recipe.yaml").is_file():
        return f"did you mean {str(file / 'recipe.yaml')!r}?"
    beside = (other.name for other in file.parent.glob("*.y*ml"))
    return nearest(file.name, beside) if file.suffix else None


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not a name", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in the plain tree; a number in the key is a place in a list."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError("not an override", where=override, expected="key.sub=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"value is not YAML: {error}", where=override) from None
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise RecipeError(f"{part!r} lies under a plain value", where=override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"{last!r} lies under a plain value", where=override)


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(
            "no such place in the list",
            where=override,
            expected=f"0 to {len(node) - 1}",
            found=part,
        )
    return int(part)


def nearest(name: str, valid: typing.Iterable[str]) -> str | None:
    """The nearest valid name as "did you mean ...?"; None if no name is near."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else None


def _explain(kind: type[BaseModel], item: Any) -> str:
    """One pydantic error as one line: field, what is wrong, what was found, nearest valid key."""
    location = ".".join(str(part) for part in item["loc"]) or "settings"
    if item["type"] == "extra_forbidden":
        valid = _keys_at(kind, item["loc"][:-1])
        return (
            f"{location}: unknown key; "
            f"{nearest(str(item['loc'][-1]), valid) or 'valid keys: ' + ', '.join(valid)}"
        )
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] in ("missing", "value_error"):
        return f"{location}: {message}"
    return f"{location}: {message}, found {to_json(item['input'], default=str)[:80]}"


def _keys_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Valid keys of the section at a location in settings of some kind."""
    section = kind
    for part in location:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            section = next(_sections_in(field.annotation), section)
    return list(section.model_fields)


def _sections_in(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)
