"""Recipes on the command line: a TOML file over which flags like `--optim.lr 3e-4` have the last word."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import tomllib
import types
from collections.abc import Iterable, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import cyclopts
from cyclopts import ArgumentCollection

from longnet.cli.check import check_words
from longnet.cli.lists import spread_lists

if TYPE_CHECKING:
    from longnet.training.config import Recipe

R = TypeVar("R", bound="Recipe")

# Flags take several values, `--evaluate.contexts 512 2048`, and there is one way of saying each thing.
PARAMETERS = cyclopts.Parameter(consume_multiple=True, negative=())
_RECALL = "recall"  # with [task] in place of [data]
_COMPARE = "compare"  # belongs to `longnet compare`; what only trains passes it by


def load_recipe(path: Path, overrides: Sequence[str] = (), *, kind: type[R]) -> R:
    """Return the recipe of a file, with flags in the command line's form over it.

    Args:
        path: of a TOML file, or the name of a recipe that comes with LongNet: "demo".
        overrides: for example ["--optim.lr", "3e-4"].
        kind: Recipe, or a dataclass that extends it by tables.

    Raises:
        ValueError: a key that no recipe has, a value of the wrong type or out of range, each named.
        OSError: there is no such file.
    """
    app = cyclopts.App(help_flags=(), version_flags=(), default_parameter=PARAMETERS)

    def read(recipe: Path, *, settings: Any) -> Any:
        return settings

    read.__annotations__ = {"recipe": Path, "settings": Annotated[kind, cyclopts.Parameter(name="*")]}
    app.default(read)
    app.config = (RecipeFile(kind),)
    try:
        command, bound, _ = app.parse_args(
            spread_lists(app, [str(path), *overrides]), exit_on_error=False, print_error=False
        )
    except cyclopts.CycloptsError as error:
        raise ValueError(str(error)) from error
    return command(*bound.args, **bound.kwargs)  # type: ignore[no-any-return]


class RecipeFile:
    """The TOML file that a command's positional parameter `recipe` names, as a source of cyclopts.

    cyclopts asks it after the command line. Keys and types are checked here, where a message can name the file.
    """

    def __init__(self, kind: type[Any]) -> None:
        self._kind = kind

    def __call__(self, app: cyclopts.App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Fill in what the command line has left open."""
        path = next((item for item in arguments if item.field_info.name == "recipe" and not item.keys), None)
        if path is None or not path.tokens:
            return  # cyclopts says that it is missing
        source = path.tokens[0].value
        check_words(app, commands, arguments)
        tables = read_tables(Path(source), self._kind)
        given = {item.keys for item in arguments if item.tokens}
        for name, kind in get_type_hints(self._kind).items():
            for key in sorted(_required(kind) - tables.get(name, {}).keys()):
                if (name, key) not in given:
                    raise ValueError(f"{source}: [{name}] {key} is missing: write it there, or give --{name}.{key}")
        # cyclopts takes top-level keys with the name of a command, as [train] is, for that command's own settings.
        for command in reversed(commands):
            tables = {command: tables}
        cyclopts.config.Dict(tables, source=source)(app, commands, arguments)


def find_recipe(path: Path) -> Path | Traversable:
    """Return a recipe's file: the one at `path`, or the one of that name that comes with LongNet.

    Raises:
        OSError: there is neither.
    """
    if path.is_file():
        return path
    ours = recipes()
    if str(path) in ours:
        return ours[str(path)]
    near = difflib.get_close_matches(path.stem, ours, n=1)
    hint = f": did you mean {near[0]}?" if near else f" or a name: {', '.join(ours)}"
    raise FileNotFoundError(f"there is no recipe {path}: give a TOML file{hint}")


def recipes() -> dict[str, Traversable]:
    """Return the recipes that come with LongNet, by name."""
    files = (importlib.resources.files("longnet") / "recipes").iterdir()
    return {file.name.removesuffix(".toml"): file for file in sorted(files, key=lambda file: file.name)}


def read_tables(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Return the tables of a TOML file, checked against a recipe's dataclass.

    Raises:
        ValueError: no TOML, or a wrong key or value.
        OSError: there is no such file.
    """
    try:
        # Some editors begin a file with a mark.
        tables = tomllib.loads(find_recipe(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    known = get_type_hints(kind)
    if _RECALL in tables and _RECALL not in known:
        raise ValueError(
            f"{path} is a recipe of longnet recall, which makes its own data: longnet recall {path} -o OUT"
        )
    if _COMPARE not in known:
        tables.pop(_COMPARE, None)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name!r} stands outside the tables{_nearest_of_all(name, known)}")
        if name not in known:
            raise ValueError(f"{path}: there is no table [{name}]{_nearest(name, known, '[{}]')}")
        _check_table(path, name, table, known)
    return tables


def _check_table(path: Path, name: str, table: dict[str, Any], known: dict[str, Any]) -> None:
    kind = known[name]
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            near = _nearest(key, hints, "{}") or _nearest_of_all(key, known)
            raise ValueError(f"{path}: [{name}] has no key {key!r}{near}")
        if hints[key] is Path and value == "":
            raise ValueError(f"{path}: [{name}] {key} is empty: give a path")
        if not _fits(value, hints[key]):
            raise ValueError(f"{path}: [{name}] {key} must be {_in_words(hints[key])}, got {_shown(value)}")
    if _required(kind) <= table.keys():
        try:
            kind(**table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _required(kind: type[Any]) -> set[str]:
    fields = dataclasses.fields(kind)
    return {item.name for item in fields if item.default is item.default_factory is dataclasses.MISSING}


def _nearest(key: str, names: Iterable[str], form: str) -> str:
    near = difflib.get_close_matches(key, list(names), n=1, cutoff=0.6)
    return f": did you mean {form.format(near[0])}?" if near else ""


def _nearest_of_all(key: str, known: dict[str, Any]) -> str:
    places = {item.name: table for table, kind in known.items() for item in dataclasses.fields(kind)}
    near = difflib.get_close_matches(key, list(places), n=1, cutoff=0.8)
    return f": did you mean {near[0]} of [{places[near[0]]}]?" if near else ""


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        if not isinstance(value, list):
            return False
        if origin is list or parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(_fits(item, part) for item, part in zip(value, parts, strict=True))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(value, str if hint is Path else hint)


def _in_words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in parts if part is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(f'"{part}"' for part in parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        return "a list of " + " and ".join(_in_words(part) for part in parts)
    if origin in (tuple, list):
        return {int: "a list of integers", float: "a list of numbers"}.get(parts[0], "a list")
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a string"}[hint]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
