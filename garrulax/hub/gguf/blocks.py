"""The types of tensors in GGUF files: blocks of numbers that share scales, and how they become float32.

A block holds `values` numbers in `bytes` bytes, little-endian. Its scale d and minimum m are float16; numbers of four
bits lie as the low halves of all bytes and then the high ones (ggml-common.h of ggml-org/ggml). The K types have blocks
of 256 numbers in groups of 16 or 32, whose scales are whole numbers times the block's d.
"""

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

Decode = Callable[[np.ndarray], np.ndarray]  # bytes [n, bytes] -> float32 [n, values]


@dataclasses.dataclass(frozen=True)
class Format:
    """One type.

    Attributes:
        name: Its name.
        values: Numbers in a block.
        bytes: Bytes of a block.
        dtype: Numpy's dtype of the numbers as they are stored; None for those that `decode` makes.
        decode: Gives the numbers of blocks; None for plain numbers.
    """

    name: str
    values: int
    bytes: int
    dtype: np.dtype | None = None
    decode: Decode | None = None

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        return math.prod(shape) // self.values * self.bytes


def _f16(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


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


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * (_halves(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * _halves(b[:, 4:]) + _f16(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * ((_halves(b[:, 6:]) | _high_bits(b, 2)).astype(np.float32) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * (_halves(b[:, 8:]) | _high_bits(b, 4)) + _f16(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * b[:, 2:].view(np.int8)


def _q8_k(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b[:, :4]).view("<f4") * b[:, 4:260].view(np.int8)


def _scaled(scale: np.ndarray, numbers: np.ndarray, minimum: np.ndarray | None = None) -> np.ndarray:
    """scale [n, g] times the numbers of each of g groups, less the group's minimum: [n, 256]."""
    groups = numbers.reshape(len(scale), scale.shape[1], -1).astype(np.float32)
    groups *= scale[..., None]
    if minimum is not None:
        groups -= minimum[..., None]
    return groups.reshape(len(scale), -1)


def _q2_k(b: np.ndarray) -> np.ndarray:
    scales, packed, d, m = b[:, :16], b[:, 16:80], _f16(b, 80), _f16(b, 82)
    return _scaled(d * (scales & 15), _fields(packed.reshape(-1, 2, 32), 2), m * (scales >> 4))


def _q3_k(b: np.ndarray) -> np.ndarray:
    high, packed, scales, d = b[:, :32], b[:, 32:96], b[:, 96:108], _f16(b, 108)
    # Sixteen scales of six bits: the low four are halves of eight bytes, the high two fields of the other four.
    six = _halves(scales[:, :8]) | _fields(scales[:, 8:], 2).reshape(-1, 16) << 4
    third = _fields(high, 1).reshape(-1, 2, 4, 32) << 2
    numbers = (_fields(packed.reshape(-1, 2, 32), 2) | third).astype(np.int8) - 4
    return _scaled(d * (six.astype(np.float32) - 32), numbers)


def _scales_k(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits in 12 bytes: [n, 8] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    return scales, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)


def _q4_k(b: np.ndarray) -> np.ndarray:
    scales, minima = _scales_k(b[:, 4:16])
    return _scaled(_f16(b, 0) * scales, _fields(b[:, 16:].reshape(-1, 4, 32), 4), _f16(b, 2) * minima)


def _q5_k(b: np.ndarray) -> np.ndarray:
    scales, minima = _scales_k(b[:, 4:16])
    fifth = _fields(b[:, 16:48], 1).reshape(-1, 4, 2, 32) << 4
    return _scaled(_f16(b, 0) * scales, _fields(b[:, 48:].reshape(-1, 4, 32), 4) | fifth, _f16(b, 2) * minima)


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = _fields(b[:, :128].reshape(-1, 2, 64), 4)
    high = _fields(b[:, 128:192].reshape(-1, 2, 32), 2) << 4
    numbers = (low.reshape(-1, 2, 4, 32) | high).astype(np.int8) - 32
    return _scaled(_f16(b, 208) * b[:, 192:208].view(np.int8), numbers)


_PLAIN = {0: ("F32", "<f4"), 1: ("F16", "<f2"), 28: ("F64", "<f8"), 30: ("BF16", ml_dtypes.bfloat16)}
_BLOCKS = (
    (2, Format("Q4_0", 32, 18, decode=_q4_0)),
    (3, Format("Q4_1", 32, 20, decode=_q4_1)),
    (6, Format("Q5_0", 32, 22, decode=_q5_0)),
    (7, Format("Q5_1", 32, 24, decode=_q5_1)),
    (8, Format("Q8_0", 32, 34, decode=_q8_0)),
    (10, Format("Q2_K", 256, 84, decode=_q2_k)),
    (11, Format("Q3_K", 256, 110, decode=_q3_k)),
    (12, Format("Q4_K", 256, 144, decode=_q4_k)),
    (13, Format("Q5_K", 256, 176, decode=_q5_k)),
    (14, Format("Q6_K", 256, 210, decode=_q6_k)),
    (15, Format("Q8_K", 256, 292, decode=_q8_k)),
)
#: Number of a type in a file -> the type.
FORMATS = {
    number: Format(name, 1, np.dtype(kind).itemsize, np.dtype(kind)) for number, (name, kind) in _PLAIN.items()
} | dict(_BLOCKS)
#: Names of the other types, for messages.
NAMES = {
    9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
