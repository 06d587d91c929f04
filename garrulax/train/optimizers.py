"""Optimizers from the settings and the ParamSpec tree, which says what is a matrix, an embedding or a vector."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from garrulax.core.spec import ParamSpec, Tree, decay_mask, map_specs
from garrulax.train.schedules import Schedule, make_schedule

OPTIMIZERS = ("muon", "adamw")


def make_optimizer(settings: Any, specs: Tree) -> optax.GradientTransformation:
    """The optimizer that the settings ask for: gradients clipped by their global norm, then AdamW or Muon.

    AdamW (Loshchilov & Hutter 2019) decays matrices and embeddings, not norms and biases. Muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) orthogonalises the momentum of every layer's matrices; embeddings, output
    projection, norms and biases go to AdamW at `adam_lr`. settings: a `Settings`. specs: the family's parameters.
    """
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    if settings.optimizer == "adamw":
        return optax.chain(clip, _adamw(settings, schedule_of(settings, settings.lr), specs))
    labels = map_specs(lambda s: "muon" if s.role == "matrix" else "adam", specs)
    parts = {
        "muon": _muon(settings, schedule_of(settings, settings.lr), specs),
        "adam": _adamw(settings, schedule_of(settings, settings.adam_lr), specs),
    }
    return optax.chain(clip, optax.partition(parts, labels))


def schedule_of(settings: Any, peak: float) -> Schedule:
    """The settings' schedule with the given peak."""
    return make_schedule(
        settings.schedule,
        peak,
        settings.steps,
        warmup=settings.warmup,
        min_ratio=settings.min_lr_ratio,
        decay=settings.decay,
    )


def _adamw(settings: Any, schedule: Schedule, specs: Tree) -> optax.GradientTransformation:
    decayed = decay_mask(specs)
    if settings.optimizer == "muon":  # sees the embeddings and vectors only
        decayed = map_specs(lambda s, d: optax.MaskedNode() if s.role == "matrix" else d, specs, decayed)
    return optax.adamw(
        schedule, settings.beta1, settings.beta2, settings.eps, weight_decay=settings.weight_decay, mask=decayed
    )


def _muon(settings: Any, schedule: Schedule, specs: Tree) -> optax.GradientTransformation:
    dimensions = map_specs(lambda s: muon_dimensions(s) if s.role == "matrix" else optax.MaskedNode(), specs)
    return optax.chain(
        optax.contrib.scale_by_muon(beta=settings.momentum, weight_dimension_numbers=dimensions),
        _scale_by_shape(specs),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def muon_dimensions(s: ParamSpec) -> MuonDimensionNumbers:
    """Which axes of a matrix are its inputs and its outputs; the layers of a stack are matrices of their own."""
    first = 1 if s.layers else 0
    return MuonDimensionNumbers(tuple(range(first, first + s.inputs)), tuple(range(first + s.inputs, len(s.shape))))


def _scale_by_shape(specs: Tree) -> optax.GradientTransformation:
    """Muon's sqrt(max(1, outputs / inputs)): the same change of the activations for every shape."""

    def factor(s):
        inputs, outputs = math.prod(s.layer_shape[: s.inputs]), math.prod(s.layer_shape[s.inputs :])
        return math.sqrt(max(1, outputs / inputs)) if s.role == "matrix" else optax.MaskedNode()

    factors = map_specs(factor, specs)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors))
