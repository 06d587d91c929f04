"""The letters of products, such as "BTD,DHC->BTHC"."""

from typing import NamedTuple


def letters(spec: str) -> tuple[str, str, str]:
    """The letters of x, of the weight and of the result."""
    terms, out = spec.replace(" ", "").split("->")
    left, right = terms.split(",")
    return left, right, out


class Sides(NamedTuple):
    """A product of activations [M, n] and a weight [n, N] or [N, n].

    Attributes:
        rows: Letters of the activations that are not contracted, M.
        contracted: Letters of n.
        columns: Letters of the weight that are not contracted, N.
        first: Whether the contracted letters come first in the weight.
    """

    rows: str
    contracted: str
    columns: str
    first: bool


def sides(left: str, right: str, out: str) -> Sides | None:
    """The letters of a product of two matrices; None for another product."""
    contracted = "".join(c for c in left if c in right)
    rows, columns, first = left.removesuffix(contracted), right.replace(contracted, ""), right.startswith(contracted)
    plain = out == rows + columns and left == rows + contracted and (first or right.endswith(contracted))
    return Sides(rows, contracted, columns, first) if plain else None
