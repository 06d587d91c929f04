"""`garrulax report`: one HTML page about one or several runs."""

import argparse
from pathlib import Path

from garrulax.train.report import write_report


def report(args: argparse.Namespace) -> None:
    """Writes the page into the folder of the first run, or into the file that `--out` names."""
    target = Path(args.out) if args.out else Path(args.runs[0], "report.html")
    print(f"report in {write_report(args.runs, target)}")
