"""docs/huggingface.md, docs/streaming.md and docs/pathology.md run as they stand."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from longnet.cli.main import main

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


def test_the_blocks_of_the_pathology_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGE.with_name("pathology.md")
    blocks = re.findall(r"^```(python|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("console") == 2
    names = {}
    for number, (kind, block) in enumerate(blocks):
        if kind == "python":
            if not hasattr(
                PreTrainedModel, "activation_checkpointing_enable"
            ):  # as the page says of transformers < 5.23
                block = block.replace("activation_checkpointing_enable", "gradient_checkpointing_enable")  # noqa: PLW2901
            exec(compile(block, f"{page.name} block {number}", "exec"), names)  # noqa: S102
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(block.removeprefix("$ ")))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, block
    assert names["error"] < 1e-5
    assert names["losses"][-1] < names["losses"][0]
    assert (tmp_path / "embeddings" / "c.png").exists()
    assert (tmp_path / "slide_encoder.pth").exists()
