"""NEFTune: noise on the embeddings while instructions are learned (Jain et al. 2023, arXiv 2310.05914)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from garrulax.core.config import ModelConfig
from garrulax.core.einsum import einsum, lookup
from garrulax.core.leaf import Leaf
from garrulax.core.spec import Tree
from garrulax.train.objectives import Batch, Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noisy(Leaf):
    """An embedding table whose rows get uniform noise when they are looked up; as an output head it has none.

    Attributes:
        table: [V, D], an array or a leaf.
        scale: Greatest size of the noise of each token, [B, T].
        key: PRNG key.
    """

    table: Any
    scale: jax.Array
    key: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the table."""
        return self.table.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the table."""
        return self.table.dtype

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The product with the table itself."""
        return einsum(spec, x, self.table)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows with noise."""
        rows = lookup(self.table, ids)
        noise = jax.random.uniform(self.key, rows.shape, rows.dtype, -1, 1)
        return rows + noise * self.scale.astype(rows.dtype)[..., None]

    def dense(self, dtype: Any = None) -> jax.Array:
        """The table."""
        return self.table.dense(dtype) if isinstance(self.table, Leaf) else self.table.astype(dtype or self.dtype)

    def astype(self, dtype: Any) -> "Noisy":
        """With the table in another dtype."""
        return dataclasses.replace(self, table=self.table.astype(dtype))

    def shardings(self, place: NamedSharding) -> "Noisy":
        """Not needed: it exists within a step only."""
        raise ValueError("a table with noise is not stored")


def neftune(objective: Objective, alpha: float) -> Objective:
    """An objective whose embeddings get noise where there is a key, as for dropout; evaluation has none.

    Each number of a token's embedding gets noise from -s to s with s = alpha / sqrt(L D). L is the number of tokens of
    the token's own text, so that noise depends neither on padding nor on other texts of the row.

    Args:
        objective: On batches with tokens [B, T], and segment where rows are packed.
        alpha: 5 to 15.

    Raises:
        ValueError: If alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be positive")

    def noisy(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if key is None:
            return objective(params, batch, config, None, **options)
        key, own = jax.random.split(key)
        scale = alpha * jax.lax.rsqrt(_lengths(batch) * config.width)
        return objective({**params, "tokens": Noisy(params["tokens"], scale, own)}, batch, config, key, **options)

    return noisy


def _lengths(batch: Batch) -> jax.Array:
    """Number of tokens of each token's text, float32 [B, T]."""
    if "segment" not in batch:
        return jnp.full(batch["tokens"].shape, float(batch["tokens"].shape[1]), jnp.float32)
    same = batch["segment"][:, :, None] == batch["segment"][:, None, :]
    return jnp.sum(same.astype(jnp.float32), axis=2)
