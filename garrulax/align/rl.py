"""Reinforcement learning for `train.loop`: rollouts, scores and advantages become the batches of a policy objective.

A step of the loop is one update. A rollout of `batch * minibatches` responses is used for `epochs * minibatches` steps.
It is a function of the parameters, the step and the seed, so that a resumed run goes on bit for bit; checkpoints come
between rollouts. On a mesh the devices that train also write and score: rows are split over `data` and `fsdp`.

Convention (the papers' programs differ): PPO pays the score at the end token, and the KL (k1) at each token; RLOO takes
the KL of the whole response off its score; the methods of the GRPO family have it in the loss, if at all. Advantages of
PPO are whitened over the rollout.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from garrulax import models
from garrulax.align.groups import group_advantages, leave_one_out_advantages, mixed_groups
from garrulax.align.logprobs import token_logprobs
from garrulax.align.policy import KLController, gae, kl_estimate, score_without_end, token_rewards, whiten
from garrulax.align.policy_objectives import COEFFICIENT, METHODS, policy_and_values, policy_model
from garrulax.align.rollouts import Prompts, Rollout, Sampled, roll_out, seeds
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.core.strategies import Strategy
from garrulax.models.unpack import TokenizerLike
from garrulax.train.batches import on_devices
from garrulax.train.evaluate import Evaluation
from garrulax.train.rows import HostBatch
from garrulax.train.sampler import permute
from garrulax.train.state import TrainState

#: Scores of samples. NaN leaves a response out; infinity is an error.
Reward = Callable[[Sequence[Sampled]], Sequence[float]]
_HELD_OUT = 2**40  # in place of the step, for the seeds of held-out responses


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """The settings of a method.

    Attributes:
        method: One of `policy_objectives.METHODS`.
        group: Responses to a prompt.
        limit: Greatest number of tokens of a response.
        epochs: Times that a rollout is used.
        minibatches: Parts of a rollout, one an update.
        beta: Coefficient of the KL to the reference.
        target_kl: KL of a response, nats, to which the coefficient adapts; None leaves it fixed.
        horizon: Responses within which it follows.
        clip: Of the ratio.
        clip_high: Of the ratio, upwards; None is `clip`.
        gamma: Discount (PPO).
        lam: Of the advantages (PPO).
        clip_value: Greatest change of a value (PPO).
        value_weight: Of the loss of the values (PPO).
        whiten_rewards: Whether the rewards of PPO are whitened, their mean kept.
        missing_end: Taken off the score of a response that the limit cut; None leaves it.
    """

    method: str = "dr_grpo"
    group: int = 8
    limit: int = 128
    epochs: int = 1
    minibatches: int = 1
    beta: float = 0.0
    target_kl: float | None = None
    horizon: int = 10_000
    clip: float = 0.2
    clip_high: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    clip_value: float = 0.2
    value_weight: float = 0.1
    whiten_rewards: bool = False
    missing_end: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: choose from {', '.join(METHODS)}")
        for name in ("group", "limit", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.method != "ppo" and self.group < 2:
            raise ValueError(f"method={self.method} compares responses to one prompt: group must be at least 2")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative")

    @property
    def in_reward(self) -> bool:
        """Whether the KL is a part of the reward; in the other methods it is one of the loss."""
        return self.method in ("ppo", "rloo")


class PolicyRollouts:
    """The rollouts of a run, as `train.run.Rollouts`.

    Args:
        prompts: All prompts to train on.
        reward: Scores the responses.
        config: Of the model.
        settings: Of the method.
        batch: Responses of an update.
        seed: Of the run.
        reference: Parameters of the reference; None needs `settings.beta` 0.
        tokenizer: Of the model.
        end_tokens: Ids that end a response; None takes those of the model.
        text: Batches of pre-training text by step, for PPO-ptx (`objectives.mixed`); None is without.
        mesh: Of the parameters, those of the reference too; it must be set where this is called, as in
            `train.loop.train`. None is one device.
        strategy: How the mesh shards tokens.
        say: Called with lines for the user.

    Raises:
        ValueError: If groups do not fill a rollout, or the reference lacks.
    """

    def __init__(
        self,
        prompts: Prompts,
        reward: Reward,
        config: ModelConfig,
        settings: PolicySettings,
        batch: int,
        seed: int,
        *,
        reference: Tree | None = None,
        tokenizer: TokenizerLike | None = None,
        end_tokens: Sequence[int] | None = None,
        text: Callable[[int], HostBatch] | None = None,
        mesh: Mesh | None = None,
        strategy: str | Strategy = "fsdp+tp",
        say: Callable[[str], None] = lambda line: None,
    ):
        self.prompts, self.reward, self.config, self.settings = prompts, reward, config, settings
        self.batch, self.seed, self.reference, self.text, self.say = batch, seed, reference, text, say
        self.tokenizer, self.end_tokens, self.mesh, self.strategy = tokenizer, end_tokens, mesh, strategy
        self.rows = batch * settings.minibatches
        self.updates = settings.epochs * settings.minibatches
        if self.rows % settings.group:
            raise ValueError(
                f"batch={batch} x minibatches={settings.minibatches} is no multiple of group={settings.group}"
            )
        if reference is None and (settings.beta or settings.target_kl is not None):
            raise ValueError(f"beta={settings.beta} needs the parameters of a reference")
        self._made: tuple[int, HostBatch] | None = None
        self._logprobs = jax.jit(functools.partial(token_logprobs, config=config))
        self._advantages = jax.jit(functools.partial(_advantages, settings=settings))
        self._values = jax.jit(lambda params, batch: policy_and_values(params, batch, config)[1:])

    def __call__(self, state: TrainState, step: int, params: Tree) -> tuple[TrainState, HostBatch, Mapping[str, float]]:
        """See `train.run.Rollouts`."""
        number, update = divmod(step, self.updates)
        metrics: Mapping[str, float] = {}
        if update == 0:
            state, batch, metrics = self._new(state, number, params)
            self._made = number, batch
        if self._made is None or self._made[0] != number:
            raise ValueError(f"step {step} lies within a rollout: begin at a multiple of {self.updates}")
        epoch, part = divmod(update, self.settings.minibatches)
        order = permute(np.arange(self.rows), self.rows, self.seed + 1, number * self.settings.epochs + epoch)
        rows = order[part * self.batch : (part + 1) * self.batch]
        batch = {name: x[rows] for name, x in self._made[1].items()}
        if self.text is None:
            return state, batch, metrics
        return state, _both(batch, self.text(step)), metrics

    def chosen(self, number: int) -> list[int]:
        """The prompts of rollout `number`: each `group` times, in another order in every pass over all prompts."""
        count, all_prompts = self.rows // self.settings.group, len(self.prompts)
        epoch, index = np.divmod(number * count + np.arange(count), all_prompts)
        return np.repeat(permute(index, all_prompts, self.seed, epoch), self.settings.group).tolist()

    def sample(self, params: Tree, chosen: Sequence[int], step: int, prompts: Prompts | None = None) -> Rollout:
        """Responses to some prompts, with the seeds of a step."""
        return roll_out(
            models.unstack(policy_model(params)),
            self.config,
            prompts or self.prompts,
            chosen,
            seeds=seeds(self.seed, step, len(chosen)),
            limit=self.settings.limit,
            tokenizer=self.tokenizer,
            end_tokens=self.end_tokens,
        )

    def scores(self, samples: Sequence[Sampled]) -> np.ndarray:
        """The rewards, float32 [B]. Raises ValueError if one is infinite or all are NaN."""
        found = np.asarray(self.reward(samples), np.float32)
        if found.shape != (len(samples),):
            raise ValueError(f"the reward function gave {found.shape} numbers for {len(samples)} responses")
        if np.isinf(found).any():
            raise ValueError(f"the reward of response {int(np.flatnonzero(np.isinf(found))[0])} is infinite")
        if np.isnan(found).all():
            raise ValueError("all rewards are NaN: there is nothing to train on")
        return found

    def _new(self, state: TrainState, number: int, params: Tree) -> tuple[TrainState, HostBatch, dict[str, float]]:
        s = self.settings
        roll = self.sample(params, self.chosen(number), number)
        scores = self.scores(roll.samples)
        ended = np.array([sample.ended for sample in roll.samples])
        given = np.asarray(score_without_end(jnp.asarray(scores), jnp.asarray(ended), penalty=s.missing_end))
        there = ~np.isnan(given)
        batch = {**roll.batch, "weights": roll.batch["weights"] * there[:, None]}
        mask = batch["weights"]
        again, values = self._in_parts(self._values, params, batch)
        kl = np.zeros_like(mask)
        if self.reference is not None:
            batch["reference"] = self._in_parts(self._logprobs, self.reference, batch)
            kl = np.asarray(kl_estimate(batch["logprobs"], batch["reference"])) * mask
        kept = params[COEFFICIENT]
        coefficient = jax.device_get(kept)[0]
        found = jax.device_get(self._advantages(given, kl, mask, values, coefficient))
        batch |= {name: np.asarray(x, np.float32) for name, x in found.items()}
        sums = kl.sum(axis=1)[there]
        controller = KLController(coefficient, s.target_kl, s.horizon).update(jnp.float32(sums.mean()), self.rows)
        changed = {**state.params, COEFFICIENT: jax.device_put(
            np.reshape(controller.coefficient, 1).astype(np.float32), kept.sharding)}  # fmt: skip
        spread = float(mixed_groups(jnp.asarray(given), s.group))
        if s.method == "ppo" and np.nanmin(given) == np.nanmax(given):
            self.say(f"rollout {number}: all responses have the same reward, so that the reward teaches nothing")
        elif spread == 0 and s.method != "ppo":
            self.say(f"rollout {number}: all responses to a prompt have the same reward, so that nothing is learned")
        lengths = roll.batch["weights"].sum(axis=1)
        metrics = {
            "reward": float(np.nanmean(scores)),
            "reward_deviation": float(np.nanstd(scores)),
            "length": float(lengths.mean()),
            "ended": float(ended.mean()),
            "dropped": float((~there).sum()),
            "mixed_groups": spread,
            "kl": float(sums.mean()),
            "kl_coefficient": float(coefficient),
            "sampler_difference": float(np.abs((np.asarray(again) - batch["logprobs"]) * mask).max()),
        }
        return dataclasses.replace(state, params=changed), batch, metrics

    def _in_parts(self, function: Callable, params: Tree, batch: HostBatch) -> Any:
        """A function of the rows of a rollout, for as many rows at once as an update has: logits are large."""
        parts = ({name: x[i : i + self.batch] for name, x in batch.items()} for i in range(0, self.rows, self.batch))
        found = [
            jax.device_get(function(params, on_devices(part, self.mesh, strategy=self.strategy))) for part in parts
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def evaluate(self, prompts: Prompts) -> Callable[[Tree, Iterable, int], Evaluation]:
        """An evaluation for `train.run.Run`: the mean reward of one response to each held-out prompt."""

        def evaluated(params: Tree, batches: Iterable, tokens: int = 0) -> Evaluation:
            roll = self.sample(params, range(len(prompts)), _HELD_OUT, prompts)
            reward = float(np.nanmean(self.scores(roll.samples)))
            return Evaluation(-reward, int(roll.batch["weights"].sum()), 0.0, reward)

        return evaluated


def _advantages(
    scores: jax.Array,
    kl: jax.Array,
    mask: jax.Array,
    values: jax.Array | None,
    coefficient: jax.Array,
    settings: PolicySettings,
) -> dict[str, jax.Array]:
    """Advantages of responses, from their rewards (scores [B]); for PPO also returns and values."""
    s, there = settings, ~jnp.isnan(scores)
    if s.method == "ppo":
        assert values is not None, "PPO needs a value head"
        rewards = token_rewards(jnp.where(there, scores, 0), kl, mask, coefficient=coefficient)
        if s.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=True)
        advantages, returns = gae(rewards, values, mask, gamma=s.gamma, lam=s.lam)
        return {"advantages": whiten(advantages, mask), "returns": returns, "values": values}
    if s.method == "rloo":
        return {"advantages": leave_one_out_advantages(scores - coefficient * kl.sum(axis=1), s.group)}
    scale = "none" if s.method == "dr_grpo" else "group"
    return {"advantages": group_advantages(scores, s.group, scale=scale)}


def _both(first: HostBatch, second: HostBatch) -> HostBatch:
    return {f"a/{k}": v for k, v in first.items()} | {f"b/{k}": v for k, v in second.items()}
