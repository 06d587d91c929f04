"""Every test runs on eight fake CPU devices in one process; set before jax is imported. And the table of README."""

import gc
import os

import pytest
import table

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

# Looking for garbage takes a sixth of the time of finding the tests, and a fifteenth of the time of running them: the
# tests never become garbage, and tracing makes much that is freed soon.
gc.disable()

_found = []


def pytest_collection_finish(session):
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_go():
    """A process that keeps every program of this suite runs out of memory maps, which LLVM answers with a crash."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules where compiling takes far longer than running; the reference cases test the optimised programs."""
    import quick  # not before jax is set up

    with quick.compilation():
        yield


@pytest.fixture(scope="module")
def shared_steps():
    """For modules that train several times with equal settings: their step is traced and compiled once."""
    import quick

    with quick.shared_steps():
        yield


def pytest_addoption(parser):
    parser.addoption("--table", action="store_true", help="write what the tests measured into README's table")


@pytest.fixture(name="table")
def _table(record_property):
    """table(row, column, value): a cell of README's table, as this test found it (`tests/table.py`)."""

    import registry  # not before jax is set up

    def record(row, column, value):
        assert row in registry.ROWS, row
        assert column in table.COLUMNS, column
        plain = value.item() if hasattr(value, "item") else value  # numpy numbers do not pass between processes
        record_property("table", [row, column, plain])

    return record


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _found.extend(value for name, value in report.user_properties if name == "table")


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--table") and not hasattr(session.config, "workerinput") and exitstatus == 0:
        table.write(_found)
