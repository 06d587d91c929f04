"""Learning from a teacher while training: distillation on given text, on the student's own, and not forgetting.

Sources: Hinton et al. 2015; Agarwal et al. 2024 (on-policy, GKD); Li & Hoiem 2016 (learning without forgetting).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from garrulax import models
from garrulax.align.distillation import distillation
from garrulax.align.rollouts import Prompts, roll_out, seeds
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import is_explicit
from garrulax.core.spec import Tree
from garrulax.models.unpack import TokenizerLike
from garrulax.train.objectives import Batch, Objective, mask_of, negative_log_likelihood
from garrulax.train.rows import HostBatch
from garrulax.train.sampler import permute
from garrulax.train.state import TrainState


def distillation_objective(
    teacher: Tree,
    teacher_config: ModelConfig | None = None,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    weight: float = 1.0,
    nll_weight: float = 0.0,
) -> Objective:
    """The objective of `distillation`: weight * temperature^2 * divergence + nll_weight * nll, of the targets.

    With nll_weight=1 and the parameters from before as the teacher it is learning without forgetting: the new text is
    learned, and the predictions of the old model on it are kept. The teacher's arrays are constants of the compiled
    step, which takes time to compile and memory if the teacher is large. On a mesh they are whole on every device,
    unless they were placed on it (`core.sharding.place`).

    Args:
        teacher: Its parameters; they get no gradient.
        teacher_config: Of the teacher; None is that of the student. Both have one tokenizer.
        beta: As for `distillation`.
        temperature: Both logits are divided by it; its square keeps gradients of one size (Hinton).
        weight: Of the divergence.
        nll_weight: Of the mean negative log-likelihood of the targets.

    Returns:
        An objective; its metrics are divergence (without weight and temperature^2) and nll.
    """

    def objective(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs: dict[str, Any] = {"positions": batch.get("positions"), "mask": mask_of(batch)}
        student, _ = models.forward(params, batch["tokens"], config, key=key, **inputs, **options)
        frozen = jax.lax.stop_gradient(_on_mesh(teacher))
        other, _ = models.forward(frozen, batch["tokens"], teacher_config or config, **inputs)
        tokens = distillation(student, other, beta=beta, temperature=temperature)
        nll = negative_log_likelihood(student, batch["targets"])
        weights = batch["weights"].astype(nll.dtype)
        count = jnp.sum(weights)
        divergence, nll = (jnp.sum(x * weights) / jnp.maximum(count, 1) for x in (tokens, nll))
        loss = weight * temperature**2 * divergence + nll_weight * nll
        return loss, {"tokens": count, "divergence": divergence, "nll": nll}

    return objective


def _on_mesh(params: Tree) -> Tree:
    """Within an explicit mesh: arrays that have no place on it, whole on every device."""
    if not is_explicit(jax.sharding.get_abstract_mesh()):
        return params
    return jax.tree.map(lambda x: jax.sharding.reshard(x, P()) if jax.typeof(x).sharding.mesh.empty else x, params)


class StudentRollouts:
    """Samples responses of the student for each step of a run (`train.run.Rollouts`), for on-policy distillation.

    With `distillation_objective(beta=1)` a run minimises the reverse KL on the student's own text. No gradient goes
    through the sampling.

    Args:
        prompts: To write after.
        config: Of the student.
        batch: Responses of a step.
        seed: Of the run.
        limit: Greatest number of tokens of a response, the same as for `prompts`.
        tokenizer: Of the model.
        end_tokens: Ids that end a response; None takes those of the model.
    """

    updates = 1

    def __init__(
        self,
        prompts: Prompts,
        config: ModelConfig,
        batch: int,
        seed: int,
        *,
        limit: int,
        tokenizer: TokenizerLike | None = None,
        end_tokens: Sequence[int] | None = None,
    ):
        self.prompts, self.config, self.batch, self.seed, self.limit = prompts, config, batch, seed, limit
        self.tokenizer, self.end_tokens = tokenizer, end_tokens

    def __call__(self, state: TrainState, step: int, params: Tree) -> tuple[TrainState, HostBatch, Mapping[str, float]]:
        """See `train.run.Rollouts`."""
        epoch, index = np.divmod(step * self.batch + np.arange(self.batch), len(self.prompts))
        roll = roll_out(
            models.unstack(params), self.config, self.prompts,
            permute(index, len(self.prompts), self.seed, epoch).tolist(),
            seeds=seeds(self.seed, step, self.batch), limit=self.limit, tokenizer=self.tokenizer,
            end_tokens=self.end_tokens,
        )  # fmt: skip
        length = float(np.mean([len(sample.response) for sample in roll.samples]))
        return state, roll.batch, {"length": length}
