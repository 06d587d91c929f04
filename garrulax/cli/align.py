"""`garrulax align`: instruction tuning, reward models, preference losses and reinforcement learning from a file."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import garrulax as gx
from garrulax import models
from garrulax.align import answers, objectives, rl, sft
from garrulax.align.conversations import (
    Example,
    as_messages,
    conversation,
    encode,
    has_chat_format,
    plain,
    read_records,
)
from garrulax.align.neftune import neftune
from garrulax.align.policy_objectives import (
    METHODS,
    on_model,
    policy_model,
    policy_objective,
    policy_params,
    policy_specs,
)
from garrulax.align.reward_files import load_reward_model, save_reward_model
from garrulax.align.rollouts import Prompts, Sampled
from garrulax.cli import starting
from garrulax.cli.align_job import Job, check_options, end_ids, policy_mesh, prompt_ids, records, token_parts
from garrulax.cli.align_preferences import kto_run, pairs_run, reward_run
from garrulax.cli.starting import Start
from garrulax.cli.train import MODEL, product, save_model, say
from garrulax.core.sharding import batch_sharding, place
from garrulax.core.spec import Tree
from garrulax.core.strategies import BATCH_AXES
from garrulax.models import reward as reward_head
from garrulax.train import lora
from garrulax.train.batches import Data, check_batch, make_data
from garrulax.train.digests import write_durably
from garrulax.train.freed_memory import run_in_the_calling_thread
from garrulax.train.loop import Result, Run
from garrulax.train.loop import train as run_training
from garrulax.train.objectives import blank_infilling, causal_lm
from garrulax.train.shards import build_shards
from garrulax.train.sources import expanded

FILE = "align.json"
ALL = ("sft", "reward", *objectives.PAIR_LOSSES, "kto", *METHODS)


def align(args: argparse.Namespace) -> None:
    """Trains by the method that the command line names; of `garrulax train --sft FILE` by sft."""
    run_in_the_calling_thread()
    args = _completed(args)
    begun = starting.start(args)
    if args.resume:
        job = Job(**json.loads(Path(begun.folder, FILE).read_text(encoding="utf-8")))
    else:
        job = _job(args)
    if not begun.loaded:
        raise ValueError(f"{begun.settings.preset} is a preset without weights: align begins with a trained model")
    if begun.model.tokenizer is None:
        raise ValueError(f"{begun.settings.preset} has no tokenizer")
    starting.check(begun.model.config, begun.settings, begun.model.tokenizer)
    run = _MAKE[_kind(job.method)](begun, job)
    identity = {**run.data.identity, "tokenizer": begun.model.tokenizer.fingerprint}
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, identity=identity))
    for line in run.data.notes:
        say(line)
    if not args.resume:
        begun.folder.mkdir(parents=True, exist_ok=True)
        starting.save_tokenizer(begun)
        write_durably(begun.folder / FILE, json.dumps(dataclasses.asdict(job), indent=2) + "\n")
    finish = functools.partial(_finish, begun, job, run)
    result = run_training(run, resume=bool(args.resume), on_finish=finish)
    if result.finished:
        e = result.evaluation
        if e is not None:
            what = f"held-out reward {e.reward:.4f}" if e.reward is not None else f"held-out loss {e.loss:.4f}"
            made = MODEL if job.method == "reward" else product(begun)
            say(f"\n{what}; {made} in {begun.folder / made}")


def _completed(args: argparse.Namespace) -> argparse.Namespace:
    """Adds the arguments that `starting.start` reads and this command lacks, and names the run after the method.

    Raises:
        ValueError: With --resume, an argument that align.json has already.
    """
    given = vars(args)
    if given.get("sft"):
        for name in ("medusa", "distributed", "list"):
            if given.get(name):
                raise ValueError(f"--{name} does not go with --sft")
        given = {**given, "method": "sft", "data": given["sft"], "valid": "", "reward": "", "option": [], "ptx": None}
    if given["resume"]:
        for name in ("method", "data", "valid", "reward", "option", "ptx", "lora"):
            if given.get(name):
                raise ValueError(f"--{name} does not go with --resume: the run goes on with what it began with")
    given = {**given, "new_data": False, "method": given.get("method") or "sft"}
    if not given["run"] and not given["resume"]:
        models = [word for word in starting.settings_words(given["settings"]) if word.startswith("preset=")]
        if models:
            given["run"] = str(Path("runs", f"{starting.name_of(models[0].removeprefix('preset='))}-{given['method']}"))
    return argparse.Namespace(**given)


def _job(args: argparse.Namespace) -> Job:
    if args.method not in ALL:
        raise ValueError(f"--method {args.method}: choose from {', '.join(ALL)}")
    if not args.data:
        raise ValueError("--data FILE is needed: JSON lines (docs/alignment.md shows their forms)")
    if args.method in METHODS and not args.reward:
        raise ValueError(f"--method {args.method} needs --reward MODULE:FUNCTION, or --reward FOLDER of a reward model")
    for name in ("reward", "ptx"):
        if args.method not in METHODS and getattr(args, name):
            raise ValueError(f"--{name} does not go with --method {args.method}: it is for {', '.join(METHODS)}")
    options = {}
    for word in args.option:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--option {word} is not like beta=0.1")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    data, valid = (str(Path(expanded(path)).absolute()) if path else "" for path in (args.data, args.valid))
    return Job(args.method, data, valid, args.reward or "", options, args.ptx or 0.0)


def _kind(method: str) -> str:
    return "policy" if method in METHODS else "pairs" if method in objectives.PAIR_LOSSES else method


# -- SFT --------------------------------------------------------------------------------------------------------------


def _sft(begun: Start, job: Job) -> Run:
    tokenizer, ends, ids = begun.model.tokenizer, end_ids(begun), prompt_ids(begun)
    assert tokenizer is not None

    in_blanks = models.blanks(begun.model.config) is not None

    def example(where: str, record: dict) -> Example:
        messages = conversation(record, where)
        if has_chat_format(tokenizer):
            return encode(tokenizer, messages, ends, where, last_only=in_blanks)
        return plain(tokenizer, messages, ends, where, ids)

    train, valid = ([example(*one) for one in part] for part in records(job))
    check_options(job, ["neftune"])
    settings, objective, alpha = begun.settings, blank_infilling if in_blanks else causal_lm, job.options.get("neftune")
    if alpha is not None:  # the step has a key where there is dropout
        objective, settings = neftune(objective, alpha), dataclasses.replace(settings, dropout=True)
    if in_blanks:
        parts = [sft.fitting(part, settings.window) for part in (train, valid)]
        notes = [f"{dropped:,} conversations left out: longer than window={settings.window}" for _, dropped in parts
                 if dropped]  # fmt: skip
        arrays = [sft.blank_arrays(part, begun.model.config, settings.window) for part, _ in parts]
        data = answers.array_data(arrays[0], arrays[1], settings, notes)
    else:
        data = sft.make_sft_data(train, valid, settings)
    return Run(begun.model.config, settings, data, begun.folder, objective=objective, params=begun.params)


# -- Reinforcement learning -------------------------------------------------------------------------------------------


def _policy(begun: Start, job: Job) -> Run:
    config, tokenizer = begun.model.config, begun.model.tokenizer
    assert tokenizer is not None
    assert begun.params is not None
    settings, s = _policy_settings(job), begun.settings
    mesh = policy_mesh(begun)
    reward, reward_digest = reward_function(job.reward, mesh, s.strategy)
    given = [[_prompt(record, where, tokenizer) for where, record in part] for part in records(job)]
    prompts, held_out = (Prompts(part, config, tokenizer, settings.limit, token_parts(mesh, s)) for part in given)
    s = dataclasses.replace(s, window=prompts.length)
    check_batch(s, mesh)
    reference = begun.params()
    if mesh is not None:
        reference = place(reference, models.parameters(config), mesh, s.strategy, s.strict)
    values = settings.method == "ppo"
    keywords = {k: getattr(settings, k) for k in ("clip", "clip_high", "limit", "clip_value", "value_weight")}
    beta = 0.0 if settings.in_reward else settings.beta
    objective = policy_objective(settings.method, beta=beta, **keywords)
    identity, text = {"corpus": hashlib.sha256(json.dumps(given).encode()).hexdigest()}, None
    if job.ptx:
        objective = objectives.mixed(objective, on_model(causal_lm), job.ptx)
        of_text = _text(begun, prompts.length)
        text = of_text.batch_at
        identity |= {f"ptx_{name}": value for name, value in of_text.identity.items()}
    needed = settings.beta > 0 or settings.target_kl is not None
    if needed:
        identity["reference"] = _digest(reference, mesh)
    if reward_digest:
        identity["reward"] = reward_digest
    made = rl.PolicyRollouts(
        prompts, reward, config, settings, s.batch, s.seed,
        reference=reference if needed else None,
        tokenizer=tokenizer, end_tokens=end_ids(begun), text=text, mesh=mesh, strategy=s.strategy, say=say,
    )  # fmt: skip
    notes = (f"prompts: {len(prompts):,} to train on, {len(held_out):,} held out; {made.rows} responses of at most "
             f"{settings.limit} tokens a rollout, {made.updates} updates each",)  # fmt: skip
    nothing = {"weights": np.ones((1, 1), np.float32)}  # the evaluation makes its own batches
    data = Data(lambda step: nothing, lambda: iter([nothing]), identity, notes)

    def params() -> Tree:  # copies: a step donates its state, and the reference stays
        return policy_params(
            jax.tree.map(jnp.copy, reference), config, settings.beta, values=values, key=jax.random.key(s.seed)
        )

    return Run(
        config, s, data, begun.folder, objective=objective, params=params, specs=policy_specs(config, values=values),
        rollouts=made, evaluate=made.evaluate(held_out),
    )  # fmt: skip


def _policy_settings(job: Job) -> rl.PolicySettings:
    check_options(job, {field.name for field in dataclasses.fields(rl.PolicySettings)} - {"method"})
    return rl.PolicySettings(job.method, **job.options)


def _prompt(record: dict, where: str, tokenizer: Any) -> Any:
    prompt = record.get("prompt", record.get("messages"))
    if not prompt:
        raise ValueError(f"{where} has no prompt, but {', '.join(record)}")
    if isinstance(prompt, str) and has_chat_format(tokenizer):
        return [{"role": "user", "content": prompt}]
    return prompt


def _text(begun: Start, window: int) -> Data:
    """The pre-training text of PPO-ptx, from the setting `corpus`."""
    s = dataclasses.replace(begun.settings, window=window)
    assert begun.model.tokenizer is not None
    datasets = [build_shards(part, begun.model.tokenizer, say=say) for part in starting.corpora(s).parts]
    return make_data(datasets, s, begun.model.config, begun.model.tokenizer)


def _digest(params: Tree, mesh: Mesh | None) -> str:
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return lora.digest(params)


def reward_function(name: str, mesh: Mesh | None = None, strategy: str = "fsdp+tp") -> tuple[rl.Reward, str]:
    """The function "module:function", of samples (`align.rollouts.Sampled`), or the scores of a reward model's folder.

    Args:
        name: Of either.
        mesh: On which a reward model computes; None is one device.
        strategy: How the mesh shards it.

    Returns:
        The function, and the digest of the reward model's weights, which is empty for a function of a module.

    Raises:
        ValueError: If there is neither.
    """
    folder = Path(expanded(name))
    if folder.is_dir():
        return _model_scores(folder / MODEL if (folder / MODEL).is_dir() else folder, mesh, strategy)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"--reward {name}: give MODULE:FUNCTION, or the folder of a reward model")
    sys.path.insert(0, "")  # a module in the working folder, as `python -m` finds it
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward {name}: {error}") from error
    return lambda samples: [float(found(one)) for one in samples], ""


def _model_scores(folder: Path, mesh: Mesh | None, strategy: str) -> tuple[rl.Reward, str]:
    model = load_reward_model(folder)
    params, where, multiple = model.params, None, 1
    if mesh is not None:
        params = place(params, reward_head.reward_specs(model.config), mesh, strategy)
        where, multiple = NamedSharding(mesh, batch_sharding(mesh)), math.prod(mesh.shape.get(n, 1) for n in BATCH_AXES)
    compute = jax.jit(lambda params, tokens, length: reward_head.scores(params, tokens, length, model.config))

    def scores(samples: Sequence[Sampled]) -> list[float]:
        longest = max(len(one.prompt) + len(one.response) for one in samples)
        width = min(1 << (longest - 1).bit_length(), model.config.context)
        rows = len(samples) + -len(samples) % multiple
        tokens, length = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for i, one in enumerate(samples):
            ids = [*one.prompt, *one.response][:width]
            tokens[i, : len(ids)], length[i] = ids, len(ids)
        found = compute(params, *jax.device_put((tokens, length), where))
        return np.asarray(found, np.float64)[: len(samples)].tolist()

    return scores, _digest(params, mesh)


# -- The end ----------------------------------------------------------------------------------------------------------


def _finish(begun: Start, job: Job, run: Run, result: Result) -> None:
    params = result.params
    if job.method == "reward":
        params = reward_head.centred(params, _mean_of_best(params, run, begun))
        save_reward_model(_merged(begun, params), begun.folder / MODEL)
    else:
        model = policy_model(params) if job.method in METHODS else params
        save_model(begun, model, begun.folder / product(begun))
    if not result.finished:
        return
    if job.method == "reward":
        words = ["garrulax", "align", begun.settings.preset, "--method", "ppo", "--reward", str(begun.folder), "--data"]
        say(f"next: {shlex.join([*words, job.data])}")
    else:
        text = [] if has_chat_format(begun.model.tokenizer) else [_first_text(job)]
        say(f"next: {shlex.join(['garrulax', 'generate' if text else 'chat', str(begun.folder), *text])}")


def _first_text(job: Job) -> str:
    """The first prompt of the data, for a model without a chat format."""
    record = next(read_records(job.data))[1]
    messages = conversation(record) if job.method == "sft" else as_messages(record["prompt"], "user")
    return str(messages[0]["content"])


def _merged(begun: Start, params: Tree) -> gx.Model:
    """The model with a reward head, and its adapters merged into its weights."""
    if not begun.settings.lora:
        return begun.model.replace(params=params)
    model = gx.merge(begun.with_params(reward_head.without_head(params)))
    return model.replace(params={**model.params, reward_head.NAME: params[reward_head.NAME]})


def _mean_of_best(params: Tree, run: Run, begun: Start) -> float:
    """The mean reward of the best answers to train on: it is taken off, so that good answers score 0 on average."""
    compute: Callable = jax.jit(lambda params, tokens, length: reward_head.scores(params, tokens, length, run.config))
    found = []
    for step in range(max(1, min(20, begun.settings.steps))):
        batch = run.data.batch_at(step)
        best = batch["rank"].argmin(axis=1)
        rows = np.arange(len(best))
        found.append(np.asarray(compute(params, batch["tokens"][rows, best], batch["length"][rows, best])))
    return float(np.concatenate(found).mean())


_MAKE: dict[str, Callable[[Start, Job], Run]] = {
    "sft": _sft,
    "reward": reward_run,
    "pairs": pairs_run,
    "kto": kto_run,
    "policy": _policy,
}
