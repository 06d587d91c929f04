"""`garrulax merge`: writes a model and an adapter as one model folder."""

import argparse
import sys

import garrulax as gx
from garrulax.cli.models import find_adapter, load


def merge(args: argparse.Namespace) -> None:
    """Runs the command."""
    if find_adapter(args.adapter) is None:
        raise FileNotFoundError(f"{args.adapter} is no adapter: it has no adapter_config.json, or a config.json too")
    model = load(args.adapter, ignore=args.ignore) if args.base is None else load(args.base, args.adapter, args.ignore)
    gx.save(gx.merge(model), args.target, args.max_shard_size)
    print(f"model in {args.target}", file=sys.stderr)
