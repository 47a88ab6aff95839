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

from longnet.data.assembly import STATE, Options, assemble
from longnet.data.corpus import list_corpus
from longnet.data.shards import INDEX, read_index
from longnet.data.tokenizer import load_tokenizer
from longnet.data.writer import UNFINISHED, publish, write_json

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished folder: its index, the seconds this took, and whether it had been there already."""

    index: dict[str, Any]
    seconds: float
    known: bool


def prepare(
    options: Options, folder: Path, *, workers: int | None = None, overwrite: bool = False, progress: bool = True
) -> Prepared:
    """Write the corpus into `folder`, or go on where an earlier call with the same options and files was stopped.

    The files are the same whatever the number of workers (None: one per core) and however often it was stopped. Raises
    ValueError or OSError, in one line that says what to do, for what the user can mend; a finished folder that was
    there stays as it is until the new one is whole.
    """
    began = time.monotonic()
    corpus = list_corpus(options.sources, suffixes=options.suffixes, exclude=options.exclude)
    tokenizer = None if options.train_bpe else load_tokenizer(options.tokenizer)
    identity = {"options": json.loads(json.dumps(dataclasses.asdict(options))), "corpus": corpus.digest()}
    if tokenizer is not None:
        saved = tokenizer.backend_tokenizer.to_str().encode()
        identity["tokenizer"] = hashlib.blake2b(saved, digest_size=16).hexdigest()
    if _claim(folder, identity, overwrite):
        return Prepared(read_index(folder), time.monotonic() - began, known=True)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = folder / UNFINISHED
    try:
        if not (work / INDEX).exists():
            assemble(options, corpus, work, tokenizer, workers=workers, progress=progress)
        publish(folder)
    except ValueError:
        shutil.rmtree(work)  # what is wrong in the input has to be mended there, which makes it another input
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise OSError(
                f"{folder}: {error.strerror}; free some, and the same command goes on from what is written, "
                f"or remove {work}"
            ) from error
        raise
    return Prepared(read_index(folder), time.monotonic() - began, known=False)


def _claim(folder: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Return whether the folder is finished already, or make it ready to be written; raise where it must not be."""
    work = folder / UNFINISHED
    finished = read_index(folder)["provenance"].get("identity") if (folder / INDEX).exists() else None
    begun = json.loads((work / STATE).read_bytes())["identity"] if (work / STATE).exists() else None
    if finished == identity:
        if begun == identity:
            shutil.rmtree(work)
        return True
    if begun != identity:
        if not overwrite and (finished or begun):
            raise ValueError(
                f"{folder} was made, or begun, {_difference(finished or begun or {}, identity)}: "
                f"give another folder, or --overwrite"
            )
        if folder.exists() and not (finished or begun) and any(path.name != UNFINISHED for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no prepared data: give another folder")
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)
        write_json({"identity": identity}, work / STATE)
    return False


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    was, now = old.get("options", {}), new["options"]
    named = [f"{name} {was.get(name)!r}, now {now[name]!r}" for name in now if was.get(name) != now[name]]
    if named:
        return "with other options (" + "; ".join(named) + ")"
    return "from other files" if old.get("corpus") != new["corpus"] else "with another tokenizer"
