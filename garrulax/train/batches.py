"""Batches of a run as functions of the step number, so that resuming a run needs only that number."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import axis_names, token_sharding
from garrulax.core.strategies import PIPELINE_AXIS, Strategy
from garrulax.models import pipeline
from garrulax.train import components, sources
from garrulax.train.components import Component
from garrulax.train.data_identity import INSTEAD_OF
from garrulax.train.feed import Feed
from garrulax.train.infill import GLM_130B, BlankMix
from garrulax.train.infill_tokens import InfillTokenizer, InfillTokens
from garrulax.train.objectives import Batch, objective_name
from garrulax.train.rows import HostBatch
from garrulax.train.sampler import hash_of
from garrulax.train.settings import Settings
from garrulax.train.shards import Dataset


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches to train on and to evaluate on.

    Attributes:
        batch_at: Maps a step number to this process's rows [B / processes, ...] of the batch. The same number always
            gives the same batch.
        held_out: Starts a new pass over the held-out batches. Each has `batch` rows over all processes, and one more
            array than a training batch: bytes, float32 [B], the bytes of text that the weighted targets of a row stand
            for (0 if unknown).
        identity: Hashes, by name, of everything that the batches depend on, those of `eval_texts` included.
        notes: Lines about the mixture and the packing, for the user.
        eval_texts: As `held_out`, of further texts, by name (`eval_texts.with_eval_texts`).
    """

    batch_at: Callable[[int], HostBatch]
    held_out: Callable[[], Iterator[HostBatch]]
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    eval_texts: Mapping[str, Callable[[], Iterator[HostBatch]]] = dataclasses.field(default_factory=dict)


def make_data(
    datasets: Dataset | Sequence[Dataset], settings: Settings, config: ModelConfig, tokenizer: InfillTokenizer
) -> Data:
    """Makes batches for the objective that the settings name, or else for the default objective of the model's family.

    Args:
        datasets: The token ids, from `shards.build_shards`: of one corpus, or of each corpus of the mixture that
            `settings.corpus` describes.
        settings: Of the run.
        config: Of the model.
        tokenizer: The one that the data sets were made with.

    Raises:
        ValueError: If the window is longer than the model's context, the vocabulary larger than the model's, the
            objective is not one of the model, a control token is missing, or a text shorter than a window.
    """
    if settings.window > config.context:
        raise ValueError(f"window={settings.window} is longer than the model's context={config.context}")
    if tokenizer.vocab > config.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} ids, the model's vocab is {config.vocab}")
    datasets = [datasets] if not isinstance(datasets, Sequence) else datasets
    make = _maker(settings, config, tokenizer)
    # The first corpus has the seed of the run, so that a run is the same with one corpus and with a mixture of one.
    made = [make(d, settings.seed if i == 0 else int(hash_of(settings.seed, i)[0])) for i, d in enumerate(datasets)]
    parts = sources.mixture(settings.corpus) if len(made) > 1 else []
    weights = [1.0]
    if len(made) > 1 and len(made) != len(parts):
        raise ValueError(f"corpus={','.join(settings.corpus)} is no mixture of {len(made)} corpora, one a data set")
    if parts:
        rows = [component.rows if part.epochs else 1 for part, component in zip(parts, made, strict=True)]
        weights = [(part.weight or 0.0) * count for part, count in zip(parts, rows, strict=True)]
    feed = Feed(made, weights, settings.batch)
    held_out = made[0].held_out if settings.valid else feed.held_out  # `valid` is the held-out text of every corpus
    return Data(feed.batch_at, held_out, _identity(datasets, parts), _notes(made, parts, weights, settings))


def _maker(
    settings: Settings, config: ModelConfig, tokenizer: InfillTokenizer
) -> Callable[[Dataset, int], Component]:  # fmt: skip
    """Maps a data set and a seed to the rows of the objective."""
    name, blanks = objective_name(settings.objective, config), models.blanks(config)
    family = models.family(config).__name__.rsplit(".", 1)[-1]
    if name != "infill":
        if blanks is not None and (name == "prefix" or not blanks.causal):
            raise ValueError(f"objective={name}: models of the family {family} fill blanks; leave the objective out")
        return lambda dataset, seed: components.causal(dataset, settings, seed, prefix=name == "prefix")
    if blanks is None:
        raise ValueError(f"objective=infill: models of the family {family} have no blanks; use causal or prefix")
    if blanks.before:
        ids = InfillTokens.of(tokenizer, blanks.masks["s"] != blanks.masks[""])
    else:
        ids = InfillTokens.of_blanks(tokenizer, blanks)
    mix = blank_mix(settings, BlankMix() if blanks.before else GLM_130B)
    return lambda dataset, seed: components.infill(dataset, settings, seed, tokenizer, ids, mix)


def blank_mix(settings: Settings, default: BlankMix) -> BlankMix:
    """The frequencies of the kinds of blanks: those of the settings, and the default's where they have none."""
    given = {
        "token": settings.token_blanks,
        "sentence": settings.sentence_blanks,
        "document": settings.document_blanks,
    }
    return dataclasses.replace(default, **{kind: share for kind, share in given.items() if share is not None})


def check_held_out(data: Data) -> None:
    """Makes the held-out batches up to the first with a token to predict, so that no run stops at its evaluation.

    Raises:
        ValueError: If there is no such token. Errors of making the batches are passed on.
    """
    if not any(batch["weights"].any() for batch in data.held_out()) and jax.process_count() == 1:
        raise ValueError("the held-out text has no token to predict: use more text, or name one with valid=")


def on_devices(
    batch: HostBatch, mesh: Mesh | None, micro_batches: int | None = None, strategy: str | Strategy = "fsdp+tp"
) -> Batch:
    """Copies a host batch to the devices: rows sharded over the mesh's batch axes, tokens as the strategy says.

    Args:
        batch: Arrays [B, ...], this process's rows.
        mesh: None is one device.
        micro_batches: A, to split the rows into: the arrays become [A, B / A, ...]. None keeps [B, ...].
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy.
    """
    if micro_batches is not None:
        batch = {k: v.reshape(micro_batches, v.shape[0] // micro_batches, *v.shape[1:]) for k, v in batch.items()}
    if mesh is None:
        return jax.device_put(batch)
    rows, tokens = token_sharding(mesh, strategy)
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
    devices, parts = 1, 1
    if mesh is not None:
        axes = map(axis_names, token_sharding(mesh, settings.strategy))
        devices, parts = (math.prod(mesh.shape[name] for name in names) for names in axes)
    if settings.batch % (settings.accumulation * jax.process_count()):
        raise ValueError(f"batch={settings.batch} cannot be shared by {jax.process_count()} processes")
    if rows % devices:
        raise ValueError(f"micro-batches of {rows} rows cannot be shared by {devices} devices: choose another batch")
    if mesh is not None and PIPELINE_AXIS in mesh.shape:
        pipeline.microbatches(rows // devices, mesh.shape[PIPELINE_AXIS])
    if settings.window % parts:
        raise ValueError(f"a window of {settings.window} tokens cannot be shared by {parts} devices: choose another")


def _identity(datasets: Sequence[Dataset], parts: Sequence[sources.Weighted]) -> dict[str, str]:
    """Hashes of the texts, joined by commas, and of the tokenizer; the weights if the run has a mixture."""
    found = {
        "corpus": ",".join(str(dataset.meta["corpus"]) for dataset in datasets),
        "tokenizer": str(datasets[0].meta["tokenizer"]),
    }
    weights = ",".join(f"{part.weight}{'x' * part.epochs}" for part in parts)
    return {**found, "mixture": weights} if parts else found


def with_new_text(data: Data, recorded: Mapping[str, str]) -> Data:
    """The data of a run that goes on with another text; its identity also says which text came before.

    Args:
        data: Of the new text.
        recorded: The identity of the data in run.json.
    """
    before = {f"{INSTEAD_OF}{name}": value for name, value in recorded.items() if not name.startswith(INSTEAD_OF)}
    return dataclasses.replace(data, identity={**data.identity, **before})


def _notes(
    made: Sequence[Component], parts: Sequence[sources.Weighted], weights: Sequence[float], settings: Settings
) -> tuple[str, ...]:
    notes = []
    rows = settings.steps * settings.batch
    for part, component, weight in zip(parts, made, weights, strict=True) if parts else ():
        share = weight / sum(weights)
        epochs = share * rows / component.rows
        notes.append(f"mixture: {share:.1%} of the rows from {part.name}, {epochs:.2f} epochs of it in this run")
    wastes = [component.waste for component in made if component.waste is not None]
    if wastes:
        notes.append(f"packing: {max(wastes):.2%} of the places in the rows are empty")
    return tuple(notes)
