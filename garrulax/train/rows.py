"""Host batches for blank infilling: empty ones, and how an example is written into a row."""

import numpy as np

HostBatch = dict[str, np.ndarray]


def row_generator(seed: int, example: int) -> np.random.Generator:
    """The generator of all random choices of one row."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, example], np.uint64)))


def empty_batch(rows: int, length: int, pad: int) -> HostBatch:
    """A batch of padding with the arrays of `infill.infill_batch`, for `write_row` to write into."""
    return {
        "tokens": np.full((rows, length), pad, np.int32),
        "targets": np.full((rows, length), pad, np.int32),
        "weights": np.zeros((rows, length), np.float32),
        "positions": np.zeros((rows, 2, length), np.int32),
        "rank": np.zeros((rows, length), np.int32),
        "segment": np.full((rows, length), -1, np.int32),
    }


def write_row(
    batch: HostBatch,
    row: int,
    tokens: np.ndarray,
    targets: np.ndarray,
    positions: np.ndarray,
    split: int,
    at: int = 0,
    segment: int = 0,
) -> None:
    """Writes one example, the result of `infill.assemble`, into a row of an `empty_batch`, from index `at` on."""
    begin, split, end = at, at + split, at + len(tokens)
    batch["tokens"][row, begin:end] = tokens
    batch["targets"][row, begin:end] = targets
    batch["weights"][row, split:end] = 1
    batch["positions"][row, :, begin:end] = positions
    batch["rank"][row, split:end] = np.arange(split + 1, end + 1)
    batch["segment"][row, begin:end] = segment
