"""`garrulax train --medusa`: trains Medusa heads for a model and saves them in a folder."""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import garrulax as gx
from garrulax.cli.models import find_model
from garrulax.cli.starting import settings_words
from garrulax.sampling.speculate import medusa_trees
from garrulax.train import typed
from garrulax.train.corpus import Corpus
from garrulax.train.settings import Settings
from garrulax.train.settings_text import read_changes, with_lists
from garrulax.train.sources import expanded

DEFAULTS = Settings(preset="", steps=300, batch=8, lr=1e-3, adam_lr=1e-3, optimizer="adamw")
#: The settings that heads have; further ones are arguments of `gx.train_medusa`.
KNOWN = ("preset", "corpus", "steps", "batch", "window", "lr", "optimizer", "seed")


def train_medusa(args: argparse.Namespace) -> None:
    """Reads the settings, trains heads on the corpus, and saves them."""
    changes = _changes(args)
    settings = typed.replace(DEFAULTS, with_lists(changes))
    folder = Path(expanded(args.run)) if args.run else Path("runs", f"{Path(settings.preset).stem}-medusa")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another --run for the heads")
    model = gx.load(find_model(expanded(settings.preset)))
    texts = [document.text for document in Corpus(settings.corpus)]
    random.Random(settings.seed).shuffle(texts)  # as many are read as the steps need
    heads = gx.train_medusa(
        model,
        texts,
        heads=4 if args.heads is None else args.heads,
        steps=settings.steps,
        batch=settings.batch,
        window=settings.window if "window" in changes else None,
        lr=settings.lr,
        optimizer=settings.optimizer,
        seed=settings.seed,
        choices=args.choices,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    gx.save_medusa(heads, folder)
    assert heads.accuracy is not None
    for i, shares in enumerate(heads.accuracy):
        first, three = float(shares[0]), float(shares[:3].sum())
        print(f"head {i}: its first guess is right in {first:.0%}, one of three in {three:.0%}", file=sys.stderr)
    drafts = min(7, medusa_trees.number_of_paths(*heads.accuracy.shape))
    tree = medusa_trees.best_paths(heads.accuracy, drafts)
    print(f"heads in {folder}; the best tree of {drafts} drafts: {tree}", file=sys.stderr)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by name."""
    for name in ("resume", "mesh", "distributed", "config", "lora"):
        if getattr(args, name, None) is not None:
            raise ValueError(f"--{name} does not go with --medusa, which trains heads in one go on one device")
    changes = read_changes(None, settings_words(args.settings))
    if odd := sorted(changes.keys() - set(KNOWN)):
        raise ValueError(f"heads have no setting {odd[0]}: --medusa knows {', '.join(KNOWN[1:])}")
    if "preset" not in changes:
        raise ValueError("--medusa needs a model with weights: garrulax train --medusa MODEL corpus=FOLDER")
    return changes
