"""Every public object has an example in its docstring, and every example runs as it is printed there."""

import doctest

import pytest

import garrulax as gx
from garrulax import flax as garrulax_flax

pytestmark = pytest.mark.usefixtures("quick_compilation")

OBJECTS = {f"gx.{name}": getattr(gx, name) for name in gx.__all__ if name != "__version__"}
OBJECTS |= {f"flax.{name}": getattr(garrulax_flax, name) for name in garrulax_flax.__all__}


@pytest.mark.parametrize("name", OBJECTS)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(OBJECTS[name], name, module=False, globs={})
    examples = [example for test in found for example in test.examples]
    assert examples, f"{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
