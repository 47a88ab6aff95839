import numpy as np
import pytest
from matplotlib.image import imread

from longnet import DilationPattern
from longnet.plots.patterns import _DPI, _LETTERS, draw_pattern, visibility


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("queries", ["kept", "all"])
@pytest.mark.parametrize(("tokens", "cells"), [(50, 256), (203, 40), (90, 7)])
def test_a_square_is_as_dark_as_the_share_of_its_pairs_that_is_attended_to(tokens, cells, queries, is_causal):
    pattern = DilationPattern((16, 30, 70, 3), (1, 4, 7, 2), queries=queries, offset_shift=3, global_tokens=13)
    size = -(-tokens // cells)
    count = -(-tokens // size)
    for branch, (w, r) in enumerate([*pattern.branches, (tokens, 1)]):
        pairs, area = np.zeros((count, count)), np.zeros((count, count))
        offset = (2 + 3) % r
        for q in range(tokens):
            for k in range(tokens):
                area[q // size, k // size] += 1
                is_kept = k % w % r == offset and (queries == "all" or q % w % r == offset)
                if branch == 4:
                    is_kept = k < 13
                if q // w == k // w and is_kept and (k <= q or not is_causal):
                    pairs[q // size, k // size] += 1
        got = visibility(pattern, branch, tokens=tokens, head=2, num_heads=4, is_causal=is_causal, cells=cells)
        assert got.size == size
        assert np.allclose(got.shares, pairs / area, rtol=0, atol=1e-12)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_written(tmp_path, suffix):
    path = tmp_path / f"pattern{suffix}"
    draw_pattern(DilationPattern((16, 32), (1, 2)), path, tokens=64, num_heads=2)
    assert path.stat().st_size > 5000


def test_a_title_of_several_lines_stands_above_all_panels_alone(tmp_path):
    """Below the top ones is the room of one line, and a second one lies on the panel above."""
    path = tmp_path / "pattern.svg"
    draw_pattern(DilationPattern((16, 32), (1, 2), global_tokens=3), path, tokens=64, num_heads=2)
    drawn = path.read_text()
    assert drawn.count("global") == drawn.count("<!-- w = 16 -->") == 1
    assert drawn.count("<!-- offset 1 -->") == 1


def test_a_picture_of_three_branches_can_be_read_on_a_telephone(tmp_path):
    path = tmp_path / "pattern.png"
    draw_pattern(DilationPattern((16, 32, 64), (1, 2, 4)), path, tokens=64, num_heads=4)
    width = imread(path).shape[1]
    letters = _LETTERS / 72 * 2 * _DPI  # of the picture's pixels
    assert letters * 358 / width >= 11  # what a page leaves of 390 pixels


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="can draw up to"):
        draw_pattern(DilationPattern((16,), (1,)), tmp_path / "x.png", tokens=2**23, num_heads=1)
    with pytest.raises(ValueError, match="suffix must be one of"):
        draw_pattern(DilationPattern((16,), (1,)), tmp_path / "x.doc", tokens=64, num_heads=1)
