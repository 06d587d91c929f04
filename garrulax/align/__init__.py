"""Alignment: instruction tuning, reward models, preference losses, policy gradients, and the losses of related work.

Everything is a pure function of arrays, or an objective for `train.step`; nothing is a trainer class.
"""

from garrulax.align.comparisons import kway_loss, pair_loss
from garrulax.align.distillation import distillation
from garrulax.align.forgetting import ewc_penalty, fisher
from garrulax.align.groups import (
    group_advantages,
    group_policy_loss,
    leave_one_out_advantages,
    sequence_policy_loss,
)
from garrulax.align.logprobs import logprobs_of, sequence_logprobs, token_logprobs
from garrulax.align.policy import (
    KLController,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimate,
    token_rewards,
    whiten,
)
from garrulax.align.preference import dpo, ipo, kto, kto_kl, orpo, simpo
from garrulax.align.repetition import coverage, repeated_ngrams, scalegrad, sequence_unlikelihood, unlikelihood
from garrulax.align.teachers import distillation_objective

__all__ = [
    "KLController",
    "clipped_policy_loss",
    "clipped_value_loss",
    "coverage",
    "distillation",
    "distillation_objective",
    "dpo",
    "ewc_penalty",
    "fisher",
    "gae",
    "group_advantages",
    "group_policy_loss",
    "ipo",
    "kl_estimate",
    "kto",
    "kto_kl",
    "kway_loss",
    "leave_one_out_advantages",
    "logprobs_of",
    "orpo",
    "pair_loss",
    "repeated_ngrams",
    "scalegrad",
    "sequence_logprobs",
    "sequence_policy_loss",
    "sequence_unlikelihood",
    "simpo",
    "token_logprobs",
    "token_rewards",
    "unlikelihood",
    "whiten",
]
