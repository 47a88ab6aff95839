"""RULER without a hub: lm-eval makes the tasks offline, and asks SmolLM2 as smollm2.py has converted and healed it.

    pip install --no-deps --target runs/smollm2/pip wonderwords
    PYTHONPATH=runs/smollm2/pip python benchmarks/smollm2_ruler.py runs/smollm2

Needs lm-eval and nltk. It goes on where it was stopped; every system is asked the same questions.
"""

import random
import sys
from pathlib import Path

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from smollm2 import LONGEST, add_row, load_healed, rows_of, systems
from transformers import AutoTokenizer

TASKS = ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "niah_multikey_3", "ruler_cwe")
LENGTHS, SAMPLES, ANSWER_TOKENS = (2048, 4096, 1024), 10, 64  # 1,024 is one segment: the least to learn, and last


def ask(work: Path) -> None:
    """Ask task by task and length by length, each system in turn, so that whatever there is compares them."""
    file, base = work / "ruler.jsonl", str(work / "base")
    done = {(row["system"], row["healed"], row["length"], row["task"]) for row in rows_of(file)}
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {each: load_healed(work, *each) for each in systems(work)}
    for task in TASKS:
        for length in LENGTHS:
            missing = [each for each in models if (*each, length, task) not in done]
            if not missing:
                continue
            manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": base})
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002 - tasks draw from it
            made = list(manager.load([task])["tasks"].values())
            for system, healed in missing:
                model = HFLM(models[system, healed], tokenizer=tokenizer, batch_size=SAMPLES, max_length=LONGEST)
                answers = simple_evaluate(
                    model, tasks=made, limit=SAMPLES, bootstrap_iters=0, apply_chat_template=True,
                    gen_kwargs={"max_gen_toks": ANSWER_TOKENS},
                )["samples"][task]  # fmt: skip
                add_row(file, {
                    "system": system, "healed": healed, "length": length, "task": task,
                    "scores": [answer[str(length)] for answer in answers],
                    "questions": [answer["doc_hash"][:8] for answer in answers],
                    "first_answer": answers[0]["resps"][0][0],
                })  # fmt: skip


if __name__ == "__main__":
    ask(Path(sys.argv[1]))
