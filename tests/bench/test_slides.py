"""The slide benchmark at sizes that take a moment; its gate closes."""

import pytest
import torch

from longnet.bench import slides
from longnet.model import tails


def test_rows_say_what_was_measured(monkeypatch):
    real = slides.LongNetSlideConfig
    monkeypatch.setattr(
        slides, "LongNetSlideConfig", lambda **kwargs: real(**{**kwargs, "num_hidden_layers": 1, "hidden_size": 64})
    )
    construct, first, second = slides.run((100, 400), torch.device("cpu"), dense_tiles=200)
    assert construct["case"] == "construct"
    assert construct["cpu_seconds"] > 0
    assert first["dense_over_dilated"] == first["dense_cpu_seconds"] / first["cpu_seconds"]
    assert second["tiles"] == 400
    assert "dense_seconds" not in second
    assert second["peak_bytes"] > 2**20


def test_nothing_is_measured_where_the_result_is_wrong(monkeypatch):
    monkeypatch.setattr(slides.LongNetSlideModel, "load_state_dict", lambda *_, **__: None)
    with pytest.raises(slides.GateError, match="not dense attention"):
        slides.gate(torch.device("cpu"))


def test_nothing_is_measured_where_branches_are_merged_wrongly(monkeypatch):
    def off(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return 1.001 * out, lse

    right = tails.attend_within
    monkeypatch.setattr(tails, "attend_within", off)
    slides.gate(torch.device("cpu"))  # one branch, exact: another path
    with pytest.raises(slides.GateError, match="several branches is not their one softmax"):
        list(slides.run((100,), torch.device("cpu")))
