"""InstructGPT's pipeline on a tiny model: SFT, a reward model, PPO with pre-training text, and then too much of it.

    python examples/instructgpt/run.py [--folder runs/instructgpt] [--seeds 3]

The task: answer a remark with one short question. A GPT over bytes with 0.2 million parameters is trained on small talk
of all kinds (pre-training), then on good answers (SFT). Then it answers remarks, four times each, and people rank the
answers. A rule stands for these people: it likes questions, and short ones; but they judge with noise, so that of two
answers they prefer the better one with the probability sigmoid(difference / NOISE), as reward models assume. A reward
model learns from their rankings. PPO then trains against the reward model, with the KL to the SFT model in the reward,
and with pre-training text beside it.

The last stage trains once more without the KL, for longer. Its reward by the model goes on rising while that by the
rule falls: over-optimisation (Gao et al. 2022). frontier.png shows both against the distance from the SFT model.

All measures are of remarks about people that no training remark is about. What each stage does to its own measure is
printed; with --seeds 3 for three seeds, with its spread. The last stage runs for the first seed alone.
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
from garrulax.align import answers, comparisons, conversations, objectives, rl, rollouts, sft
from garrulax.align.logprobs import token_logprobs
from garrulax.align.policy_objectives import on_model, policy_model, policy_objective, policy_params, policy_specs
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.models import gpt, reward
from garrulax.train import loop
from garrulax.train.batches import Data
from garrulax.train.evaluate import Evaluation, make_evaluate
from garrulax.train.objectives import causal_lm
from garrulax.train.settings import Settings

END = 256
CONFIG = gpt.Config(layers=2, heads=4, width=96, context=96, vocab=257, bos=None, eos=END)
TOKENIZER = ByteTokenizer(["<|endoftext|>"])
LIMIT = 40  # tokens of an answer
LENGTH = 72  # of the longest remark and answer
ANSWERS = 4  # to each remark, which people rank
NOISE = 0.3  # of their judgements: an answer that the rule puts 0.5 higher is preferred in 84 of 100 cases
ROWS = 256  # that are written at once
HELD_OUT = 256  # remarks, to measure PPO on
JUDGED = 128  # held-out remarks, to measure the reward model on
EPOCHS = 2  # of the reward model; with more it learns the noise
LOGPROBS = jax.jit(token_logprobs, static_argnums=2)
NOTHING = {"weights": np.ones((1, 1), np.float32)}  # PPO makes its batches itself

WHO = ("I", "my sister", "our teacher", "the old man", "a friend", "the baker", "my cat", "the girl", "my uncle",
       "our dog", "the queen", "a doctor", "the farmer", "my mother", "the boy", "a painter", "the judge", "our singer",
       "a soldier", "the old woman")  # fmt: skip
STRANGERS = ("my brother", "the king", "our neighbour", "a sailor")  # of held-out remarks alone
DOES = ("likes", "saw", "wants", "lost", "found", "sold", "drew", "hid")
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


def rankings(
    model: gx.Model, count: int, seed: int, people: tuple[str, ...] = WHO
) -> tuple[list[answers.Ranking], np.ndarray]:
    """Remarks with answers of the model, ranked by people; and what the rule says of the answers, [count, ANSWERS]."""
    draw = np.random.default_rng(seed)
    said = [remark(draw, people) for _ in range(count)]
    each = [prompt for prompt in said for _ in range(ANSWERS)]
    written = []
    for first in range(0, len(each), ROWS):
        part = each[first : first + ROWS]
        written += gx.generate(model, part, max_new_tokens=LIMIT, seed=list(range(first, first + len(part))))
    values = np.array([rule(one.text, one.finish_reason == "eos") for one in written])
    found = []
    for i, prompt in enumerate(said):
        places = range(i * ANSWERS, (i + 1) * ANSWERS)
        # With Gumbel noise a preference has the probability sigmoid(difference / NOISE). Equal answers tie.
        noise = {written[j].text: NOISE * draw.gumbel() for j in places}
        judged = [values[j] + noise[written[j].text] for j in places]
        order, ids = sorted(set(judged), reverse=True), list(TOKENIZER.prompt(prompt))
        texts = [[*ids, *written[j].tokens] for j in places]
        shown = [conversations.Example(text, [k >= len(ids) for k in range(len(text))]) for text in texts]
        found.append(answers.Ranking(shown, [order.index(one) for one in judged]))
    return found, values.reshape(count, ANSWERS)


def measured(params: dict, prompts: rollouts.Prompts, reference: dict, score, seed: int) -> dict[str, float]:
    """Mean rewards by the rule and by the model, KL to the reference, and length, of answers to held-out remarks."""
    every = range(len(prompts))
    roll = rollouts.roll_out(gx.unstack(params), CONFIG, prompts, every, seeds=rollouts.seeds(seed, 2**41, len(every)),
                             limit=LIMIT, tokenizer=TOKENIZER)  # fmt: skip
    batch = {name: jnp.asarray(x) for name, x in roll.batch.items()}
    other = LOGPROBS(reference, batch, CONFIG)
    return {
        "rule": float(np.mean([rule(s.text, s.ended) for s in roll.samples])),
        "model": float(np.mean(score(roll.samples))),
        "kl": float(jnp.mean(jnp.sum((batch["logprobs"] - other) * batch["weights"], axis=1))),
        "length": float(np.mean([len(s.text) for s in roll.samples])),
        "questions": float(np.mean([s.text.endswith("?") for s in roll.samples])),
    }


def pretrain_and_tune(folder: Path, seed: int, steps: int) -> tuple[dict, dict, Data, list[float]]:
    """The pre-trained model, the SFT model, the pre-training text, and the loss of both on held-out good answers."""
    talk = sft.make_sft_data(
        examples(4000, seed, small_talk), examples(200, 90, small_talk, STRANGERS), settings(seed=seed)
    )
    shown = sft.make_sft_data(
        examples(600, seed + 1, good_answer), examples(400, 91, good_answer, STRANGERS), settings(seed=seed)
    )
    new = gx.init(CONFIG, jax.random.key(seed))
    base = train(folder / "pretrained", settings(steps=steps, lr=3e-3, seed=seed), talk, causal_lm, new)
    tuned = train(folder / "sft", settings(steps=60, lr=1e-3, seed=seed), shown, causal_lm, copied(base))
    return base, tuned, talk, [loss_of(base, shown), loss_of(tuned, shown)]


def train_judge(folder: Path, seed: int, tuned: dict, remarks: int) -> tuple[dict, dict[str, list[float]]]:
    """The reward model, and its loss and accuracy on held-out rankings: of the untrained head, of it, of the rule."""
    model = gx.Model(CONFIG, gx.unstack(tuned), TOKENIZER)
    ranked, _ = rankings(model, remarks, seed + 2)
    others, values = rankings(model, JUDGED, seed + 4, STRANGERS)
    arrays = [answers.ranking_arrays(part, LENGTH)[0] for part in (ranked, others)]
    s = settings(steps=EPOCHS * remarks // 16, lr=5e-4, batch=16, window=LENGTH, seed=seed)
    untrained, objective = reward.add_reward_head(tuned, CONFIG, jax.random.key(seed)), objectives.reward_objective()
    judge = train(folder / "reward", s, answers.array_data(*arrays, s), objective, copied(untrained),
                  specs=reward.reward_specs(CONFIG))  # fmt: skip
    loss, accuracy = [], []
    for params in (untrained, judge):
        value, metrics = objective(params, jax.tree.map(jnp.asarray, arrays[1]), CONFIG)
        loss.append(float(value))
        accuracy.append(float(metrics["accuracy"]))
    ranks = jnp.asarray([one.ranks for one in others], jnp.int32)
    best = float(comparisons.kway_loss(jnp.asarray(values / NOISE, jnp.float32), ranks=ranks))
    pairs = np.asarray(comparisons.pairs(ranks.shape, ranks=ranks))
    difference = (values[:, :, None] - values[:, None, :])[pairs]
    right = float(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return judge, {"loss": [*loss, best], "accuracy": [*accuracy, right]}


def scorer(judge: dict):
    """The scores of a reward model, as `rl.PolicyRollouts` takes them."""
    compute = jax.jit(lambda params, tokens, length: reward.scores(params, tokens, length, CONFIG))

    def score(samples) -> list[float]:
        tokens, length = np.zeros((len(samples), LENGTH), np.int32), np.zeros(len(samples), np.int32)
        for i, one in enumerate(samples):
            ids = [*one.prompt, *one.response]
            tokens[i, : len(ids)], length[i] = ids, len(ids)
        return np.asarray(compute(judge, tokens, length), np.float64).tolist()

    return score


def pipeline(folder: Path, seed: int, *, pretraining: int, remarks: int, steps: int, too_far: int) -> dict:
    """Runs all stages.

    Args:
        folder: For their runs.
        seed: Of the data, the first parameters and the sampling.
        pretraining: Its number of steps.
        remarks: Number of those whose answers people rank.
        steps: Of PPO-ptx.
        too_far: Of PPO without the KL; 0 leaves that stage out.

    Returns:
        points: Of each model, what `measured` says, in a list; for PPO from the beginning of the stage to its end.
        stages: Of each measure of a stage on held-out data, its value before and after the stage.
        rule: Loss and accuracy of the rule itself on the held-out rankings: no reward model does better.
    """
    base, tuned, talk, losses = pretrain_and_tune(folder, seed, pretraining)
    judge, found = train_judge(folder, seed, tuned, remarks)
    score, draw = scorer(judge), np.random.default_rng(seed + 3)
    train_on, held_out = (
        rollouts.Prompts([remark(draw, people) for _ in range(n)], CONFIG, TOKENIZER, LIMIT)
        for n, people in ((2000, WHO), (HELD_OUT, STRANGERS))
    )
    points = {
        "pre-trained": [measured(base, held_out, tuned, score, seed)],
        "SFT": [measured(tuned, held_out, tuned, score, seed)],
    }
    for name, count, beta, weight in (("PPO-ptx", steps, 0.05, 0.1), ("PPO without the KL", too_far, 0.0, 0.0)):
        if not count:
            continue
        points[name] = [points["SFT"][0]]
        s = settings(steps=count, lr=1e-3, batch=64, window=train_on.length, schedule="constant", seed=seed,
                     eval_every=max(4, count // 16 * 2), checkpoint_every=count)  # fmt: skip
        ppo(folder / name.replace(" ", "-"), tuned, judge, train_on, score, beta, (talk, weight) if weight else None,
            s, _points(points[name], held_out, tuned, score, seed))  # fmt: skip
    first, last = points["PPO-ptx"][0], points["PPO-ptx"][-1]
    stages = {
        "SFT: loss, nats a token": losses,
        "reward model: loss, nats a pair": found["loss"][:2],
        "reward model: accuracy": found["accuracy"][:2],
        "PPO-ptx: reward by the model": [first["model"], last["model"]],
        "PPO-ptx: reward by the rule": [first["rule"], last["rule"]],
    }
    return {"points": points, "stages": stages, "rule": {name: values[2] for name, values in found.items()}}


def copied(params: dict) -> dict:
    """A copy: training gives the arrays that it begins with away."""
    return jax.tree.map(jnp.copy, params)


def ppo(folder: Path, tuned: dict, judge: dict, train_on, score, beta: float, ptx, s: Settings, evaluate) -> None:
    """One PPO stage from the SFT model on, with the KL times beta in the reward, and perhaps (data, weight) of text."""
    chosen = rl.PolicySettings("ppo", group=1, limit=LIMIT, epochs=2, beta=beta, missing_end=1.0)
    made = rl.PolicyRollouts(train_on, score, CONFIG, chosen, s.batch, s.seed, reference=tuned, tokenizer=TOKENIZER,
                             text=ptx[0].batch_at if ptx else None)  # fmt: skip
    objective = policy_objective("ppo")
    if ptx:
        objective = objectives.mixed(objective, on_model(causal_lm), ptx[1])
    data = Data(lambda step: NOTHING, lambda: iter([NOTHING]))
    start = policy_params(copied(judge), CONFIG, beta, values=True, key=jax.random.key(s.seed))
    start = {**start, **copied(tuned)}  # the policy is the SFT model, the values begin as the judge's
    run = loop.Run(CONFIG, s, data, folder, objective=objective, params=start,
                   specs=policy_specs(CONFIG, values=True), rollouts=made, evaluate=evaluate)  # fmt: skip
    gx.save(gx.Model(CONFIG, policy_model(loop.train(run).params), TOKENIZER), folder / "model")


def loss_of(params: dict, data: Data) -> float:
    """The mean over held-out target tokens, nats."""
    return make_evaluate(CONFIG, causal_lm)(params, data.held_out()).loss


def main() -> None:
    """Runs the pipeline for each seed, prints tables, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/instructgpt"))
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs")
    parser.add_argument("--pretraining", type=int, default=200, help="number of steps")
    parser.add_argument("--remarks", type=int, default=512, help="whose answers are ranked, a multiple of 16")
    parser.add_argument("--steps", type=int, default=24, help="of PPO-ptx, an even number")
    parser.add_argument("--too-far", type=int, default=96, help="steps of PPO without the KL, an even number")
    args = parser.parse_args()
    begun, found = time.perf_counter(), []
    for i in range(args.seeds):
        seed = args.seed + 10 * i
        found.append(pipeline(args.folder / f"seed{seed}", seed, pretraining=args.pretraining, remarks=args.remarks,
                              steps=args.steps, too_far=0 if i else args.too_far))  # fmt: skip
        print(f"\nseed {seed}, after {time.perf_counter() - begun:.0f} s")
        table(found[-1]["points"])
    print()
    report([one["stages"] for one in found])
    loss, accuracy = (np.mean([one["rule"][name] for one in found]) for name in ("loss", "accuracy"))
    print(f"on the same rankings the rule itself has loss {loss:.3f} and accuracy {accuracy:.3f}, a coin 0.693 and 0.5")
    (args.folder / "measured.json").write_text(json.dumps(found, indent=1))
    draw_picture(found[0]["points"], args.folder / "frontier.png")
    print(args.folder / "frontier.png")


def table(points: dict[str, list[dict[str, float]]]) -> None:
    """Prints the last measurement of each model."""
    print(f"{'':20} {'rule':>6} {'model':>6} {'KL':>6} {'length':>7} {'questions':>10}")
    for name, p in ((name, measurements[-1]) for name, measurements in points.items()):
        print(f"{name:20} {p['rule']:6.2f} {p['model']:6.2f} {p['kl']:6.2f} {p['length']:7.1f} {p['questions']:10.0%}")


def report(runs: list[dict[str, list[float]]]) -> None:
    """Prints each measure before and after its stage: the mean over the runs, and their standard deviation."""
    print(f"{'on held-out data':32} {'before':>15} {'after':>15} {'change':>15}   better in")
    for name in runs[0]:
        before, after = np.array([run[name] for run in runs]).T
        change = after - before
        better = int(np.sum(change < 0 if "loss" in name else change > 0))
        spread = [f" ± {x.std(ddof=1):.3f}" if len(runs) > 1 else "" for x in (before, after, change)]
        columns = [f"{x.mean():6.3f}{y}" for x, y in zip((before, after, change), spread, strict=True)]
        print(f"{name:32} {columns[0]:>15} {columns[1]:>15} {columns[2]:>15}   {better} of {len(runs)}")


def _points(points: list, prompts: rollouts.Prompts, reference: dict, score, seed: int):
    """An evaluation that keeps what it measured."""

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
        for name in (name for name in found if name.startswith("PPO")):
            x = [max(p["kl"], 0) ** 0.5 for p in found[name]]
            axis.plot(x, [p[key] for p in found[name]], marker="o", label=name)
        axis.set_xlabel("square root of the KL to the SFT model, nats")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
