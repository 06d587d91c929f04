"""`garrulax glitch`: the tokens that training never saw, as a list and as a picture."""

import argparse
import os

import numpy as np

from garrulax import hub
from garrulax.cli.models import find_model
from garrulax.models.glitch import MIN_DISTANCE, SIDES, GlitchTokens, glitch_tokens


def glitch(args: argparse.Namespace) -> None:
    """Prints the ranking, and draws it if asked to. Reads only the embeddings from the model folder."""
    model = hub.load(find_model(args.model), only=SIDES.values(), ignore=args.ignore)
    found = glitch_tokens(model, top=args.top, side=args.side)
    print(describe(args.model, found))
    if args.plot:
        plot(found, args.plot, args.model)
        print(f"drawn to {args.plot}")


def describe(name: str, found: GlitchTokens) -> str:
    """Returns the ranking as text, with the name of the model as its title."""
    lines = [f"{name}: {found.count:,} of {found.vocab:,} tokens look untrained"]
    for side, s in found.sides.items():
        limit = "no group of rows looks untrained" if s.threshold is None else f"scores up to {s.threshold:.3f}"
        lines.append(f"  {side} embeddings: {limit} (searched from {s.start})")
    lines += ["", f"{'rank':>5}  {'id':>7}  " + "".join(f"{side:>7}  " for side in found.sides) + "  token"]
    for token in found.tokens:
        scores = "".join(
            f"{score:>7.3f}{'*' if side in token.flagged else ' '} " for side, score in token.scores.items()
        )
        text = "" if token.text is None else repr(token.text)
        kind = "" if token.kind == "text" else f" ({token.kind})"
        lines.append(f"{token.rank:>5}  {token.id:>7}  {scores}  {text}{kind}")
    return "\n".join(
        [*lines, "", "* looks untrained; numbers are distances from the centre of the untrained rows, over the mean"]
    )


def plot(found: GlitchTokens, path: str | os.PathLike, title: str = "") -> None:
    """Draws a histogram of the scores of each side, with its flagged rows and threshold.

    Args:
        found: The result of `glitch_tokens`.
        path: Picture file; its ending decides the format.
        title: Put in front of the name of each side.

    Raises:
        ImportError: Matplotlib is not installed (extra `plots`).
    """
    from matplotlib.figure import Figure  # pyplot would need global state and a display

    figure = Figure(figsize=(8, 3.2 * len(found.sides)), dpi=150, layout="constrained")
    panels = figure.subplots(len(found.sides), squeeze=False)[:, 0]
    for axes, (name, side) in zip(panels, found.sides.items(), strict=True):
        scores = np.maximum(side.scores, MIN_DISTANCE)  # the axis is logarithmic
        bins = np.geomspace(scores.min() * 0.9, scores.max() * 1.1, 100)
        axes.hist(scores[~side.flagged], bins, color="#9db8d9", label="trained")
        axes.hist(scores[side.flagged], bins, color="#d1495b", label=f"look untrained: {side.flagged.sum():,}")
        if side.threshold is not None:
            axes.axvline(side.threshold, color="#666666", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{title} {name} embeddings".strip(), loc="left", fontsize=10)
        axes.set_xlabel("distance from the centre of the untrained rows, over the mean")
        axes.set_ylabel("tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
