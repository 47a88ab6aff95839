"""A folder of cells: the plan that it holds them to, and each cell's result or why there is none."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from longnet.comparison.document import write_text
from longnet.comparison.process import Stop
from longnet.training.config import Tables, to_toml, with_defaults

RESULT, FAILURE = "result.json", "failure.json"
STOPPED = 3  # exit status of a cell that was told to stop and has left what the next process goes on from

R = TypeVar("R")


def run_once(
    stop: Stop,
    work: Callable[..., int],
    *arguments: Any,
    folder: Path,
    load: Callable[[Path], R | None],
    title: str | None,
) -> R | str | None:
    """Return a cell's result, computed where its folder holds none; why there is none; None where it was stopped.

    Args:
        stop: runs it.
        work: a function of a module that leaves RESULT or FAILURE in the folder, and returns 0 or STOPPED.
        arguments: of `work`.
        folder: of the cell.
        load: reads the result; None where there is none.
        title: told when work begins; None tells nothing.
    """
    result = load(folder)
    if result is not None or stop.is_asked:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    if title is not None:
        print(f"{title} ({folder})", flush=True)  # noqa: T201
    status = stop.run(work, *arguments)
    result = load(folder)
    if result is not None or status == STOPPED or stop.is_asked:
        return result
    if (folder / FAILURE).is_file():
        return str(json.loads((folder / FAILURE).read_text())["error"])
    if status < 0:
        return f"ended by {signal.Signals(-status).name}; the system does that where memory runs out, for one"
    return f"ended with exit status {status}"


def leave_failure(error: BaseException, folder: Path) -> None:
    """Write why a cell has no result: the error's first line."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    write_text(json.dumps({"error": reason[0]}) + "\n", folder / FAILURE)


def check_plan(path: Path, tables: Tables, *, free: Collection[str] = (), data: str | None = None) -> None:
    """Refuse to mix results of two recipes in one folder; write what it holds them to, and the recipe beside it.

    Args:
        path: of the plan, OUT/comparison.json, say.
        tables: of the recipe, what decides the results.
        free: tables and dotted keys that may change from one run of the command to the next.
        data: fingerprint of the data, None where there are none.

    Raises:
        ValueError: the folder's plan is another.
    """
    if path.exists():
        plan = json.loads(path.read_text())
        if plan.get("data") != data:
            raise ValueError(f"{path.parent} holds a comparison on other data: choose another folder")
        old, changed = with_defaults(plan["recipe"], tables), []
        for table in sorted((old.keys() | tables.keys()) - set(free)):
            before, now = old.get(table, {}), tables.get(table, {})
            changed += [
                f"{table}.{key} ({before.get(key)} → {now.get(key)})"
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key) and f"{table}.{key}" not in free
            ]
        if changed:
            raise ValueError(
                f"{path.parent} holds a comparison with another recipe: {', '.join(changed)}; set these back, or "
                "choose another folder"
            )
    write_text(to_toml(tables), path.parent / "recipe.toml")
    plan = {"recipe": tables} if data is None else {"recipe": tables, "data": data}
    write_text(json.dumps(plan, indent=1) + "\n", path)
