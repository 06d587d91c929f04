"""Batches of token windows in a shuffled order that depends on two integers only: the seed and the step.

The text is cut into windows. An epoch visits every window once, in an order given by a pseudo-random permutation that
is computed instead of stored. The next epoch moves the cuts and uses another permutation. Step s takes the windows
s*B .. s*B + B - 1 of this endless sequence, so that a resumed run needs only the number of its step.
"""

import functools
from collections.abc import Iterator

import numpy as np

from garrulax.train.tokens import Tokens


class Sampler:
    """Random windows of a long text.

    Args:
        tokens: The text, a `Tokens` or an integer array [N].
        window: T, the length of a row. A window has T + 1 tokens, for inputs and targets.
        batch: B, rows in a batch over all processes.
        seed: Decides the order; any int, taken modulo 2**64.
        process_index: Of this process.
        process_count: Number of processes. Each gets B / process_count rows; the rows of all processes, in order, are
            the batch that a single process would get.
        name: What to call the text in errors.

    Attributes:
        windows_per_epoch: Number of windows that the text is cut into.

    Raises:
        ValueError: If the text is shorter than one window, or B is not a multiple of process_count.
    """

    def __init__(
        self,
        tokens: Tokens | np.ndarray,
        window: int,
        batch: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        name: str = "text",
    ):
        if window < 1 or batch < 1:
            raise ValueError(f"window and batch must be positive, not {window} and {batch}")
        if len(tokens) < window + 1:
            raise ValueError(
                f"the {name} has {len(tokens)} tokens, fewer than one window of {window} + 1: "
                "use a smaller window or more text"
            )
        if batch % process_count or not 0 <= process_index < process_count:
            raise ValueError(
                f"a batch of {batch} cannot be shared by {process_count} processes (this is {process_index})"
            )
        self.tokens = _as_tokens(tokens)
        self.window = window
        self.batch = batch
        self.seed = seed
        local = batch // process_count
        self._rows = np.arange(process_index * local, (process_index + 1) * local)
        # One window fewer than would fit, so that the cuts can move from epoch to epoch.
        self.windows_per_epoch = max(1, (len(tokens) - window) // window)
        self._slack = len(tokens) - 1 - self.windows_per_epoch * window
        # Numpy takes as long for a few windows as for thousands: compute the starts of many steps at once.
        self._block_steps = max(1, 4096 // batch)
        self._block = functools.lru_cache(maxsize=2)(self._starts)

    def examples_at(self, step: int) -> np.ndarray:
        """The indices of this process's rows in the endless sequence of windows, int64 [B / process_count]."""
        return step * self.batch + self._rows

    def starts(self, examples: np.ndarray) -> np.ndarray:
        """The index in the text where windows of the endless sequence start; int64, the shape of `examples`."""
        epoch, index = np.divmod(examples, self.windows_per_epoch)
        offset = hash_of(self.seed, epoch, 0) % np.uint64(self._slack + 1)
        return permute(index, self.windows_per_epoch, self.seed, epoch) * self.window + offset.astype(np.int64)

    def starts_at(self, step: int) -> np.ndarray:
        """The index in the text where each of this process's windows starts, int64 [B / process_count]."""
        if step < 0:
            raise ValueError(f"step must not be negative, is {step}")
        block, within = divmod(step, self._block_steps)
        return self._block(block)[within]

    def _starts(self, block: int) -> np.ndarray:
        """`starts_at` of all steps of a block, int64 [block_steps, B / process_count]."""
        steps = block * self._block_steps + np.arange(self._block_steps)
        return self.starts(steps[:, None] * self.batch + self._rows)

    def batch_at(self, step: int) -> np.ndarray:
        """This process's windows of a step, int32 [B / process_count, T + 1]. Raises ValueError if step is negative."""
        return self.tokens.windows(self.starts_at(step), self.window + 1)


def eval_windows(
    tokens: Tokens | np.ndarray, window: int, batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields consecutive windows in which every token of a text, except the first, is a target exactly once.

    Args:
        tokens: The text, a `Tokens` or an integer array [N].
        window: T, the length of a row.
        batch: B, rows in a batch over all processes.
        process_index: Of this process.
        process_count: Number of processes.

    Yields:
        windows, int32 [B / process_count, T + 1], and weights of the targets, float32 [B / process_count, T]. The last
        windows are padded with token 0 and weight 0.

    Raises:
        ValueError: If the text has fewer than two tokens, or B is not a multiple of process_count.
    """
    if len(tokens) < 2:
        raise ValueError(f"the held-out text has {len(tokens)} tokens: too few to evaluate on, use more text")
    if batch % process_count:
        raise ValueError(f"a batch of {batch} cannot be shared by {process_count} processes")
    local = batch // process_count
    targets = len(tokens) - 1
    for first in range(0, -(-targets // window), batch):
        starts = (first + process_index * local + np.arange(local)) * window
        windows = np.zeros((local, window + 1), np.int32)
        weights = np.zeros((local, window), np.float32)
        for row, start in enumerate(starts):
            text = tokens[start : start + window + 1]
            windows[row, : len(text)] = text
            weights[row, : max(0, len(text) - 1)] = 1
        yield windows, weights


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """Applies a pseudo-random permutation of 0 .. size - 1 that is computed, not stored.

    A Feistel network on pairs (left, right) with left < a, right < b and a * b just above `size`. A result outside
    0 .. size - 1 goes through the network again, so that the map stays a bijection ("cycle walking": Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        index: int64, any shape.
        size: Of the permuted range.
        seed: Together with the epoch chooses the permutation.
        epoch: Of every index; broadcast to its shape.

    Returns:
        int64, the shape of `index`.
    """
    a = max(1, int(np.ceil(np.sqrt(size))))
    b = -(-size // a)
    out = np.array(index, np.int64)
    epoch = np.broadcast_to(epoch, out.shape)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = np.divmod(out[outside], b)
        for layer in range(1, 9, 2):
            left = (left + _below(hash_of(seed, epoch[outside], layer, right), a)) % a
            right = (right + _below(hash_of(seed, epoch[outside], layer + 1, left), b)) % b
        out[outside] = left * b + right
        outside = out >= size
    return out


def _below(bits: np.ndarray, bound: int) -> np.ndarray:
    return (bits % np.uint64(bound)).astype(np.int64)


def hash_of(*values: np.ndarray | int) -> np.ndarray:
    """A 64-bit hash of integers or arrays of them, uint64: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = np.zeros(1, np.uint64)
    for value in values:
        value = np.asarray(value & (2**64 - 1) if isinstance(value, int) else value).astype(np.uint64)
        mixed = (mixed ^ value) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def _as_tokens(tokens: Tokens | np.ndarray) -> Tokens:
    return tokens if isinstance(tokens, Tokens) else Tokens([tokens], 0, np.array([0, len(tokens)]))
