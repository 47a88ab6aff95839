"""An adapter of a dilated model says so: the pattern travels in its own configuration, `adapter_config.json`.

PEFT saves an adapter's weights and the name of its base, which knows of no pattern. Of what it writes and reads again
`auto_mapping` alone takes other keys: `auto_mapping["longnet"]` holds the implementation and the pattern's fields.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longnet.model.interface import exchange
from longnet.model.patterns import PATTERN_FIELDS, fields_of, kind_of

# Of auto_mapping.
_KEY = "longnet"


def record(model: nn.Module) -> None:
    """Write into the configurations of a model's adapters, in memory, how the model attends; nothing if in full."""
    inner = _model_in(model)
    if inner is None:
        return
    name = kind_of(inner.config)
    note = None
    if name in PATTERN_FIELDS:
        note = {"attn_implementation": name, **(fields_of(inner.config, name) or {})}
    for config in _adapters_of(model).values():
        mapping = {key: value for key, value in (config.auto_mapping or {}).items() if key != _KEY}
        if note is not None:
            if config.task_type is None and not mapping:  # the Auto classes of PEFT take it for theirs
                mapping = {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__}
            mapping[_KEY] = note
        config.auto_mapping = mapping or None


def follow(model: nn.Module, adapter: str, folder: Any = None) -> None:
    """Let a model attend as an adapter says that it was trained to.

    Args:
        model: which the adapter was loaded into.
        adapter: its name there.
        folder: where it came from, read where the adapter was there before, as a run that is resumed has it.

    Raises:
        ValueError: the model has another pattern already, or the adapter's note is of a later version.
    """
    inner = _model_in(model)
    config = _adapters_of(model).get(adapter)
    note = None if config is None else (config.auto_mapping or {}).get(_KEY)
    if note is None and folder is not None:
        note = _note_in(folder)
    if note is None or inner is None:
        return
    wanted = dict(note)
    name = wanted.pop("attn_implementation", None)
    if name not in PATTERN_FIELDS or not set(wanted) <= set(PATTERN_FIELDS[name]):
        raise ValueError(f"the adapter {adapter!r} asks for an attention that this version does not know: {note}")
    wanted = {**PATTERN_FIELDS[name], **wanted}
    held, other = fields_of(inner.config, name), kind_of(inner.config)
    if other in PATTERN_FIELDS and other != name:
        raise ValueError(
            f"the adapter {adapter!r} was trained with {name} attention, and the model's is {other}: load the adapter "
            "into a model that attends in full, or as it does"
        )
    if held is not None and held != wanted:
        raise ValueError(
            f"the adapter {adapter!r} was trained with {name} attention of {_told(wanted)}, and the model has the "
            f"pattern {_told(held)}: load the adapter into a model without a pattern, or with its own"
        )
    if other != name:
        exchange(model, name, **wanted)


def meet_peft() -> None:
    """Have PEFT's models keep the pattern of the models that they are made around; called once PEFT is loaded."""
    mixin = importlib.import_module("peft.config").PeftConfigMixin
    if hasattr(mixin.save_pretrained, "__wrapped__"):
        return
    mixin.save_pretrained = _keeping_the_note(mixin.save_pretrained)
    for module, name in (("peft.peft_model", "PeftModel"), ("peft.mixed_model", "PeftMixedModel")):
        kind = getattr(importlib.import_module(module), name)
        kind.save_pretrained = _recording(kind.save_pretrained)
        kind.load_adapter = _following(kind.load_adapter)


def _adapters_of(model: nn.Module) -> dict[str, Any]:
    adapters: dict[str, Any] | None = getattr(model, "peft_config", None)
    return adapters or {}


def _model_in(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _note_in(folder: Any) -> dict[str, Any] | None:
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    note: dict[str, Any] | None = (json.loads(path.read_text("utf-8")).get("auto_mapping") or {}).get(_KEY)
    return note


def _told(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _keeping_the_note(save: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of a PEFT configuration: what a model's auto_mapping replaces, keeps the note."""

    @functools.wraps(save)
    def saving(self: Any, save_directory: str, **kwargs: Any) -> Any:
        note = (self.auto_mapping or {}).get(_KEY)
        if note is not None and kwargs.get("auto_mapping_dict") is not None:
            kwargs["auto_mapping_dict"] = {**kwargs["auto_mapping_dict"], _KEY: note}
        return save(self, save_directory, **kwargs)

    return saving


def _recording(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def saving(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record(self)
        return save(self, *args, **kwargs)

    return saving


def _following(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def loading(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        given = inspect.signature(load).bind(self, *args, **kwargs).arguments
        folder = given.get("model_id", given.get("peft_model_id"))
        follow(self, given.get("adapter_name") or "default", folder)
        return result

    return loading


# transformers saves and loads adapters by methods of its own, which import PEFT when they are called.
PreTrainedModel.save_pretrained = _recording(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]
PreTrainedModel.load_adapter = _following(PreTrainedModel.load_adapter)  # type: ignore[method-assign]
