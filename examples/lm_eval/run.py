"""Runs the three tasks of this folder with lm-evaluation-harness. Nothing is downloaded.

From the root of the repository:

pip install -e '.[lm-eval]'
python examples/lm_eval/run.py path/to/model
"""

import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import garrulax as gx
from garrulax.evaluate.lm_eval import Harness

TASKS = ["facts_choice", "facts_perplexity", "facts_writing"]


def evaluate(model):
    """The numbers of each task, by task and metric. `model` is what lm_eval.simple_evaluate takes."""
    manager = TaskManager(include_path=str(Path(__file__).parent), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0)["results"]


if __name__ == "__main__":
    for task, numbers in evaluate(Harness(gx.load(sys.argv[1]))).items():
        for name, value in numbers.items():
            if isinstance(value, float):
                print(f"{task:<18} {name.partition(',')[0]:<16} {value:.4f}")
