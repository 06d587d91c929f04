"""Log-probabilities of the targets of rows: batches of similar length, and the output head in chunks of tokens.

Letters: B rows, T tokens of a row, N = B·T, R rows of positions, D model width, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import auto_mesh, half
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import at_least_float32
from garrulax.core.spec import Tree
from garrulax.evaluate.rows import Row
from garrulax.kernels import masks
from garrulax.models.unpack import ModelLike, TokenizerLike, unpack_model

BATCH_TOKENS = 4096  # of a batch, padding included, unless a single row has more
CHUNK_LOGITS = 1 << 24  # logits that exist at a time: 64 MB in float32
LEAST_WIDTH = 16


class Found(NamedTuple):
    """The results for the scored targets of one row, in the order of the text.

    Attributes:
        logprobs: Natural logarithms [n], float32, or float64 of a model in float64.
        is_argmax: bool [n], whether the target is the most probable token.
    """

    logprobs: np.ndarray
    is_argmax: np.ndarray


def prepare(model: ModelLike) -> tuple[Tree, ModelConfig, TokenizerLike | None]:
    """The parameters, the configuration and the tokenizer (or None) of a model.

    Stacked parameters stay so: compile time then does not grow with depth. Only bfloat16 on a CPU is unstacked and
    becomes its bits (`core.half`), or every program would hold a float32 copy.

    Raises:
        TypeError: `model` is neither the result of `garrulax.load` nor (params, config).
        ValueError: The parameters are on several devices, and not on one mesh without the axis `pipeline`.
    """
    params, config, tokenizer = unpack_model(model)
    mesh = auto_mesh.mesh_of(params)
    with auto_mesh.using(mesh):
        params = auto_mesh.in_auto_mode(jax.tree.map(jnp.asarray, params), mesh)
    leaves = jax.tree.leaves(params)
    if mesh is None and any(x.dtype == jnp.bfloat16 for x in leaves) and jax.default_backend() == "cpu":
        params = half.as_bits(models.unstack(params), stacked=False)
    return params, config, tokenizer


def score_rows(rows: Sequence[Row], params: Tree, config: ModelConfig, batch_tokens: int = BATCH_TOKENS) -> list[Found]:
    """The log-probabilities of the scored targets of rows.

    Rows of similar length are computed together; the result depends on the batch only by rounding. The number of
    programs grows with the logarithm of the lengths, and the memory with `batch_tokens` and the longest row.

    Args:
        rows: In any order.
        params: From `prepare`.
        config: The family's Config.
        batch_tokens: Greatest number of tokens of a batch, padding included.

    Raises:
        ValueError: `batch_tokens` is below 1.
        FloatingPointError: A log-probability is not a number.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens} must be at least 1")
    found: list[Found] = [Found(np.zeros(0, np.float32), np.zeros(0, bool))] * len(rows)
    mesh = auto_mesh.mesh_of(params)
    for batch, width in _batches(rows, batch_tokens):
        arrays = _assemble([rows[i] for i in batch], width, models.blanks(config) is not None)
        with auto_mesh.using(mesh):
            found_here = _pass(params, *arrays, config, _chunk(config.vocab, arrays[3].size))
        logprobs, is_argmax = jax.device_get(found_here)
        start = 0
        for i in batch:
            end = start + int((rows[i].choice > 0).sum())
            found[i] = Found(logprobs[start:end], is_argmax[start:end])
            start = end
        if np.isnan(logprobs[:start]).any():
            raise FloatingPointError("the logits are not finite: the parameters or the precision of the model are bad")
    return found


def _bucket(size: int, least: int = 1) -> int:
    """A size rounded up to a power of two."""
    return max(least, 1 << (size - 1).bit_length())


def _chunk(vocab: int, size: int) -> int:
    """The number of tokens, a power of two, whose logits are computed at a time."""
    return min(size, max(LEAST_WIDTH, 1 << ((CHUNK_LOGITS // vocab).bit_length() - 1)))


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[tuple[list[int], int]]:
    """Indices of the rows of each batch, and T: long rows first, since memory runs out there if it does."""
    widths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.choice.any():
            widths.setdefault(_bucket(len(row.tokens), LEAST_WIDTH), []).append(i)
    for width in sorted(widths, reverse=True):
        size = max(1, batch_tokens // width)
        size = 1 << (size.bit_length() - 1)
        for start in range(0, len(widths[width]), size):
            yield widths[width][start : start + size], width


def _assemble(rows: Sequence[Row], width: int, fills_blanks: bool) -> tuple:
    """The arguments of `_pass` up to `count`; rows and lengths are padded to powers of two.

    Padding is behind the tokens, where a causal model does not see it. It has the positions of real tokens, so that no
    table of positions is exceeded.
    """
    count, axes = _bucket(len(rows)), rows[0].positions.shape[:-1]
    tokens, targets = np.zeros((count, width), np.int32), np.zeros((count, width), np.int32)
    choice = np.full((count, width), masks.PAD, np.int32)
    positions = np.zeros((count, *axes, width), np.int32)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        tokens[i, :size], targets[i, :size], choice[i, :size] = row.tokens, row.targets, row.choice
        positions[i, :, :size], positions[i, :, size:] = row.positions, row.positions[:, -1:]
    scored = np.flatnonzero(choice > 0).astype(np.int32)
    index = np.zeros(tokens.size, np.int32)
    index[: len(scored)] = scored
    if axes == (1,):
        positions = positions[:, 0]
    return (
        tokens, positions, choice if fills_blanks else None, index, targets.reshape(-1)[index], np.int32(len(scored))
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def _pass(
    params: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    choice: jax.Array | None,
    index: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    config: ModelConfig,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [N] of targets, and whether each is the argmax.

    Args:
        params: From `prepare`.
        tokens: int32 [B, T].
        positions: int32 [B, T] or [B, 2, T].
        choice: int32 [B, T], see `Row`; None for causal models.
        index: int32 [N], places in the flat tokens; the first `count` count.
        targets: int32 [N], at these places.
        count: int32 scalar.
        config: The family's Config.
        chunk: Number of places whose logits are computed at a time; divides N.
    """
    params = half.from_bits(params)
    mask = None if choice is None else masks.choices(choice)
    tokens = auto_mesh.split(tokens, rows=0)  # on a mesh, rows are shared
    states, _ = models.hidden(params, tokens, config, positions=positions, mask=mask)
    states = states.reshape(-1, states.shape[-1])
    dtype = at_least_float32(states.dtype)

    def next_chunk(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        places, wanted = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (index, targets))
        logits = models.family(config).logits(params, states[places][None], config)[0].astype(dtype)  # [chunk, V]
        logits = logits - logits.max(axis=-1, keepdims=True)  # so that the difference below is exact for likely tokens
        picked = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        logprobs = picked - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
        new = (logprobs, jax.lax.argmax(logits, 1, jnp.int32) == wanted)
        return tuple(  # type: ignore[return-value]
            jax.lax.dynamic_update_slice_in_dim(old, x, i * chunk, axis=0) for old, x in zip(found, new, strict=True)
        )

    empty = (jnp.zeros(index.shape, dtype), jnp.zeros(index.shape, bool))
    found = jax.lax.fori_loop(jnp.int32(0), (count + chunk - 1) // chunk, next_chunk, empty)
    return jax.tree.map(auto_mesh.split, found)  # whole on every device
