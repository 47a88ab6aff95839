"""docs/training.md runs as it stands, with fewer steps, and its table is the recipe's dataclasses.

Run as a program, this writes the table.
"""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import longnet
from longnet.cli.compare import app
from longnet.cli.main import main
from longnet.cli.recipe import _in_words
from longnet.comparison.config import ComparisonRecipe as Recipe
from longnet.model.budget import count_parameters, training_memory
from longnet.training.chunk_schedule import chunk_costs

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BEGIN = "<!-- begin settings: written by `python tests/training/test_documentation.py` -->"
END = "<!-- end settings -->"
SMALLER = (
    "--train.steps 6 --train.tokens 64 --evaluate.every 3 --evaluate.contexts 16 64 --evaluate.tokens 128 "
    "--sample.every 3 --sample.tokens 3 --checkpoint.every 3 --train.device cpu"
)


def settings():
    """Return the table: a row for each key of a recipe."""
    rows = ["| setting | is | default | |", "|---|---|---|---|"]
    for argument in app.assemble_argument_collection(parse_docstring=True):
        if len(argument.keys) != 2:
            continue
        table, key = argument.keys
        hint = get_type_hints(get_type_hints(Recipe)[table])[key]
        text = " ".join((argument.parameter.help or "").split()).replace("|", "\\|")
        rows.append(f"| `{table}.{key}` | {_in_words(hint)} | {shown(argument.field_info.default)} | {text} |")
    return "\n".join(rows)


def shown(default):
    if default is None:
        return ""
    if isinstance(default, type):
        return "required"
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"


def test_the_table_is_the_recipes():
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert written == settings(), f"run python {Path(__file__).relative_to(PAGE.parents[1])}"


def test_every_key_is_documented():
    documented = {}
    for argument in app.assemble_argument_collection(parse_docstring=True):
        if len(argument.keys) == 2:
            documented.setdefault(argument.keys[0], {})[argument.keys[1]] = argument.parameter.help
    for table, kind in get_type_hints(Recipe).items():
        for field in dataclasses.fields(kind):
            text = documented[table][field.name]
            assert text, f"{table}.{field.name} has no description"
            assert text != kind.__doc__.splitlines()[0], f"{table}.{field.name} has its table's description"


def test_the_blocks_of_the_training_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-project").symlink_to(Path(longnet.__file__).parent / "training", target_is_directory=True)
    blocks = re.findall(r"^```(console|python|toml)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("console") >= 4
    names = {}
    for kind, block in blocks:
        if kind == "toml":
            with Path("first.toml").open("a") as recipe:  # a later block is a further table of the same recipe
                recipe.write(block)
        elif kind == "python":
            exec(compile(block, PAGE.name, "exec"), names)  # noqa: S102
        else:
            for line in block.splitlines():
                command = shlex.split(line.removeprefix("$ "))
                if command[1] == "train":
                    stands = {word for word in command if word.startswith("--")}
                    pairs = re.findall(r"(--\S+)((?: [^-]\S*)+)", SMALLER)
                    command += [
                        word for flag, values in pairs if flag not in stands for word in (flag, *values.split())
                    ]
                assert run(monkeypatch, command) == 0, line
    assert list(names["losses"]) == [6]
    printed, warned = capsys.readouterr()
    assert "no head keeps" not in warned  # the page's pattern suits its number of heads
    assert "step 6  perplexity by context  16: " in printed
    assert "RUN is finished at step 6" in printed


SHAPES = {
    "4 × 512": {"vocab_size": 256, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    "Llama-8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


def estimated(shape, weights, chunk_tokens):
    """Return GiB of a rank and bytes of log a token, for 2²⁸ tokens in chunks under bfloat16 autocast."""
    pattern = longnet.DilationPattern.geometric(2048, 2**28)
    config = longnet.LongNetConfig(
        **SHAPES[shape], segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates
    )
    dp = 8 if "8 ranks" in weights else 1
    needed = training_memory(
        config, tokens=chunk_tokens, sequences=1, bfloat16=True, checkpoint_activations=shape == "Llama-8B", dp=dp
    )
    held = needed.total
    if "LoRA" in weights:  # frozen in 2 bytes; adapters are next to nothing beside them
        held = 2 * count_parameters(config).total + needed.activations + needed.loss
    costs = chunk_costs(config, tokens=2**28, chunk_tokens=chunk_tokens, itemsize=2)
    return round((held + costs.state + costs.owed) / 2**30), float(f"{costs.log / 2**28:.3g}")


@pytest.mark.filterwarnings("ignore:in the branch")
def test_estimates_of_steps_in_chunks_are_the_formulas():
    rows = re.findall(
        r"^\| (4 × 512|Llama-8B), ([^|]*) \| (\d+)K \| ([\d.,]+) \| (\d+)[^|]* \|$", PAGE.read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for shape, weights, chunk, log, memory in rows:
        found = estimated(shape, weights, int(chunk) * 1024)
        assert found == (int(memory), float(log.replace(",", ""))), (shape, weights, found)


def run(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", command)
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{settings()}\n{END}{rest.partition(END)[2]}")
