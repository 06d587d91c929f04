"""What a training run is made of, and what it results in."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.train.batches import Data
from garrulax.train.evaluate import Evaluation
from garrulax.train.objectives import Objective
from garrulax.train.rows import HostBatch
from garrulax.train.settings import Settings
from garrulax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """The inputs of a training run, and the folder for its results.

    Attributes:
        config: Of the model.
        settings: Of the run.
        data: Batches to train on and to evaluate on.
        folder: For run.json, metrics.jsonl, events/, checkpoints/ and loss.png.
        objective: None takes the one that the settings name.
        params: Parameters to start from, such as those of a loaded model, or a function that returns them, which keeps
            no second copy in memory; None draws random ones. They are not needed to resume, unless the settings train
            adapters: checkpoints have these alone.
        export: Called as `export(params, step)` every `export_every` steps, to save the model; None saves none.
        write_samples: Called with the parameters every `sample_every` steps, while the mesh is set; returns pairs of a
            prompt and what the model writes after it. None writes none.
        specs: ParamSpec tree of the parameters, if they have more leaves than the config's family says, such as a head.
        rollouts: Makes the batches instead of `data.batch_at`, from what the model itself writes; see `Rollouts`.
        evaluate: `evaluate(params, batches, tokens)`, instead of that of `evaluate.make_evaluate`.
    """

    config: ModelConfig
    settings: Settings
    data: Data
    folder: Path
    objective: Objective | None = None
    params: Tree | Callable[[], Tree] | None = None
    export: Callable[[Tree, int], None] | None = None
    write_samples: Callable[[Tree], Sequence[tuple[str, str]]] | None = None
    specs: Tree | None = None
    rollouts: "Rollouts | None" = None
    evaluate: Callable[..., Evaluation] | None = None


class Rollouts(Protocol):
    """Batches that depend on the parameters, as in reinforcement learning.

    Attributes:
        updates: Steps for which one rollout is used. Checkpoints and stops come only between rollouts, so that a
            resumed run makes the rollouts that it would have made.
    """

    updates: int

    def __call__(self, state: TrainState, step: int, params: Tree) -> tuple[TrainState, HostBatch, Mapping[str, float]]:
        """Makes the batch of a step.

        Args:
            state: Of the run, before the step.
            step: Counted from 0.
            params: All parameters of the model, with those that are not trained.

        Returns:
            The state, in which it may have changed parameters that the optimizer does not; this process's rows of the
            batch; and metrics of the rollout, to be logged.
        """


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a training run.

    Attributes:
        params: After `step` steps; their moving average, if the settings ask for one.
        step: Number of updates.
        finished: False if the run was stopped before its last step.
        evaluation: Of the final parameters; None if the run was stopped.
        best: Step of the checkpoint with the lowest held-out loss; None if none was evaluated.
        picture: Path of loss.png; None if it was not drawn.
    """

    params: Tree
    step: int
    finished: bool
    evaluation: Evaluation | None
    best: int | None
    picture: Path | None


def check_rollouts(run: Run) -> None:
    """Checks that checkpoints come between rollouts. Raises ValueError if they do not."""
    updates = 1 if run.rollouts is None else run.rollouts.updates
    for name in ("steps", "checkpoint_every", "eval_every"):
        value = getattr(run.settings, name)
        if value % updates:
            raise ValueError(f"{name}={value} is not a multiple of the {updates} steps that one rollout is used for")
