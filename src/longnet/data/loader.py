"""Windows of tokens for training, in an order that is a pure function of the seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from longnet.data.shards import Split


class Windows:
    """Sequences of `tokens` tokens cut from a split, in an endless order without state.

    Epoch e cuts the stream, taken as a ring, from a random token on into `len(windows)` windows end to end and goes
    through them in a random order; both are a function of (seed, e) alone, so that any step can be read at once, after
    a restart too. Every token of the split is an input once an epoch, but for the fewer than `tokens` that remain.
    A window may hold the end of one document and the beginning of the next; where the ring closes is such a place.

    Raises ValueError where the split is shorter than tokens + 1, or an argument is out of range.
    """

    def __init__(self, split: Split, tokens: int, *, seed: int) -> None:
        if tokens < 1 or seed < 0:
            raise ValueError(f"windows need at least 1 token and a seed of 0 or more, got tokens={tokens}, seed={seed}")
        if split.tokens < tokens + 1:
            raise ValueError(
                f"the {split.name} split holds {split.tokens:,} tokens, too few for sequences of {tokens:,} "
                f"(one more is needed): prepare more text, or shorten the sequences"
            )
        self.split, self.tokens, self.seed = split, tokens, seed
        self._epochs: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Windows of one epoch."""
        return self.split.tokens // self.tokens

    def batch(
        self, step: int, sequences: int, *, rank: int = 0, ranks: int = 1, start: int = 0, stop: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's share of the batch of one step: inputs and targets, (sequences / ranks, tokens) int64.

        The batch is windows step · sequences to (step + 1) · sequences of the endless order, whatever the number of
        ranks; rank r has the r-th run of them. `targets[:, t]` follows `input_ids[:, t]`. Where a slice of each window
        is asked for, its tokens start … stop − 1, the rest is not read.

        Raises ValueError where ranks does not divide sequences, or a number is out of range.
        """
        stop = self.tokens if stop is None else stop
        if step < 0 or sequences < 1 or not 0 <= rank < ranks:
            raise ValueError(f"no batch at step={step}, sequences={sequences}, rank={rank} of {ranks}")
        if not 0 <= start < stop <= self.tokens:
            raise ValueError(f"windows of {self.tokens} tokens have no slice {start} … {stop - 1}")
        if sequences % ranks:
            raise ValueError(f"{sequences} sequences cannot be shared evenly by {ranks} ranks: use a multiple")
        share = sequences // ranks
        first = step * sequences + rank * share
        rows = np.empty((share, stop - start + 1), dtype=np.int64)
        for row, index in enumerate(range(first, first + share)):
            self._read(index, start, rows[row])
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _read(self, index: int, offset: int, row: npt.NDArray[np.int64]) -> None:
        epoch, place = divmod(index, len(self))
        shift, order = self._epoch(epoch)
        start = (shift + int(order[place]) * self.tokens + offset) % self.split.tokens
        stop = min(start + len(row), self.split.tokens)
        row[: stop - start] = self.split.read(start, stop)
        row[stop - start :] = self.split.read(0, len(row) - (stop - start))

    def _epoch(self, epoch: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Return the token at which an epoch's first cut lies, and the order of its windows.

        Both come from raw words of PCG64: numpy promises to keep that stream, and not Generator.permutation's.
        """
        if epoch not in self._epochs:
            words = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(1 + len(self))
            order = np.argsort(words[1:], kind="stable")
            # Two epochs, since a batch may reach from one into the next.
            self._epochs = {e: cut for e, cut in self._epochs.items() if e in (epoch - 1, epoch + 1)}
            self._epochs[epoch] = int(words[0] % np.uint64(self.split.tokens)), order
        return self._epochs[epoch]
