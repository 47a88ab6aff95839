import numpy as np
import pytest

from longnet import DilationPattern
from longnet.plots import Curve, draw_curves, draw_pattern, draw_runtime, name_length, visibility


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("tokens", [50, 600])
def test_a_pixel_is_dark_where_any_query_sees_any_key(tokens, is_causal):
    pattern = DilationPattern((16, 30, 70), (1, 4, 7))
    size = min(tokens, 256)
    for branch, (w, r) in enumerate(pattern.branches):
        expected = np.zeros((size, size), dtype=bool)
        for q in range(tokens):
            for k in range(q // w * w, min((q // w + 1) * w, tokens)):
                if q % w % r == k % w % r == 2 % r and (k <= q or not is_causal):
                    expected[q * size // tokens, k * size // tokens] = True
        got = visibility(pattern, branch, tokens=tokens, head=2, num_heads=4, is_causal=is_causal)
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_written(tmp_path, suffix):
    path = tmp_path / f"pattern{suffix}"
    draw_pattern(DilationPattern((16, 32), (1, 2)), path, tokens=64, num_heads=2)
    assert path.stat().st_size > 5000
    columns = [f"{key}_{which}_s" for key in ("forward", "both") for which in ("dense", "dilated")]
    rows = [
        {"case": "compare", "flop_ratio": 2.0, "tokens": tokens, **dict.fromkeys(columns, tokens / 1e6)}
        for tokens in (2048, 4096)
    ]
    draw_runtime(rows, path, "a machine")
    assert path.stat().st_size > 5000


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="can draw up to"):
        draw_pattern(DilationPattern((16,), (1,)), tmp_path / "x.png", tokens=2**23, num_heads=1)
    with pytest.raises(ValueError, match="suffix must be one of"):
        draw_pattern(DilationPattern((16,), (1,)), tmp_path / "x.doc", tokens=64, num_heads=1)


def test_lengths_have_names():
    assert [name_length(tokens) for tokens in (512, 1000, 2048, 2049, 32768, 2**20, 3 * 2**20)] == [
        "512", "1,000", "2K", "2,049", "32K", "1M", "3M",
    ]  # fmt: skip


@pytest.mark.parametrize("scale", ["tokens", "log", "linear"])
def test_curves_are_drawn(tmp_path, scale):
    path = tmp_path / "curves.png"
    curves = [
        Curve("one", [512, 2048], [3.0, 2.5], [0.1, None], "sdpa"),
        Curve("two", [512, 2048, 8192], [3.0, 2.5, 2.4], None, "other", 5, ["a", "b", "c"]),
    ]
    draw_curves(curves, path, x="tokens", y="loss", scale=scale, mark=(2048, "training length"))
    assert path.stat().st_size > 5000
