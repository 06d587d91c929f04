"""Medusa heads against plain decoding on this machine: tokens of a pass and time of a text, greedy, one prompt a call.

    python benchmarks/medusa.py RUN --bytes [--new 256] [--train 40000] [--steps 600] [--runs 5]
    python benchmarks/medusa.py MODEL [--dtype float32] [--choices 4096] [--heads 4] [--drafts 3 7 15] [--folder FOLDER]

RUN is a byte-level model trained in this repository:

    garrulax train gpt2-tiny tokenizer=bytes window=128 batch=6 steps=1100 --run runs/bytes

MODEL is a model that answers messages, such as SmolLM2-135M-Instruct. The heads are trained on texts that the model
itself continues from beginnings of three kinds, and measured on other beginnings. FOLDER keeps the heads and the texts:
a second call with it only measures. Plain decoding and Medusa run in turns, after a first call that compiles; the times
are those of the fastest runs. All texts are compared: they must be equal token for token.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import garrulax as gx

TOPICS = (
    "volcanoes", "the moon", "bread", "honey bees", "the heart", "rainbows", "trains", "gravity", "glaciers", "music",
    "chess", "the internet", "dreams", "coffee", "trees", "money", "sleep", "the ocean", "bicycles", "electricity",
    "earthquakes", "cats", "democracy", "paper", "whales", "clouds", "running", "the brain", "maps", "soap", "tea",
    "deserts", "magnets", "spiders", "history", "winter", "gardens", "robots", "languages", "bridges",
)  # fmt: skip
QUESTIONS = (
    "What is {}?",
    "Explain {} to a child.",
    "Give me five facts about {}.",
    "Why is it good to know about {}?",
)
STORIES = ("Once upon a time, there was a little girl who loved {}.", "The most important thing about {} is that",
           "A short introduction to {}. In this chapter, we", "Dear friend, I want to tell you about {}.")  # fmt: skip
CODE = ('def count_{}(items):\n    """', "import os\n\nclass {}:\n    def __init__(self",
        "for {} in range(10):\n    print(", "def test_{}():\n    assert ")  # fmt: skip


def beginnings(model) -> dict[str, list[list[int]]]:
    """Token ids of beginnings of each kind of text, those of a topic together."""

    def each(patterns, encode):
        return [encode(p.format(t if encode is not code else t.split()[-1])) for t in TOPICS for p in patterns]

    def message(text):
        return list(model.tokenizer.apply_chat_template([{"role": "user", "content": text}]))

    def plain(text):
        return list(model.tokenizer.prompt(text))

    def code(text):
        return list(model.tokenizer.prompt(text))

    return {"answers": each(QUESTIONS, message), "prose": each(STORIES, plain), "code": each(CODE, code)}


def library_lines(model) -> dict[str, list[list[int]]]:
    """Beginnings out of Python's standard library: for a byte-level model that was trained on it."""
    from garrulax.train.corpus import Corpus

    random = np.random.default_rng(0)
    texts = [document.text for document in Corpus(("stdlib",)).split("valid")]
    found = []
    while len(found) < 400:
        text = texts[random.integers(len(texts))]
        start = text.find("\n", random.integers(len(text))) + 1
        if len(text) - start > 64:
            found.append(list(model.tokenizer.encode(text[start : start + 48])))
    return {"library": found}


def own_texts(model, prompts: list[list[int]], tokens: int, new: int, file: Path, batch: int = 32) -> list[list[int]]:
    """The model's continuations of beginnings, until there are so many tokens: one half greedy, the other sampled.

    They are in the file too, so that a call that was stopped can be gone on with.
    """
    found: list[list[int]] = json.loads(file.read_text()) if file.exists() else []
    prompts = prompts[len(found) :]
    for i, part in enumerate(prompts[j : j + batch] for j in range(0, len(prompts), batch)):
        if sum(map(len, found)) >= tokens:
            break
        done = gx.generate(model, part, max_new_tokens=new, temperature=[0.0, 0.6][i % 2], seed=list(range(len(part))))
        found += [[*ids, *one.tokens] for ids, one in zip(part, done, strict=True)]
        file.write_text(json.dumps(found))
        print(f"  {sum(map(len, found)):,} tokens written", flush=True)
    return found


def compare(model, heads, prompts: list[list[int]], new: int, drafts: int, runs: int) -> dict[str, float]:
    """Tokens of a pass, and new tokens a second without and with Medusa, in the fastest run of each prompt."""
    seconds = {"plain": 0.0, "medusa": 0.0}
    tokens = passes = 0
    for prompt in prompts:
        best = dict.fromkeys(seconds, float("inf"))
        for run in range(runs + 1):
            found = {}
            for name, speculate in (("plain", None), ("medusa", gx.medusa(heads, tree=drafts))):
                begun = time.perf_counter()
                found[name] = gx.generate(model, prompt, max_new_tokens=new, temperature=0, speculate=speculate)
                if run:  # the first one compiles
                    best[name] = min(best[name], time.perf_counter() - begun)
            assert found["plain"].tokens == found["medusa"].tokens, "the texts differ"
        tokens, passes = tokens + len(found["medusa"].tokens), passes + found["medusa"].passes
        seconds = {name: seconds[name] + best[name] for name in seconds}
    plain, fast = (tokens / seconds[name] for name in ("plain", "medusa"))
    return {"tokens/pass": tokens / passes, "plain": plain, "medusa": fast, "ratio": fast / plain}


def main() -> None:
    """Trains heads unless the folder has some, and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", help="of the weights, in place of a file's own codes")
    parser.add_argument("--bytes", action="store_true", help="the model is one over bytes, trained on stdlib")
    parser.add_argument("--folder", type=Path, default=Path("runs/medusa-benchmark"))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--choices", type=int)
    parser.add_argument("--train", type=int, default=40_000, help="tokens of the model's own text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 7, 15])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=3, help="beginnings of each kind that are measured")
    args = parser.parse_args()
    path = Path(args.model) / "model"
    loaded = gx.load(path if path.exists() else args.model, dtype=args.dtype)
    model = loaded.replace(params=gx.unstack(loaded.params))
    kinds = (library_lines if args.bytes else beginnings)(model)
    count = max(4, args.prompts)
    random = np.random.default_rng(1)
    training = [prompts[i] for prompts in kinds.values() for i in range(len(prompts) - count)]
    training = [training[i] for i in random.permutation(len(training))]
    if not (args.folder / "heads").exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        texts = own_texts(model, training, args.train, args.new, args.folder / "texts.json")
        begun = time.perf_counter()
        heads = gx.train_medusa(loaded, texts, heads=args.heads, choices=args.choices, steps=args.steps, report=print)
        print(f"trained in {time.perf_counter() - begun:.0f} s")
        gx.save_medusa(heads, args.folder / "heads")
    heads = gx.load_medusa(args.folder / "heads", model)
    print("accuracy of the first three guesses:", np.round(heads.accuracy[:, :3], 2).tolist())
    print(f"{'text':10} {'drafts':>6} {'tokens/pass':>12} {'plain tok/s':>12} {'Medusa tok/s':>13} {'ratio':>6}")
    for kind, prompts in kinds.items():
        for drafts in args.drafts:
            r = compare(model, heads, prompts[-args.prompts :], args.new, drafts, args.runs)
            print(
                f"{kind:10} {drafts:6} {r['tokens/pass']:12.2f} {r['plain']:12.0f} {r['medusa']:13.0f} "
                f"{r['ratio']:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
