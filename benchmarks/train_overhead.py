"""Times the trainer with its features on against the bare step: same model, same batches, in turns.

    python benchmarks/train_overhead.py [--rounds 5] [--sizes small medium] [--features guard,ema,...]

The bare step is `step.make_train_step` in a loop over batches that are made beforehand. The trainer is `loop.train`: it
makes each batch, logs norms of every block, throughput, goodput and memory every 10 steps, skips spikes, averages the
parameters, and saves a checkpoint every `checkpoint` steps. Times are seconds of the processors a step (of all threads)
and of the clock; the first quarter of the steps is a warm-up. Both run in new processes, one after the other, in every
round. The processor's seconds tell more on a machine that does other work too.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import train_step
from measuring import measure

#: Steps between checkpoints: a few minutes of a long run would be usual; here each run saves twice or three times.
STEPS = {"small": (160, 70), "medium": (24, 10)}
FEATURES = {
    "skip": {"skip_steps": "spikes"},
    "ema": {"ema": 0.999},
    "log": {"log_every": 10},
    "save": {},
}


def trial(size: str, features: list[str], bare: bool) -> dict:
    """Seconds of the processors and of the clock a step."""
    import jax
    import numpy as np

    from garrulax.models import gpt
    from garrulax.train import batches, components, loop, objectives, optimizers, settings, state, step

    a, (steps, every) = train_step.SIZES[size], STEPS[size]
    config = gpt.Config(**{k: a[k] for k in ("layers", "heads", "width", "context", "vocab")})
    never = 10**9
    values = {"optimizer": "adamw", "batch": a["batch"], "window": a["context"], "steps": steps, "eval_tokens": 1,
              "eval_every": never, "log_every": never, "checkpoint_every": never}  # fmt: skip
    if "save" in features:
        values["checkpoint_every"] = every
    for name in features if not bare else []:
        values |= FEATURES[name]
    run = settings.Settings(**values)
    rows = np.random.default_rng(0).integers(0, a["vocab"], (16, a["batch"], a["context"] + 1)).astype(np.int32)
    times = []

    def batch_at(i):
        times.append((time.process_time(), time.perf_counter()))
        return components.causal_batch(rows[i % 16])

    if bare:
        optimizer = optimizers.make_optimizer(run, gpt.parameters(config))
        now = state.init_state(config, optimizer, 0)
        update = step.make_train_step(config, run, optimizer, objectives.causal_lm)
        for i in range(steps):
            now, metrics = update(now, batches.on_devices(batch_at(i), None, 1))
            jax.block_until_ready(metrics)
    else:
        held_out = {**components.causal_batch(rows[0]), "bytes": np.ones(a["batch"], np.float32)}
        data = batches.Data(batch_at, lambda: iter([held_out]))
        with tempfile.TemporaryDirectory() as folder:
            loop.train(loop.Run(config, run, data, Path(folder)), out=open("/dev/null", "w"))  # noqa: SIM115
    begin = len(times) // 4
    (cpu, wall), (cpu0, wall0), n = times[-1], times[begin], len(times) - 1 - begin
    return {"cpu": (cpu - cpu0) / n, "wall": (wall - wall0) / n}


def compare(size: str, rounds: int, features: list[str]) -> None:
    """Runs both in every round; prints medians and the ratios within the rounds."""
    found: dict[str, list[dict]] = {"bare": [], "trainer": []}
    for _ in range(rounds):
        for name, seen in found.items():
            seen.append(
                measure([sys.executable, __file__, "--trial", size, "--features", ",".join(features), "--as", name])
            )
    for clock in ("cpu", "wall"):
        ratios = sorted(t[clock] / b[clock] - 1 for b, t in zip(found["bare"], found["trainer"], strict=True))
        bare, trainer = (1e3 * statistics.median(one[clock] for one in seen) for seen in found.values())
        print(f"{size:7} {clock:5} bare {bare:8.2f} ms  trainer {trainer:8.2f} ms  "
              f"overhead {statistics.median(ratios):+.1%} ({ratios[0]:+.1%} to {ratios[-1]:+.1%})")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--features", default=",".join(FEATURES), help=f"of {', '.join(FEATURES)}")
    parser.add_argument("--trial", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--as", dest="kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [name for name in args.features.split(",") if name]
    if args.trial:
        print(json.dumps(trial(args.trial, chosen, args.kind == "bare")))
    else:
        for each in args.sizes:
            compare(each, args.rounds, chosen)
