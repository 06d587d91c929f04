"""Rotary position embeddings with all scalings that LLaMA checkpoints name (Su et al. 2021, arXiv 2104.09864)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.config import Flag, Positive, Size, check_fields, check_value
from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import like_tokens, whole_tokens
from garrulax.layers.call import Call

#: Fields that each kind uses, besides theta.
USED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_context"},
    "yarn": {"factor", "original_context", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
             "mscale_all_dim"},
    "longrope": {"factor", "original_context", "attention_factor", "short_factors", "long_factors"},
    "llama3": {"factor", "original_context", "low", "high"},
}  # fmt: skip
KINDS = tuple(USED)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary settings; a field that the kind does not use must keep its default.

    Attributes:
        theta: Base of the frequencies.
        kind: Scaling of the frequencies for long texts, one of `KINDS`.
        factor: How many times the context is stretched.
        original_context: Tokens that the model was trained on (yarn, longrope, llama3), or its context (dynamic).
        low: llama3's lower limit, in wavelengths per original context.
        high: llama3's upper limit.
        beta_fast: Yarn's upper limit, in rotations over the original context.
        beta_slow: Yarn's lower limit.
        truncate: Whether yarn rounds the limits to whole frequencies.
        attention_factor: Factor of cosine and sine; None derives it.
        mscale: Yarn's other way to give the attention factor, together with the next.
        mscale_all_dim: See mscale.
        short_factors: Longrope's divisor of each frequency, in texts up to the original context.
        long_factors: Longrope's divisor of each frequency, in longer texts.
    """

    theta: Positive = 10_000.0
    kind: str = "default"
    factor: Positive = 1.0
    original_context: int = 0
    low: Positive = 1.0
    high: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: Flag = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown RoPE kind {self.kind!r}: choose from {', '.join(KINDS)}")
        used = USED[self.kind] | {"theta", "kind"}
        for field in dataclasses.fields(self):
            if field.name not in used and getattr(self, field.name) != field.default:
                raise ValueError(f"RoPE kind {self.kind!r} does not use {field.name}={getattr(self, field.name)}")
        if "original_context" in used:
            if self.original_context == 0:
                raise ValueError(f"RoPE kind {self.kind!r} needs original_context")
            check_value("original_context", self.original_context, Size)
        check_fields(self)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_value(name, getattr(self, name), Positive)
        for name in ("theta", "factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"RoPE {name}={getattr(self, name)} must be a number of at least 1")
        for low, high in (("low", "high"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"RoPE {low}={getattr(self, low)} must be above 0 and below {high}={getattr(self, high)}"
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("RoPE mscale and mscale_all_dim do nothing without each other: give both or none")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError(
                "RoPE attention_factor takes the place of mscale and mscale_all_dim: give one or the other"
            )
        for name in ("short_factors", "long_factors"):
            if any(not isinstance(x, int | float) or not 0 < x < math.inf for x in getattr(self, name)):
                raise ValueError(f"RoPE {name} must be numbers above 0: {getattr(self, name)}")


#: For Configs with a field `rope`: `max_length = rope_max_length`.
rope_max_length = property(
    lambda config: max(config.context, int((config.rope.original_context or config.context) * config.rope.factor)),
    doc="Tokens that a text may have: the context, or the original context times the factor of the rotary positions.",
)
#: For Configs with a field `rotary`, the share of a head's entries that are rotated: `rotary_width = rotated_entries`.
rotated_entries = property(
    lambda config: int(config.head_dim * config.rotary), doc="Entries of a head that are rotated."
)


def check_rotary(config: Any) -> None:
    """Checks that a Config rotates an even number of entries of each head.

    Raises:
        ValueError: It does not.
    """
    if config.rotary > 1 or config.rotary_width % 2 or not config.rotary_width:
        raise ValueError(f"rotary={config.rotary} must rotate an even part of head_dim {config.head_dim}")


def frequencies(rope: Rope, width: int, length: jax.Array | None = None, dtype: Any = float) -> np.ndarray | jax.Array:
    """The angle by which each pair of entries turns from one position to the next.

    Args:
        rope: Rotary settings.
        width: Number of entries of a head that are rotated.
        length: int32 [B], length of each row's whole text, which the kinds dynamic and longrope read.
        dtype: In which the angles of those two kinds are computed.

    Returns:
        float64 [width / 2] radians, or [B, width / 2] in `dtype` where they depend on the length.

    Raises:
        ValueError: There is no length, or longrope has another number of factors.
    """
    exponent = np.arange(0, width, 2) / width
    plain = rope.theta**-exponent
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "default":
        return plain
    if length is None:
        raise ValueError(f"RoPE kind {rope.kind!r} needs the length of the text")
    if rope.kind == "dynamic":
        stretch = jnp.maximum(length, rope.original_context).astype(dtype) / rope.original_context
        base = rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (width / (width - 2))
        return base[:, None] ** jnp.asarray(-exponent, dtype)[None]
    for name in ("short_factors", "long_factors"):
        if len(getattr(rope, name)) != width // 2:
            raise ValueError(f"longrope needs {width // 2} {name}, not {len(getattr(rope, name))}")
    long, short = (jnp.asarray(plain / np.array(x), dtype)[None] for x in (rope.long_factors, rope.short_factors))
    return jnp.where(length[:, None] > rope.original_context, long, short)


def same_angles(rope: Rope, one: int, other: int) -> bool:
    """Whether `frequencies` are the same for texts of two lengths."""
    if rope.kind == "dynamic":
        return max(one, rope.original_context) == max(other, rope.original_context)
    return rope.kind != "longrope" or (one > rope.original_context) == (other > rope.original_context)


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Peng et al. 2023 (arXiv 2309.00071), section 3.2: fast frequencies stay, slow ones are divided by the factor."""
    width = 2 * len(plain)

    def index(rotations):  # fractional index of the frequency that makes so many rotations in the original context
        return width * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    slow = np.clip((np.arange(len(plain)) - low) / max(high - low, 0.001), 0, 1)
    return plain / rope.factor * slow + plain * (1 - slow)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """meta-llama/llama-models, apply_scaling: wavelengths beyond the original context are stretched, short ones not."""
    rotations = rope.original_context * plain / (2 * math.pi)
    smooth = np.clip((rotations - rope.low) / (rope.high - rope.low), 0, 1)
    return plain / rope.factor * (1 - smooth) + plain * smooth


def amplitude(rope: Rope) -> float:
    """Factor of cosine and sine; scores are thereby multiplied by its square."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def yarn(scale):
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1

    if rope.kind == "yarn":
        return yarn(rope.mscale) / yarn(rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else yarn(1)
    if rope.kind == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))
    return 1.0


def cos_sin(
    rope: Rope, positions: jax.Array, width: int, length: jax.Array | None, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle of each pair of entries at each position.

    Args:
        rope: Rotary settings.
        positions: int32 [B, T].
        width: Number of entries of a head that are rotated.
        length: int32 [B], length of each row's whole text, for kinds that depend on it.
        dtype: Of the result, at least float32.

    Returns:
        Two arrays [B, T, 1, width / 2].
    """
    cosine, sine = cos_sin_of(frequencies(rope, width, length, at_least_float32(dtype)), positions, dtype)
    return amplitude(rope) * cosine, amplitude(rope) * sine


def cos_sin_of(angles: np.ndarray | jax.Array, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, F] of positions int32 [B, T] times the angles a position, [F] or [B, F]."""
    dtype = at_least_float32(dtype)
    angles = jnp.asarray(angles, dtype)
    angles = angles[:, None] if angles.ndim == 2 else angles[None, None]  # [B or 1, 1, F]
    angle = (whole_tokens(positions).astype(dtype)[..., None] * angles)[:, :, None]  # [B, T, 1, F]
    return jnp.cos(angle), jnp.sin(angle)


def rotate_halves(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates pairs of entries i and i + F (the layout of Hugging Face's LLaMA and of GPT-NeoX).

    Args:
        x: [B, T, H, C].
        cosine: [B, T, 1, F]. The first 2F entries of each head are rotated, the others stay.
        sine: [B, T, 1, F].
    """
    width = 2 * cosine.shape[-1]
    cosine, sine = like_tokens(cosine, x), like_tokens(sine, x)
    a, b = jnp.split(x[..., :width].astype(cosine.dtype), 2, axis=-1)
    rotated = jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1).astype(x.dtype)
    return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], axis=-1)


def rotate_pairs(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates pairs of entries 2i and 2i + 1 (the layout of the paper, of GPT-J and of ChatGLM2).

    Args:
        x: [B, T, H, C].
        cosine: [B, T, 1, F]. The first 2F entries of each head are rotated, the others stay.
        sine: [B, T, 1, F].
    """
    width = 2 * cosine.shape[-1]
    cosine, sine = like_tokens(cosine, x), like_tokens(sine, x)
    pairs = x[..., :width].astype(cosine.dtype).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
    return jnp.concatenate([rotated.reshape(*x.shape[:-1], width).astype(x.dtype), x[..., width:]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotations of one forward pass.

    Attributes:
        rotate: `rotate_halves` or `rotate_pairs`.
        cosine: [B, T, 1, F], of the tokens of the pass; where positions are counted in the cache (`Call.room`), of the
            positions 0, 1, ..., [B or 1, room, 1, F].
        sine: Likewise.
    """

    rotate: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    cosine: jax.Array
    sine: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """The queries or keys [B, T, H, C] of the pass, rotated."""
        return self.rotate(x, self.cosine, self.sine)

    def at(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys [B, S, H, C], rotated by positions [B, S] in the cache. Others are those of keys not read."""
        place = jnp.clip(positions, 0, self.cosine.shape[1] - 1)
        cosine, sine = (
            t[0][place] if len(t) == 1 else jnp.take_along_axis(t, place[:, :, None, None], axis=1)
            for t in (self.cosine, self.sine)
        )
        return self.rotate(x, cosine, sine)


def rotary(rope: Rope, call: Call, width: int, dtype: Any, rotate: Callable = rotate_halves) -> Rotary:
    """The rotations of a forward pass.

    Args:
        rope: Rotary settings.
        call: The forward pass.
        width: Number of entries of a head that are rotated.
        dtype: Of the angles, at least float32.
        rotate: How pairs lie in a head, `rotate_halves` or `rotate_pairs`.
    """
    if call.room is None:
        tables = cos_sin(rope, call.positions, width, call.text_length, dtype)
        if call.cache is not None and jax.default_backend() == "gpu":
            # XLA would compute cosine and sine again in the kernels of every layer, where they take most of the time.
            tables = jax.lax.optimization_barrier(tables)
        return Rotary(rotate, *tables)
    positions = jnp.arange(call.room, dtype=jnp.int32)[None]
    return Rotary(rotate, *cos_sin(rope, positions, width, call.text_length, dtype))
