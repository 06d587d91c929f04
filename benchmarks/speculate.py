"""Speculation against plain decoding: time and accepted drafts for three kinds of text, one prompt at a time.

    python benchmarks/speculate.py MODEL [--tokens 128] [--rounds 3] [--layers 10] [--temperature 0]

The ways of decoding take turns. A ratio above 1 means that speculation is faster; tokens a pass are those of it.
"""

import argparse
import statistics
import time

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
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    model = gx.load(arguments.model)
    model = gx.Model(model.config, gx.unstack(model.params), model.tokenizer)
    ways = {"plain": {}, "prompt lookup": {"speculate": gx.prompt_lookup()}}
    if arguments.layers is not None:
        ways[f"first {arguments.layers} layers"] = {"speculate": gx.draft(layers=arguments.layers)}

    def timed(text, options):
        start = time.perf_counter()
        completion = gx.generate(
            model, text, max_new_tokens=arguments.tokens, temperature=arguments.temperature, end_tokens=(), **options
        )
        return time.perf_counter() - start, completion

    for name, text in TEXTS.items():
        seconds, plain = {way: [] for way in ways}, []
        for turn in range(arguments.rounds + 1):
            for way, options in ways.items():
                taken, completion = timed(text, options)
                if turn == 0:  # compiles
                    plain = plain or completion.tokens
                    rate = 1.0 if completion.passes is None else len(completion.tokens) / completion.passes
                    other = "" if completion.tokens == plain else ", OTHER TOKENS"
                    print(f"{name}, {way}: {rate:.2f} tokens a pass{other}", flush=True)
                else:
                    seconds[way].append(taken)
        for way, times in seconds.items():
            ratios = [a / b for a, b in zip(seconds["plain"], times, strict=True)]
            print(
                f"{name}, {way}: {statistics.median(times):.2f} s, {arguments.tokens / statistics.median(times):.1f} "
                f"tokens/s, {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
