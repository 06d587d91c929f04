"""Running one side of a comparison in a process of its own."""

import json
import subprocess


def measure(command: list[str]) -> dict:
    """The JSON that a command prints last. Exits with what the command said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
