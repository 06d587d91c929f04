"""GPT-1 in the two stages of its paper: pre-training on text, then fine-tuning with a classifier head.

The task: is a snippet of 128 bytes from the package asyncio or from the package email of Python's standard library?
Accuracy is measured on files that were not trained on. Run: python examples/gpt1_tasks.py
"""

import argparse
import asyncio
import email
import pathlib

import jax
import numpy as np

import garrulax as gx
from garrulax.core import spec
from garrulax.models import gpt, heads
from garrulax.train import tasks
from garrulax.train.components import causal_batch
from garrulax.train.objectives import causal_lm
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import init_state
from garrulax.train.step import make_train_step

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=250, help="updates in each of the two stages")
settings = Settings(steps=parser.parse_args().steps)  # the default optimizer, Muon
LENGTH, BATCH = 128, 16
rng = np.random.default_rng(0)


def read(package):
    """The bytes of three quarters of a package's files, to train on, and of the others."""
    files = sorted(pathlib.Path(package.__file__).parent.glob("*.py"))
    texts = [np.frombuffer(file.read_bytes(), np.uint8).astype(np.int32) for file in files]
    return np.concatenate([text for i, text in enumerate(texts) if i % 4]), np.concatenate(texts[::4])


def snippets(texts, count, length=LENGTH):
    """Random snippets of the texts, and as labels the index of the text that each snippet is from."""
    labels = rng.integers(0, len(texts), count)
    starts = [rng.integers(0, len(texts[label]) - length) for label in labels]
    return [texts[label][s : s + length] for label, s in zip(labels, starts, strict=True)], labels


def labelled_batch(texts, count):
    examples, labels = snippets(texts, count)
    return tasks.make_batch("classification", [[snippet] for snippet in examples], labels, control, LENGTH + 2)


def train(params, specs, objective, make_batch):
    """The parameters after all steps of a stage."""
    optimizer = make_optimizer(settings, specs)
    state = init_state(config, optimizer, seed=0, params=params, specs=specs)
    step = make_train_step(config, settings, optimizer, objective)
    for i in range(settings.steps):
        state, metrics = step(state, {name: array[None] for name, array in make_batch().items()})  # one micro-batch
        if i % 50 == 0 or i == settings.steps - 1:
            print(f"step {i:4d}  loss {metrics['loss']:.3f}", flush=True)
    return state.params


training, held_out = zip(*(read(package) for package in (asyncio, email)), strict=True)
config = gx.preset("gpt1", vocab=256, context=LENGTH + 2, layers=2, width=64, heads=4)

print("pre-training: predict the next byte")
params = gx.init(config, jax.random.key(0))
params = train(
    params, gpt.parameters(config), causal_lm, lambda: causal_batch(np.stack(snippets(training, BATCH, LENGTH + 1)[0]))
)

print("fine-tuning: name the package, and predict the next byte")
params, config = heads.add_tokens(params, config, 3, jax.random.key(1))
control = tasks.ControlTokens.of(config)  # the three new tokens
head = {"classifier": heads.classifier(config, outputs=2)}
params |= spec.init(head, jax.random.key(2))
objective = tasks.make_objective("classification")
params = train(params, gpt.parameters(config) | head, objective, lambda: labelled_batch(training, BATCH))

test = labelled_batch(held_out, 512)
predicted = tasks.predict(params, test, config, "classification").argmax(-1)
print(f"accuracy on held-out files: {np.mean(predicted == test['labels']):.1%} (chance is 50 %)")
