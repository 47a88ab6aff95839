"""RULER without a hub: lm-eval makes the tasks offline and scores what SmolLM2 answers, as smollm2.py has healed it.

    pip install --no-deps --target runs/smollm2/pip wonderwords
    export PYTHONPATH=runs/smollm2/pip
    python benchmarks/smollm2_ruler.py runs/smollm2 ask
    python benchmarks/smollm2.py runs/smollm2 answer
    python benchmarks/smollm2_ruler.py runs/smollm2 score

`ask` and `score` need lm-eval and nltk and take a minute; `answer` takes long, needs neither, and may run on another
machine. Every system is asked the same questions, and scored by what was asked then.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler.common_utils import process_results
from smollm2 import rows_of
from transformers import AutoTokenizer

TASKS = ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "niah_multikey_3", "ruler_cwe")
LENGTHS, QUESTIONS = (2048, 4096, 1024), 30  # 1,024 is one segment: the least to learn, and last


class Asked(LM):
    """Stands for a model: it notes what it is asked, and says nothing."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def tokenizer_name(self) -> str:
        return "SmolLM2-135M-Instruct"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self.tokenizer.chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        ))  # fmt: skip

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [""] * len(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("RULER's tasks ask for text")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("RULER's tasks ask for text")


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(file)


def ask(work: Path, questions: int) -> None:
    """Write the questions, a task and a length a row, and what is right beside each."""
    file, base = work / "questions.jsonl", str(work / "base")
    model, rows = Asked(AutoTokenizer.from_pretrained(base)), []
    for task in TASKS:
        for length in LENGTHS:
            manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": base})
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002 - tasks draw from it
            samples = simple_evaluate(
                model, tasks=list(manager.load([task])["tasks"].values()), limit=questions, bootstrap_iters=0,
                apply_chat_template=True,
            )["samples"][task]  # fmt: skip
            rows.append({
                "task": task, "length": length, "digests": [each["doc_hash"][:8] for each in samples],
                "questions": [each["arguments"][0][0] for each in samples],
                "docs": [{name: each["doc"][name] for name in ("max_length", "outputs")} for each in samples],
            })  # fmt: skip
            print(f"{task} at {length}: {len(samples)} questions", flush=True)
    write_rows(file, rows)


def score(work: Path) -> None:
    """Write a row of scores for each row of answers; rows of what has no answers here stay."""
    file = work / "ruler.jsonl"
    asked = {(row["task"], row["length"]): row for row in rows_of(work / "questions.jsonl")}
    rows = {_key(row): row for row in rows_of(file)}
    for row in rows_of(work / "answers.jsonl"):
        told, length = asked[row["task"], row["length"]], row["length"]
        scores = [
            process_results(doc, [answer])[str(length)]
            for doc, answer in zip(told["docs"], row["answers"], strict=False)  # the first, where fewer were answered
        ]
        known = {name: value for name, value in row.items() if name not in ("answers", "questions")}
        rows[_key(row)] = {**known, "scores": scores, "questions": told["digests"][: len(scores)],
                           "first_answer": row["answers"][0]}  # fmt: skip
    write_rows(file, [*rows.values()])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["length"], row["system"], row["healed"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that smollm2.py fills")
    parser.add_argument("step", choices=("ask", "score"))
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of a task and length (%(default)s)")
    arguments = parser.parse_args()
    if arguments.step == "ask":
        ask(arguments.work, arguments.questions)
    else:
        score(arguments.work)
