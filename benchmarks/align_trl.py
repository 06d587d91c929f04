"""DPO and SFT steps of Garrulax and of TRL: same LLaMA, same rows, same AdamW, float32, on the CPU of this machine.

    python benchmarks/align_trl.py --trl-python PATH [--rounds 3] [--sizes tiny small] [--methods dpo sft] [--core 1]

Both sides run one after another in every round, each in a new process. Prints the greatest difference of the losses of
all steps, and medians over the rounds of tokens per second, by the clock and by the processor's time (all threads of
the process), which other programs on the machine disturb less. The log-probabilities of DPO's reference are computed
before training on both sides. TRL runs without its default bfloat16 and gradient checkpointing, which are slower here.
--core keeps both sides on one core: on a machine that does other work as well, PyTorch's threads wait for each other.
PATH is the Python of an environment with trl==1.16.0 and torch==2.13.0.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import measure

SIZES = {
    "tiny": {"layers": 2, "width": 64, "vocab": 512, "length": 48, "batch": 8, "steps": 40},
    "small": {"layers": 4, "width": 256, "vocab": 2048, "length": 128, "batch": 8, "steps": 12},
}
RATE, DECAY = 1e-3, 0.1
PEER = Path(__file__).parent / "peers" / "trl_train.py"


def write(folder: Path, size: dict[str, int]) -> None:
    """Writes a random model, and the rows of every step; the first row of each is as long as rows may be."""
    import jax

    import garrulax as gx
    from garrulax.models import llama

    end = size["vocab"] - 1
    config = llama.Config(layers=size["layers"], width=size["width"], heads=4, kv_heads=2, mlp_width=3 * size["width"],
                          context=size["length"], vocab=size["vocab"], eos=end, init_std=0.05)  # fmt: skip
    gx.save(gx.Model(config, gx.init(config, jax.random.key(0))), folder / "model")
    draw = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return draw.integers(0, end - 1, count).tolist()

    def row(first: bool) -> dict[str, list[int]]:
        prompt = size["length"] // 4
        longest = size["length"] - prompt - 1  # with the token that ends it
        lengths = [longest if first else int(draw.integers(longest // 2, longest)) for _ in range(2)]
        return {"prompt": ids(prompt), "chosen": ids(lengths[0]), "rejected": ids(lengths[1])}

    steps = [[row(i == 0) for i in range(size["batch"])] for _ in range(size["steps"])]
    (folder / "rows.json").write_text(json.dumps(steps))


def ours(folder: Path, method: str) -> dict:
    """What the peer prints, of Garrulax."""
    import jax
    import jax.numpy as jnp

    import garrulax as gx
    from garrulax import models
    from garrulax.align import answers, objectives
    from garrulax.align.conversations import Example
    from garrulax.train import optimizers, settings, state, step
    from garrulax.train.objectives import causal_lm

    rows = json.loads((folder / "rows.json").read_text())
    model = gx.load(folder / "model")
    end, window = model.config.vocab - 1, model.config.context - 1

    def example(prompt: list[int], answer: list[int]) -> Example:
        return Example([*prompt, *answer, end], [False] * len(prompt) + [True] * (len(answer) + 1))

    def batch_of(rows: list[dict]) -> dict[str, np.ndarray]:
        rankings = [answers.Ranking([example(r["prompt"], r[k]) for k in ("chosen", "rejected")], [0, 1]) for r in rows]
        pairs = answers.pair_arrays(rankings, window)[0]
        return pairs if method == "dpo" else {name: x[:, 0] for name, x in pairs.items()}

    batches = [batch_of(part) for part in rows]
    objective = causal_lm
    if method == "dpo":
        objective = objectives.pair_objective("dpo", beta=0.1)
        reference = jax.jit(lambda params, batch: objectives.with_reference(batch, params, model.config)["reference"])
        batches = [{**b, "reference": np.asarray(reference(model.params, b))} for b in batches]
    s = settings.Settings(optimizer="adamw", lr=RATE, weight_decay=DECAY, schedule="constant", warmup=0, clip=1.0,
                          beta1=0.9, beta2=0.99, eps=1e-8, steps=len(rows), batch=len(rows[0]),
                          window=window)  # fmt: skip
    optimizer = optimizers.make_optimizer(s, models.parameters(model.config))
    train_state = state.init_state(model.config, optimizer, 0, params=jax.tree.map(jnp.copy, model.params))
    update = step.make_train_step(model.config, s, optimizer, objective)
    losses, at = [], []
    for batch in batches:
        at.append((time.perf_counter(), time.process_time()))
        train_state, metrics = update(train_state, {name: x[None] for name, x in batch.items()})
        losses.append(float(metrics["loss"]))
    at.append((time.perf_counter(), time.process_time()))
    seconds, processor = (b - a for a, b in zip(at[len(rows) // 4], at[-1], strict=True))
    return {"losses": losses, "seconds": seconds, "processor_seconds": processor, "version": f"jax {jax.__version__}"}


def compare(name: str, method: str, rounds: int, python: str, core: int | None) -> None:
    """Runs both sides in every round and prints what the docstring of the module says."""
    size, on_core = SIZES[name], [] if core is None else ["taskset", "-c", str(core)]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), size)
        commands = {
            "garrulax": [sys.executable, __file__, "--ours", folder, method],
            "trl": [python, str(PEER), folder, method, str(RATE), str(DECAY)],
        }
        found: dict[str, list[dict]] = {side: [] for side in commands}
        for _ in range(rounds):
            for side, command in commands.items():
                found[side].append(measure(on_core + command))
        rows = json.loads(Path(folder, "rows.json").read_text())
    answers = ("chosen", "rejected") if method == "dpo" else ("chosen",)
    timed = [row for batch in rows[len(rows) // 4 :] for row in batch]
    tokens = sum(len(row["prompt"]) + len(row[k]) + 1 for row in timed for k in answers)
    a, b = (np.array(found[side][0]["losses"]) for side in commands)
    print(f"{name} {method}: {len(rows)} steps, losses {a[0]:.5f} to {a[-1]:.5f}, "
          f"greatest difference {np.abs(a - b).max():.1e}")  # fmt: skip
    for key in ("seconds", "processor_seconds"):
        rates = {side: [tokens / one[key] for one in found[side]] for side in commands}
        ratios = [x / y for x, y in zip(rates["garrulax"], rates["trl"], strict=True)]
        print(f"  tokens by {key.replace('_', ' '):18}: "
              + "  ".join(f"{side} {statistics.median(r):,.0f}/s" for side, r in rates.items())
              + f"  {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    print("  " + ", ".join(found[side][0]["version"] for side in commands))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="Python with trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=["dpo", "sft"], default=["dpo", "sft"])
    parser.add_argument("--core", type=int, help="number of the core to stay on; left out: all of them")
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(Path(args.ours[0]), args.ours[1])))
    elif not args.trl_python:
        parser.error("--trl-python is needed")
    else:
        for each in args.sizes:
            for method in args.methods:
                compare(each, method, args.rounds, args.trl_python, args.core)
