"""Times a training step of Garrulax and of PyTorch on this machine: same GPT-2, same batch, AdamW, clipping, float32.

    python benchmarks/train_step.py --torch-python PATH [--rounds 5] [--sizes small medium]

Garrulax, PyTorch eager and torch.compile run one after another in every round, each in a new process, so that a
machine whose speed changes slows all of them alike. Prints medians over the rounds, and ratios within the rounds. PATH
is the Python of an environment with torch==2.13.0. A token takes 6 FLOPs for each weight and 12 L H C T for attention
(models/summary.py).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from measuring import measure

SIZES = {
    "small": {"layers": 4, "heads": 4, "width": 128, "context": 64, "batch": 12, "vocab": 65, "steps": 300},
    "medium": {"layers": 6, "heads": 6, "width": 384, "context": 256, "batch": 8, "vocab": 65, "steps": 16},
}
PEER = Path(__file__).parent / "peers" / "torch_train.py"


def ours(size: str) -> dict:
    """Median milliseconds of a step as `garrulax train` takes it; the first quarter of the steps is a warm-up."""
    import time

    import jax
    import numpy as np

    from garrulax.models import gpt, summary
    from garrulax.train import freed_memory, objectives, optimizers, settings, state, step

    freed_memory.run_in_the_calling_thread()
    a = SIZES[size]
    config = gpt.Config(**{k: a[k] for k in ("layers", "heads", "width", "context", "vocab")})
    run = settings.Settings(optimizer="adamw", batch=a["batch"], window=a["context"], steps=a["steps"])
    optimizer = optimizers.make_optimizer(run, gpt.parameters(config))
    train_state = state.init_state(config, optimizer, 0)
    update = step.make_train_step(config, run, optimizer, objectives.causal_lm)
    rng, times = np.random.default_rng(0), []
    for i in range(a["steps"]):
        rows = rng.integers(0, a["vocab"], (1, a["batch"], a["context"] + 1)).astype(np.int32)
        start = time.perf_counter()
        batch = {
            "tokens": rows[..., :-1],
            "targets": rows[..., 1:],
            "weights": np.ones(rows[..., 1:].shape, np.float32),
        }
        train_state, metrics = update(train_state, batch)
        jax.block_until_ready(metrics)
        if i >= a["steps"] // 4:
            times.append(time.perf_counter() - start)
    flops = 3 * summary.flops_per_token(config, a["context"]) * a["batch"] * a["context"]
    return {"milliseconds": 1e3 * statistics.median(times), "flops": flops, "version": f"jax {jax.__version__}"}


def compare(size: str, rounds: int, torch_python: str) -> None:
    """Runs all three in every round; prints medians and ratios."""
    sizes = [word for k, v in SIZES[size].items() for word in (f"--{k}", str(v))]
    commands = {
        "garrulax": [sys.executable, __file__, "--ours", size],
        "torch eager": [torch_python, str(PEER), *sizes],
        "torch.compile": [torch_python, str(PEER), *sizes, "--compile"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    versions, flops = {}, 0
    for _ in range(rounds):
        for name, command in commands.items():
            result = measure(command)
            times[name].append(result["milliseconds"])
            versions[name] = result["version"]
            flops = result.get("flops", flops)
    base = statistics.median(times["garrulax"])
    tokens = SIZES[size]["batch"] * SIZES[size]["context"]
    for name, values in times.items():
        ms = statistics.median(values)
        pairs = [t / o for t, o in zip(values, times["garrulax"], strict=True)]
        print(f"{size:7} {name:14} {ms:8.1f} ms  {1e3 * tokens / ms:9,.0f} tokens/s  {flops / ms / 1e6:6.1f} GFLOP/s  "
              f"garrulax is {ms / base:.2f}x ({min(pairs):.2f} to {max(pairs):.2f})  [{versions[name]}]")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="Python with torch==2.13.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ours", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args.ours)))
    elif not args.torch_python:
        parser.error("--torch-python is needed")
    else:
        for each in args.sizes:
            compare(each, args.rounds, args.torch_python)
