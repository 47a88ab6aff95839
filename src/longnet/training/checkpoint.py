"""Checkpoints: folders that are whole or not there, and finding the newest whole one.

A checkpoint is written beside its place, each file synced to disk, a manifest with their SHA-256 last, and only then
renamed into place: whatever kills the process, a folder `step-…` is complete. What damages it later (a flipped byte, a
file cut short) the manifest shows.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError

from longnet.durable import sync

_FOLDER = "checkpoints"
_MANIFEST = "manifest.json"
STATE = "state.json"  # what tells a checkpoint from other Hugging Face folders
_DOOMED = ".superseded"  # ends the names of folders that may go at any time; so does _PARTIAL
_PARTIAL = ".partial"
_SAVING = "saving"  # the thread's name


@dataclass(kw_only=True)
class CheckpointConfig:
    """The recipe's table `[checkpoint]`."""

    every: int = 500
    """Steps between two checkpoints; 0 writes one after the last step only. Stopping the run writes one, too."""

    keep: int = 2
    """How many of the newest checkpoints stay; older ones are deleted once a newer one is whole. 0 keeps all."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("every", "keep"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name} must be 0 or more, got {getattr(self, name)}")


class Found(NamedTuple):
    """What a run folder holds.

    Attributes:
        whole: its newest whole checkpoint, None where there is none.
        damaged: newer ones, newest first, each with what is wrong with it.
    """

    whole: Path | None
    damaged: list[tuple[Path, str]]


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold a run folder, made where it is missing, for this process; the system lets go of it when the process ends.

    Raises:
        ValueError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{run} is in use by process {file.read().strip() or 'unknown'}: wait for it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def save_checkpoint(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    on_first: Callable[[Callable[[], Any]], Any] = lambda function: function(),
) -> Path:
    """Write the checkpoint of a step; then delete what it supersedes. Return its folder.

    Args:
        run: the run's folder.
        step: steps finished.
        write: puts the files into an empty folder; across ranks it raises on all of them or on none.
        keep: checkpoints up to this one that stay, 0 for all.
        on_first: runs a function on the first of the ranks that all call this, and gives each its result or error.

    Raises:
        OSError: it cannot be written, a full disk for example. What was written is removed, the others are untouched.
    """
    folder = run / _FOLDER
    final = folder / f"step-{step:08d}"
    partial = folder / (final.name + _PARTIAL)
    try:
        on_first(lambda: _begin(partial))
        write(partial)
        on_first(lambda: _finish(partial, final))
    except (OSError, SafetensorError) as error:
        rest = on_first(lambda: _give_up(partial, run))
        reason = "the disk is full" if _is_disk_full(error) else str(error)
        raise OSError(f"cannot write the checkpoint of step {step} into {folder}: {reason}; {rest}") from error
    on_first(lambda: delete_superseded(run, step, keep))
    return final


def delete_superseded(run: Path, step: int, keep: int) -> None:
    """Delete checkpoints that the newest supersede, and what a kill has left of such.

    Args:
        run: the run's folder.
        step: of the newest. Checkpoints of later steps are damaged ones, which the run has skipped: they go when their
            step is reached again.
        keep: of those up to it that stay, 0 for all.
    """
    folder = run / _FOLDER
    # A folder is renamed before its files go, so that a half-deleted one is not taken for a checkpoint.
    earlier = [checkpoint for checkpoint in _checkpoints(folder) if _step(checkpoint) <= step]
    for checkpoint in earlier[:-keep] if keep else []:
        doomed = checkpoint.with_name(checkpoint.name + _DOOMED)
        _remove(doomed)
        checkpoint.rename(doomed)
    for path in folder.iterdir():
        if path.name.endswith((_DOOMED, _PARTIAL)):
            _remove(path)


class Saving:
    """Writes checkpoints in a thread, one at a time, while training goes on.

    A process that ends while it writes waits for it: a thread that frees tensors while Python shuts down aborts the
    process. Who wants to end at once uses `end_at_once`: what is not finished is no checkpoint.
    """

    def __init__(self) -> None:
        self._future: futures.Future[Path] | None = None
        self._thread: threading.Thread | None = None

    @property
    def has_failed(self) -> bool:
        """Whether `wait` will raise."""
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def start(self, save: Callable[[], Path]) -> None:
        """Begin to write a checkpoint, once the one before is written; raise what that raised."""
        self.wait()
        future: futures.Future[Path] = futures.Future()
        self._future = future

        def run() -> None:
            try:
                future.set_result(save())
            except Exception as error:  # noqa: BLE001  # `wait` raises it
                future.set_exception(error)

        self._thread = threading.Thread(target=run, name=_SAVING, daemon=True)
        self._thread.start()
        atexit.register(self._outlast)

    def _outlast(self) -> None:
        """Let the thread end before Python shuts down, unless Ctrl-C is pressed once more."""
        try:
            self._join()
        except KeyboardInterrupt:
            end_at_once(128 + signal.SIGINT)

    def wait(self) -> Path | None:
        """Return the checkpoint begun last, once it is written, None where there is none; raise what was raised.

        The thread has then ended: one that still frees its copies of the weights when Python shuts down aborts it.
        """
        if self._join():
            atexit.unregister(self._outlast)
        return self._future.result() if self._future is not None else None

    def _join(self) -> bool:
        """Return once the thread has ended, if there is one; say whether there is."""
        if self._future is None or self._thread is None:
            return False
        # Ctrl-C comes here, as a rule: one that interrupts `join` makes Python 3.11 take the thread for one that ended.
        futures.wait([self._future])
        self._thread.join()
        return True


def end_at_once(status: int) -> NoReturn:
    """End this process, though a checkpoint may be half-written, which another thread would not leave alone."""
    if any(thread.name == _SAVING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def newest_whole(run: Path) -> Found:
    """Look for the newest checkpoint of a run whose files are all as its manifest says, reading each."""
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(_checkpoints(run / _FOLDER)):
        fault = find_fault(checkpoint)
        if fault is None:
            return Found(checkpoint, damaged)
        damaged.append((checkpoint, fault))
    return Found(None, damaged)


def find_fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None where it is whole."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_bytes())["files"]
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    for name, (expected_size, expected_sha256) in listed.items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != expected_size:
                return f"{name} has {size} bytes instead of {expected_size}"
            if _sha256(path) != expected_sha256:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def model_folder(path: str | Path) -> Path:
    """Return the Hugging Face folder of a model: a run's newest whole checkpoint, or the folder itself.

    Raises:
        FileNotFoundError: there is no model in it.
        ValueError: a checkpoint, or all those of a run, are damaged.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        is_checkpoint = (path / _MANIFEST).exists() or (path / STATE).exists()
        fault = find_fault(path) if is_checkpoint else None
        if fault is not None:
            raise ValueError(f"{path} is a damaged checkpoint: {fault}; use another checkpoint of its run")
        return path
    found = newest_whole(path)
    if found.whole is not None:
        return found.whole
    if found.damaged:
        raise ValueError(f"{path} holds no whole checkpoint: {describe_damage(found.damaged)}")
    raise FileNotFoundError(
        f"{path} holds no model: give the folder of a run that has written a checkpoint, or a Hugging Face model folder"
    )


def describe_damage(damaged: list[tuple[Path, str]]) -> str:
    """Return one line that names damaged checkpoints and what is wrong with each."""
    return "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in damaged)


def has_checkpoints(run: Path) -> bool:
    """Tell whether a run has written a checkpoint, whole or not."""
    return bool(_checkpoints(run / _FOLDER))


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal() and path.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _begin(partial: Path) -> None:
    _remove(partial)
    partial.mkdir(parents=True)


def _finish(partial: Path, final: Path) -> None:
    _seal(partial)
    if final.exists():  # damaged, or it would have been resumed from
        doomed = final.with_name(final.name + _DOOMED)
        _remove(doomed)
        final.rename(doomed)
    partial.rename(final)
    sync(final.parent)
    sync(final.parent.parent)


def _give_up(partial: Path, run: Path) -> str:
    _remove(partial)
    previous = newest_whole(run).whole
    return f"the previous one, {previous}, is whole" if previous else "there is no earlier one"


def _seal(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        else:
            sync(path)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")
    sync(manifest)
    sync(folder)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_disk_full(error: Exception) -> bool:
    # safetensors says it in words.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full)
