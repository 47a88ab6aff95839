"""Models across real processes: loss, weights' gradients and hidden states of one device."""

import pytest

from ranks import run_ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_longnet_trains_as_on_one_device(ranks, tmp_path):
    for worst in run_ranks("parallel_checks:model", ranks, tmp_path):
        assert len(worst) == 3
        for case, (loss, gradient) in worst.items():
            assert loss <= 1e-12, case
            assert gradient <= 1e-12, case


def test_other_models_run_unchanged(tmp_path):
    for rank, (worst, messages) in enumerate(run_ranks("parallel_checks:other_models", 3, tmp_path)):
        assert set(worst) == {"LlamaModel", "BertModel", "packed"}
        for case, difference in worst.items():
            assert difference <= 1e-12, case
        # Positions that restart on every rank are refused on all, also on the first, whose own are right.
        (message,) = messages
        assert "do not start where its slice" in message, rank
