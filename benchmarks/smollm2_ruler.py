"""RULER without a hub: lm-eval makes the tasks offline, and scores what SmolLM2 answers, as smollm2.py has healed it.

    pip install --no-deps --target runs/smollm2/pip wonderwords
    export PYTHONPATH=runs/smollm2/pip
    python benchmarks/smollm2_ruler.py runs/smollm2 ask
    python benchmarks/smollm2.py runs/smollm2 answer
    python benchmarks/smollm2_ruler.py runs/smollm2 score

`ask` and `score` need lm-eval and nltk; `answer`, which takes long, needs neither, and may run on another machine. All
of it goes on where it was stopped, and every system is asked the same questions.
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
from smollm2 import rows_of
from transformers import AutoTokenizer

TASKS = ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "niah_multikey_3", "ruler_cwe")
LENGTHS, SAMPLES = (2048, 4096, 1024), 2  # 1,024 is one segment: the least to learn, and last


class Answered(LM):
    """Stands for a model whose answers are known, or not yet: it notes what it is asked, and says what it is given."""

    def __init__(self, tokenizer: Any, answers: list[str] | None) -> None:
        super().__init__()
        self.tokenizer, self.answers = tokenizer, answers
        self.questions: list[str] = []

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
        self.questions = [request.args[0] for request in requests]
        return [""] * len(requests) if self.answers is None else self.answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("RULER's tasks ask for text")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("RULER's tasks ask for text")


def tasks_of(task: str, length: int, tokenizer: str) -> list[Any]:
    """Return a task's questions of a length, the same at every call."""
    manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": tokenizer})
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - tasks draw from it
    return list(manager.load([task])["tasks"].values())


def evaluate(model: Answered, task: str, made: list[Any], limit: int = SAMPLES) -> list[dict[str, Any]]:
    """Return lm-eval's account of each of a task's first questions."""
    samples: list[dict[str, Any]] = simple_evaluate(
        model, tasks=made, limit=limit, bootstrap_iters=0, apply_chat_template=True
    )["samples"][task]
    return samples


def ask(work: Path) -> None:
    """Write the questions, a task and a length a row."""
    file, tokenizer = work / "questions.jsonl", AutoTokenizer.from_pretrained(work / "base")
    rows = rows_of(file)
    done = {(row["task"], row["length"]) for row in rows}
    for task in TASKS:
        for length in LENGTHS:
            if (task, length) in done:
                continue
            model = Answered(tokenizer, None)
            evaluate(model, task, tasks_of(task, length, str(work / "base")))
            rows.append({"task": task, "length": length, "questions": model.questions})
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{task} at {length}: {len(model.questions)} questions", flush=True)


def score(work: Path) -> None:
    """Write a row of scores for each row of answers."""
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    questions = {(row["task"], row["length"]): row["questions"] for row in rows_of(work / "questions.jsonl")}
    rows = []
    for (task, length), asked in questions.items():
        made = tasks_of(task, length, str(work / "base"))
        for row in rows_of(work / "answers.jsonl"):
            if (row["task"], row["length"]) != (task, length):
                continue
            model = Answered(tokenizer, row["answers"])
            scored = evaluate(model, task, made, len(row["answers"]))
            if model.questions != asked[: len(row["answers"])]:
                raise SystemExit(f"{task} at {length}: lm-eval asks other questions now than were answered")
            known = {name: value for name, value in row.items() if name not in ("answers", "questions")}
            rows.append({
                **known, "scores": [each[str(length)] for each in scored],
                "questions": [each["doc_hash"][:8] for each in scored], "first_answer": row["answers"][0],
            })  # fmt: skip
    (work / "ruler.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that smollm2.py fills")
    parser.add_argument("step", choices=("ask", "score"))
    asked = parser.parse_args()
    {"ask": ask, "score": score}[asked.step](asked.work)
