"""Batches of one corpus or of a mixture, as functions of the step number."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from garrulax.train.components import Component
from garrulax.train.mixing import deal, fractions
from garrulax.train.rows import HostBatch


class Feed:
    """The rows of a mixture in batches.

    Args:
        components: The corpora.
        weights: Shares of their rows, not negative and not all zero.
        batch: B, rows in a batch over all processes.

    Raises:
        ValueError: If the processes cannot share a batch.
    """

    def __init__(self, components: Sequence[Component], weights: Sequence[float], batch: int):
        processes = jax.process_count()
        if batch % processes:
            raise ValueError(f"a batch of {batch} cannot be shared by {processes} processes")
        self._components, self._fractions, self._batch = components, fractions(weights), batch
        local = batch // processes
        self._rows = jax.process_index() * local + np.arange(local)
        # Numpy takes as long for a few rows as for thousands: find the rows of many steps at once.
        self._block_steps = max(1, 4096 // batch)
        self._block = functools.lru_cache(maxsize=2)(self._found)

    def batch_at(self, step: int) -> HostBatch:
        """This process's rows of a step's batch. Raises ValueError if step is negative."""
        if step < 0:
            raise ValueError(f"step must not be negative, is {step}")
        block, within = divmod(step, self._block_steps)
        component, example, place = (array[within] for array in self._block(block))
        if len(self._components) == 1:
            return self._components[0].make(place, example)
        batch: HostBatch = {}
        for number in np.unique(component):
            here = component == number
            for name, values in self._components[number].make(place[here], example[here]).items():
                if name not in batch:
                    batch[name] = np.empty((len(self._rows), *values.shape[1:]), values.dtype)
                batch[name][here] = values
        return batch

    def held_out(self) -> Iterator[HostBatch]:
        """The held-out batches of all corpora, one of each in turn, until all of them have ended."""
        for batches in itertools.zip_longest(*(component.held_out() for component in self._components)):
            yield from (batch for batch in batches if batch is not None)

    def _found(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The corpus of each row in a block of steps, its number and its place there: [block_steps, B / processes]."""
        steps = block * self._block_steps + np.arange(self._block_steps)
        rows = steps[:, None] * self._batch + self._rows
        component, example = deal(rows.reshape(-1), self._fractions)
        place = np.empty_like(example)
        for number in np.unique(component):
            here = component == number
            place[here] = self._components[number].places(example[here])
        shape = rows.shape
        return component.reshape(shape), example.reshape(shape), place.reshape(shape)
