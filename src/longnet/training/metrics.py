"""What a run tells: JSON lines, TensorBoard, the screen; and the figures of the machine that it tells about."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from longnet.measurement import seconds

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from longnet.training.chunked import ChunkProgress

_UNSCALED = ("kind", "step", "text")  # no scalars for TensorBoard


class Metrics:
    """Lines of metrics in RUN/metrics.jsonl and, where asked, TensorBoard files.

    Each line is an object with `kind` ("train", "skipped", "evaluate", "sample") and `step`, the steps finished then.
    Lines of later steps than `step`, which a killed run has left and its resumption writes again, are cut away, as is
    a line without end. A run that begins keeps the lines of another one in metrics-1.jsonl, metrics-2.jsonl, ….

    Args:
        run: the run's folder; None to write nothing, on ranks that another one writes for.
        step: steps finished.
        tensorboard: write RUN/tensorboard, too.

    Attributes:
        told: kind and step of each line.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, run: Path | None, *, step: int, tensorboard: bool) -> None:
        self.told: set[tuple[str, int]] = set()
        self._file = self._writer = None
        if run is None:
            return
        self._path = path = run / "metrics.jsonl"
        self._writer = _tensorboard(run / "tensorboard", step) if tensorboard else None
        kept = 0
        if not step:
            _set_aside(path)
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    row = _row(line)
                    if row is None or row["step"] > step:
                        break
                    self.told.add((row["kind"], row["step"]))
                    kept += len(line)
            os.truncate(path, kept)
        self._file = path.open("ab", buffering=0)  # nothing waits to be written, and fails again, when it is closed

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line.

        Raises:
            OSError: it cannot be written, on a full disk for example; what there is of it goes when the run is resumed.
        """
        line = (json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n").encode()
        if self._file is None:
            self.told.add((kind, step))
            return
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error.strerror}; make room and resume") from error
        self.told.add((kind, step))
        if self._writer is not None:
            for name, value in _scalars({"kind": kind, "step": step, **values}):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            if "text" in values:
                self._writer.add_text(kind, values["text"], step)

    def has(self, kind: str, step: int) -> bool:
        """Tell whether there is such a line."""
        return (kind, step) in self.told

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


class Screen:
    """A progress bar on a terminal, plain lines elsewhere, nothing where not wanted; warnings in any case.

    Args:
        steps: of the whole run.
        step: finished ones.
        wanted: show anything.
        speaks: False on ranks that another one speaks for; their warnings are not shown either.
    """

    def __init__(self, *, steps: int, step: int, wanted: bool, speaks: bool = True) -> None:
        wanted = wanted and speaks
        self._console = Console(quiet=not wanted, highlight=False, soft_wrap=True)
        self._steps, self._speaks = steps, speaks
        self._bar: Progress | None = None
        if self._console.is_terminal and wanted:
            # Where the terminal is narrow the figures are cut at their end: step and time left stay.
            figures = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))
            step_of = TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True))
            bar_width = 20 if self._console.width >= 100 else 8
            self._bar = Progress(step_of, BarColumn(bar_width), figures, console=self._console, expand=True)
            self._task: TaskID = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Show on the bar, if there is one, that a step is finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, figures: str) -> None:
        """Show the figures of a step: beside the bar, or as a line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=figures)
        else:
            self.say(f"step {step}/{self._steps}  {figures}")

    def within(self, step: int, figures: str) -> None:
        """Show on the bar, if there is one, how far a step has come."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=figures)

    def note(self, step: int, figures: str) -> None:
        """Say how far a step has come where no bar shows it."""
        if self._bar is None:
            self.say(f"step {step + 1}/{self._steps}  {figures}")

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False)

    def warn(self, line: str) -> None:
        """Print a warning on stderr, wanted or not."""
        if not self._speaks:
            return
        console = self._console if self._bar is not None else Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"longnet: warning: {line}", markup=False)


def describe(row: dict[str, Any], seconds_left: float) -> str:
    """Return the figures of a line of kind "train" for the screen."""
    utilisation = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
    gradient = "none" if row["gradient_norm"] is None else f"{row['gradient_norm']:.2f}"
    return (
        f"{_clock(seconds_left)} left  loss {loss}  lr {row['lr']:.2e}  gradient {gradient}  "
        f"{row['tokens_per_s']:,.0f} tokens/s  MFU {utilisation}  {row['memory'] / 2**30:.2f} GiB"
    )


def describe_chunk(progress: ChunkProgress, *, tokens: int, seconds: float, since: float) -> str:
    """Return how far a step in chunks has come, for the screen.

    Args:
        progress: of its last chunk.
        tokens: that went by in `seconds`, in both passes.
        seconds: of this process.
        since: the share of the step that was done before them.
    """
    doing = "learning" if progress.is_learning else "reading"
    rate = f"{tokens / seconds:,.0f} tokens/s  " if tokens else ""
    left = seconds * (1 - progress.share) / (progress.share - since) if progress.share > since else None
    time_left = "" if left is None else f"  {_clock(left)} left"
    return f"{doing} chunk {progress.chunk + 1}/{progress.chunks}  {rate}{progress.share:.1%}{time_left}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOPs a second of a matrix product on a device: what "utilisation" is a share of.

    The best of a few products, which take some 50 ms in all; None where the device cannot multiply in this dtype.
    """
    size = 8192 if device.type == "cuda" else 512
    spent: list[float] = []
    try:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        while len(spent) < 2 or sum(spent[1:]) < 0.05:  # the first one loads libraries
            spent.append(seconds(lambda: matrix @ matrix, device))
    except RuntimeError:  # no such kernel, or no memory for it
        return None
    return 2 * size**3 / min(spent)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _set_aside(path: Path) -> None:
    """Rename lines of a run whose checkpoints are gone: only they tell of it."""
    if path.exists() and path.stat().st_size:
        places = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(place for place in places if not place.exists()))


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    is_whole = line.endswith(b"\n") and isinstance(row, dict) and {"kind", "step"} <= row.keys()
    return row if is_whole else None


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    scalars = [
        (name, value) for name, value in row.items() if isinstance(value, (int, float)) and name not in _UNSCALED
    ]
    for result in row.get("contexts", []):
        names = ("loss", "perplexity", "bits_per_byte")
        scalars += [(f"{name}/{result['context']}", result[name]) for name in names]
    return scalars


def _tensorboard(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra, and slow to import
    except ImportError as error:
        raise ValueError(
            "train.tensorboard = true needs TensorBoard: pip install 'longnet-torch[tensorboard]', or leave it out"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
