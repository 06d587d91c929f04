"""The training loop: it wires the pieces of this room and has no mathematics of its own."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from garrulax import models
from garrulax.core.sharding import make_mesh
from garrulax.core.spec import Tree
from garrulax.train import plots
from garrulax.train import settings as settings_
from garrulax.train.batches import Data, check_batch, on_devices
from garrulax.train.checkpoint import Checkpoints
from garrulax.train.evaluate import Evaluation, make_evaluate
from garrulax.train.flops import peak_flops, train_flops_per_token
from garrulax.train.interrupts import Interrupts
from garrulax.train.metrics import MetricsLog
from garrulax.train.objectives import OBJECTIVES, Objective, objective_name
from garrulax.train.optimizers import make_optimizer
from garrulax.train.progress import Progress, Speed
from garrulax.train.settings import Settings
from garrulax.train.state import TrainState, abstract_state, init_state
from garrulax.train.step import Metrics, make_train_step

AHEAD = 2  # steps given to the device before waiting: the host prepares the next batch while it computes


class Diverged(FloatingPointError):
    """The loss or its gradient is not a finite number."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What to train, on what, and where to keep it.

    objective: None takes the settings' one. params: start from these (a loaded model) instead of random ones.
    folder: gets run.json, metrics.jsonl, events/, checkpoints/ and loss.png.
    """

    config: Any
    settings: Settings
    data: Data
    folder: Path
    objective: Objective | None = None
    params: Tree | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """params: after `step` updates. finished: False where it was stopped. evaluation: of the final parameters, None
    where it was stopped. best: step of the checkpoint with the lowest held-out loss.
    """

    params: Tree
    step: int
    finished: bool
    evaluation: Evaluation | None
    best: int | None
    picture: Path | None


def train(
    run: Run,
    *,
    resume: bool = False,
    on_finish: Callable[[Result], None] | None = None,
    out: TextIO | None = None,
) -> Result:
    """Trains to the end of the settings' steps, or to the first SIGINT or SIGTERM, which saves and returns.

    resume: go on from the folder's latest checkpoint, exactly as if the run had never stopped, on this or another
    mesh; otherwise the folder must not hold a run. on_finish: called with the result, of a stopped run too, while the
    mesh is set, for exporting. out: where the progress goes, default stderr.

    Several processes call this alike after `jax.distributed.initialize()`.

    Raises ValueError for settings that do not fit together, the devices, or the checkpoint; FileExistsError and
    FileNotFoundError for the folder; Diverged where the loss is not finite, with the last checkpoint intact; OSError
    where saving failed, likewise.
    """
    settings = run.settings
    mesh = _mesh(settings)
    check_batch(settings, mesh)
    identity = settings_.identity(settings, run.config, run.data.identity)
    run.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        saves = stack.enter_context(Checkpoints(run.folder / "checkpoints", identity, settings.keep))
        loop = _Loop(run, mesh, saves, _progress(run, mesh, out))
        state = loop.begin(resume)
        loop.log = stack.enter_context(MetricsLog(run.folder, int(state.step)))
        with Interrupts() as interrupts:
            result = loop.finish(*loop.steps(state, interrupts))
        if on_finish is not None:
            on_finish(result)
        return result


def _mesh(settings: Settings) -> Mesh | None:
    if settings.mesh:
        return make_mesh(settings.mesh)
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes need a mesh: such as mesh=data={jax.device_count()}")
    return None


def _progress(run: Run, mesh: Mesh | None, out: TextIO | None) -> Progress:
    s, peak = run.settings, peak_flops(jax.devices()[0])
    devices = 1 if mesh is None else mesh.size
    flops = train_flops_per_token(run.config, s.window)
    return Progress(s.steps, s.batch * s.window, flops, peak and peak * devices, out)


class _Loop:
    """The parts of one call of `train`."""

    log: MetricsLog

    def __init__(self, run: Run, mesh: Mesh | None, saves: Checkpoints, progress: Progress):
        s, c = run.settings, run.config
        objective = run.objective or OBJECTIVES[objective_name(s.objective, c)]
        self.run, self.mesh, self.saves, self.progress = run, mesh, saves, progress
        self.optimizer = make_optimizer(s, models.parameters(c))
        self.train_step = make_train_step(c, s, self.optimizer, objective)
        self.evaluate = make_evaluate(c, objective, mesh=mesh, precision=s.precision)
        self.speed = Speed()
        self.pending: deque[tuple[int, Metrics]] = deque()  # measured, perhaps still being computed

    def begin(self, resume: bool) -> TrainState:
        """The first state: new, or of the latest checkpoint."""
        run, s = self.run, self.run.settings
        if resume:
            target = abstract_state(run.config, self.optimizer, mesh=self.mesh, rules=s.rules)
            state = self.saves.restore(target)
            self.progress.say(f"resumed {run.folder} at step {int(state.step):,}")
        elif self.saves.latest is not None:
            raise FileExistsError(f"{run.folder} holds a run of {self.saves.latest} steps: resume it or choose another")
        else:
            state = init_state(run.config, self.optimizer, s.seed, mesh=self.mesh, rules=s.rules, params=run.params)
        if jax.process_index() == 0:
            settings_.save(run.folder, s, run.config, run.data.identity)
        return state

    def steps(self, state: TrainState, interrupts: Interrupts) -> tuple[TrainState, int, Evaluation | None]:
        """All steps that are left, or those up to an interrupt: the state, its step and its evaluation, if there is."""
        s, first, evaluation = self.run.settings, int(state.step), None
        if self.log.note:
            self.progress.say(self.log.note)
        for step in range(first + 1, s.steps + 1):
            batch = on_devices(self.run.data.batch_at(step - 1), self.mesh, s.accumulation)
            state, metrics = self.train_step(state, batch)
            self.wait(step, metrics, step == first + 1)
            last = step == s.steps
            stop = interrupts.stop_after(step)
            if (step - AHEAD) % s.log_every == 0 or last or stop:
                self.report()
            evaluation = self.measure(state, step, last) if (step % s.eval_every == 0 or last) and not stop else None
            if step % s.checkpoint_every == 0 or last or stop:
                self.save(state, step, evaluation)
            if stop:
                return state, step, evaluation
        return state, max(first, s.steps), evaluation

    def wait(self, step: int, metrics: Metrics, compiling: bool) -> None:
        """Lets the device work on `AHEAD` steps at most; the first one, which compiles, is waited for."""
        self.pending.append((step, metrics))
        if compiling:
            jax.block_until_ready(metrics)
            self.speed.begin(step)
        elif len(self.pending) > AHEAD:
            self.pending[-1 - AHEAD][1]["loss"].block_until_ready()

    def report(self, ahead: int = AHEAD) -> None:
        """Reads the metrics of all steps but the latest `ahead`, which may still be computed, and shows them."""
        done = [self.pending.popleft() for _ in range(len(self.pending) - ahead)]
        if not done:
            return
        values = jax.device_get([metrics for _, metrics in done])
        for (step, _), v in zip(done, values, strict=True):
            if not v["finite"]:
                raise Diverged(self.diverged(step, float(v["loss"]), float(v["grad_norm"])))
        step, newest = done[-1][0], values[-1]
        seconds = self.speed.lap(step)
        loss = sum(float(v["loss"]) for v in values) / len(values)
        tokens = self.run.settings.batch * self.run.settings.window
        self.log.write(
            step,
            {
                "loss": loss,
                "lr": float(newest["lr"]),
                "grad_norm": float(newest["grad_norm"]),
                "tokens": step * tokens,
                "tokens_per_second": seconds and tokens / seconds,
            },
        )
        self.progress.update(step, loss, float(newest["lr"]), self.speed.per_step)

    def diverged(self, step: int, loss: float, norm: float) -> str:
        """The message for a step that gave no finite number."""
        latest = self.saves.latest
        kept = "no checkpoint was saved yet" if latest is None else f"the checkpoint of step {latest} is intact"
        return f"step {step}: loss {loss}, gradient norm {norm}; {kept}; try a lower lr, a longer warmup or float32"

    def measure(self, state: TrainState, step: int, last: bool) -> Evaluation:
        """Held-out loss, written down and shown; the last one takes all of the text."""
        self.report(ahead=0)
        self.speed.stop()
        tokens = 0 if last else self.run.settings.eval_tokens
        e = self.evaluate(state.params, self.run.data.held_out(), tokens)
        self.log.write(step, {"valid_loss": e.loss, "perplexity": e.perplexity, "bits_per_byte": e.bits_per_byte})
        bits = f"  {e.bits_per_byte:.3f} bits/byte" if e.bits_per_byte is not None else ""
        self.progress.say(f"step {step:,}  held-out loss {e.loss:.4f}  perplexity {e.perplexity:.2f}{bits}")
        self.speed.start()
        return e

    def save(self, state: TrainState, step: int, evaluation: Evaluation | None) -> None:
        """Begins to write a checkpoint, once all steps up to it are known to be finite."""
        self.report(ahead=0)
        self.speed.stop()
        self.saves.save(state, step, None if evaluation is None else evaluation.loss)
        self.speed.start()

    def finish(self, state: TrainState, step: int, evaluation: Evaluation | None) -> Result:
        """Waits for the last checkpoint and draws the curves."""
        self.saves.close()
        self.progress.close()
        run, finished = self.run, step >= self.run.settings.steps
        if finished and evaluation is None:  # resumed at its end
            evaluation = self.evaluate(state.params, run.data.held_out())
        if not finished:
            self.progress.say(f"stopped and saved at step {step:,}; to go on: garrulax train --resume {run.folder}")
        return Result(state.params, step, finished, evaluation, self.saves.best, self.draw() if finished else None)

    def draw(self) -> Path | None:
        """The loss curves, in process 0 and where matplotlib is installed."""
        if jax.process_index() != 0:
            return None
        try:
            return plots.draw(self.run.folder, f"{self.run.folder.name}: {models.count(self.run.config):,} parameters")
        except ImportError:
            self.progress.say("no loss curves are drawn: pip install 'garrulax[plots]' brings matplotlib")
            return None
