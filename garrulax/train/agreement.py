"""Whether the processes of a run were started with the same settings. Otherwise they would wait for one another."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

#: Settings that may differ: machines have their files in different places. What is in the files is compared.
_PATHS = ("preset", "corpus", "valid", "eval_texts", "tokenizer")


def check_agreement(settings: Any, config: Any, data: Mapping[str, str]) -> None:
    """Compares the settings of all processes, before anything is compiled; with one process it does nothing.

    Args:
        settings: Of the run, a dataclass.
        config: Of the model.
        data: Hashes of what the batches depend on (`batches.Data.identity`).

    Raises:
        ValueError: In every process, if they disagree; it names the settings, and the processes that differ.
    """
    if jax.process_count() == 1:
        return
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in _PATHS}
    values |= {"the model's config": config, "the text or the tokenizer": sorted(data.items())}
    own = np.array([zlib.crc32(repr(value).encode()) for value in values.values()], np.uint32)
    found = np.asarray(multihost_utils.process_allgather(own))  # [processes, settings]
    different = found != found[0]
    if different.any():
        names = [name for name, column in zip(values, different.T, strict=True) if column.any()]
        who = [str(i) for i in np.flatnonzero(different.any(axis=1))]
        raise ValueError(
            f"the processes disagree on {', '.join(names)}: {'processes' if len(who) > 1 else 'process'} "
            f"{', '.join(who)} and process 0 have different values; start all with the same command"
        )
