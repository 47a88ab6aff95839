import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM


def test_a_run_is_streamed_by_its_newest_checkpoint(call, run_folder, tmp_path):
    text = b"segment of bytes, some of which are no text: \xff\xfe " * 20
    (tmp_path / "file").write_bytes(text)
    assert call("stream", run_folder, tmp_path / "file", "--chunk", 100, "-o", tmp_path / "out", "--device", "cpu") == 0
    about = json.loads((tmp_path / "out" / "stream.json").read_text())
    assert about["is_bytes"]
    assert about["tokens"] == len(text) + 1
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    ids = torch.tensor([[*text, 256]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:])
    assert about["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert math.isfinite(about["loss"])
