"""Quick compilation, for programs that take far longer to compile than to run."""

import contextlib
import functools

import jax

from garrulax import models
from garrulax.train import loop

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


@contextlib.contextmanager
def shared_steps():
    """Runs with equal settings in the block have one jitted step and one evaluation, which are traced once."""
    make_step, make_evaluate, steps = loop.make_train_step, loop.make_evaluate, {}

    def step(config, settings, optimizer, objective):
        key = config, settings, objective  # the optimizer follows from the settings
        if key not in steps:
            steps[key] = make_step(config, settings, optimizer, objective)
        return steps[key]

    loop.make_train_step, loop.make_evaluate = step, functools.cache(make_evaluate)
    try:
        yield
    finally:
        loop.make_train_step, loop.make_evaluate = make_step, make_evaluate
