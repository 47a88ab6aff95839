"""Models that commands load, whole and causal: a run's newest checkpoint, or any Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


OURS = ("dilated", "dilated_triton", "sparse_fixed", "sdpa", "eager")  # what is named first


class Loaded(NamedTuple):
    """A model and where it came from.

    Attributes:
        model: on its device, in eval mode.
        folder: its Hugging Face folder.
        run: the folder that was given, or the run that a checkpoint belongs to.
        training_length: tokens of a training sequence; None where the folder does not say.
    """

    model: PreTrainedModel
    folder: Path
    run: Path
    training_length: int | None


def load_model(
    path: Path, device: torch.device, attention: str | None = None, dtype: torch.dtype | None = None
) -> Loaded:
    """Load a model, every weight of it, and see that no token of it sees a later one.

    Args:
        path: of a run, of a checkpoint, or of a Hugging Face model. Names with `_orig_mod.` in them, as
            torch.compile leaves them, are understood.
        device: where it goes.
        attention: to use instead of its own, which is the one that its configuration holds a pattern of.
        dtype: of its weights; that of the file when None.

    Raises:
        ValueError: a folder whose model cannot be loaded: weights that are missing, left over, of another shape, cut
            off or not finite; an attention that the model does not have; a model that sees later tokens.
        OSError: there is no model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import longnet.model  # noqa: F401  # makes LongNet and its attentions known to transformers
    from longnet.evaluation.scoring import refuse_sight_of_later_tokens
    from longnet.model.patterns import PATTERN_FIELDS, fields_of
    from longnet.model.weights import load_config, load_folder
    from longnet.training.checkpoint import model_folder

    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path}: give a run of `longnet train`, or a Hugging Face model folder"
        )
    folder = model_folder(path)
    if attention is not None and attention not in (names := ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]):
        own = [*OURS, *(name for name in names if "|" not in name and name not in OURS)]
        raise ValueError(f"there is no attention {attention!r}: choose one of {', '.join(own)}")
    keywords: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if dtype is not None:
        keywords["dtype"] = dtype
    if attention is None:
        held = [name for name in PATTERN_FIELDS if fields_of(load_config(folder), name) is not None]
        if held:
            keywords["attn_implementation"] = held[0]
    model = load_folder(AutoModelForCausalLM, folder, **keywords).to(device)
    refuse_sight_of_later_tokens(model)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else path
    return Loaded(model, folder, run, training_length(folder))


def training_length(folder: Path) -> int | None:
    """Return the tokens of a training sequence of a checkpoint of `longnet train`, None for another model."""
    from longnet.training.state import read_record

    return int(read_record(folder)["recipe"]["train"]["tokens"]) if (folder / "state.json").is_file() else None
