"""Weights of files and folders, whole and finite, or a ValueError that names the file and the tensor."""

import argparse
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from longnet.tensors import first_line, read_pickle, reading

_WRAPPERS = ("model", "teacher", "module", "state_dict")  # what training code keeps a state dictionary under
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, of a pickle those under `model`, `teacher`, `module` or `state_dict`.

    Raises:
        ValueError: a damaged file, or one that holds no tensors by name.
        FileNotFoundError: no such file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where torchscale's file is expected: from_pretrained reads folders")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        with reading(path):
            return load_file(path)
    held = read_pickle(path, [argparse.Namespace])  # fairseq keeps its arguments beside
    if isinstance(held, dict):
        held = next((held[name] for name in _WRAPPERS if isinstance(held.get(name), dict)), held)
    tensors = held.items() if isinstance(held, dict) else ()
    weights = {name: value for name, value in tensors if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{path} holds no tensors by name")
    return weights


def refuse_no_floats(path: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError where weights by name are sparse, or not float16, bfloat16, float32 or float64."""
    other = [
        f"{name}: {weight.dtype}".replace("torch.", "") + ", sparse" * (weight.layout != torch.strided)
        for name, weight in weights
        if weight.dtype not in _DTYPES or weight.layout != torch.strided
    ]
    if other:
        raise ValueError(
            f"weights in {path} are not dense floating-point numbers, {'; '.join(_named('in all', other))}: save them "
            "in float32, float16 or bfloat16"
        )


def refuse_broken(path: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError where weights by name are NaN or infinite."""
    broken = [name for name, weight in weights if weight.is_floating_point() and not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"weights in {path} are NaN or infinite, {'; '.join(_named('in all', broken))}: take an earlier "
            "checkpoint, from before the training went astray"
        )


def load_config(folder: str | Path) -> PreTrainedConfig:
    """Return the configuration in a folder, of whatever class its config.json names.

    Raises:
        ValueError: there is none, or a wrong one.
    """
    with _loading(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]


def load_folder(kind: Any, folder: str | Path, **keywords: Any) -> Any:
    """Return `kind.from_pretrained(folder)`, every weight of it, in eval mode.

    Args:
        kind: a model class, or an Auto class.
        folder: that `save_pretrained` wrote. Names with `_orig_mod.` in them, as torch.compile leaves them, are
            understood.
        **keywords: of from_pretrained.

    Raises:
        ValueError: weights that are missing, left over, of another shape, cut off or not finite; a folder that holds
            no model.
    """
    with _loading(folder):
        model, found = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            key_mapping={r"_orig_mod\.": ""}, **keywords,
        )  # fmt: skip
    # transformers keeps how names were changed, and changes them back when the model is saved.
    vars(model).pop("_weight_conversions", None)
    _refuse_partial(folder, model, found)
    refuse_broken(folder, model.state_dict().items())
    return model.eval()


@contextmanager
def _loading(folder: str | Path) -> Iterator[None]:
    # transformers draws a bar and prints a table of what did not fit, which `_refuse_partial` says in a line.
    level = logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged ({first_line(error)}): copy them anew") from error
    except StrictDataclassError as error:
        cause = error.__cause__ or error
        raise ValueError(f"the model in {folder} cannot be loaded: config.json: {first_line(cause)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)


def _refuse_partial(folder: str | Path, model: Any, found: dict[str, Collection[Any]]) -> None:
    """Raise ValueError unless each weight came from the file, and each of the file went somewhere."""
    missing, extra = set(found["missing_keys"]), set(found["unexpected_keys"])
    shapes = {
        name: f"{name} {list(ours)} in place of {list(theirs)}" for name, ours, theirs in found["mismatched_keys"]
    }
    faults = [
        *_named("missing", missing - shapes.keys()),
        *_named("of no use to this model", extra - shapes.keys()),
        *_named("of another shape", shapes.values()),
    ]
    if faults:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json, a {type(model).__name__}: {'; '.join(faults)}: "
            "give both from one training, and save a part of a model as a part of it"
        )


def _named(what: str, names: Collection[str]) -> list[str]:
    shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
    return [f"{len(names):,} {what} ({shown})"] if names else []
