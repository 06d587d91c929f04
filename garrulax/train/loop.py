"""The training loop. It connects the other modules of this package and computes nothing itself."""

import contextlib
import dataclasses
import shlex
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from garrulax import models
from garrulax.core.sharding import make_mesh, sharding_report
from garrulax.core.spec import Tree
from garrulax.core.strategies import check_strategy
from garrulax.train import lock, lora, peers, plots, spare
from garrulax.train import settings as settings_
from garrulax.train.agreement import check_agreement
from garrulax.train.batches import check_batch, check_held_out, on_devices
from garrulax.train.checkpoint import Checkpoints
from garrulax.train.continuing import changed, check_data, continued
from garrulax.train.environment import write_environment
from garrulax.train.evaluate import Evaluation, make_evaluate
from garrulax.train.flops import peak_flops, train_flops_per_token
from garrulax.train.guard import first_guard, why_skipped
from garrulax.train.interrupts import Interrupts, Stopped
from garrulax.train.metrics import MetricsLog, held_out_losses, read_metrics
from garrulax.train.norms import named_norms
from garrulax.train.objectives import OBJECTIVES, Batch, objective_name
from garrulax.train.optimizers import make_optimizer
from garrulax.train.profiling import Profiler
from garrulax.train.progress import Progress, StepTimer
from garrulax.train.quantized import check_quantized
from garrulax.train.run import Result, Run, check_rollouts
from garrulax.train.setting_limits import profiled
from garrulax.train.settings import Settings
from garrulax.train.state import TrainState, abstract_state, init_state
from garrulax.train.step import Metrics, make_train_step
from garrulax.train.trackers import Trackers, check_trackers
from garrulax.train.usage import Usage

# Steps that the device may be behind the host, which prepares the next batch while the device computes; on a CPU whose
# programs run in the thread that calls them (`freed_memory`) there are none.
AHEAD = 2


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite, or too many steps were skipped one after another."""


def train(
    run: Run,
    *,
    resume: bool = False,
    on_finish: Callable[[Result], None] | None = None,
    out: TextIO | None = None,
) -> Result:
    """Trains until the last step of the settings, or until SIGINT, SIGTERM or SIGHUP: then it saves and returns.

    With several processes, all of them call this with the same arguments after `jax.distributed.initialize()`.

    Args:
        run: What to train. Without `resume`, its folder must not have a run in it.
        resume: Continue from the latest checkpoint in the folder, on the same or another mesh. The result is exactly
            that of a run which was never stopped, bit for bit on the same mesh, and to the rounding of sums in another
            order on another one. A checkpoint that is damaged is named, and an earlier one is taken; without any the
            run begins at step 0.
        on_finish: Called with the result while the mesh is set, to export the model; also for a stopped run.
        out: Where to write the progress; None is stderr.

    Raises:
        ValueError: If the settings do not fit together, or do not fit the devices or the checkpoint; if processes have
            different ones; or if there is no held-out token to evaluate on.
        FileExistsError: If the folder has a run in it and `resume` is False.
        FileNotFoundError: If `resume` is True and the folder has no run in it.
        FolderInUseError: If another training works in the folder.
        Diverged: If the loss is not finite and the settings skip no such step, or if `most_skipped` steps were skipped
            one after another. The last checkpoint is intact.
        ImportError: If a package is not installed that `trackers` or `quantize` needs.
        OSError: If saving a checkpoint failed. The earlier ones are intact.
    """
    check_agreement(run.settings, run.config, run.data.identity)
    settings, mesh = run.settings, _mesh(run.settings)
    check_batch(settings, mesh)
    check_rollouts(run)
    check_held_out(run.data)
    check_trackers(settings.trackers)
    check_quantized(settings.quantize, settings.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.held(run.folder))
        stack.enter_context(peers.watched(run.folder))
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        adaptation = lora.adapted(run.params, run.config, settings, mesh, run.specs)
        run = lora.with_base(run, adaptation)
        identity = settings_.run_identity(settings, run.config, run.data.identity)
        records = read_metrics(run.folder) if resume else []
        checkpoints = Checkpoints(
            run.folder / "checkpoints", identity, settings.keep, held_out_losses(records), settings.keep_minutes
        )
        stack.enter_context(checkpoints)
        lines = checkpoints.check() if resume else []
        run, more = _continued(run, checkpoints) if resume else (run, [])
        loop = _Loop(run, adaptation, mesh, checkpoints, out)
        report = [] if mesh is None else sharding_report(adaptation.specs, mesh, settings.strategy)
        for line in [*lines, *more, *report]:
            loop.progress.say(line)
        state = loop.first_state(resume)
        trackers = Trackers(settings.trackers, run.folder, identity["settings"], loop.progress.say)
        stack.enter_context(trackers)
        log = stack.enter_context(MetricsLog(run.folder, int(state.step), loop.progress.say, trackers))
        stack.enter_context(loop.profiler)
        with Interrupts() as interrupts:
            done = {name for record in records if record["step"] == int(state.step) for name in record}
            result = loop.finish(*loop.steps(state, log, interrupts, done))
        if on_finish is not None:
            on_finish(result)
        return result


def _mesh(settings: Settings) -> Mesh | None:
    if not settings.mesh and jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes need a mesh: such as mesh=data={jax.device_count()}")
    if not settings.mesh:
        return None
    mesh = make_mesh(settings.mesh)
    check_strategy(settings.strategy, mesh.shape)
    return mesh


def _continued(run: Run, checkpoints: Checkpoints) -> tuple[Run, list[str]]:
    """The run with the learning rate that `continuing.continued` decides, and what to say about its settings."""
    saved, step = checkpoints.saved_identity, checkpoints.latest
    if saved is None or step is None:
        return run, []
    lines = changed(checkpoints.identity["settings"], saved["settings"], step)
    settings, line = continued(run.settings, saved["settings"], step)
    checkpoints.identity = settings_.run_identity(settings, run.config, run.data.identity)
    return dataclasses.replace(run, settings=settings), [*lines, *([] if line is None else [line])]


class _Loop:
    """The objects of one call of `train`, and the steps of the loop."""

    def __init__(
        self, run: Run, adaptation: lora.Adaptation, mesh: Mesh | None, checkpoints: Checkpoints, out: TextIO | None
    ):
        s, c = run.settings, run.config
        objective = run.objective or OBJECTIVES[objective_name(s.objective, c)]
        self.run, self.mesh, self.checkpoints = run, mesh, checkpoints
        self.adaptation = adaptation
        self.optimizer = make_optimizer(s, adaptation.specs)
        self.train_step = make_train_step(c, s, self.optimizer, objective)
        self.evaluate = run.evaluate or make_evaluate(c, objective, mesh=mesh, precision=s.precision)
        self.timer, self.evaluated = StepTimer(), False
        self.whole = 1 if run.rollouts is None else run.rollouts.updates
        peak, devices = peak_flops(jax.devices()[0]), 1 if mesh is None else mesh.size
        amounts = s.batch * s.window, train_flops_per_token(c, s.window), peak and peak * devices
        self.progress, self.usage = Progress(s.steps, *amounts, out), Usage(*amounts)
        self.profiler = Profiler(profiled(s.profile), run.folder / "profile")
        # Steps that are not reported yet, and their metrics, which the device may still compute.
        self.pending: deque[tuple[int, Metrics]] = deque()

    def first_state(self, resume: bool) -> TrainState:
        """The state to start from: new, or of the latest checkpoint. Writes run.json, and its spare copy."""
        run, s = self.run, self.run.settings
        options: dict[str, Any] = {"mesh": self.mesh, "strategy": s.strategy, "strict": s.strict,
                                   "dtype": s.weights, "average": s.ema > 0, "guard": first_guard(s),
                                   "specs": self.adaptation.specs}  # fmt: skip
        if resume and self.checkpoints.latest is not None:
            state = self.checkpoints.restore(abstract_state(run.config, self.optimizer, **options))
            self.progress.say(f"resumed {run.folder} at step {int(state.step):,}")
        elif self.checkpoints.latest is not None:
            raise FileExistsError(
                f"{run.folder} holds a run of {self.checkpoints.latest} steps: resume it or choose another folder"
            )
        elif resume and not (run.folder / settings_.RUN_FILE).exists():
            raise FileNotFoundError(f"{run.folder} is not the folder of a run: it has no run.json and no checkpoint")
        else:
            if resume:
                check_data(run.folder, run.data.identity)
                self.progress.say(f"{run.folder} has no whole checkpoint: it begins at step 0, with the same settings")
            state = init_state(run.config, self.optimizer, s.seed, params=run.params, **options)
        if jax.process_index() == 0:
            settings_.write_run_file(run.folder, s, run.config, run.data.identity)
            spare.keep(run.folder)
            write_environment(run.folder)
        return state

    def model(self, state: TrainState) -> Tree:
        """All parameters of the model, to evaluate and to save."""
        return self.adaptation.joined(state.model)

    def steps(
        self, state: TrainState, log: MetricsLog, interrupts: Interrupts, done: Collection[str] = ()
    ) -> tuple[TrainState, int, Evaluation | None, bool]:
        """Runs the remaining steps, or those until an interrupt.

        Args:
            state: To start from.
            log: For the metrics.
            interrupts: To ask after every step.
            done: Names of what is in the log already for the step of the state.

        Returns:
            The last state, its step, its evaluation, and whether an interrupt stopped the run.
        """
        s, first, evaluation = self.run.settings, int(state.step), None
        if first and self.is_evaluated(first) and first not in self.checkpoints.losses:
            evaluation = self.measure(log, state, first, interrupts)  # the run ended before or in this evaluation
            if evaluation is None:
                return state, first, None, True
        if first:
            self.use(log, state, first, done)  # the run may have ended before that, too
        for step in range(first + 1, s.steps + 1):
            state, batch = self.batch(state, step, log)
            with self.profiler.step(step):
                state, metrics = self.train_step(state, batch, self.adaptation.frozen)
            self.wait(step, metrics, compiling=step == first + 1)
            if self.profiler.ends_with(step):
                self.timer.stop()
                self.profiler.finish(metrics)
                self.progress.say(f"profiler trace in {self.run.folder / 'profile'}")
                self.timer.start()
            stop = interrupts.stop_after(step) and step % self.whole == 0
            if (step - AHEAD) % s.log_every == 0:
                self.report(log)
            should_evaluate = self.is_evaluated(step) and not stop
            if step % s.checkpoint_every == 0 or should_evaluate or stop:
                self.save(log, state, step)
            evaluation = self.measure(log, state, step, interrupts) if should_evaluate else None
            self.use(log, state, step)
            if stop or (should_evaluate and evaluation is None):
                return state, step, evaluation, True
        return state, max(first, s.steps), evaluation, False

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out loss is measured after this step."""
        return step % self.run.settings.eval_every == 0 or step == self.run.settings.steps

    def batch(self, state: TrainState, step: int, log: MetricsLog) -> tuple[TrainState, Batch]:
        """The state and the batch of a step, on the devices; how long it took, if the device had nothing else to do."""
        start, s = time.perf_counter(), self.run.settings
        if self.run.rollouts is None:
            rows = self.run.data.batch_at(step - 1)
        else:
            state, rows, metrics = self.run.rollouts(state, step - 1, self.model(state))
            log.write(step, dict(metrics))
        batch = on_devices(rows, self.mesh, s.accumulation, s.strategy)
        if not self.pending or all(x.is_ready() for x in jax.tree.leaves(self.pending[-1][1])):
            self.usage.waited(time.perf_counter() - start)
        return state, batch

    def wait(self, step: int, metrics: Metrics, compiling: bool) -> None:
        """Waits until the device has at most `AHEAD` unfinished steps; after the first step, which compiles, none."""
        self.pending.append((step, metrics))
        if compiling:
            jax.block_until_ready(metrics)
            self.timer.begin(step)
        elif len(self.pending) > AHEAD:
            self.pending[-1 - AHEAD][1]["loss"].block_until_ready()

    def report(self, log: MetricsLog, ahead: int = AHEAD) -> None:
        """Logs and shows the metrics of all steps except the latest `ahead`, which the device may still compute."""
        done = [self.pending.popleft() for _ in range(len(self.pending) - ahead)]
        if not done:
            return
        values = jax.device_get([metrics for _, metrics in done])
        for (step, _), v in zip(done, values, strict=True):
            if "guard" in v:
                self.note_skipped(log, step, v)
            elif not v["finite"]:
                raise Diverged(self.diverged(f"step {step}: loss {v['loss']}, gradient norm {v['grad_norm']}"))
        step, newest = done[-1][0], values[-1]
        counted = [float(v["loss"]) for v in values if "guard" not in v or not v["guard"]["skipped"]]
        loss = sum(counted) / len(counted) if counted else None
        log.write(
            step,
            {
                "loss": loss,
                "lr": float(newest["lr"]),
                **({"grad_norm": float(newest["grad_norm"]), **named_norms(newest["grad_norms"])} if counted else {}),
                **{name: float(x) for name, x in newest["extra"].items()},
                "tokens": step * self.run.settings.batch * self.run.settings.window,
                **self.usage.record(self.timer.lap(step), len(done)),
            },
        )
        if loss is not None:
            self.progress.update(step, loss, float(newest["lr"]), self.timer.per_step)

    def note_skipped(self, log: MetricsLog, step: int, v: Metrics) -> None:
        """Logs and says that a step was skipped, if it was. Raises Diverged if it is one too many in a row."""
        if not v["guard"]["skipped"]:
            return
        why, most = why_skipped(v), self.run.settings.most_skipped
        log.write(step, {"skipped": 1, "skipped_because": why})
        self.progress.say(f"step {step:,} skipped: {why}")
        if v["guard"]["in_a_row"] >= most:
            raise Diverged(self.diverged(f"step {step}: {most} steps in a row were skipped, the last for its {why}"))

    def diverged(self, what: str) -> str:
        """The error message for a run that cannot go on."""
        latest = self.checkpoints.latest
        saved = "no checkpoint was saved yet" if latest is None else f"the checkpoint of step {latest} is intact"
        return f"{what}; {saved}; try a lower lr, a longer warmup or float32"

    def measure(self, log: MetricsLog, state: TrainState, step: int, interrupts: Interrupts) -> Evaluation | None:
        """Evaluates, logs and shows the held-out loss; after the last step on all of the held-out text.

        None if a signal comes meanwhile: the evaluation is repeated when the run is resumed. The step is saved already.
        The first evaluation, which compiles and takes the most memory, waits until the checkpoint is complete.
        """
        self.timer.stop()
        if not self.evaluated:
            self.checkpoints.wait()
            self.evaluated = True
        tokens = 0 if step == self.run.settings.steps else self.run.settings.eval_tokens
        texts, found = {"": self.run.data.held_out, **self.run.data.eval_texts}, {}
        try:
            for name, batches in texts.items():
                found[name] = self.evaluate(self.model(state), interrupts.until_received(batches()), tokens)
        except Stopped:
            return None
        self.checkpoints.record(step, found[""].loss)
        for name, e in found.items():
            self.show(log, step, e, name)
        self.timer.start()
        return found[""]

    def show(self, log: MetricsLog, step: int, e: Evaluation, text: str = "") -> None:
        """Logs and shows an evaluation; `text` is the name of one of the further texts."""
        end = f"/{text}" if text else ""
        if e.reward is not None:
            log.write(step, {"valid_loss": e.loss, "valid_reward": e.reward})
            self.progress.say(f"step {step:,}  held-out reward {e.reward:.4f}")
            return
        values = {"valid_loss": e.loss, "bits_per_byte": e.bits_per_byte}
        of_tokens = self.run.objective in (None, *OBJECTIVES.values())  # of other losses there is no perplexity
        if of_tokens:
            values["perplexity"] = e.perplexity
        log.write(step, {f"{name}{end}": value for name, value in values.items()})
        bits = f"  {e.bits_per_byte:.3f} bits/byte" if e.bits_per_byte is not None else ""
        where = f" of {text}" if text else ""
        perplexity = f"  perplexity {e.perplexity:.2f}" if of_tokens else ""
        self.progress.say(f"step {step:,}  held-out loss{where} {e.loss:.4f}{perplexity}{bits}")

    def use(self, log: MetricsLog, state: TrainState, step: int, done: Collection[str] = ()) -> None:
        """Exports the model and lets it write, after the steps that the settings say; not what is done already."""
        run, s = self.run, self.run.settings
        exports = run.export is not None and s.export_every and step % s.export_every == 0 and "exported" not in done
        writes = (
            run.write_samples is not None and s.sample_every and step % s.sample_every == 0 and "sample" not in done
        )
        if not exports and not writes:
            return
        self.report(log, ahead=0)
        self.timer.stop()
        if run.export is not None and exports:
            run.export(self.model(state), step)
            log.write(step, {"exported": 1})
        if run.write_samples is not None and writes:
            for prompt, text in run.write_samples(self.model(state)):
                log.write(step, {"prompt": prompt, "sample": text})
                self.progress.say(f"step {step:,}  {prompt!r} goes on: {text!r}")
        self.timer.start()

    def save(self, log: MetricsLog, state: TrainState, step: int) -> None:
        """Starts to write a checkpoint, after `report` has checked that all steps up to it are finite."""
        self.report(log, ahead=0)
        self.timer.stop()
        self.checkpoints.save(state, step)
        self.timer.start()

    def finish(self, state: TrainState, step: int, evaluation: Evaluation | None, stopped: bool) -> Result:
        """Waits for the last checkpoint and draws the loss curves."""
        self.checkpoints.close()
        self.progress.close()
        run, finished = self.run, not stopped
        if finished and evaluation is None:  # the run was resumed after its last step
            evaluation = self.evaluate(self.model(state), run.data.held_out())
        if not finished:
            self.progress.say(
                f"stopped and saved at step {step:,}; continue with: garrulax train --resume "
                f"{shlex.quote(str(run.folder))}"
            )
        return Result(
            self.model(state), step, finished, evaluation, self.checkpoints.best, self.draw() if finished else None
        )

    def draw(self) -> Path | None:
        """Draws the loss curves, in process 0 only and if matplotlib is installed."""
        if jax.process_index() != 0:
            return None
        try:
            return plots.draw(self.run.folder, f"{self.run.folder.name}: {models.count(self.run.config):,} parameters")
        except ImportError:
            self.progress.say("no loss curves are drawn; to get them: pip install 'garrulax[plots]'")
            return None
