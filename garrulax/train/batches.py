"""Batches of a run as functions of the step number, so that resuming a run needs only that number."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import SEQUENCE_AXIS, token_sharding
from garrulax.train.documents import isolated_causal, isolated_infill, segments_at
from garrulax.train.infill import BlankMix, InfillTokenizer, InfillTokens, infill_batch, source_window
from garrulax.train.objectives import Batch, objective_name
from garrulax.train.rows import HostBatch
from garrulax.train.sampler import Sampler, eval_windows
from garrulax.train.settings import Settings
from garrulax.train.shards import Dataset, Tokens

# Seed of the blanks in the held-out text. It is the same in every run, so that held-out losses can be compared.
HELD_OUT_SEED = 2**40
# Tokens of the shortest text that blank infilling is evaluated on.
_SHORTEST = 9


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches to train on and to evaluate on.

    Attributes:
        batch_at: Maps a step number to this process's rows [B / processes, ...] of the batch. The same number always
            gives the same batch.
        held_out: Starts a new pass over the held-out batches. Each has `batch` rows over all processes, and one more
            array than a training batch: bytes, float32 [B], the bytes of text that the weighted targets of a row stand
            for (0 if unknown).
        identity: Hashes, by name, of everything that the batches depend on.
        eval_texts: As `held_out`, of further texts, by name (`eval_texts.eval_batches`).
    """

    batch_at: Callable[[int], HostBatch]
    held_out: Callable[[], Iterator[HostBatch]]
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eval_texts: Mapping[str, Callable[[], Iterator[HostBatch]]] = dataclasses.field(default_factory=dict)


def make_data(dataset: Dataset, settings: Settings, config: ModelConfig, tokenizer: InfillTokenizer) -> Data:
    """Makes batches for the objective that the settings name, or else for the default objective of the model's family.

    Args:
        dataset: The token ids, from `shards.build_shards`.
        settings: Of the run.
        config: Of the model.
        tokenizer: The one that the data set was made with.

    Raises:
        ValueError: If the window is longer than the model's context, the vocabulary larger than the model's, a control
            token is missing, or the text shorter than a window.
    """
    if settings.window > config.context:
        raise ValueError(f"window={settings.window} is longer than the model's context={config.context}")
    if tokenizer.vocab > config.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} ids, the model's vocab is {config.vocab}")
    if objective_name(settings.objective, config) == "causal":
        return causal_data(dataset, settings)
    blanks = models.blanks(config)
    has_task_masks = blanks is not None and blanks.masks["s"] != blanks.masks[""]
    return infill_data(dataset, settings, tokenizer, InfillTokens.of(tokenizer, has_task_masks))


def causal_data(dataset: Dataset, settings: Settings) -> Data:
    """Makes batches for next-token prediction. Evaluation predicts each held-out token exactly once.

    With `isolate`, a document sees only itself, and its first token is not predicted (`documents.isolated_causal`).

    Args:
        dataset: The token ids.
        settings: Of the run; uses window, batch, seed and isolate.

    Raises:
        ValueError: If the text is shorter than a window, or the held-out text than two tokens.
    """
    check_length(dataset.valid, 2)
    split = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    length = settings.window
    sampler = Sampler(dataset.train, length, settings.batch, settings.seed, **split, name="training text")
    bytes_per_token = dataset.valid.bytes / (len(dataset.valid) - 1)

    def made(tokens: Tokens, windows: np.ndarray, starts: np.ndarray) -> HostBatch:
        if not settings.isolate:
            return causal_batch(windows)
        return isolated_causal(windows, segments_at(tokens.documents, starts, length + 1))

    def batch_at(step):
        return made(dataset.train, sampler.batch_at(step), sampler.starts_at(step))

    def held_out():
        for i, (windows, present) in enumerate(eval_windows(dataset.valid, length, settings.batch, **split)):
            rows = i * settings.batch + jax.process_index() * len(windows) + np.arange(len(windows))
            batch = made(dataset.valid, windows, rows * length)
            weights = batch["weights"] * present
            yield {**batch, "weights": weights, "bytes": weights.sum(1) * np.float32(bytes_per_token)}

    return Data(batch_at, held_out, _identity(dataset))


def causal_batch(windows: np.ndarray) -> HostBatch:
    """Makes a batch for next-token prediction.

    Args:
        windows: int32 [B, T + 1], plain text.

    Returns:
        tokens and targets, int32 [B, T]; weights, float32 [B, T], all 1.
    """
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "weights": np.ones((len(windows), windows.shape[1] - 1), np.float32),
    }


def infill_data(dataset: Dataset, settings: Settings, tokenizer: InfillTokenizer, ids: InfillTokens) -> Data:
    """Makes batches for blank infilling. The held-out text gets the same blanks in every evaluation of every run.

    A held-out text that is shorter than a window is evaluated whole, in every row of one batch with other blanks. With
    `isolate`, every document is an example of its own (`documents.isolated_infill`).

    Args:
        dataset: The token ids.
        settings: Of the run; uses window, batch, seed, isolate and the frequencies of the kinds of blanks.
        tokenizer: Gives the number of bytes of every token.
        ids: Control tokens of the tokenizer.

    Raises:
        ValueError: If the text or the window is too short.
    """
    split = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    check_length(dataset.valid, _SHORTEST)
    mix = BlankMix(settings.token_blanks, settings.sentence_blanks, settings.document_blanks)
    width = source_window(settings.window)
    sampler = Sampler(dataset.train, width, settings.batch, settings.seed, **split, name="training text")
    valid = Sampler(dataset.valid, min(width, len(dataset.valid) - 1), settings.batch, HELD_OUT_SEED, **split)
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab)], np.float32)  # [V]

    def made(sampler: Sampler, step: int) -> HostBatch:
        windows, examples = sampler.batch_at(step), sampler.examples_at(step)
        if not settings.isolate:
            return infill_batch(windows, examples, sampler.seed, ids, settings.window, mix)
        segments = segments_at(sampler.tokens.documents, sampler.starts_at(step), windows.shape[1])
        return isolated_infill(windows, segments, examples, sampler.seed, ids, settings.window, mix)

    def batch_at(step):
        return made(sampler, step)

    def held_out():
        for step in range(max(1, valid.windows_per_epoch // settings.batch)):
            batch = made(valid, step)
            yield {**batch, "bytes": (sizes[batch["targets"]] * batch["weights"]).sum(1)}

    return Data(batch_at, held_out, _identity(dataset))


def check_length(held_out: Tokens, least: int) -> None:
    """Checks that there is held-out text enough to evaluate on. Raises ValueError that says what to do."""
    if len(held_out) < least:
        raise ValueError(
            f"the held-out text has {len(held_out)} tokens ({held_out.bytes} bytes), too few to evaluate on: use more "
            f"text, or name a held-out text of at least {least} tokens with valid="
        )


def check_held_out(data: Data) -> None:
    """Makes the held-out batches up to the first with a token to predict, so that no run stops at its evaluation.

    Raises:
        ValueError: If there is no such token. Errors of making the batches are passed on.
    """
    if not any(batch["weights"].any() for batch in data.held_out()) and jax.process_count() == 1:
        raise ValueError("the held-out text has no token to predict: use more text, or name one with valid=")


def on_devices(batch: HostBatch, mesh: Mesh | None, micro_batches: int | None = None) -> Batch:
    """Copies a host batch to the devices: rows sharded over the mesh's batch axes, tokens over its sequence axis.

    Args:
        batch: Arrays [B, ...], this process's rows.
        mesh: None is one device.
        micro_batches: A, to split the rows into: the arrays become [A, B / A, ...]. None keeps [B, ...].
    """
    if micro_batches is not None:
        batch = {k: v.reshape(micro_batches, v.shape[0] // micro_batches, *v.shape[1:]) for k, v in batch.items()}
    if mesh is None:
        return jax.device_put(batch)
    rows, tokens = token_sharding(mesh)
    leading = () if micro_batches is None else (None,)  # the axis of micro-batches is not sharded

    def sharding(v):
        inner = v.ndim - len(leading) - 1  # dimensions after the rows; the last of them is the tokens
        columns = (None,) * (inner - 1) + (tokens,) if inner > 0 else ()
        return jax.NamedSharding(mesh, jax.P(*leading, rows, *columns))

    return {k: jax.make_array_from_process_local_data(sharding(v), v) for k, v in batch.items()}


def check_batch(settings: Settings, mesh: Mesh | None) -> None:
    """Checks that processes and devices can share a micro-batch evenly.

    Raises:
        ValueError: If they cannot; it says which setting to change.
    """
    rows = settings.batch // settings.accumulation
    devices = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in ("data", "fsdp") if a in mesh.shape]))
    if settings.batch % (settings.accumulation * jax.process_count()):
        raise ValueError(f"batch={settings.batch} cannot be shared by {jax.process_count()} processes")
    if rows % devices:
        raise ValueError(f"micro-batches of {rows} rows cannot be shared by {devices} devices: choose another batch")
    parts = 1 if mesh is None else mesh.shape.get(SEQUENCE_AXIS, 1)
    if settings.window % parts:
        raise ValueError(f"a window of {settings.window} tokens cannot be shared by {parts} devices: choose another")


def _identity(dataset: Dataset) -> dict[str, str]:
    return {name: str(dataset.meta[name]) for name in ("corpus", "tokenizer")}
