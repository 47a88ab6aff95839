"""What each place of a slide is worth."""

from typing import Any, BinaryIO

import numpy as np
from matplotlib.figure import Figure


def draw_heat_map(
    coords: np.ndarray[Any, np.dtype[Any]], values: np.ndarray[Any, np.dtype[Any]], step: float, file: BinaryIO
) -> None:
    """Draw a value of each tile of a slide where it lies, as a PNG; the colours span percentiles 1 to 99.

    Args:
        coords: (N, 2), x and y of each tile's corner.
        values: (N,).
        step: how wide a tile is.
        file: to write to.
    """
    cells = np.floor((coords - coords.min(0)) / step).astype(int)
    grid = np.full(cells.max(0)[::-1] + 1, np.nan)
    for (x, y), value in zip(cells, values, strict=True):
        grid[y, x] = np.fmax(grid[y, x], value)
    height, width = grid.shape
    figure = Figure(figsize=(6 * max(0.3, min(1, width / height)) + 1, 6 * max(0.3, min(1, height / width))))
    ax = figure.subplots()
    low, high = np.percentile(values, (1, 99))
    image = ax.imshow(grid, cmap="inferno", vmin=low, vmax=high, interpolation="nearest")
    ax.axis("off")
    figure.colorbar(image, ax=ax, shrink=0.6, label="attention received")
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
