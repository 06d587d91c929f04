"""What `garrulax align` is asked to do: its arguments, the records of its files, and what it reads from the model."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import Mesh

from garrulax import models
from garrulax.align import answers
from garrulax.align.conversations import read_records
from garrulax.cli.starting import Start
from garrulax.core.sharding import axis_names, token_sharding
from garrulax.core.strategies import PIPELINE_AXIS, check_strategy
from garrulax.sampling.ends import ends_of
from garrulax.sampling.partners import encode_prompt
from garrulax.train.settings import Settings


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of the command, besides the settings; align.json in the run's folder keeps them.

    Attributes:
        method: One of `cli.align.ALL`.
        data: File of conversations, answers or prompts.
        valid: File of held-out ones; "" holds out one in twenty.
        reward: "module:function", or the folder of a reward model.
        options: Of the method, by name.
        ptx: Weight of the loss on the text `corpus=`, for PPO-ptx.
    """

    method: str
    data: str
    valid: str = ""
    reward: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    ptx: float = 0.0


def check_options(job: Job, known: Iterable[str]) -> None:
    """Raises ValueError for an --option that the method does not have."""
    names = sorted(known)
    if odd := sorted(job.options.keys() - set(names)):
        raise ValueError(f"--option {odd[0]}: --method {job.method} knows {', '.join(names)}")


def keywords(function: Callable) -> set[str]:
    """The keyword-only parameters of a function."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def records(job: Job) -> tuple[list[tuple[str, dict]], list[tuple[str, dict]]]:
    """Reads the data of a job.

    Returns:
        The records to train on and the held-out ones, each with its place in the file.
    """
    found = list(read_records(job.data))
    if job.valid:
        return found, list(read_records(job.valid))
    train, held = answers.split(len(found))
    return [found[i] for i in train], [found[i] for i in held]


def end_ids(begun: Start) -> tuple[int, ...]:
    """The ids that end an answer."""
    return ends_of(begun.model, begun.model.config, begun.model.tokenizer, None)


def prompt_ids(begun: Start) -> Callable[[str], list[int]] | None:
    """The ids of a prompt for a model that fills blanks: with the mask and the token that begins a blank; else None."""
    config, tokenizer = begun.model.config, begun.model.tokenizer
    if models.blanks(config) is None:
        return None
    return lambda text: list(encode_prompt(text, None, config, tokenizer, "a prompt").ids)


def policy_mesh(begun: Start) -> Mesh | None:
    """The devices on which a policy writes and is trained; None is one device.

    Raises:
        ValueError: The mesh does not fit the devices or the strategy, or has stages of layers.
    """
    mesh, settings = begun.mesh, begun.settings
    if mesh is None:
        return None
    check_strategy(settings.strategy, mesh.shape)
    if mesh.shape.get(PIPELINE_AXIS, 1) > 1:
        raise ValueError(
            f"mesh={settings.mesh}: a policy also writes, which does not run in stages: leave the axis pipeline out"
        )
    return mesh


def token_parts(mesh: Mesh | None, settings: Settings) -> int:
    """Into how many parts the mesh splits the tokens of a row."""
    if mesh is None:
        return 1
    _, tokens = token_sharding(mesh, settings.strategy)
    return math.prod(mesh.shape[name] for name in axis_names(tokens))
