"""Watermarks on a real model: how surely each scheme is detected, and what it costs in perplexity.

    python benchmarks/watermark.py SmolLM2-135M-Instruct.Q4_1.gguf [--texts 64] [--picture docs/pictures/watermark.png]

Each text is sampled at temperature 1 after one of a few openings, with a key of its own, and without an end token. The
perplexity is that of the model itself: exp of the mean negative log-probability of the sampled tokens, with the
standard error over the texts. Unmarked texts are tested with all keys, and marked ones with theirs, from
their token ids and from the text alone, which is encoded again.
"""

import argparse
import math

import numpy as np

import garrulax as gx

OPENINGS = (
    "The weather in the mountains changes quickly, and",
    "In the first chapter of the book, the author explains",
    "Yesterday the city council decided that",
    "My grandmother used to tell a story about",
    "To bake a good loaf of bread, you should",
    "The history of mathematics begins with",
    "Many people believe that computers",
    "When the train arrived at the small station,",
)
SCHEMES = ("none", "green", "gumbel")
BATCH = 32


def write(model, scheme: str, texts: int, tokens: int) -> list[gx.Completion]:
    done: list[gx.Completion] = []
    for start in range(0, texts, BATCH):
        some = range(start, min(start + BATCH, texts))
        options = {} if scheme == "none" else {"watermark": [gx.watermark(key_of(i), scheme) for i in some]}
        prompts = [OPENINGS[i % len(OPENINGS)] for i in some]
        seeds = [i + 1000 * SCHEMES.index(scheme) for i in some]
        done += gx.generate(model, prompts, max_new_tokens=tokens, end_tokens=(), seed=seeds, **options)
    return done


def key_of(text: int) -> str:
    return f"key {text}"


def detect(model, done: list[gx.Completion], scheme: str, from_text: bool = False) -> np.ndarray:
    """z of each text, with its own key."""
    return np.array([
        gx.detect_watermark(one.text if from_text else one.tokens, gx.watermark(key_of(i), scheme), model.tokenizer).z
        for i, one in enumerate(done)
    ])  # fmt: skip


def report(model, written: dict[str, list[gx.Completion]]) -> None:
    print(f"{'scheme':8} {'perplexity':>20} {'z from ids':>24} {'z from the text':>24}")
    for scheme, done in written.items():
        losses = np.array([-np.mean(one.logprobs) for one in done])
        perplexity, error = math.exp(losses.mean()), losses.std(ddof=1) / math.sqrt(len(losses))
        line = f"{scheme:8} {perplexity:10.2f} +- {perplexity * error:5.2f}"
        for from_text in (False, True) if scheme != "none" else ():
            z = detect(model, done, scheme, from_text)
            line += f"   mean {z.mean():5.1f}, {np.mean(z > 4):6.1%} > 4"
        print(line)
    for scheme in SCHEMES[1:]:
        keys = [gx.watermark(key_of(i), scheme) for i in range(len(written["none"]))]
        z = np.array([[gx.detect_watermark(one.tokens, key).z for key in keys] for one in written["none"]])
        print(f"{scheme}: {z.size} pairs of an unmarked text and a key: z {z.mean():.3f} +- {z.std():.3f}, greatest "
              f"{z.max():.2f}, {np.sum(z > 4)} above 4")  # fmt: skip


def draw(written: dict[str, list[gx.Completion]], path: str) -> None:
    """z against the number of tokens: the mean over the texts, and the range of the middle 80 percent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = len(written["none"][0].tokens)
    sizes = np.arange(10, tokens + 1, 10)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, scheme in zip(axes, SCHEMES[1:], strict=True):
        for name, colour, label in ((scheme, "#1f4e79", "marked"), ("none", "0.5", "unmarked")):
            z = np.array([
                [gx.detect_watermark(one.tokens[:size], gx.watermark(key_of(i), scheme)).z for size in sizes]
                for i, one in enumerate(written[name])
            ])  # fmt: skip
            low, high = np.quantile(z, [0.1, 0.9], axis=0)
            panel.fill_between(sizes, low, high, color=colour, alpha=0.25, linewidth=0)
            panel.plot(sizes, z.mean(axis=0), color=colour, label=label)
        panel.axhline(4, color="0.2", linewidth=0.8, linestyle="--")
        panel.set_title({"green": "green lists, gamma 0.25, delta 2", "gumbel": "Gumbel"}[scheme], fontsize=9)
        panel.set_xlabel("tokens", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=8, frameon=False, loc="upper left")
    axes[0].set_ylabel("z", fontsize=8)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--picture", metavar="FILE")
    args = parser.parse_args()
    loaded = gx.load(args.model)
    texts = {scheme: write(loaded, scheme, args.texts, args.tokens) for scheme in SCHEMES}
    report(loaded, texts)
    if args.picture:
        draw(texts, args.picture)
