"""JAX's settings that break programs: jax_enable_x64, strict dtype promotion, and no rank promotion, all at once.

Errors of all three appear while a program is traced, so nothing is compiled for most families.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxprs import equations

import garrulax as gx
from garrulax import models, sampling
from garrulax.kernels import attention, masks
from garrulax.sampling import knobs, requests, state
from garrulax.sampling.loop import decode_step
from garrulax.sampling.transforms import DEFAULT
from garrulax.train.objectives import causal_lm
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import init_state
from garrulax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
KNOBS = {"max_new_tokens": 3, "temperature": [0.0, 1.0], "top_k": 5, "top_p": 0.9, "seed": 0}


@contextlib.contextmanager
def everything():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def wide(jaxpr):
    """Names of the operations whose results are float64 arrays: there are none in a float32 or bfloat16 model."""
    return [
        e.primitive.name
        for e in equations(jaxpr)
        if any(getattr(x.aval, "dtype", None) == np.float64 and x.aval.shape for x in e.outvars)
    ]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(f, dtype, marks=[pytest.mark.slow] * (dtype == "bfloat16" and f not in ("gpt", "glm130b")))
        for f in tiny.CONFIGS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_every_family_is_traced_under_all_three_settings(family, dtype):
    config = tiny.CONFIGS[family]
    with everything():
        params = jax.eval_shape(lambda: models.init(config, jax.random.key(0), dtype=dtype))
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
        tokens = jnp.array([[1, 2, 3]])
        assert tokens.dtype == np.int64

        def loss(params):
            logits, _ = gx.forward(params, tokens, config, key=jax.random.key(1))
            assert logits.dtype == dtype
            return logits.astype(jnp.float32).sum()

        assert not wide(jax.make_jaxpr(jax.grad(loss))(params))
        values = knobs.knobs_per_prompt(2, **KNOBS)
        batch = requests.assemble(
            [requests.causal_prompt(ids, 4, config, "") for ids in ([1, 2, 3], [4])], values, config
        )

        def decode(params):
            first = state.grow(state.prefill(params, batch, config, DEFAULT, 32), 32)
            return first, decode_step(params, first, config)

        program, (first, second) = jax.make_jaxpr(decode, return_shape=True)(params)
        assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(lambda x: x.dtype, second)
        assert not wide(program)


def test_texts_are_those_without_the_settings():
    config = tiny.CONFIGS["glm"]
    blanks = [[5, config.mask, 6, config.mask, 7], [config.mask, 3]]
    prompts = [[1, 2, 3], [4]]
    params = gx.unstack(tiny.params(config))

    def texts():
        model = (params, config)
        return [c.tokens for c in gx.generate(model, prompts, **KNOBS)] + [
            f.tokens for f in gx.fill(model, blanks, **KNOBS)
        ]

    plain = texts()
    with everything():
        assert texts() == plain


def test_another_default_device_and_no_jit():
    """Programs are compiled in other threads, where the settings of a context do not hold."""
    config = tiny.CONFIGS["gpt"]
    stacked, device = tiny.params(config), jax.devices()[1]
    greedy = {"max_new_tokens": 2, "temperature": 0}
    wanted = gx.generate((stacked, config), [1, 2], **greedy).tokens
    with jax.default_device(device):
        assert gx.generate((jax.device_put(stacked, device), config), [1, 2], **greedy).tokens == wanted
    with jax.disable_jit():
        sampling.compile_ahead((stacked, config), [1, 2])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step(optimizer):
    config = models.gpt.Config(vocab=48, context=8, width=16, layers=1, heads=2)
    batch = {"tokens": np.ones((1, 2, 8), np.int32), "targets": np.ones((1, 2, 8), np.int32)}
    batch["weights"] = np.ones((1, 2, 8), np.float32)
    with everything():
        settings = Settings(optimizer=optimizer, steps=10, precision="bfloat16")
        step = make_train_step(config, settings, make_optimizer(settings, models.parameters(config)), causal_lm)
        first = init_state(config, make_optimizer(settings, models.parameters(config)), 0)
        second, _ = jax.eval_shape(step, first, batch)
        assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(lambda x: x.dtype, second)


def test_attention_takes_int64_streams():
    with everything():
        x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
        segment = jnp.array([[0, 0, 1, -1]])
        assert segment.dtype == np.int64
        for mask in (masks.packed(segment), gx.Mask({"rank": segment, "segment": segment})):
            assert attention(x, x, x, mask=mask).dtype == jnp.bfloat16
