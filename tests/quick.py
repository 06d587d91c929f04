"""Quick compilation, for programs that take far longer to compile than to run."""

import contextlib

import jax

from garrulax import models

_NAME = "jax_disable_most_optimizations"


@contextlib.contextmanager
def compilation():
    """Compiles without most optimizations in the block."""
    before = jax.config.read(_NAME)
    jax.config.update(_NAME, True)
    try:
        yield
    finally:
        jax.config.update(_NAME, before)


def init(config, key, **options):
    """`models.init`: the optimised program takes ten seconds to compile, this one half a second."""
    with compilation():
        return models.init(config, key, **options)
