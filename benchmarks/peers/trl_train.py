"""TRL's side of benchmarks/align_trl.py: DPOTrainer or SFTTrainer as they are, on rows that are given as ids.

    python benchmarks/peers/trl_train.py FOLDER METHOD LEARNING_RATE WEIGHT_DECAY

FOLDER has `model` in Hugging Face layout and rows.json: of each step a list of rows with prompt, chosen and, for dpo,
rejected, lists of ids. Prints one JSON line: the loss of every step, and of the last three quarters of them the seconds
by the clock and of the processor (all threads).
"""

import json
import logging
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.disable(logging.WARNING)


def tokenizer_of(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """Each id is a word; the last one ends a text, the one before pads."""
    words = {str(i): i for i in range(vocab - 2)} | {"<pad>": vocab - 2, "<end>": vocab - 1}
    made = Tokenizer(WordLevel(words))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("<end>", special=True)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def recorded(kind: type) -> type:
    """A trainer that takes the rows in their order, and keeps the loss and the times of every step."""

    class Recorded(kind):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    return Recorded


class Times(transformers.TrainerCallback):
    """The clock and the processor's time at the beginning of each step, and at the end of the last."""

    def __init__(self):
        self.at = []

    def _read(self, *args, **kwargs):
        self.at.append((time.perf_counter(), time.process_time()))

    on_step_begin = on_train_end = _read


def main(folder: str, method: str, rate: float, decay: float) -> dict:
    """Trains, and returns what is printed."""
    with open(f"{folder}/rows.json", encoding="utf-8") as file:
        steps = json.load(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    tokenizer = tokenizer_of(model.config.vocab_size)
    settings = {
        "per_device_train_batch_size": len(steps[0]), "num_train_epochs": 1, "learning_rate": rate,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": decay, "adam_beta1": 0.9,
        "adam_beta2": 0.99, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "optim": "adamw_torch", "bf16": False,
        "fp16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_steps": 10**6, "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": None,
    }  # fmt: skip
    rows = [row for batch in steps for row in batch]
    times = Times()
    with tempfile.TemporaryDirectory() as output:
        if method == "dpo":
            data = [{name: " ".join(map(str, ids)) for name, ids in row.items()} for row in rows]
            data = [{k: v if k == "prompt" else f" {v}" for k, v in row.items()} for row in data]
            args = trl.DPOConfig(output, beta=0.1, precompute_ref_log_probs=True, **settings)
            kind = trl.DPOTrainer
        else:
            data = [
                {
                    "input_ids": [*row["prompt"], *row["chosen"], model.config.vocab_size - 1],
                    "labels": [*[-100] * len(row["prompt"]), *row["chosen"], model.config.vocab_size - 1],
                }
                for row in rows
            ]
            args = trl.SFTConfig(output, packing=False, **settings)
            kind = trl.SFTTrainer
        trainer = recorded(kind)(model=model, args=args, train_dataset=datasets.Dataset.from_list(data),
                                 processing_class=tokenizer, callbacks=[times])  # fmt: skip
        trainer.losses = []
        trainer.train()
    first = len(steps) // 4
    seconds, processor = (b - a for a, b in zip(times.at[first], times.at[-1], strict=True))
    return {
        "losses": [float(loss) for loss in trainer.losses],
        "seconds": seconds,
        "processor_seconds": processor,
        "version": f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))))
