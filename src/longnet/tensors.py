"""Files of tensors from elsewhere: what is wrong with one is a ValueError that names it, whatever a library raises."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

# What readers of HDF5, safetensors and pickles let through when bytes are not what they should be.
_OF_DAMAGE = (
    OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, OverflowError,
    MemoryError, struct.error, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read bytes of a file with another library, and nothing else: what it raises becomes a ValueError.

    Raises:
        ValueError: the file is damaged.
        OSError: it is not there, or not ours to read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except _OF_DAMAGE as error:
        raise ValueError(
            f"{path} is damaged, or another kind of file ({first_line(error)}): copy or make it anew"
        ) from None


def read_pickle(path: Path, allowed: Sequence[type] = ()) -> Any:
    """Return what `torch.save` wrote, on the CPU, without running any code that the file names.

    Args:
        path: of the file.
        allowed: classes that it may hold beside tensors, numbers, text and their containers.

    Raises:
        ValueError: the file is damaged, or holds objects of other classes.
        OSError: it is not there, or not ours to read.
    """
    with reading(path):
        try:
            with torch.serialization.safe_globals(list(allowed)):
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            found = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error))
            if found is None and isinstance(error, RuntimeError):
                raise
    if found is None:
        raise ValueError(f"{path} is damaged, or not a file of torch.save: copy or make it anew")
    raise ValueError(
        f"{path} holds more than tensors ({found[1] or found[2]}), which is not read, since it can run code: save a "
        "dictionary of tensors"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
