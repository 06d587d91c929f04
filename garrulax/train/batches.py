"""Where a run's batches come from: functions of the step, so that resuming needs nothing but its number."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from garrulax.core.sharding import SEQUENCE_AXIS, token_sharding
from garrulax.train.infill import InfillTokens, Mix, infill, source_window
from garrulax.train.infill import causal as causal_batch
from garrulax.train.objectives import Batch, objective_name
from garrulax.train.sampler import Sampler, eval_windows
from garrulax.train.shards import Dataset

HELD_OUT_SEED = 2**40  # of the blanks in the held-out text: the same in every run, whatever its own seed
HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches to train on and to evaluate on.

    batch_at: step -> this process's rows [B / processes, ...] of its batch; the same for every call.
    held_out: -> this process's rows of the held-out batches, each of `batch` rows over all processes, with one more
        array bytes float32 [B]: how many bytes of text the row's weighted targets stand for, 0 where unknown.
    identity: hashes of what the batches depend on, by name.
    """

    batch_at: Callable[[int], HostBatch]
    held_out: Callable[[], Iterator[HostBatch]]
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)


def make_data(dataset: Dataset, settings: Any, config: Any, tokenizer: Any) -> Data:
    """Batches for the settings' objective, or the one that the config's family was made for.

    dataset: as `shards.build_shards` gives it. settings: a `Settings`. config: of the model. tokenizer: the data set's.
    Raises ValueError where window, vocabulary or control tokens do not fit the model, and where there is too little
    text for a window.
    """
    if settings.window > config.context:
        raise ValueError(f"window={settings.window} is longer than the model's context={config.context}")
    if tokenizer.vocab > config.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} ids, the model's vocab is {config.vocab}")
    if objective_name(settings.objective, config) == "causal":
        return causal_data(dataset, settings)
    return infill_data(dataset, settings, tokenizer, InfillTokens.of(tokenizer, config.sentence_mask is not None))


def causal_data(dataset: Dataset, settings: Any) -> Data:
    """Causal batches over a data set's windows; the held-out text is predicted token by token, each once.

    settings: a `Settings`; read are window, batch, seed. Raises ValueError where the text is shorter than a window.
    """
    split = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    sampler = Sampler(dataset.train, settings.window, settings.batch, settings.seed, **split)
    bytes_per_token = dataset.valid.bytes / max(1, len(dataset.valid) - 1)

    def held_out():
        for windows, weights in eval_windows(dataset.valid, settings.window, settings.batch, **split):
            yield {**causal_batch(windows), "weights": weights, "bytes": weights.sum(1) * np.float32(bytes_per_token)}

    return Data(lambda step: causal_batch(sampler.batch_at(step)), held_out, _identity(dataset))


def infill_data(dataset: Dataset, settings: Any, tokenizer: Any, ids: InfillTokens) -> Data:
    """Blank-infilling batches; the held-out text has its blanks drawn once, the same at every evaluation.

    settings: a `Settings`; read are window, batch, seed and the shares of blanks. tokenizer: counts the bytes of the
    blanks. ids: its control tokens. Raises ValueError where text or window is too short.
    """
    split = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    mix = Mix(settings.token_blanks, settings.sentence_blanks, settings.document_blanks)
    width = source_window(settings.window)
    sampler = Sampler(dataset.train, width, settings.batch, settings.seed, **split)
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab)], np.float32)

    def batch_at(step):
        return infill(sampler.batch_at(step), sampler.examples_at(step), settings.seed, ids, settings.window, mix)

    def held_out():
        valid = Sampler(dataset.valid, width, settings.batch, HELD_OUT_SEED, **split)
        for step in range(max(1, valid.windows_per_epoch // settings.batch)):
            batch = infill(valid.batch_at(step), valid.examples_at(step), HELD_OUT_SEED, ids, settings.window, mix)
            yield {**batch, "bytes": (sizes[batch["targets"]] * batch["weights"]).sum(1)}

    return Data(batch_at, held_out, _identity(dataset))


def on_devices(batch: HostBatch, mesh: Mesh | None, micro: int | None = None) -> Batch:
    """A host batch on the devices: rows sharded over the mesh's batch axes, tokens over its sequence axis.

    micro: cut the rows into this many micro-batches [A, B / A, ...]; None keeps [B, ...].
    """
    if micro is not None:
        batch = {k: v.reshape(micro, v.shape[0] // micro, *v.shape[1:]) for k, v in batch.items()}
    if mesh is None:
        return jax.device_put(batch)
    rows, tokens = token_sharding(mesh)
    before = () if micro is None else (None,)

    def where(v):
        columns = (None,) * (v.ndim - len(before) - 2) + (tokens,) if v.ndim > len(before) + 1 else ()
        return jax.NamedSharding(mesh, jax.P(*before, rows, *columns))

    return {k: jax.make_array_from_process_local_data(where(v), v) for k, v in batch.items()}


def check_batch(settings: Any, mesh: Mesh | None) -> None:
    """Raises ValueError where the processes or devices cannot share a micro-batch evenly."""
    rows = settings.batch // settings.accumulation
    ways = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in ("data", "fsdp") if a in mesh.shape]))
    if settings.batch % (settings.accumulation * jax.process_count()):
        raise ValueError(f"batch={settings.batch} cannot be shared by {jax.process_count()} processes")
    if rows % ways:
        raise ValueError(f"micro-batches of {rows} rows cannot be shared by {ways} devices: choose another batch")
    parts = 1 if mesh is None else mesh.shape.get(SEQUENCE_AXIS, 1)
    if settings.window % parts:
        raise ValueError(f"a window of {settings.window} tokens cannot be shared by {parts} devices: choose another")


def _identity(dataset: Dataset) -> dict[str, str]:
    return {name: str(dataset.meta[name]) for name in ("corpus", "tokenizer")}
