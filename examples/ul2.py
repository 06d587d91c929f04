"""A mixture of denoisers like UL2's (Tay et al. 2023, arXiv 2205.05131, table 1) for a GLM, in plain JAX and Optax.

Three kinds of rows: R hides short spans and little of the text, X long spans or much of it, S the end of the text. The
mask tokens [MASK], [sMASK] and [gMASK] say which kind a row is, as UL2's mode tokens do. Trains on the source of
Python's standard library, one byte a token. Run: python examples/ul2.py
"""

import argparse
import pathlib

import jax
import numpy as np
import optax

import garrulax as gx
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.train.objectives import blank_infilling
from garrulax.train.rows import Example, infill_rows

#: Kind, mean length of a span, share of the text that is hidden; all equally often.
DENOISERS = [
    ("R", 3, 0.15),
    ("R", 8, 0.15),
    ("S", None, 0.25),
    ("X", 3, 0.5),
    ("X", 8, 0.5),
    ("X", 64, 0.15),
    ("X", 64, 0.5),
]
LENGTH, TEXT = 256, 128  # tokens in a row, and in the text that it is made of


def spans(rng, mean, share):
    """[begin, stop) of spans of about `mean` tokens that hide a share of the text; gaps and lengths are random."""
    hidden = max(1, round(share * TEXT))
    count = max(1, min(round(hidden / mean), TEXT - hidden - 1))
    lengths = np.diff([0, *np.sort(rng.choice(np.arange(1, hidden), count - 1, replace=False)), hidden])
    left = TEXT - hidden
    gaps = np.diff([0, *np.sort(rng.choice(np.arange(1, left), count, replace=False))])
    stops = np.cumsum(gaps + lengths)
    return list(zip((stops - lengths).tolist(), stops.tolist(), strict=True))


def example(rng, text, ids):
    """A text with the blanks of a random denoiser."""
    kind, mean, share = DENOISERS[rng.integers(len(DENOISERS))]
    if kind == "S":
        hidden = int(rng.integers(1, 2 * share * TEXT))
        return Example(text, [(TEXT - hidden, TEXT)], ids["[gMASK]"], ids["<|startofpiece|>"], None)
    found = spans(rng, mean, share)
    rng.shuffle(found)
    mask = ids["[MASK]" if kind == "R" else "[sMASK]"]
    return Example(text, found, mask, ids["<|startofpiece|>"], ids["<|endofpiece|>"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    ids = ByteTokenizer(GLM_SPECIALS).specials
    config = gx.preset(
        "glm-base", layers=2, width=64, heads=4, vocab=264, context=LENGTH, eos=256, pad=256, cls=257, mask=258,
        sentence_mask=259, generation_mask=260, sop=261, eop=262,
    )  # fmt: skip
    files = sorted(pathlib.Path(pathlib.__file__).parent.glob("*.py"))
    source = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).astype(np.int32)
    rng, optimizer = np.random.default_rng(0), optax.adamw(3e-3, b2=0.99)
    params = gx.init(config, jax.random.key(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        (value, _), gradient = jax.value_and_grad(blank_infilling, has_aux=True)(params, batch, config)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    for i in range(steps):
        starts = rng.integers(0, len(source) - TEXT, 8)
        batch = infill_rows([[example(rng, source[s : s + TEXT], ids)] for s in starts], LENGTH, pad=256)
        params, state, value = step(params, state, batch)
        if i % 20 == 0 or i == steps - 1:
            print(f"step {i:4d}  loss {value:.3f} nats a hidden byte")


if __name__ == "__main__":
    main()
