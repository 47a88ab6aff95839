"""`longnet prepare`: a corpus to a folder of token shards, killed and resumed as it may be."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from longnet.data.assembly import STATE, Options, assemble, load_state
from longnet.data.content import InputError
from longnet.data.corpus import list_corpus
from longnet.data.shards import INDEX, TOKEN_BYTES, TokenData, read_index
from longnet.data.tokenizer import load_tokenizer
from longnet.data.writer import UNFINISHED, DamagedWorkError, publish, write_state

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished folder: its index, the seconds it took, whether it had been there already, options without effect."""

    index: dict[str, Any]
    seconds: float
    known: bool
    unused: list[str]


def prepare(
    options: Options, folder: Path, *, workers: int | None = None, overwrite: bool = False, progress: bool = True
) -> Prepared:
    """Write the corpus into `folder`, or go on where an earlier call with the same options and files was stopped.

    The files are the same whatever the number of workers (None: one per core) and however often it was stopped. Raises
    ValueError or OSError, in one line that says what to do, for what the user can mend; a finished folder that was
    there stays as it is until the new one is whole.
    """
    try:
        return _prepare(options, folder, workers, overwrite, progress)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise OSError(
            f"{folder}: {error.strerror}; free some, and the same command goes on from what is written, "
            f"or remove {folder / UNFINISHED}"
        ) from error


def _prepare(options: Options, folder: Path, workers: int | None, overwrite: bool, progress: bool) -> Prepared:
    began = time.monotonic()
    corpus = list_corpus(options.sources, suffixes=options.suffixes, exclude=options.exclude)
    tokenizer = None if options.train_bpe else load_tokenizer(options.tokenizer)
    identity = {"options": json.loads(json.dumps(dataclasses.asdict(options))), "corpus": corpus.digest()}
    if tokenizer is not None:
        saved = tokenizer.backend_tokenizer.to_str().encode()
        identity["tokenizer"] = hashlib.blake2b(saved, digest_size=16).hexdigest()
    if _claim(folder, identity, overwrite):
        return Prepared(read_index(folder), time.monotonic() - began, True, corpus.unused)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = folder / UNFINISHED

    def go_on() -> None:
        if not (work / INDEX).exists():
            assemble(options, corpus, work, tokenizer, workers=workers, progress=progress)

    try:
        try:
            go_on()
        except DamagedWorkError:
            if not overwrite:
                raise
            _begin(work, identity)
            go_on()
    except ValueError as error:
        # What is wrong in the input has to be mended there, which makes it another input. All else may pass.
        if isinstance(error, InputError) or not _has_cost(work):
            shutil.rmtree(work)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    publish(folder)
    return Prepared(read_index(folder), time.monotonic() - began, False, corpus.unused)


def _has_cost(work: Path) -> bool:
    """Tell whether unfinished work holds a vocabulary or tokens."""
    state = load_state(work)
    return bool(state.get("trained") or state.get("writer"))


def _begun(work: Path) -> dict[str, Any] | None:
    """Return what unfinished data are made from, {} where their state is damaged, None where there are none."""
    try:
        return _with_defaults(load_state(work)["identity"])
    except FileNotFoundError:
        return {} if any(not path.name.startswith(".") for path in work.glob("*")) else None
    except (DamagedWorkError, KeyError, TypeError):
        return {}


def _with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity that may be older than some options, which were then as they are by default."""
    fields = dataclasses.fields(Options)
    defaults = {item.name: item.default for item in fields if item.default is not dataclasses.MISSING}
    return {**identity, "options": json.loads(json.dumps({**defaults, **identity["options"]}))}


def _claim(folder: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Return whether the folder is finished already, or make it ready to be written; raise where it must not be."""
    work = folder / UNFINISHED
    if work.exists() and not work.is_dir():
        raise ValueError(f"{work} is a file where unfinished data would lie: move it away, or give another folder")
    begun = _begun(work)
    finished = _finished(folder, identity, overwrite)
    if finished == identity:
        if begun == identity:
            shutil.rmtree(work)
        return True
    if begun == identity:
        return False
    if begun and not _has_cost(work):
        begun = None
    known = finished if finished is not None else begun
    if begun == {} and not overwrite:
        raise DamagedWorkError(f"{work / STATE} is missing or damaged")
    if known is not None and not overwrite:
        raise ValueError(
            f"{folder} was made, or begun, {_difference(known, identity)}: give another folder, or --overwrite"
        )
    if known is None and folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no prepared data: give another folder")
    _begin(work, identity)
    return False


def _begin(work: Path, identity: dict[str, Any]) -> None:
    """Leave work at its begin, whatever there was."""
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_state({"identity": identity}, work / STATE)


def _finished(folder: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return what the data in a folder were made from, {} for damaged ones that may be overwritten, None for none."""
    if not (folder / INDEX).exists():
        return None
    try:
        found = dict(read_index(folder)["provenance"].get("identity", {}))
        found = _with_defaults(found) if found else found
        if found == identity:
            data = TokenData.open(folder)
            if overwrite:
                data.verify()
    except (ValueError, FileNotFoundError):
        if overwrite and (folder / TOKEN_BYTES).exists():
            return {}
        raise
    return found


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    if not old:
        return "by other means"
    was, now = old["options"], new["options"]
    named = [f"{name} {was.get(name)!r}, now {now[name]!r}" for name in now if was.get(name) != now[name]]
    if named:
        return "with other options (" + "; ".join(named) + ")"
    return "from other files" if old["corpus"] != new["corpus"] else "with another tokenizer"
