"""Looking through programs before they are compiled."""

import jax


def inside(eqn):
    """The programs in an equation: of a loop, a branch, a call."""
    for x in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        x = getattr(x, "jaxpr", x)
        if hasattr(x, "eqns"):
            yield x


def equations(jaxpr):
    """All equations, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inside(eqn):
            yield from equations(inner)
