"""docs/huggingface.md and docs/streaming.md run as they stand."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
STREAMING = PAGE.with_name("streaming.md")


def test_the_blocks_of_the_hugging_face_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 7
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name} block {number}", "exec"), names)  # noqa: S102
    assert isinstance(names["losses"], list)
    assert torch.isfinite(names["full"]).all()


def test_the_blocks_of_the_streaming_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", STREAMING.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{STREAMING.name} block {number}", "exec"), names)  # noqa: S102
    assert names["far"].get_seq_length() == 10**9 + 500
