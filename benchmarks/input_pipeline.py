"""Tokens a second of the input pipeline: batches made from memory-mapped shards on the host, without a model.

    python benchmarks/input_pipeline.py             # 20 M tokens of random documents, two corpora
    python benchmarks/input_pipeline.py --stdlib    # waste of packing on the source of the standard library

One process and one thread make the batches; the other core is free. Rows of 1,024 tokens, 32 a batch.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import garrulax as gx
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.train import batches, settings, shards
from garrulax.train.corpus import Corpus
from garrulax.train.documents import causal_packing
from garrulax.train.shards import Dataset


def made(folder: Path, tokens: int, mean: int, seed: int) -> Dataset:
    """A data set of random documents with exponential lengths, written as `build_shards` writes it."""
    text = np.random.default_rng(seed).integers(97, 123, tokens, dtype=np.uint8).tobytes().decode()
    cuts = np.cumsum(np.random.default_rng(seed + 1).exponential(mean, 2 * tokens // mean).astype(int) + 1)
    cuts = [0, *cuts[cuts < tokens].tolist(), tokens]
    folder.mkdir()
    with open(folder / "a.jsonl", "w") as file:
        for begin, stop in itertools.pairwise(cuts):
            file.write(json.dumps({"text": text[begin:stop]}) + "\n")
    return shards.build_shards(Corpus(folder / "a.jsonl"), ByteTokenizer(GLM_SPECIALS), folder / "cache")


def speed(datasets: list[Dataset], preset: str, words: list[str], seconds: float) -> tuple[float, float]:
    """Tokens a second, and tokens a second of the CPU's time, padding left out."""
    corpus = ["corpus=a:0.7,b:0.3"] if len(datasets) > 1 else []
    s, config = settings.read_settings(None, [f"preset={preset}", "batch=32", "window=1024", *corpus, *words])
    config = gx.preset(preset, context=1025, vocab=300, **({} if "glm" in preset else {"bos": None, "eos": None}))
    data = batches.make_data(datasets if len(datasets) > 1 else datasets[0], s, config, ByteTokenizer(GLM_SPECIALS))
    data.batch_at(0)
    step = tokens = 0
    begin, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        batch = data.batch_at(step)
        tokens += int((batch["segment"] >= 0).sum()) if "segment" in batch else batch["tokens"].size
        step += 1
    return tokens / (time.perf_counter() - begin), tokens / (time.process_time() - used)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--stdlib", action="store_true", help="only measure the waste on the standard library")
    args = parser.parse_args()
    if args.stdlib:
        with tempfile.TemporaryDirectory() as root:
            from garrulax.hub.tokenizer_training import train_sentencepiece

            corpus = Corpus()
            tokenizer = train_sentencepiece((d.text for d in corpus.split("train")), vocab=4096)
            tokens = shards.build_shards(corpus, tokenizer, root).train
            for window in (256, 1024, 4096):
                packing = causal_packing(tokens, window, seed=0)
                print(f"window {window}: {len(tokens):,} tokens in {len(packing):,} rows, {packing.waste:.3%} wasted")
        return
    with tempfile.TemporaryDirectory() as root:
        datasets = [made(Path(root, "a"), args.tokens, 600, 0), made(Path(root, "b"), args.tokens // 2, 200, 2)]
        cases = {
            "one corpus, cut": (datasets[:1], "gpt2", []),
            "mixture, cut": (datasets, "gpt2", []),
            "one corpus, packed": (datasets[:1], "gpt2", ["packing=first_fit"]),
            "mixture, packed": (datasets, "gpt2", ["packing=first_fit"]),
            "mixture, packed, prefix LM": (datasets, "gpt2", ["packing=first_fit", "objective=prefix"]),
            "mixture, GLM's blanks": (datasets, "glm-base", []),
            "mixture, packed, GLM's blanks": (datasets, "glm-base", ["packing=first_fit"]),
        }
        for name, (used, preset, words) in cases.items():
            wall, cpu = speed(used, preset, words, args.seconds)
            print(f"{name}: {wall / 1e6:.2f} M tokens/s, {cpu / 1e6:.2f} M in a second of CPU time", flush=True)


if __name__ == "__main__":
    main()
