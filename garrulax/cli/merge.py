"""`garrulax merge`: writes a model and an adapter as one model folder; quantised weights become float32 first."""

import argparse
import sys

import garrulax as gx
from garrulax.cli.models import find_adapter, load
from garrulax.core.leaf import Leaf, weights
from garrulax.core.lora import Lora


def merge(args: argparse.Namespace) -> None:
    """Runs the command."""
    if find_adapter(args.adapter) is None:
        raise FileNotFoundError(f"{args.adapter} is no adapter: it has no adapter_config.json, or a config.json too")
    model = load(args.adapter, ignore=args.ignore) if args.base is None else load(args.base, args.adapter, args.ignore)
    if any(isinstance(w, Lora) and isinstance(w.base, Leaf) for w in weights(model.params)):
        print("the weights of the model are quantised: they become float32, and so does their sum", file=sys.stderr)
        model = gx.dequantise(model)
    gx.save(gx.merge(model), args.target, args.max_shard_size)
    print(f"model in {args.target}", file=sys.stderr)
