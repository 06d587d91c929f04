"""What tests need that compile for TPUs that are not there."""

import importlib.util

import pytest

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed: jax[tpu] has it"
)
