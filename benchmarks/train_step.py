"""A training step against PyTorch's on this machine: same GPT-2, same batch, AdamW, clipping, float32.

    python benchmarks/train_step.py --torch-python PATH [--rounds 5] [--size small|medium]

Garrulax and PyTorch (eager, and compiled with --compile) run in turns, each in a process of its own, so that a
machine whose speed drifts is fair to both; medians and their ratio are printed. PATH is the Python of an environment
with torch==2.13.0. Model FLOPs are those of `models.summary.flops_per_token`, times 3 for the backward pass.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {
    "small": {"layers": 4, "heads": 4, "width": 128, "context": 64, "batch": 12, "vocab": 65, "steps": 300},
    "medium": {"layers": 6, "heads": 6, "width": 384, "context": 256, "batch": 8, "vocab": 65, "steps": 16},
}


def ours(a):
    """Median milliseconds of a step, as JSON on stdout."""
    import time

    import jax
    import numpy as np

    import garrulax as gx
    from garrulax.models import gpt, summary
    from garrulax.train import optimizers, settings, state, step

    config = gpt.Config(vocab=a.vocab, context=a.context, width=a.width, layers=a.layers, heads=a.heads)
    run = settings.Settings(batch=a.batch, window=a.context, optimizer="adamw", lr=1e-3, beta2=0.99, steps=a.steps)
    train_state, update = step.prepare(run, config)
    rng, times = np.random.default_rng(0), []
    for i in range(a.steps):
        rows = rng.integers(0, a.vocab, (a.batch, a.context + 1)).astype(np.int32)
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": np.ones(rows[:, 1:].shape, np.float32)}
        start = time.perf_counter()
        train_state, metrics = update(train_state, batch)
        jax.block_until_ready(metrics)
        if i >= a.steps // 4:
            times.append(time.perf_counter() - start)
    flops = 3 * summary.flops_per_token(config, a.context) * a.batch * a.context
    milliseconds = 1e3 * statistics.median(times)
    version = f"jax {jax.__version__}, garrulax {gx.__version__}"
    print(json.dumps({"milliseconds": milliseconds, "gflops": flops / milliseconds / 1e6, "version": version}))
