"""The types of tensors in GGUF files: blocks of codes that share scales, and how they become float32.

A block holds `values` numbers in `bytes` bytes, little-endian. Its scale d and minimum m are float16; numbers of four
bits lie as the low halves of all bytes and then the high ones (ggml-common.h of ggml-org/ggml). The K types have blocks
of 256 numbers in groups of 16 or 32, whose scales are whole numbers times the block's d.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from garrulax.core.codes import E2M1


class Codes(NamedTuple):
    """The codes of n blocks: numbers are scale * level + minimum, where codes of 4 bits without minima are less 8.

    Attributes:
        codes: uint8 or int8 [n, values].
        scale: float16 or float32 [n, groups].
        minimum: [n, groups] or None.
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """One type.

    Attributes:
        name: Its name.
        values: Numbers in a block.
        bytes: Bytes of a block.
        dtype: Numpy's dtype of the numbers as they are stored; None for those in codes.
        codes: Gives the codes of blocks, bytes [n, bytes]; None for plain numbers.
        bits: Of a code, 4 or 8.
        table: The numbers of the codes, where they are no integers.
    """

    name: str
    values: int
    bytes: int
    dtype: np.dtype | None = None
    codes: Callable[[np.ndarray], Codes] | None = None
    bits: int = 4
    table: tuple[float, ...] = ()

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        return math.prod(shape) // self.values * self.bytes

    def decode(self, blocks: np.ndarray) -> np.ndarray:
        """The numbers of blocks [n, bytes]: float32 [n, values]."""
        assert self.codes is not None
        codes, scale, minimum = self.codes(blocks)
        level = np.asarray(self.table, np.float32)[codes] if self.table else codes.astype(np.float32)
        if minimum is None and self.bits == 4 and not self.table:
            level -= 8
        groups = level.reshape(*scale.shape, -1)
        groups *= scale.astype(np.float32)[..., None]
        if minimum is not None:
            groups += minimum.astype(np.float32)[..., None]
        return groups.reshape(codes.shape)


def _f16(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")


def _f32(blocks: np.ndarray, start: int) -> np.ndarray:
    """The same as float32."""
    return _f16(blocks, start).astype(np.float32)


def _halves(packed: np.ndarray) -> np.ndarray:
    """The low four bits of bytes [..., n], then the high ones: [..., 2 n]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """The fields of bytes [..., n] from low to high: [..., 8 / bits, n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return packed[..., None, :] >> shifts & np.uint8((1 << bits) - 1)


def _high_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """The fifth bit of 32 numbers, in 4 bytes from `start` on: [n, 32]."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> Codes:
    return Codes(_halves(b[:, 2:]), _f16(b, 0))


def _q4_1(b: np.ndarray) -> Codes:
    return Codes(_halves(b[:, 4:]), _f16(b, 0), _f16(b, 2))


def _q5_0(b: np.ndarray) -> Codes:
    return Codes((_halves(b[:, 6:]) | _high_bits(b, 2)).astype(np.int8) - 16, _f16(b, 0))


def _q5_1(b: np.ndarray) -> Codes:
    return Codes(_halves(b[:, 8:]) | _high_bits(b, 4), _f16(b, 0), _f16(b, 2))


def _q8_0(b: np.ndarray) -> Codes:
    return Codes(b[:, 2:].view(np.int8), _f16(b, 0))


def _q8_k(b: np.ndarray) -> Codes:
    return Codes(b[:, 4:260].view(np.int8), np.ascontiguousarray(b[:, :4]).view("<f4"))


def _q2_k(b: np.ndarray) -> Codes:
    scales, packed = b[:, :16], b[:, 16:80]
    codes = _fields(packed.reshape(-1, 2, 32), 2).reshape(-1, 256)
    return Codes(codes, _f32(b, 80) * (scales & 15), -(_f32(b, 82) * (scales >> 4)))


def _q3_k(b: np.ndarray) -> Codes:
    high, packed, scales = b[:, :32], b[:, 32:96], b[:, 96:108]
    # Sixteen scales of six bits: the low four are halves of eight bytes, the high two fields of the other four.
    six = _halves(scales[:, :8]) | _fields(scales[:, 8:], 2).reshape(-1, 16) << 4
    third = _fields(high, 1).reshape(-1, 2, 4, 32) << 2
    codes = _fields(packed.reshape(-1, 2, 32), 2) | third  # less 4; codes of four bits stand for code - 8
    return Codes(codes.reshape(-1, 256) + np.uint8(4), _f32(b, 108) * (six.astype(np.float32) - 32))


def _scales_k(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits in 12 bytes: [n, 8] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    return scales, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)


def _q4_k(b: np.ndarray) -> Codes:
    scales, minima = _scales_k(b[:, 4:16])
    codes = _fields(b[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    return Codes(codes, _f32(b, 0) * scales, -(_f32(b, 2) * minima))


def _q5_k(b: np.ndarray) -> Codes:
    scales, minima = _scales_k(b[:, 4:16])
    fifth = _fields(b[:, 16:48], 1).reshape(-1, 4, 2, 32) << 4
    codes = _fields(b[:, 48:].reshape(-1, 4, 32), 4) | fifth
    return Codes(codes.reshape(-1, 256), _f32(b, 0) * scales, -(_f32(b, 2) * minima))


def _q6_k(b: np.ndarray) -> Codes:
    low = _fields(b[:, :128].reshape(-1, 2, 64), 4)
    high = _fields(b[:, 128:192].reshape(-1, 2, 32), 2) << 4
    codes = (low.reshape(-1, 2, 4, 32) | high).astype(np.int8) - 32
    return Codes(codes.reshape(-1, 256), _f32(b, 208) * b[:, 192:208].view(np.int8))


def _mxfp4(b: np.ndarray) -> Codes:
    return Codes(_halves(b[:, 1:]), np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 127))


#: The numbers of IQ4_NL (ggml-common.h, kvalues_iq4nl).
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_PLAIN = {0: ("F32", "<f4"), 1: ("F16", "<f2"), 28: ("F64", "<f8"), 30: ("BF16", ml_dtypes.bfloat16)}
_BLOCKS = (
    (2, Format("Q4_0", 32, 18, codes=_q4_0)),
    (3, Format("Q4_1", 32, 20, codes=_q4_1)),
    (6, Format("Q5_0", 32, 22, codes=_q5_0, bits=8)),
    (7, Format("Q5_1", 32, 24, codes=_q5_1, bits=8)),
    (8, Format("Q8_0", 32, 34, codes=_q8_0, bits=8)),
    (10, Format("Q2_K", 256, 84, codes=_q2_k)),
    (11, Format("Q3_K", 256, 110, codes=_q3_k)),
    (12, Format("Q4_K", 256, 144, codes=_q4_k)),
    (13, Format("Q5_K", 256, 176, codes=_q5_k, bits=8)),
    (14, Format("Q6_K", 256, 210, codes=_q6_k, bits=8)),
    (15, Format("Q8_K", 256, 292, codes=_q8_k, bits=8)),
    (20, Format("IQ4_NL", 32, 18, codes=_q4_0, table=tuple(map(float, _IQ4_NL)))),
    (39, Format("MXFP4", 32, 17, codes=_mxfp4, table=E2M1)),
)
#: Number of a type in a file -> the type.
FORMATS = {
    number: Format(name, 1, np.dtype(kind).itemsize, np.dtype(kind)) for number, (name, kind) in _PLAIN.items()
} | dict(_BLOCKS)
#: Names of the other types, for messages.
NAMES = {
    9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip
