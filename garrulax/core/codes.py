"""Codes of quantised weights: how they lie in bytes, and the numbers that they stand for.

A quantised matrix has a row of codes for each output. The inputs of a row are in groups, which share a scale:

    number = scale * level(code)                       symmetric
    number = scale * (code - offset)                   the offset is an integer, the zero point
    number = scale * code + offset                     the offset is a float, the minimum

Codes of four bits are packed within their group: byte d of a group of g inputs holds input d in its low half and input
d + g/2 in its high one. So a product needs no interleaving, and a part of a row that is cut between groups is complete.

Everything here computes from integers. XLA:CPU converts a whole array of a narrow float type before it slices it, so
that float8 and its like are kept as their bits.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

#: NF4 (Dettmers et al. 2023): quantiles of the normal distribution, as bitsandbytes stores them in its checkpoints.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Numbers of four bits with two exponent bits (OCP Microscaling Formats), by their bits.
E2M1 = (*_E2M1_HALF, *(-x for x in _E2M1_HALF))
E4M3_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Form:
    """The static part of a quantised weight.

    Attributes:
        kind: "int", "e4m3" (the bits of a float8_e4m3fn), or "table" (numbers of `values`).
        bits: Of a code: 4 or 8. Codes of fewer bits are stored as 4, of 5 to 7 as 8.
        group: Number of neighbouring inputs, as stored, that share a scale.
        inner: Sizes of the dimensions that are contracted with the activations.
        outer: Sizes of the other dimensions.
        first: Whether the contracted dimensions come first in the shape of the weight.
        dtype: Name of the dtype of the weight that this one stands for: that of its looked-up rows.
        values: The numbers of the codes of a "table".
        activations: Bits of the activations, which are rounded when they are multiplied, with a scale for each row of
            them; 0 leaves them as they are. 8 is for "int" of 8 bits with a scale a row (W8A8).
    """

    kind: str
    bits: int
    group: int
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    first: bool
    dtype: str = "float32"
    values: tuple[float, ...] = ()
    activations: int = 0

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return math.prod(self.inner)

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return math.prod(self.outer)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, without an axis of layers."""
        return (*self.inner, *self.outer) if self.first else (*self.outer, *self.inner)

    @property
    def name(self) -> str:
        """The usual name: int8, int4, w8a8, fp8, nf4, mxfp4 (or fp4)."""
        if self.activations:
            return f"w{self.bits}a{self.activations}"
        if self.kind == "int":
            return f"int{self.bits}"
        return "fp8" if self.kind == "e4m3" else {NF4: "nf4", E2M1: "mxfp4"}.get(self.values, "fp4")


def pack(codes: np.ndarray, group: int) -> np.ndarray:
    """Codes of four bits [..., n] in bytes [..., n / 2]; n is a multiple of the group, which is even."""
    halves = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 2, group // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*codes.shape[:-1], -1)


def unpack(packed: np.ndarray, group: int) -> np.ndarray:
    """The inverse of `pack`."""
    groups = packed.reshape(*packed.shape[:-1], -1, group // 2)
    return np.stack([groups & 15, groups >> 4], axis=-2).reshape(*packed.shape[:-1], -1)


def halves(form: Form) -> int:
    """Number of codes in a byte."""
    return 8 // form.bits


def arrange(x: jax.Array, form: Form) -> list[jax.Array]:
    """The columns of x [..., groups * group] that the first, and the second, code of every byte are multiplied by."""
    if halves(form) == 1:
        return [x]
    split = x.reshape(*x.shape[:-1], -1, 2, form.group // 2)
    return [split[..., half, :].reshape(*x.shape[:-1], -1) for half in range(2)]


def restore(parts: list[jax.Array], form: Form) -> jax.Array:
    """The inverse of `arrange`."""
    if len(parts) == 1:
        return parts[0]
    split = [part.reshape(*part.shape[:-1], -1, 1, form.group // 2) for part in parts]
    return jnp.concatenate(split, axis=-2).reshape(*parts[0].shape[:-1], -1)


def decode(codes: jax.Array, scale: jax.Array, offset: jax.Array | None, form: Form) -> list[jax.Array]:
    """The numbers of rows of codes, in the order of `arrange`.

    Args:
        codes: uint8 or int8 [..., bytes].
        scale: [..., groups].
        offset: [..., groups] or None.
        form: Their form.

    Returns:
        One float32 array [..., bytes], or two where a byte holds two codes.
    """
    groups = (*codes.shape[:-1], scale.shape[-1], codes.shape[-1] // scale.shape[-1])
    split = codes.reshape(groups)
    wide = scale.astype(jnp.float32)[..., None]
    add = None if offset is None else offset.astype(jnp.float32)[..., None]
    found = []
    for part in (split,) if halves(form) == 1 else (split & np.uint8(15), split >> np.uint8(4)):
        level = _levels(part, form, centred=add is None)
        if add is None:
            number = level * wide
        elif jnp.issubdtype(offset.dtype, jnp.integer):  # type: ignore[union-attr]
            number = (level - add) * wide
        else:
            number = level * wide + add
        found.append(number.reshape(codes.shape))
    return found


def _levels(codes: jax.Array, form: Form, centred: bool) -> jax.Array:
    """float32 numbers of codes before scaling."""
    if form.kind == "table":
        return jnp.take(jnp.asarray(form.values, jnp.float32), codes.astype(jnp.int32), mode="clip")
    if form.kind == "e4m3":
        return _from_e4m3(codes)
    level = codes.astype(jnp.float32)
    return level - 8.0 if centred and form.bits == 4 else level


def _from_e4m3(bits: jax.Array) -> jax.Array:
    """The numbers of the bits of float8_e4m3fn; NaN (0x7f and 0xff) becomes 480, so refuse it when codes are made.

    The exponent and mantissa of a float8 at their places in a float16 are the number times 2^-8, subnormals included.
    (In a float32 they would be subnormal too, which XLA:CPU takes for zero.)
    """
    wide = bits.astype(jnp.uint16)
    placed = (wide & np.uint16(128)) << np.uint16(8) | (wide & np.uint16(127)) << np.uint16(7)
    return jax.lax.bitcast_convert_type(placed, jnp.float16).astype(jnp.float32) * np.float32(256.0)
