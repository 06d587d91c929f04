"""`garrulax align` on judged answers: reward models from rankings, preference losses from pairs, KTO from labels."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from garrulax import models
from garrulax.align import answers, labelled, objectives, preference
from garrulax.cli.align_job import Job, check_options, end_ids, keywords, prompt_ids, records
from garrulax.cli.starting import Start
from garrulax.cli.train import say
from garrulax.core.auto_mesh import using
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models import reward as reward_head
from garrulax.train.batches import on_devices
from garrulax.train.loop import Run
from garrulax.train.rows import HostBatch

REFERENCE = "reference.npz"


def _read(begun: Start, job: Job, read: Callable) -> list[list[Any]]:
    """Reads the records to train on and the held-out ones with `answers.ranking` or `labelled.labelled`."""
    tokenizer = begun.model.tokenizer
    assert tokenizer is not None
    form = answers.AnswerFormat(tokenizer, end_ids(begun), prompt_ids(begun))
    return [[read(record, form, where) for where, record in part] for part in records(job)]


def _in_blanks(begun: Start) -> ModelConfig | None:
    """The config of a model whose answers are blanks."""
    return None if models.blanks(begun.model.config) is None else begun.model.config


def _left_out(kind: str, counts: dict[str, int]) -> list[str]:
    return [f"{number:,} {kind} left out: {why}" for why, number in counts.items() if number]


def reward_run(begun: Start, job: Job) -> Run:
    """A reward model, from rankings.

    Raises:
        ValueError: For a model that fills blanks.
    """
    if _in_blanks(begun) is not None:
        raise ValueError(
            "--method reward needs a model that reads from left to right, and this model fills blanks: train it on "
            "the same file with --method dpo or kto, or on prompts with a policy method and --reward MODULE:FUNCTION"
        )
    check_options(job, keywords(objectives.reward_objective))
    s, config = begun.settings, begun.model.config
    made = [answers.ranking_arrays(part, s.window) for part in _read(begun, job, answers.ranking)]
    notes = [line for _, counts in made for line in _left_out("prompts", counts)]
    notes.append(f"rankings: {len(made[0][0]['tokens']):,} prompts, up to {made[0][0]['tokens'].shape[1]} answers each")
    data = answers.array_data(made[0][0], made[1][0], s, notes)

    def params() -> Tree:
        assert begun.params is not None
        return reward_head.add_reward_head(begun.params(), config, jax.random.key(s.seed))

    objective = objectives.reward_objective(**job.options)
    return Run(
        config, s, data, begun.folder, objective=objective, params=params, specs=reward_head.reward_specs(config)
    )


def pairs_run(begun: Start, job: Job) -> Run:
    """A preference loss on pairs."""
    check_options(job, {"nll_weight"} | keywords(getattr(preference, job.method)))
    s, config = begun.settings, begun.model.config
    made = [answers.pair_arrays(part, s.window, _in_blanks(begun)) for part in _read(begun, job, answers.ranking)]
    notes = [line for _, counts in made for line in _left_out("pairs", counts)]
    notes.append(f"pairs: {len(made[0][0]['tokens']):,} to train on, {len(made[1][0]['tokens']):,} held out")
    arrays = [part for part, _ in made]
    if job.method in ("dpo", "ipo"):
        arrays = _with_references(begun, arrays)
    data = answers.array_data(arrays[0], arrays[1], s, notes)
    objective = objectives.pair_objective(job.method, **job.options)
    return Run(config, s, data, begun.folder, objective=objective, params=begun.params)


def kto_run(begun: Start, job: Job) -> Run:
    """KTO on single answers."""
    check_options(job, keywords(objectives.kto_objective))
    s, config = begun.settings, begun.model.config
    flat = [[one for found in part for one in found] for part in _read(begun, job, labelled.labelled)]
    for kind, label in (("desirable", True), ("undesirable", False)):
        if not any(desirable == label for _, desirable in flat[0]):
            raise ValueError(f"{job.data} has no {kind} answers to train on: KTO learns from both kinds")
    made = [labelled.labelled_arrays(part, s.window, _in_blanks(begun)) for part in flat]
    notes = [line for _, counts in made for line in _left_out("answers", counts)]
    good, count = int(made[0][0]["desirable"].sum()), len(made[0][0]["desirable"])
    notes.append(f"answers: {good:,} desirable and {count - good:,} undesirable to train on, "
                 f"{len(made[1][0]['desirable']):,} held out")  # fmt: skip
    arrays = _with_references(begun, [part for part, _ in made])
    data = answers.array_data(arrays[0], arrays[1], s, notes)
    return Run(config, s, data, begun.folder, objective=objectives.kto_objective(**job.options), params=begun.params)


def _with_references(begun: Start, arrays: list[Any]) -> list[Any]:
    """The arrays with the log-probabilities under the model that training begins with.

    A run that is resumed reads them from its folder, if they are of the same model and data.
    """
    file = begun.folder / REFERENCE
    digest = hashlib.sha256(begun.settings.preset.encode())
    for part in arrays:
        digest.update(part["tokens"].tobytes())
    stored = dict(np.load(file)) if file.exists() else {}
    if str(stored.get("digest")) == digest.hexdigest():
        return [{**part, "reference": stored[name]} for name, part in zip(("train", "valid"), arrays, strict=True)]
    say("computing the log-probabilities of the reference")
    assert begun.params is not None
    params, config = begun.params(), begun.model.config
    compute = jax.jit(lambda params, batch: objectives.with_reference(batch, params, config)["reference"])
    mesh, s = begun.mesh, begun.settings

    def of_part(batch: HostBatch) -> np.ndarray:
        return np.asarray(compute(params, on_devices(batch, mesh, strategy=s.strategy)))

    with using(mesh):
        filled = [answers.filled(part, of_part, s.batch, "reference") for part in arrays]
    begun.folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"partial-{REFERENCE}")
    np.savez(partial, digest=digest.hexdigest(), train=filled[0]["reference"], valid=filled[1]["reference"])
    partial.replace(file)
    return filled
