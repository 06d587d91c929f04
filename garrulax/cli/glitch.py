"""`garrulax glitch`: lists the tokens that look untrained."""

import argparse

from garrulax import hub
from garrulax.cli.models import find_model
from garrulax.models.glitch import SIDES, GlitchTokens, glitch_tokens, plot


def glitch(args: argparse.Namespace) -> None:
    """Prints the ranking, and draws it if `--plot` is given. Only the embeddings are read from the model folder."""
    model = hub.load(find_model(args.model), only=SIDES.values())
    found = glitch_tokens(model, top=args.top, side=args.side)
    print(describe(args.model, found))
    if args.plot:
        plot(found, args.plot, args.model)
        print(f"drawn to {args.plot}")


def describe(name: str, found: GlitchTokens) -> str:
    """The ranking as text, under the name of the model."""
    lines = [f"{name}: {found.count:,} of {found.vocab:,} tokens look untrained"]
    for side, s in found.sides.items():
        limit = "no group of rows looks untrained" if s.threshold is None else f"scores up to {s.threshold:.3f}"
        lines.append(f"  {side} embeddings: {limit} (searched from {s.start})")
    lines += ["", f"{'rank':>5}  {'id':>7}  " + "".join(f"{side:>7}  " for side in found.sides) + "  token"]
    for token in found.tokens:
        scores = "".join(
            f"{score:>7.3f}{'*' if side in token.flagged else ' '} " for side, score in token.scores.items()
        )
        shown = "" if token.text is None else repr(token.text)
        kind = "" if token.kind == "text" else f" ({token.kind})"
        lines.append(f"{token.rank:>5}  {token.id:>7}  {scores}  {shown}{kind}")
    return "\n".join(
        [*lines, "", "* looks untrained. A score is the distance from untrained rows, divided by the mean distance."]
    )
