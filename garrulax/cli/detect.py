"""`garrulax detect`: whether a text was written with a watermark."""

import argparse
import dataclasses
import json

import garrulax as gx
from garrulax.cli.models import find_model
from garrulax.cli.score import text_of
from garrulax.cli.watermarks import watermark_of


def detect(args: argparse.Namespace) -> None:
    """Prints what the detector found, or with `--json` one object that has it."""
    text = text_of(args)
    mark = watermark_of(args.key, "--", scheme=args.scheme, gamma=args.gamma, context=args.context)
    model = gx.load(find_model(args.model), only=(), ignore=args.ignore)
    found = gx.detect_watermark(text, mark, model.tokenizer)
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    name = "green tokens" if mark.scheme == "green" else "sum of -log(1 - u)"
    print(f"tokens scored {found.scored} (repeated and not scored: {found.repeated}), {name} {found.statistic:.6g}")
    print(f"z {found.z:.2f}, p-value {found.p_value:.3g}")
