"""The losses of Medusa heads (`models.medusa`), and how often they guess right.

Letters: B rows, T tokens, V vocabulary, N tokens that heads choose from, k heads.
Source: Cai et al. 2024, arXiv 2401.10774, section 2.2.

Medusa-1 trains the heads of a frozen model: its batches have `hidden`, float32 [B, T, D], the model's hidden states
after the last norm, and the parameters are those of the heads. Medusa-2 trains both: the parameters are those of the
model and, under "medusa", those of the heads:

    c = medusa.Config(config.width, config.vocab, heads=4)
    specs = {**models.parameters(config), "medusa": medusa.parameters(c)}
    optimizer = make_optimizer(settings, specs)
    state = init_state(config, optimizer, seed, params={**params, "medusa": heads.params}, specs=specs)
    step = make_train_step(config, settings, optimizer, joint_objective(c))
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import at_least_float32
from garrulax.core.spec import Tree
from garrulax.models import medusa
from garrulax.train.objectives import Batch, Objective, mask_of, negative_log_likelihood

DECAY = 0.8  # weight of a head's loss divided by that of the head before (section 2.2.1)
JOINT_WEIGHT = 0.2  # of the heads' loss in that of Medusa-2


def heads_objective(c: medusa.Config, tokens: Any = None, decay: float = DECAY) -> Objective:
    """The objective of Medusa-1: the parameters are those of the heads, and the batch has `hidden`.

    The loss is the sum over heads of decay^(i + 1) times the mean cross entropy of head i, which at token t predicts
    token t + i + 2. There is no label beyond the row or in another document (stream `segment`), and none that the heads
    cannot choose.

    Args:
        c: Of the heads.
        tokens: Ids that they choose from, as in `MedusaHeads`.
        decay: Of the weights.
    """
    medusa.check_tokens(tokens, c)
    place = places(tokens, c)

    def loss(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return heads_loss(params, batch["hidden"], batch, c, place, decay)

    return loss


def joint_objective(
    c: medusa.Config, tokens: Any = None, decay: float = DECAY, weight: float = JOINT_WEIGHT
) -> Objective:
    """The objective of Medusa-2: the language model's loss + weight * the heads' loss (section 2.2.2).

    Its metrics are tokens, lm_loss and medusa_loss.

    Args:
        c: Of the heads.
        tokens: Ids that they choose from, as in `MedusaHeads`.
        decay: See `heads_objective`.
        weight: Of the heads' loss (lambda_0 in the paper).
    """
    medusa.check_tokens(tokens, c)
    place = places(tokens, c)

    def loss(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = {name: part for name, part in params.items() if name != "medusa"}
        positions, mask = batch.get("positions"), mask_of(batch)
        x, _ = models.hidden(model, batch["tokens"], config, positions=positions, mask=mask, key=key, **options)
        nll = negative_log_likelihood(models.family(config).logits(model, x, config), batch["targets"])
        lm, count = _mean(nll, batch["weights"])
        heads, _ = heads_loss(params["medusa"], x, batch, c, place, decay)
        return lm + weight * heads, {"tokens": count, "lm_loss": lm, "medusa_loss": heads}

    return loss


def places(tokens: Any, c: medusa.Config) -> np.ndarray | None:
    """Index of each token among the tokens that heads choose from: int32 [V], -1 for the others.

    None if heads choose from all tokens.
    """
    if tokens is None:
        return None
    table = np.full(c.vocab, -1, np.int32)
    table[np.asarray(tokens)] = np.arange(len(tokens), dtype=np.int32)
    return table


def heads_loss(
    params: Tree, x: jax.Array, batch: Batch, c: medusa.Config, place: np.ndarray | None = None, decay: float = DECAY
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the heads' losses (nats), and the number of labels of the first head.

    Args:
        params: Of the heads.
        x: Hidden states [B, T, D].
        batch: Targets and weights, and segment if rows are packed.
        c: Of the heads.
        place: From `places`.
        decay: See `heads_objective`.
    """
    total = jnp.zeros((), at_least_float32(x.dtype))
    counts: list[jax.Array] = []
    for i, (found, (targets, weights)) in enumerate(zip(medusa.logits(params, x, c), labels(batch, c), strict=True)):
        if place is not None:
            targets = jnp.asarray(place)[targets]
            weights = weights * (targets >= 0).astype(weights.dtype)
        mean, count = _mean(negative_log_likelihood(found, targets), weights)
        total = total + jnp.asarray(decay ** (i + 1), mean.dtype) * mean
        counts.append(count)
    return total, {"tokens": counts[0]}


def labels(batch: Batch, c: medusa.Config) -> list[tuple[jax.Array, jax.Array]]:
    """The labels of each head: targets int32 [B, T] and weights float32 [B, T], 0 where there is nothing."""
    found = []
    for i in range(c.heads):
        weights = _later(batch["weights"], i + 1)
        if "segment" in batch:  # padding after the row's end is a document of its own
            segment = batch["segment"]
            weights = weights * (_later(segment + 1, i + 1) == segment + 1).astype(weights.dtype)
        found.append((_later(batch["targets"], i + 1), weights))
    return found


def correct(
    params: Tree, x: jax.Array, batch: Batch, c: medusa.Config, tokens: jax.Array | None, ranks: int
) -> tuple[jax.Array, jax.Array]:
    """The accuracy of each guess of each head.

    Args:
        params: Of the heads.
        x: Hidden states [B, T, D].
        batch: As for `heads_loss`.
        c: Of the heads.
        tokens: Ids that they choose from, as in `MedusaHeads`.
        ranks: Number of guesses of a head.

    Returns:
        Sum of the weights of the tokens that the guess of each rank predicts right [k, ranks], and of all tokens [k].
    """
    right, counts = [], []
    for found, (targets, weights) in zip(medusa.logits(params, x, c), labels(batch, c), strict=True):
        guesses = jax.lax.top_k(found, ranks)[1]  # [B, T, ranks]
        guesses = guesses if tokens is None else tokens[guesses]
        hits = (guesses == targets[..., None]).astype(weights.dtype) * weights[..., None]
        right.append(jnp.sum(hits, axis=(0, 1)))
        counts.append(jnp.sum(weights))
    return jnp.stack(right), jnp.stack(counts)


def _later(x: jax.Array, by: int) -> jax.Array:
    """x [B, T], of the token `by` places later; 0 behind the end."""
    return jnp.pad(x, ((0, 0), (0, by)))[:, by:]


def _mean(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = weights.astype(x.dtype)
    count = jnp.sum(weights)
    return jnp.sum(x * weights) / jnp.maximum(count, 1), count
