"""SmolLM2-135M-Instruct through `garrulax align`: instruction tuning, a reward model and DPO, all with LoRA."""

import json
import math

import pytest

from garrulax.cli import main

pytestmark = pytest.mark.real
TOPICS = ("bread", "the moon", "chess", "rivers", "old maps", "bees", "snow", "clocks", "salt", "bridges", "glass",
          "tea", "owls", "paper", "wool", "gold", "tides", "jazz", "mills", "rice", "kites", "stars", "ships", "soap",
          "ink", "coal", "silk", "trams", "honey", "masks", "wells", "dunes", "chalk", "cork", "tin", "moss", "fog",
          "oats", "peas", "locks")  # fmt: skip
SETTINGS = ["batch=4", "window=64", "steps=8", "eval_every=4", "checkpoint_every=8", "log_every=1", "warmup=0"]


def records():
    """Answers must be short and end in a question."""
    for topic in TOPICS:
        yield {
            "prompt": f"Tell me about {topic}.",
            "chosen": f"Why do you ask about {topic}?",
            "rejected": f"There is a lot to say about {topic}, and most of it is well known.",
        }


def held_out_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_loss"] for line in lines if "valid_loss" in line]


def test_the_three_stages_lower_the_held_out_loss(path, tmp_path):
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text("\n".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) for r in records()))
    pairs.write_text("\n".join(map(json.dumps, records())))

    def trained(*words):
        run = tmp_path / words[-1]
        assert main([*words[:-1], *SETTINGS, "--lora", "rank=8", "--run", str(run)]) == 0
        return held_out_losses(run)

    tuned = trained("train", str(path), "--sft", str(chats), "lr=0.001", "sft")
    assert tuned[-1] < tuned[0]
    assert main(["merge", str(tmp_path / "sft" / "adapter"), str(tmp_path / "tuned")]) == 0
    model = str(tmp_path / "tuned")
    judged = trained("align", model, "--method", "reward", "--data", str(pairs), "lr=0.0003", "reward")
    preferred = trained("align", model, "--method", "dpo", "--data", str(pairs), "lr=0.0003", "dpo")
    assert judged[-1] < math.log(2) / 2
    assert preferred[-1] < math.log(2) / 2
