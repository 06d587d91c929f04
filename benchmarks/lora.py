"""Times a training step of LoRA beside the step that trains all weights, in turns, on this machine.

    python benchmarks/lora.py [MODEL] [--rank 16] [--batch 4] [--window 256] [--rounds 5] [--steps 4]

MODEL is a folder or a GGUF file, computed in float32; without one, a LLaMA of 56 million random numbers. Both steps are
those of `garrulax train`: AdamW, clipping, the same batch. Every round runs some steps of one, and then as many of the
other. Printed are medians over the rounds of tokens a second, by the clock and by the time of the processors (all
threads), the ratios within the rounds, the bytes of the optimizer's state, and the number of products of each program.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

import garrulax as gx
from garrulax.models import summary
from garrulax.train import lora, objectives, optimizers
from garrulax.train.freed_memory import run_in_the_calling_thread
from garrulax.train.settings import Settings
from garrulax.train.state import init_state
from garrulax.train.step import make_train_step

LEARNING_RATE = 1e-4


def step_of(model: gx.Model, run: Settings, batch: dict[str, np.ndarray]) -> tuple[Callable[[], float], int, int]:
    """A function that takes one step and returns its loss; bytes of the optimizer's state; products of the program."""
    parts = lora.adapted(model.params, model.config, run, None)
    optimizer = optimizers.make_optimizer(run, parts.specs)
    # The step donates its state: both sides begin with arrays of their own.
    state = init_state(model.config, optimizer, 0, params=jax.tree.map(np.asarray, parts.start), specs=parts.specs)
    program = make_train_step(model.config, run, optimizer, objectives.causal_lm)
    compiled = program.lower(state, batch, parts.frozen).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))

    def go() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, parts.frozen)
        return float(metrics["loss"])

    return go, size, len(re.findall(r" dot\(| custom-call\(.*matmul", compiled.as_text()))


def timed(step: Callable[[], float], steps: int) -> tuple[float, float]:
    """Seconds of a step by the clock, and of the processors."""
    begin = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    end = time.perf_counter(), time.process_time()
    return (end[0] - begin[0]) / steps, (end[1] - begin[1]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    for name, value in (("rank", 16), ("batch", 4), ("window", 256), ("rounds", 5), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    run_in_the_calling_thread()  # as `garrulax train` does
    if args.model is None:
        config = gx.preset("llama-tiny", width=768, layers=8, heads=12, kv_heads=4, mlp_width=2048, vocab=4096)
        model = gx.Model(config, gx.init(config, jax.random.key(0)))
    else:
        model = gx.load(args.model, dtype="float32").replace(tokenizer=None)
    rows = np.random.default_rng(0).integers(0, model.config.vocab, (1, args.batch, args.window + 1), dtype=np.int32)
    batch = {"tokens": rows[..., :-1], "targets": rows[..., 1:], "weights": np.ones(rows[..., 1:].shape, np.float32)}

    def run(*words: str) -> Settings:
        return Settings(
            optimizer="adamw", batch=args.batch, window=args.window, steps=1000, lr=LEARNING_RATE, lora=words
        )  # fmt: skip

    sides: dict[str, Settings] = {"all weights": run(), "LoRA": run(f"rank={args.rank}")}
    steps = {name: step_of(model, settings, batch) for name, settings in sides.items()}
    for step, _, _ in steps.values():
        step()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, (step, _, _) in steps.items():
            found[name].append(timed(step, args.steps))
    tokens, full = args.batch * args.window, found["all weights"]
    weights = summary.matmul_parameters(model.config)
    print(f"{weights / 1e6:.0f} million weights in products, {args.batch} rows of {args.window} tokens")
    for name, rows_ in found.items():
        wall, cpu = (statistics.median(row[i] for row in rows_) for i in range(2))
        ratios = [sorted(a[i] / b[i] for a, b in zip(full, rows_, strict=True)) for i in range(2)]
        _, size, products = steps[name]
        print(f"{name:12} {1e3 * wall:8.0f} ms  {tokens / wall:8.0f} tokens/s  {statistics.median(ratios[0]):.2f}x "
              f"({ratios[0][0]:.2f} to {ratios[0][-1]:.2f})  processors {1e3 * cpu:8.0f} ms  "
              f"{statistics.median(ratios[1]):.2f}x ({ratios[1][0]:.2f} to {ratios[1][-1]:.2f})  "
              f"optimizer {size / 2**20:.0f} MiB  {products} products")  # fmt: skip


if __name__ == "__main__":
    main()
