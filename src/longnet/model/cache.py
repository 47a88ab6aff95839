"""DilatedCache: a transformers cache whose size does not depend on the length of the text."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from longnet.attention.backends.dispatch import Backend
from longnet.attention.pattern import DilationPattern
from longnet.attention.streaming import StreamState
from longnet.model.patterns import heads_of, pattern_of
from longnet.model.versions import TELLS_WHAT_TO_RECORD

_FORMAT = "longnet cache 1"
_PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # windows that hide something are refused


class StreamedKeys(Tensor):
    """New keys on their way from the cache to the attention, which finds the earlier ones in `layer`."""

    layer: DilatedLayer
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what is computed from them is a plain tensor


class DilatedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """The state of one layer, in transformers' terms.

    `update` returns the new keys and values alone; `attend` attends with them to themselves and to the past, and keeps
    of them what later tokens need. Some models change keys or values between the two, and then ask for attention to the
    changed ones: the first pass, which has no past, serves them as it is. Then `plain` keeps all keys where
    `may_keep_all`; else the second is refused.
    """

    is_croppable = True  # once activate_past_recording has been called, as transformers does before it needs it

    def __init__(self, pattern: DilationPattern, *, start: int, max_tokens: int | None) -> None:
        self.pattern, self.start, self.max_tokens = pattern, start, max_tokens
        self.columns = 0
        self.record_past = False
        self.state: StreamState | None = None
        self._new: tuple[Tensor, Tensor] | None = None
        self.plain: DynamicLayer | None = None
        self.may_keep_all = False  # set by who makes a cache for a model unasked

    def holds(self, value: Tensor) -> bool:
        """Say whether `attend` would read this very tensor, which no model has changed since `update`."""
        return self._new is not None and self._new[1] is value

    @property
    def seen(self) -> int:
        """Tokens so far, padding counted."""
        if self.plain is not None:
            return self.plain.get_seq_length()
        return self.columns + (0 if self._new is None else self._new[0].shape[2])

    def _keeps_all(self) -> DynamicLayer | None:
        """Return `plain`, which a pass between whose `update` and whose end nobody called `attend` makes."""
        if self._new is not None:
            if self.columns or self.start or not self.may_keep_all:
                raise ValueError(
                    "a DilatedCache got keys that no attention read: it serves attn_implementation='dilated' alone, "
                    "see longnet.use_dilated_attention"
                )
            warnings.warn(
                "this model changes keys or values after its cache has taken them, which a DilatedCache cannot serve: "
                "all of them are kept, as by transformers' dynamic cache, and memory grows with the text",
                stacklevel=2,
            )
            self.plain = DynamicLayer()  # type: ignore[no-untyped-call]
            self.plain.update(*self._new)
            self._new = None
        return self.plain

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there is room for keys and values."""
        return self.state is not None or self.plain is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, rows, D), the branches one after the other."""
        if self.plain is not None:
            return self.plain.keys
        return None if self.state is None else self.state.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, rows, D)."""
        if self.plain is not None:
            return self.plain.values
        return None if self.state is None else self.state.values

    @property
    def batch_size(self) -> int:
        """B, or −1 as long as no keys have come."""
        return -1 if self.keys is None else self.keys.shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> StreamState:  # type: ignore[override]
        """Make room for keys and values like these."""
        self.state = StreamState(
            self.pattern,
            batch_size=key_states.shape[0],
            num_kv_heads=key_states.shape[1],
            head_dim=key_states.shape[3],
            dtype=key_states.dtype,
            device=key_states.device,
            start=self.start,
            max_tokens=self.max_tokens,
        )
        self.state.record(is_on=self.record_past)
        return self.state

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the new keys and values (B, G, T, D), for `attend`, and return them."""
        plain = self._keeps_all()
        if plain is not None:
            return plain.update(key_states, value_states)
        self._new = key_states, value_states
        keys = key_states.as_subclass(StreamedKeys)
        keys.layer = self
        return keys, value_states

    def attend(
        self,
        query: Tensor,
        pattern: DilationPattern,
        *,
        scale: float | None,
        bounds: Tensor | None,
        sinks: Tensor | None,
        backend: Backend = "auto",
    ) -> Tensor:
        """Attend with queries (B, H, T, D) to what `update` was given and to the past; return (B, H, T, D).

        Args:
            query: (B, H, T, D).
            pattern: that of the layer, for the heads at hand.
            scale: factor on q·k.
            bounds: (n, 3), the real tokens among the T.
            sinks: (H,) or (B, H, T).
            backend: as in `dilated_attention`, but for the oracle; a state serves any, also in turns.

        Raises:
            ValueError: tensors that do not fit the state, or padding between the tokens of a row.
        """
        if self._new is None:
            raise ValueError("a DilatedCache attends to what update() was given: call that first")
        (key, value), self._new = self._new, None
        state = self.state
        if state is None:
            self.pattern = pattern
            state = self.lazy_initialization(key, value)
        elif pattern != self.pattern:
            raise ValueError(
                f"this DilatedCache holds rows of heads {self.pattern.head_shard}, the model asks for those of heads "
                f"{pattern.head_shard} (first, of how many): make a new one, without batch_size"
            )
        state.backend = backend
        out = state.attend(query, key, value, scale=scale, bounds=bounds, sinks=sinks)
        self.columns += query.shape[2]
        return out

    def get_seq_length(self) -> int:
        """Return the position of the next token, padding counted."""
        return self.start + self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the keys that the attention is given, and the column of the first: the new ones alone.

        Args:
            query_length: the new tokens; before transformers 5.4, their columns (T,).
        """
        tokens = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return (tokens, self.columns) if self._keeps_all() is None else (self.seen + tokens, 0)

    def get_max_length(self) -> int:
        """Return −1: any length fits."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return −1; transformers before 5.13 calls `get_max_length` so."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget every token."""
        self.columns, self._new, self.plain = 0, None, None
        if self.state is not None:
            self.state.restart()

    def activate_past_recording(self) -> None:
        """Keep what is replaced until the next `crop`, so that it may go back across segments."""
        if not self.record_past:
            self.record_past = True
            if self.state is not None:
                self.state.record(is_on=True)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last −`tokens_to_remove` tokens; before transformers 5.14, a positive number is one to keep.

        Raises:
            ValueError: a positive number, more tokens than there are, or rows of an earlier segment would be needed,
                which are gone unless `activate_past_recording` was called before the tokens to forget.
        """
        plain = self._keeps_all()
        if plain is not None:
            plain.crop(tokens_to_remove)  # type: ignore[arg-type]
            return
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17's assisted decoding counts in a tensor
        if tokens_to_remove > 0 and not TELLS_WHAT_TO_RECORD:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if self.state is None:
            return
        if self.state.is_recording and not self.record_past:  # transformers switches it off by the attribute
            self.state.record(is_on=False)
        self.state.crop(-tokens_to_remove)
        self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch rows into this order; a row may come again."""
        plain = self._keeps_all()
        if plain is not None:
            plain.reorder_cache(beam_idx)  # type: ignore[arg-type]
        elif self.state is not None:
            self.state.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows; a bool per row, or indices."""
        plain = self._keeps_all()
        if plain is not None:
            plain.batch_select_indices(indices)
        elif self.state is not None:
            self.state.select((indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        plain = self._keeps_all()
        if plain is not None:
            plain.batch_repeat_interleave(repeats)
        elif self.state is not None:
            self.state.select([row for row in range(self.batch_size) for _ in range(repeats)])


class DilatedCache(Cache):
    """Keys and values that a causal model with dilated attention needs to go on: constant memory at any length.

    Each layer keeps of branch i the kept rows of the current segment, ceil(w_i / r_i) a key/value head; `nbytes` is
    2 · layers · B · G · D · bytes · `pattern.state_rows(tokens=max_tokens)`. `generate()` makes one by itself. Outputs
    are those without a cache, whatever the chunks.

        cache = DilatedCache(model.config)
        for chunk in ids.split(65_536, dim=1):
            model(chunk, cache=cache)  # past_key_values=cache before transformers 5.24

    It carries no gradients. Batch rows may be padded on the left.

    Args:
        config: of a causal model whose attention is "dilated"; it holds the pattern.
        batch_size: B. Room is made at once where it, dtype and device are given, else when the first keys come.
        dtype: of keys and values, that of the first keys when None.
        device: of keys and values, that of the first keys when None.
        start: position of the first token, as if so many tokens had passed unseen. `generate()` wants 0.
        max_tokens: make room for sequences up to this length only; it grows when one is longer. None for any length.

    Raises:
        ValueError: a config without a pattern, with layers of another kind than attention, or numbers out of range.
    """

    layers: list[DilatedLayer]  # type: ignore[assignment]  # of one kind

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        start: int = 0,
        *,
        max_tokens: int | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        reason = refusal(config)
        if reason is not None:
            raise ValueError(f"a DilatedCache cannot serve {type(config).__name__}: {reason}")
        for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("max_tokens", max_tokens, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.pattern, self.start = pattern_of(config), start
        layers = [
            DilatedLayer(pattern_of(config, layer), start=start, max_tokens=max_tokens)
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(layers=[*layers])
        if batch_size is not None and dtype is not None and device is not None:
            shape = (batch_size, *heads_of(config))
            for layer in layers:
                empty = torch.empty((*shape[:2], 0, shape[2]), dtype=dtype, device=device)
                layer.lazy_initialization(empty, empty)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; 0 as long as there is no room for them."""
        kept = [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.nbytes for x in kept)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the column of the next token in a padding mask: the tokens so far, wherever they started."""
        seen: int = self.layers[layer_idx].seen
        return seen

    def activate_past_recording(self) -> None:
        """Keep what is replaced until the next `crop`, in every layer; transformers has this from 5.14 on."""
        for layer in self.layers:
            layer.activate_past_recording()

    def to(self, device: torch.device | str) -> Self:
        """Move keys and values to a device, in place; return the cache."""
        for layer in self.layers:
            if layer.state is not None:
                layer.state.keys, layer.state.values = layer.state.keys.to(device), layer.state.values.to(device)
                layer.state.record(is_on=layer.record_past)
            if layer.plain is not None and layer.plain.keys is not None and layer.plain.values is not None:
                layer.plain.keys, layer.plain.values = layer.plain.keys.to(device), layer.plain.values.to(device)
        return self

    def save(self, path: Path | str) -> None:
        """Write the cache into one safetensors file, whole or not at all.

        Raises:
            ValueError: a cache without tokens.
            OSError: the file cannot be written.
        """
        states = [layer.state for layer in self.layers if layer.state is not None]
        if len(states) < len(self.layers):
            raise ValueError("this cache has seen no token, or keeps all of them: there is nothing to save")
        tensors = {}
        for index, state in enumerate(states):
            tensors[f"{index}.keys"], tensors[f"{index}.values"] = state.keys.contiguous(), state.values.contiguous()
        about = {
            "pattern": str(self.layers[-1].pattern),  # which says whether offsets rotate
            "start": self.start,
            "columns": [layer.columns for layer in self.layers],
            "max_tokens": [state.max_tokens for state in states],
            "next": [state.next for state in states],
            "first": [state.first for state in states],
            "ended": [state.ended for state in states],
        }
        text = json.dumps(about)
        metadata = {"format": _FORMAT, "cache": text, "sha256": _checksum(text, tensors)}
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str, config: PreTrainedConfig, *, device: torch.device | str = "cpu") -> Self:
        """Read a cache that `save` wrote.

        Args:
            path: the file.
            config: of the model that will use it; its pattern and layers must be those of the file.
            device: of keys and values.

        Raises:
            ValueError: a damaged file, or one of another model.
            OSError: no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no cache file {path}")
        try:
            with safe_open(path, "pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no cache file: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is no cache file of this version: its format is {metadata.get('format')!r}")
        text = metadata.get("cache", "")
        if metadata.get("sha256") != _checksum(text, tensors):
            raise ValueError(f"{path} is damaged: its checksum does not match; make it anew")
        about = json.loads(text)
        cache = cls(config, start=about["start"])
        if about["pattern"] != str(cache.layers[-1].pattern) or len(about["next"]) != len(cache.layers):
            raise ValueError(
                f"{path} holds {len(about['next'])} layers of the pattern {about['pattern']}, the model has "
                f"{len(cache.layers)} of {cache.layers[-1].pattern}"
            )
        for index, layer in enumerate(cache.layers):
            keys, values = tensors[f"{index}.keys"].to(device), tensors[f"{index}.values"].to(device)
            layer.max_tokens, layer.columns = about["max_tokens"][index], about["columns"][index]
            state = layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
            state.keys.copy_(keys)  # into memory aligned as ever: kernels round otherwise
            state.values.copy_(values)
            state.next, state.first = about["next"][index], about["first"][index]
            state.ended = about["ended"][index]
        return cache


def refusal(config: PreTrainedConfig) -> str | None:
    """Say why a model cannot be served with a DilatedCache, or None."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model attends to two sequences"
    kinds = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS
    if kinds:
        return f"it has layers of another kind than attention, {sorted(kinds)}"
    if getattr(config, "kv_sharing_modes", None) is not None:
        return "its layers share keys and values"
    if (getattr(config, "n_recurrent_loops", None) or 1) > 1:
        return "its layers run several times a token"
    return None


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name].cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(memoryview(x.view(torch.uint8).reshape(-1).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
