"""Speculation against plain decoding: time and accepted drafts for three kinds of text, one prompt at a time.

    python benchmarks/speculate.py MODEL [--layers 10] [--medusa HEADS] [--tokens 128] [--rounds 3] [--temperature 0]
        [--picture docs/pictures/speculation.png]

The ways of decoding take turns, and must write the same tokens. A ratio above 1 means that speculation is faster.
"""

import argparse
import statistics
import time
from pathlib import Path

import garrulax as gx

CODE = '''class Account:
    """A bank account."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("the balance is too small")
        self.balance -= amount
        return self.balance
'''
PEOPLE = """Anna Schmidt, born 1984 in Hamburg, works as an engineer and has two children.
Peter Novak, born 1979 in Brno, works as a teacher and has three children.
Maria Rossi, born 1990 in Torino, works as a doctor and has one child.
Jan de Vries, born 1988 in Utrecht, works as an architect and has no children.
"""
#: The beginning of each answer is given, so that small models do what is asked.
TEXTS = {
    "copying": f"Here is a Python file:\n\n{CODE}\nHere is the same file again, unchanged:\n\n{CODE[:160]}",
    "JSON": f'{PEOPLE}\nThe same as JSON:\n\n[\n  {{"name": "Anna Schmidt", "born": 1984, "city": "Hamburg", '
    '"work": "engineer", "children": 2},\n  {"name": "Peter Novak", "born": 1979, "city": "Brno",',
    "prose": "The old lighthouse keeper had not spoken to anyone for eleven years. One evening in October,",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a GGUF file")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="also draft with this many first layers of the model")
    parser.add_argument("--medusa", help="also draft with the Medusa heads of this folder")
    parser.add_argument("--drafts", type=int, default=3, help="nodes of the tree of the Medusa heads")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--picture", type=Path, help="file of a picture of the results")
    arguments = parser.parse_args()
    model = gx.load(arguments.model, dtype="float32")
    model = gx.Model(model.config, gx.unstack(model.params), model.tokenizer)
    ways = {"plain": {}, "prompt lookup": {"speculate": gx.prompt_lookup()}}
    if arguments.layers is not None:
        ways[f"first {arguments.layers} layers"] = {"speculate": gx.draft(layers=arguments.layers)}
    if arguments.medusa is not None:
        heads = gx.load_medusa(arguments.medusa, model)
        ways["Medusa heads"] = {"speculate": gx.medusa(heads, tree=arguments.drafts)}
    results = {name: compare(model, name, text, ways, arguments) for name, text in TEXTS.items()}
    if arguments.picture is not None:
        draw(results, arguments)


def compare(model, name: str, text: str, ways: dict[str, dict], arguments) -> dict[str, tuple[float, float]]:
    """Tokens of a pass, and the median ratio of plain decoding's time to its own, of each way but the plain one."""

    def timed(options):
        start = time.perf_counter()
        completion = gx.generate(
            model, text, max_new_tokens=arguments.tokens, temperature=arguments.temperature, end_tokens=(), **options
        )
        return time.perf_counter() - start, completion

    seconds, plain, rates, found = {way: [] for way in ways}, [], {}, {}
    for turn in range(arguments.rounds + 1):
        for way, options in ways.items():
            taken, completion = timed(options)
            if turn == 0:  # compiles
                plain = plain or completion.tokens
                assert completion.tokens == plain, f"{way} wrote other tokens"
                rates[way] = 1.0 if completion.passes is None else len(completion.tokens) / completion.passes
            else:
                seconds[way].append(taken)
    for way, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["plain"], times, strict=True)]
        speed = arguments.tokens / statistics.median(times)
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name}, {way}: {rates[way]:.2f} tokens a pass, {speed:.1f} tokens/s, {spread}", flush=True)
        found[way] = rates[way], statistics.median(ratios)
    del found["plain"]
    return found


def draw(results: dict[str, dict[str, tuple[float, float]]], arguments) -> None:
    """Draws bars of both numbers for each text and way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = "tokens of a pass", "times as fast as plain decoding"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    ways = list(next(iter(results.values())))
    for number, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for i, way in enumerate(ways):
            places = [j + 0.8 * (i - (len(ways) - 1) / 2) / len(ways) for j in range(len(results))]
            bars = axis.bar(places, [found[way][number] for found in results.values()], 0.8 / len(ways), label=way)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.axhline(1, color="0.5", linewidth=0.8)
        axis.set_xticks(range(len(results)), list(results))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
