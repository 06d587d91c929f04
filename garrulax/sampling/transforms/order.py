"""The standard order of transforms."""

import functools
from collections.abc import Callable, Iterable

from garrulax.sampling.transforms.base import Transform, chain
from garrulax.sampling.transforms.filters import temperature, top_k, top_p

#: Knob -> its transform, in the order in which transformers applies them.
STANDARD: dict[str, Callable[[], Transform]] = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
}
ALWAYS = ("temperature", "top_k", "top_p")


def standard_chain(names: Iterable[str] = ()) -> Transform:
    """Returns the chain of the transforms that read the given knobs, in the order of transformers.

    Args:
        names: Names of knobs. Temperature, top_k and top_p are always part of the chain.

    Returns:
        The chain; for equal sets of names the same object.

    Raises:
        ValueError: A name that no transform of this package reads.

    Example:
        >>> from garrulax.sampling import transforms
        >>> transforms.standard_chain(["top_k"]) is transforms.DEFAULT
        True
    """
    return _standard_chain(frozenset(names) | frozenset(ALWAYS))


@functools.cache
def _standard_chain(names: frozenset[str]) -> Transform:
    if unknown := sorted(names - STANDARD.keys()):
        raise ValueError(f"no transform reads the knob {unknown[0]}")
    return chain(*(transform() for name, transform in STANDARD.items() if name in names))


#: Temperature, then top-k, then top-p: the order of transformers and vLLM.
DEFAULT = standard_chain()
