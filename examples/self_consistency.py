"""Self-consistency (Wang et al. 2023, arXiv 2203.11171): sample several answers with their reasoning, and take a vote.

    python examples/self_consistency.py PATH "A box has 3 rows of 4 eggs. Two break. How many are whole?"

The prompt is read once for all samples. Answers that end with the same number are one vote each.
"""

import argparse
import collections
import re

import garrulax as gx


def last_number(text: str) -> str | None:
    """The last number of a text, without separators of thousands."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else None


def vote(texts: list[str]) -> list[tuple[str, int]]:
    """The answers in the order of their votes. Texts without a number do not vote."""
    return collections.Counter(answer for text in texts if (answer := last_number(text)) is not None).most_common()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, run, GGUF file or hub name")
    parser.add_argument("question")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()

    model = gx.load(args.model)
    text = f"{args.question} Think step by step, and end with the answer as a number."
    prompt = text
    if hasattr(model.tokenizer, "apply_chat_template"):
        prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    samples = gx.generate(
        model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        search=gx.best_of(args.samples, returned=args.samples),
    )
    for answer, votes in vote([sample.text for sample in samples]):
        print(f"{votes:3} of {len(samples)}: {answer}")


if __name__ == "__main__":
    main()
