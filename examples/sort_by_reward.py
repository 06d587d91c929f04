"""Teaches a tiny LLaMA to sort six digits by reward alone: Dr. GRPO after a short warm start. Two minutes on two cores.

    python examples/sort_by_reward.py [--method dr_grpo|rloo] [--steps 240] [--seed 0] [--folder runs/sort]

The warm start is supervised and ends while about half of the sampled answers are right. Then the model gets 1 for an
answer that is right in all places and 0 for another one, and nothing else. It prints the share of right answers,
sampled and greedy, before and after, and the share of the groups whose rewards differ: only those teach anything.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import garrulax as gx
from garrulax.align import rl, rollouts
from garrulax.align.policy_objectives import policy_model, policy_objective, policy_params, policy_specs
from garrulax.models import llama
from garrulax.train import loop
from garrulax.train.batches import Data, on_devices
from garrulax.train.objectives import causal_lm
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import init_state
from garrulax.train.step import make_train_step

DIGITS, SORT, END, VOCAB = 6, 10, 11, 12  # ids 0 to 9 are the digits
CONFIG = llama.Config(
    layers=2, heads=4, kv_heads=4, width=64, mlp_width=192, context=16, vocab=VOCAB, bos=None, eos=END
)  # fmt: skip


def questions(count: int, seed: int) -> np.ndarray:
    """Digits to sort, int32 [count, DIGITS]."""
    return np.random.default_rng(seed).integers(0, 10, (count, DIGITS), dtype=np.int32)


def right(sample: rollouts.Sampled) -> float:
    """1 for the sorted digits and an end, else 0."""
    return float(sample.response == [*sorted(sample.prompt[:DIGITS]), END])


def warm_start(steps: int, seed: int) -> dict:
    """Parameters after a supervised start with 64 sorted rows a step."""
    settings = Settings(optimizer="adamw", lr=3e-3, weight_decay=0.0, batch=64, window=2 * DIGITS + 1, steps=steps)
    optimizer = make_optimizer(settings, gx.models.parameters(CONFIG))
    state = init_state(CONFIG, optimizer, seed)
    step = make_train_step(CONFIG, settings, optimizer, causal_lm)
    for i in range(steps):
        digits = questions(64, 1000 * (seed + 1) + i)
        rows = np.concatenate([digits, np.full((64, 1), SORT), np.sort(digits, axis=1), np.full((64, 1), END)], axis=1)
        rows = rows.astype(np.int32)
        weights = (np.arange(rows.shape[1] - 1) >= DIGITS).astype(np.float32)[None].repeat(64, 0)
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}
        state, _ = step(state, on_devices(batch, None, 1))
    return state.params


def shares(params: dict, prompts: rollouts.Prompts, seed: int) -> tuple[float, float]:
    """Share of right answers: sampled, greedy."""
    every = range(len(prompts))
    model = gx.unstack(params)
    sampled = rollouts.roll_out(model, CONFIG, prompts, every, seeds=rollouts.seeds(seed, 2**40, len(every)), limit=8)
    greedy = gx.generate((model, CONFIG), [one.ids for one in prompts.encoded], max_new_tokens=8, temperature=0)
    asked = [one.ids[:DIGITS] for one in prompts.encoded]
    exact = [list(done.tokens) == [*sorted(ids), END] for ids, done in zip(asked, greedy, strict=True)]
    return float(np.mean([right(s) for s in sampled.samples])), float(np.mean(exact))


def main() -> float:
    """Trains, prints what came of it, and returns the share of right greedy answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("dr_grpo", "rloo"), default="dr_grpo")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--warm", type=int, default=100, help="supervised steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    begun = time.perf_counter()
    params = warm_start(args.warm, args.seed)
    train, held = (
        rollouts.Prompts([[*row.tolist(), SORT] for row in questions(count, seed)], CONFIG, None, 8)
        for count, seed in ((4096, 7), (256, 8))
    )
    before = shares(params, held, args.seed)
    print(f"after {args.warm} supervised steps: sampled {before[0]:.2f}, greedy {before[1]:.2f}", flush=True)
    settings = Settings(
        optimizer="adamw", lr=8e-4, weight_decay=0.0, schedule="linear", min_lr_ratio=0.0, warmup=0.0, batch=256,
        window=train.length, steps=args.steps, eval_every=args.steps, checkpoint_every=args.steps, log_every=20,
    )  # fmt: skip
    chosen = rl.PolicySettings(args.method, group=8, limit=8)
    made = rl.PolicyRollouts(
        train, lambda samples: [right(s) for s in samples], CONFIG, chosen, settings.batch, args.seed
    )  # fmt: skip
    nothing = {"weights": np.ones((1, 1), np.float32)}
    run = loop.Run(
        CONFIG, settings, Data(lambda step: nothing, lambda: iter([nothing])), args.folder or Path(tempfile.mkdtemp()),
        objective=policy_objective(args.method, limit=8), specs=policy_specs(CONFIG, values=False), rollouts=made,
        params=policy_params(jax.tree.map(jnp.copy, params), CONFIG, 0.0, values=False, key=jax.random.key(0)),
        evaluate=made.evaluate(held),
    )  # fmt: skip
    result = loop.train(run)
    after = shares(policy_model(result.params), held, args.seed)
    print(f"after {args.steps} steps of {args.method}: sampled {after[0]:.2f}, greedy {after[1]:.2f}, "
          f"in {time.perf_counter() - begun:.0f} s")  # fmt: skip
    return after[1]


if __name__ == "__main__":
    main()
