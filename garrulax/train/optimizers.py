"""Optimizers, built from the settings and from the role of every parameter: matrix, embedding or vector."""

import math

import jax
import jax.numpy as jnp
import optax

from garrulax.core.spec import Tree, decay_mask, map_specs
from garrulax.train import lora
from garrulax.train.factored import scale_by_adafactor
from garrulax.train.layer_rates import scaled_by_layer
from garrulax.train.muon import scale_by_muon
from garrulax.train.schedules import Schedule, make_schedule
from garrulax.train.settings import Settings


def make_optimizer(settings: Settings, specs: Tree) -> optax.GradientTransformation:
    """Makes the optimizer of the settings: clips gradients by their global norm, then applies one of Optax's.

    AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023) and Adafactor (Shazeer & Stern 2018) decay matrices and
    embeddings, but not norms and biases. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises
    the momentum of the matrices of every layer. Embeddings, output projection, norms and biases use AdamW at `adam_lr`
    then. `layer_decay` makes the rate of lower layers smaller (`layer_rates`), `plus` in `lora` that of every B larger.

    Args:
        settings: Of the run.
        specs: ParamSpec tree of the parameters.
    """
    adapters = lora.read(settings.lora)
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    optimizer = _MAKERS[settings.optimizer](settings, specs)
    if settings.layer_decay != 1:
        optimizer = scaled_by_layer(optimizer, specs, settings.layer_decay)
    if adapters is not None and adapters.plus != 1:
        optimizer = lora.plus_rates(optimizer, specs, adapters.plus)
    return optax.chain(clip, optimizer)


def schedule_of(settings: Settings, peak: float | None) -> Schedule:
    """The learning-rate schedule of the settings, with the given peak: `settings.lr` or `settings.adam_lr`."""
    assert peak is not None  # Settings replaces None by the default of the optimizer
    return make_schedule(
        settings.schedule,
        peak,
        settings.steps,
        warmup=settings.warmup,
        min_ratio=settings.min_lr_ratio,
        decay=settings.decay,
        tail=(settings.tail_step, settings.tail_ratio) if settings.tail_step else None,
    )


def _adamw(settings: Settings, specs: Tree) -> optax.GradientTransformation:
    return _adam(settings, schedule_of(settings, settings.lr), decay_mask(specs))


def _adam(settings: Settings, schedule: Schedule, decayed: Tree) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, settings.beta1, settings.beta2, settings.eps, weight_decay=settings.weight_decay, mask=decayed
    )


def _lion(settings: Settings, specs: Tree) -> optax.GradientTransformation:
    schedule, decay = schedule_of(settings, settings.lr), settings.weight_decay or 0.0
    return optax.lion(schedule, settings.beta1, settings.beta2, weight_decay=decay, mask=decay_mask(specs))


def _adafactor(settings: Settings, specs: Tree) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_adafactor(specs),
        optax.add_decayed_weights(settings.weight_decay, decay_mask(specs)),
        optax.scale_by_learning_rate(schedule_of(settings, settings.lr)),
    )


def _muon(settings: Settings, specs: Tree) -> optax.GradientTransformation:
    labels = map_specs(lambda s: "muon" if s.role == "matrix" else "adam", specs)
    decayed = map_specs(lambda s, d: optax.MaskedNode() if s.role == "matrix" else d, specs, decay_mask(specs))
    muon = optax.chain(
        scale_by_muon(settings.momentum, specs),
        _scale_by_shape(specs),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(schedule_of(settings, settings.lr)),
    )
    adam = _adam(settings, schedule_of(settings, settings.adam_lr), decayed)
    return optax.partition({"muon": muon, "adam": adam}, labels)


_MAKERS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


def _scale_by_shape(specs: Tree) -> optax.GradientTransformation:
    """Multiplies updates by Muon's sqrt(max(1, outputs / inputs)), so that activations change alike for all shapes."""

    def factor(s):
        inputs, outputs = math.prod(s.layer_shape[: s.inputs]), math.prod(s.layer_shape[s.inputs :])
        return math.sqrt(max(1, outputs / inputs)) if s.role == "matrix" else optax.MaskedNode()

    factors = map_specs(factor, specs)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors))
