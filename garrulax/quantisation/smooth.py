"""SmoothQuant's migration (Xiao et al. 2022, arXiv 2211.10438): weights take over a share of large activations.

A few channels of the activations are far larger than the others, so that a scale for a whole row of them rounds the
others away. What a norm writes is divided by a factor for each channel, and the rows of the weights that read it are
multiplied by it. The model computes the same; its activations are easier to round, and its weights a little harder.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models import forward
from garrulax.quantisation.calibrating import Calibrating, calibrate

Factors = dict[tuple[int, str], np.ndarray]  # (layer, name of the norm) -> [inputs]
_READERS = {"attention": ("qkv", "query", "key", "value"), "mlp": ("gate", "up")}


def smooth_factors(largest: np.ndarray, weights: Sequence[np.ndarray], alpha: float = 0.5) -> np.ndarray:
    """The factors [inputs] of matrices that read the same activations.

    Args:
        largest: float32 [inputs], the greatest size of each activation in the calibration texts.
        weights: float32 [outputs, inputs] each.
        alpha: The share of the activations' size that moves into the weights, 0 to 1.
    """
    of_weights = np.maximum(np.max([np.abs(w).max(0) for w in weights], axis=0), np.float32(1e-5))
    return np.maximum(largest**alpha / of_weights ** (1 - alpha), 1e-5).astype(np.float32)


def smooth(params: Tree, config: ModelConfig, tokens: np.ndarray, alpha: float) -> tuple[Tree, dict[str, np.ndarray]]:
    """The parameters after the migration.

    Args:
        params: Unstacked.
        config: Of the model.
        tokens: int32 [rows, tokens], of the calibration texts.
        alpha: As in `smooth_factors`.

    Returns:
        The parameters; and by their paths the factors of weights for which no norm can be divided, because something
        else reads it too (the residual sum of a model with norms after its sums). Those weights are multiplied as well,
        and their inputs must be divided where they are multiplied.
    """
    largest = _largest_inputs(params, config, tokens)
    factors: Factors = {}
    for i, block in enumerate(params["blocks"]):
        for norm in dict(readers(block)):
            paths = [path for name, path in readers(block) if name == norm]
            matrices = [np.asarray(block[a][b], np.float32).reshape(len(block[a][b]), -1).T for a, b in paths]
            factors[i, norm] = smooth_factors(largest[_name(i, paths[0])], matrices, alpha)
    if _norms_can_be_divided(params, config, factors):
        return moved(params, factors, norms=True), {}
    kept = {
        _name(i, path): factors[i, norm]
        for i, block in enumerate(params["blocks"]) for norm, path in readers(block)
    }  # fmt: skip
    return moved(params, factors, norms=False), kept


def _largest_inputs(params: Tree, config: ModelConfig, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """By the path of each reader, the greatest size of each of its inputs."""
    largest: dict[str, np.ndarray] = {}
    leaves: dict[str, Calibrating] = {}

    def record(name: str, matrix: np.ndarray, x: np.ndarray) -> jax.Array:
        largest[name] = np.abs(x).max(0)
        return leaves[name].array

    blocks = []
    for i, block in enumerate(params["blocks"]):
        new = block
        for _, path in readers(block):
            leaf = leaves[_name(i, path)] = Calibrating(_name(i, path), block[path[0]][path[1]], 1, record)
            new = _with(new, path, leaf)
        blocks.append(new)
    calibrate({**params, "blocks": tuple(blocks)}, config, tokens, leaves)
    return largest


def _name(layer: int, path: tuple[str, str]) -> str:
    return f"blocks/{layer}/{'/'.join(path)}"


def readers(block: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The norms of one layer, and the paths of the matrices that read them."""
    for part, names in _READERS.items():
        norm = f"{part}_norm" if f"{part}_norm" in block else "attention_norm"  # which a parallel block may share
        for name in names:
            if name in block[part]:
                yield norm, (part, name)


def moved(params: Tree, factors: Factors, norms: bool) -> Tree:
    """Unstacked parameters whose readers are multiplied by the factors and, if `norms`, whose norms are divided."""

    def one(i: int, block: Any) -> Any:
        new = block
        for norm, (part, name) in readers(block):
            w = block[part][name]
            factor = jnp.asarray(factors[i, norm], w.dtype).reshape(-1, *(1,) * (w.ndim - 1))
            new = _with(new, (part, name), w * factor)
        for norm in dict(readers(block)) if norms else ():
            new = {**new, norm: jax.tree.map(lambda x, n=norm: x / jnp.asarray(factors[i, n], x.dtype), block[norm])}
        return new

    return {**params, "blocks": tuple(one(i, block) for i, block in enumerate(params["blocks"]))}


def _norms_can_be_divided(params: Tree, config: ModelConfig, factors: Factors) -> bool:
    """Whether the model computes the same if norms are divided.

    Tried with factors of two, which change no rounding: the logits are the same bit for bit, or the model is another.
    """
    twos = {place: np.full_like(factor, 2) for place, factor in factors.items()}
    tokens = jnp.arange(8, dtype=jnp.int32)[None] % config.vocab
    before, after = (forward(tree, tokens, config)[0] for tree in (params, moved(params, twos, norms=True)))
    return bool(jnp.array_equal(before, after))


def _with(block: Any, path: tuple[str, str], w: Any) -> Any:
    """The layer with another weight."""
    part, name = path
    return {**block, part: {**block[part], name: w}}
