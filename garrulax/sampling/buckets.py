"""The sizes for which programs are compiled."""

import dataclasses

import jax

LEAST_SLOTS = 256  # of the cache; a state grows by factors of 4, since XLA:CPU reads all slots in every step


def bucket(size: int, least: int = 1) -> int:
    """Rounds a size up to a power of two, so that few programs are compiled."""
    return max(least, 1 << (size - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes for which programs are compiled. Any other size is rounded up to the next one.

    Attributes:
        rows: Numbers of rows of a state. On CPUs at least 2: XLA:CPU computes a single row by other instructions, so
            that its last bits would differ from those of the same row in a batch.
        prompt: Numbers of tokens of a context.
        size: Numbers of tokens of prompt and answer together.

    None is the powers of two, from 1 (on CPUs 2), 16 and 256 on.

    Example:
        >>> import garrulax as gx
        >>> buckets = gx.sampling.Buckets(prompt=(64, 512))
        >>> buckets.of("prompt", 65), buckets.of("rows", 5)
        (512, 8)
    """

    rows: tuple[int, ...] | None = None
    prompt: tuple[int, ...] | None = None
    size: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("rows", "prompt", "size"):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or list(sizes) != sorted(set(sizes)) or min(sizes) < 1):
                raise ValueError(f"Buckets: {name}={sizes!r} must be whole numbers in rising order")

    def of(self, name: str, size: int) -> int:
        """The bucket of a size. Raises ValueError if it is larger than the largest."""
        sizes = getattr(self, name)
        if sizes is None:
            least_rows = 2 if name == "rows" and jax.default_backend() == "cpu" else 1
            return bucket(size, {"rows": least_rows, "prompt": 16, "size": LEAST_SLOTS}[name])
        for one in sizes:
            if size <= one:
                return one
        raise ValueError(f"{size} is more than the largest bucket of {name}, {sizes[-1]}: give Buckets a larger one")


POWERS_OF_TWO = Buckets()
ONE_ROW = Buckets(rows=tuple(1 << i for i in range(24)))  # for speculation: its steps read several tokens of a row


def slots_for(needed: int, size: int) -> int:
    """Number of cache slots of a state: at least `needed`, at most `size`, the greatest length that a row can get."""
    slots = LEAST_SLOTS
    while slots < needed:
        slots *= 4
    return min(slots, size)
