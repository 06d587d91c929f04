"""Fields of bits in words, as formats of quantised checkpoints pack them."""

import numpy as np

#: Place of each nibble of a word in AutoAWQ's "gemm" layout: nibble k of a word is column 8 c + AWQ_ORDER[k].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """The fields of 32-bit words [..., n], lowest bits first: uint8 [..., 32 n / bits].

    Fields of 3 bits run on from word to word: 32 of them take 3 words.
    """
    words = np.ascontiguousarray(words)
    if bits == 8:
        return words.view(np.uint8)
    octets = words.view(np.uint8)  # little-endian, like all formats
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return (octets[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(*octets.shape[:-1], -1)
    flat = np.unpackbits(octets, axis=-1, bitorder="little")
    flat = flat[..., : flat.shape[-1] // bits * bits].reshape(*flat.shape[:-1], -1, bits)
    return (flat << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


def awq_fields(words: np.ndarray) -> np.ndarray:
    """The fields of four bits of 32-bit words [..., n] in AutoAWQ's order: uint8 [..., 8 n]."""
    packed = fields(words, 4).reshape(*words.shape, 8)
    return packed[..., np.argsort(AWQ_ORDER)].reshape(*words.shape[:-1], -1)


def nibbles(octets: np.ndarray, high_first: bool) -> np.ndarray:
    """The two halves of each byte [..., n]: uint8 [..., 2 n]."""
    octets = octets.view(np.uint8)
    pair = (octets >> 4, octets & 15) if high_first else (octets & 15, octets >> 4)
    return np.stack(pair, axis=-1).reshape(*octets.shape[:-1], -1)
