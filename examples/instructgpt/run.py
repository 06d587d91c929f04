"""InstructGPT's pipeline on a tiny model: SFT, a reward model, PPO with pre-training text, and then too much of it.

    python examples/instructgpt/run.py [--folder runs/instructgpt] [--seed 0] [--steps 80]
    python examples/instructgpt/run.py --seeds 3 --steps 24 --pretraining 200

The task: answer a remark with one short question. A GPT over bytes with 0.2 million parameters is trained on small talk
of all kinds (pre-training), then on good answers (SFT). A rule, which stands for the people of the paper, prefers of
two answers the one that asks and is short; one comparison in five is answered at random. A reward model learns from a
few hundred of these. PPO then trains against the reward model, with the KL to the SFT model in the reward, and with
pre-training text beside it.

The last stage trains once more without the KL. Its reward by the model goes on rising while that by the rule falls:
over-optimisation (Gao et al. 2022). frontier.png shows both against the distance from the SFT model.

All measures are of remarks about people that no training remark is about. With --seeds the stages before that run once
for each of several seeds, and what each stage does to its own measure is printed with its spread.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import garrulax as gx
from garrulax.align import answers, conversations, objectives, rl, rollouts, sft
from garrulax.align.logprobs import token_logprobs
from garrulax.align.policy_objectives import on_model, policy_model, policy_objective, policy_params, policy_specs
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.models import gpt, reward
from garrulax.train import loop
from garrulax.train.batches import Data
from garrulax.train.objectives import causal_lm
from garrulax.train.settings import Settings

END = 256
CONFIG = gpt.Config(layers=2, heads=4, width=96, context=96, vocab=257, bos=None, eos=END)
TOKENIZER = ByteTokenizer(["<|endoftext|>"])
LIMIT = 40  # tokens of an answer
NOTHING = {"weights": np.ones((1, 1), np.float32)}  # PPO makes its batches itself

WHO = ("I", "my sister", "our teacher", "the old man", "a friend", "the baker", "my cat", "the girl")
DOES = ("likes", "saw", "wants", "lost", "found", "sold", "drew", "hid")
STRANGERS = ("my brother", "the king", "our neighbour", "a sailor")  # of held-out remarks alone
WHAT = ("a boat", "the moon", "red shoes", "some bread", "an apple", "the key", "a song", "two birds")


def remark(draw: np.random.Generator, people: tuple[str, ...] = WHO) -> str:
    """A prompt."""
    return f"{draw.choice(people)} {draw.choice(DOES)} {draw.choice(WHAT)}. "


def small_talk(draw: np.random.Generator) -> str:
    """An answer of any kind: a question or not, short or long."""
    who, thing = draw.choice(WHO), draw.choice(WHAT)
    kinds = (
        f"why {thing}?",
        "oh, really?",
        f"where is {thing}?",
        f"well, {who} told me so.",
        "that is good.",
        f"yes, and {who} {draw.choice(DOES)} {thing}.",
        f"who has {thing} now, and why?",
        "no.",
    )
    return kinds[draw.integers(len(kinds))]


def good_answer(draw: np.random.Generator) -> str:
    """A demonstration, as a person would write it: not always a perfect one."""
    said = small_talk(draw)
    return said if draw.random() < 0.5 else ("why?", "really?", "where?")[draw.integers(3)]


def rule(text: str, ended: bool = True) -> float:
    """The true reward: 1 for a question, less 1 for each 20 characters, and less 1 for an answer that does not end."""
    return float(text.endswith("?")) - len(text) / 20 - float(not ended)


def settings(**values) -> Settings:
    """Those that all stages share."""
    common = {"optimizer": "adamw", "weight_decay": 0.0, "batch": 32, "window": 95, "log_every": 20, "warmup": 0.05}
    return Settings(**common | values)


def train(folder: Path, s: Settings, data: Data, objective, params, **more) -> dict:
    """One stage; returns its parameters."""
    s = dataclasses.replace(s, eval_every=s.steps, checkpoint_every=s.steps)
    return loop.train(loop.Run(CONFIG, s, data, folder, objective=objective, params=params, **more)).params


def examples(count: int, seed: int, write, people: tuple[str, ...] = WHO) -> list[conversations.Example]:
    """Remarks with answers, as a text and its continuation."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        said = remark(draw, people)
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": write(draw)}]
        made.append(conversations.plain(TOKENIZER, messages, (END,), "an example"))
    return made


def comparisons(model: gx.Model, count: int, seed: int, people: tuple[str, ...] = WHO) -> list[answers.Ranking]:
    """Pairs of the model's own answers, compared by the rule, one in five at random."""
    draw = np.random.default_rng(seed)
    said = [remark(draw, people) for _ in range(count)]
    written = gx.generate(model, [s for s in said for _ in range(2)], max_new_tokens=LIMIT, seed=list(range(2 * count)))
    found = []
    for i, prompt in enumerate(said):
        both = written[2 * i : 2 * i + 2]
        values = [rule(one.text, one.finish_reason == "eos") for one in both]
        first = int(values[1] > values[0]) if draw.random() > 0.2 else int(draw.integers(2))
        ids = list(TOKENIZER.prompt(prompt))
        pair = [
            conversations.Example(ids + list(one.tokens), [False] * len(ids) + [True] * len(one.tokens)) for one in both
        ]
        found.append(answers.Ranking([pair[first], pair[1 - first]], [0, 1]))
    return found


def measured(params: dict, prompts: rollouts.Prompts, reference: dict, score, seed: int) -> dict[str, float]:
    """Mean rewards by the rule and by the model, KL to the reference, and length, of answers to held-out remarks."""
    every = range(len(prompts))
    roll = rollouts.roll_out(gx.unstack(params), CONFIG, prompts, every, seeds=rollouts.seeds(seed, 2**41, len(every)),
                             limit=LIMIT, tokenizer=TOKENIZER)  # fmt: skip
    batch = {name: jnp.asarray(x) for name, x in roll.batch.items()}
    other = token_logprobs(reference, batch, CONFIG)
    return {
        "rule": float(np.mean([rule(s.text, s.ended) for s in roll.samples])),
        "model": float(np.mean(score(roll.samples))),
        "kl": float(jnp.mean(jnp.sum((batch["logprobs"] - other) * batch["weights"], axis=1))),
        "length": float(np.mean([len(s.text) for s in roll.samples])),
        "questions": float(np.mean([s.text.endswith("?") for s in roll.samples])),
    }


def pipeline(
    folder: Path,
    seed: int,
    stages: dict[str, tuple[float, float]],
    *,
    pretraining: int,
    compared: int,
    steps: int,
    eval_every: int,
) -> dict:
    """Runs all stages.

    Args:
        folder: For their runs.
        seed: Of the data, the first parameters and the sampling.
        stages: Of PPO: a name, and the weights of the KL and of the pre-training text.
        pretraining: Its number of steps.
        compared: Number of comparisons that the reward model learns from.
        steps: Of each PPO stage.
        eval_every: Steps of PPO from one measurement to the next.

    Returns:
        points: Of each model, what `measured` says; of a PPO stage a list, from its beginning to its end.
        held_out: Of each stage, its own measure on held-out data before and after it.
    """
    talk = sft.make_sft_data(
        examples(4000, seed, small_talk), examples(200, 90, small_talk, STRANGERS), settings(seed=seed)
    )
    base = train(
        folder / "pretrained",
        settings(steps=pretraining, lr=3e-3),
        talk,
        causal_lm,
        gx.init(CONFIG, jax.random.key(seed)),
    )
    shown = sft.make_sft_data(
        examples(300, seed + 1, good_answer), examples(200, 91, good_answer, STRANGERS), settings(seed=seed)
    )
    tuned = train(folder / "sft", settings(steps=60, lr=1e-3), shown, causal_lm, jax.tree.map(jnp.copy, base))

    model = gx.Model(CONFIG, tuned, TOKENIZER)
    ranked = comparisons(model, compared, seed + 2), comparisons(model, 200, seed + 4, STRANGERS)
    arrays = [answers.ranking_arrays(part, 95)[0] for part in ranked]
    untrained = reward.add_reward_head(tuned, CONFIG, jax.random.key(seed))
    ranked_data = answers.array_data(*arrays, settings(batch=16, seed=seed))
    judge = train(folder / "reward", settings(steps=120, lr=1e-3, batch=16), ranked_data,
                  objectives.reward_objective(), jax.tree.map(jnp.copy, untrained),
                  specs=reward.reward_specs(CONFIG))  # fmt: skip
    compute = jax.jit(lambda params, tokens, length: reward.scores(params, tokens, length, CONFIG))

    def score(samples) -> list[float]:
        tokens, length = np.zeros((len(samples), 96), np.int32), np.zeros(len(samples), np.int32)
        for i, one in enumerate(samples):
            ids = [*one.prompt, *one.response]
            tokens[i, : len(ids)], length[i] = ids, len(ids)
        return np.asarray(compute(judge, tokens, length), np.float64).tolist()

    draw = np.random.default_rng(seed + 3)
    train_on, held_out = (
        rollouts.Prompts([remark(draw, people) for _ in range(n)], CONFIG, TOKENIZER, LIMIT)
        for n, people in ((2000, WHO), (200, STRANGERS))
    )
    points = {
        "pretrained": [measured(base, held_out, tuned, score, seed)],
        "sft": [measured(tuned, held_out, tuned, score, seed)],
    }
    for name, (beta, weight) in stages.items():
        points[name] = [points["sft"][0]]
        s = settings(steps=steps, lr=1e-3, batch=64, window=train_on.length, schedule="constant", seed=seed,
                     eval_every=eval_every, checkpoint_every=steps)  # fmt: skip
        ppo(folder / name.replace(" ", "-"), tuned, judge, train_on, score, beta, (talk, weight) if weight else None,
            s, _points(points[name], held_out, tuned, score, seed))  # fmt: skip
    stage = points[next(iter(stages))]
    accuracies = [
        float(objectives.reward_objective()(params, jax.tree.map(jnp.asarray, arrays[1]), CONFIG)[1]["accuracy"])
        for params in (untrained, judge)
    ]
    own = {
        "SFT: loss, nats a token": [loss_of(base, shown), loss_of(tuned, shown)],
        "reward model: accuracy": accuracies,
        "PPO-ptx: reward by the model": [stage[0]["model"], stage[-1]["model"]],
        "PPO-ptx: reward by the rule": [stage[0]["rule"], stage[-1]["rule"]],
    }
    return {"points": points, "held_out": own}


def ppo(folder: Path, tuned: dict, judge: dict, train_on, score, beta: float, ptx, s: Settings, evaluate) -> None:
    """One PPO stage from the SFT model on, with the KL times beta in the reward, and perhaps (data, weight) of text."""
    chosen = rl.PolicySettings("ppo", group=1, limit=LIMIT, epochs=2, beta=beta, missing_end=1.0)
    made = rl.PolicyRollouts(train_on, score, CONFIG, chosen, s.batch, s.seed, reference=tuned, tokenizer=TOKENIZER,
                             text=ptx[0].batch_at if ptx else None)  # fmt: skip
    objective = policy_objective("ppo")
    if ptx:
        objective = objectives.mixed(objective, on_model(causal_lm), ptx[1])
    data = Data(lambda step: NOTHING, lambda: iter([NOTHING]))
    start = policy_params(jax.tree.map(jnp.copy, judge), CONFIG, beta, values=True, key=jax.random.key(s.seed))
    start = {**start, **jax.tree.map(jnp.copy, tuned)}  # the policy is the SFT model, the values begin as the judge's
    run = loop.Run(CONFIG, s, data, folder, objective=objective, params=start,
                   specs=policy_specs(CONFIG, values=True), rollouts=made, evaluate=evaluate)  # fmt: skip
    gx.save(gx.Model(CONFIG, policy_model(loop.train(run).params), TOKENIZER), folder / "model")


def loss_of(params: dict, data: Data) -> float:
    """The mean over held-out target tokens, nats."""
    total = count = 0.0
    for batch in data.held_out():
        loss, metrics = causal_lm(params, {name: jnp.asarray(x) for name, x in batch.items()}, CONFIG)
        total, count = total + float(loss * metrics["tokens"]), count + float(metrics["tokens"])
    return total / count


def main() -> None:
    """Runs the stages, prints a table, and draws the picture; with --seeds prints what each stage does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/instructgpt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="number of runs, without the last stage if several")
    parser.add_argument("--steps", type=int, default=80, help="of each of the two PPO stages")
    parser.add_argument("--comparisons", type=int, default=300)
    parser.add_argument("--pretraining", type=int, default=400, help="number of steps")
    args = parser.parse_args()
    begun, stages = time.perf_counter(), {"ppo-ptx": (0.05, 0.1)}
    sizes = {"pretraining": args.pretraining, "compared": args.comparisons, "steps": args.steps}
    if args.seeds > 1:
        seeds = [args.seed + 10 * i for i in range(args.seeds)]
        found = [pipeline(args.folder / f"seed{i}", i, stages, **sizes, eval_every=args.steps) for i in seeds]
        report([one["held_out"] for one in found])
        (args.folder / "seeds.json").write_text(json.dumps(found, indent=1))
    else:
        stages["ppo without KL"] = (0.0, 0.0)
        found = pipeline(args.folder, args.seed, stages, **sizes, eval_every=max(2, args.steps // 10 // 2 * 2))
        accuracy = found["held_out"]["reward model: accuracy"][1]
        print(f"the reward model agrees with {accuracy:.0%} of the held-out comparisons, a fifth of which are random")
        print(f"\n{'':15} {'rule':>6} {'model':>6} {'KL':>6} {'length':>7} {'questions':>10}")
        for name, points in found["points"].items():
            p = points[-1]
            print(
                f"{name:15} {p['rule']:6.2f} {p['model']:6.2f} {p['kl']:6.2f} {p['length']:7.1f} {p['questions']:10.0%}"
            )
        (args.folder / "frontier.json").write_text(json.dumps(found["points"], indent=1))
        draw_picture(found["points"], args.folder / "frontier.png")
        print(args.folder / "frontier.png")
    print(f"{time.perf_counter() - begun:.0f} s")


def report(runs: list[dict[str, list[float]]]) -> None:
    """Prints each measure before and after its stage: the mean over the runs, and their standard deviation."""
    print(f"\n{'on held-out data':30} {'before':>15} {'after':>15} {'change':>15}   better in")
    for name in runs[0]:
        before, after = np.array([run[name] for run in runs]).T
        change = after - before
        better = int(np.sum(change < 0 if "loss" in name else change > 0))
        columns = [f"{x.mean():6.3f} ± {x.std(ddof=1):.3f}" for x in (before, after, change)]
        print(f"{name:30} {columns[0]:>15} {columns[1]:>15} {columns[2]:>15}   {better} of {len(runs)}")


def _points(points: list, prompts: rollouts.Prompts, reference: dict, score, seed: int):
    """An evaluation that keeps what it measured."""
    from garrulax.train.evaluate import Evaluation

    def evaluate(params, batches, tokens=0):
        points.append(measured(policy_model(params), prompts, reference, score, seed))
        return Evaluation(-points[-1]["model"], len(prompts), 0.0, points[-1]["model"])

    return evaluate


def draw_picture(found: dict, file: Path) -> None:
    """Rewards against the square root of the KL, one line a stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for axis, key, title in zip(axes, ("model", "rule"), ("reward by the model", "reward by the rule"), strict=True):
        for name in ("ppo-ptx", "ppo without KL"):
            x = [max(p["kl"], 0) ** 0.5 for p in found[name]]
            axis.plot(x, [p[key] for p in found[name]], marker="o", label=name)
        axis.set_xlabel("square root of the KL to the SFT model, nats")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
