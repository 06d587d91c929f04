"""Programs that are compiled ahead of their first call, in other threads: while weights are read, or side by side."""

import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax

from garrulax.layers import host_memory
from garrulax.layers.cache import on_host
from garrulax.sampling import programs

MOST = 64  # programs kept
_log = logging.getLogger("garrulax")

#: Options of XLA for decoding steps on a GPU: products of the same few activations with several weights (query, key and
#: value; gate and up) become one kernel, which reads each weight where it lies. One of 32 MB reads 3.3 TB/s of an
#: H200's memory, one of 90 MB 3.9 TB/s. Not for reading prompts: with many rows XLA would rather copy the weights
#: together for cuBLAS.
GPU_STEPS = {"xla_gpu_dot_merger_threshold_mb": 512}

_pool = concurrent.futures.ThreadPoolExecutor(3, thread_name_prefix="compile")
_lock = threading.Lock()
_tracing = threading.Lock()  # Python traces one program at a time anyway: so the first is compiled as soon as it can be
_programs: dict[Hashable, concurrent.futures.Future] = {}


def compile_ahead(function: Any, *args: Any, gpu: dict[str, Any] | None = None, **static: Any) -> None:
    """Begins to compile a jitted function for arguments of these shapes and dtypes, on the default device.

    Args:
        function: From `jax.jit`.
        *args: Its positional arguments, arrays or abstract ones (`jax.ShapeDtypeStruct`).
        gpu: Options of XLA where that device is a GPU.
        **static: Its static arguments, by name.
    """
    config: Any = jax.config  # its attributes are created at run time, so mypy does not know them
    if config.jax_disable_jit or not jax.sharding.get_abstract_mesh().empty:
        return
    key = _key(function, args, static)
    with _lock:
        if key in _programs:
            return
        while len(_programs) >= MOST:
            del _programs[next(iter(_programs))]
        abstract, settings = jax.tree.map(_abstract, args, on_host(args)), _settings()
        options = gpu if _default_device().platform == "gpu" else None

        future: concurrent.futures.Future = concurrent.futures.Future()
        _programs[key] = future
        _pool.submit(_compile, future, function, abstract, static, options, settings)


def _compile(
    future: concurrent.futures.Future,
    function: Any,
    args: tuple,
    static: dict[str, Any],
    options: dict[str, Any] | None,
    settings: tuple,
) -> None:
    """Gives a future its program: that in the cache on disk, or it is compiled, and kept there if there is a cache."""
    if not future.set_running_or_notify_cancel():
        return
    file = program = None
    try:
        # Settings of a context, such as `jax.enable_x64(True)`, hold in the thread of the caller only.
        if _settings() == settings:
            device = _default_device()
            file = programs.file_of(function, args, static, options, device)
            program = None if file is None else programs.read(file, args, device)
            if program is not None:
                file = None
            else:
                with _tracing:
                    lowered = function.lower(*args, **static)
                program, own = programs.compile_anew(lowered, options)
                file = file if own else None
    except Exception as error:  # the call itself raises it, where it belongs
        if options:
            _log.warning("a program is compiled without the options %s: %s", options, error)
    future.set_result(program)  # now, since somebody may wait for it
    if file is not None and program is not None:
        programs.write(file, program)


def call_ahead(function: Callable[[], Any]) -> None:
    """Calls a function in one of the threads that compile, after the programs that are being compiled.

    An error is left to whoever calls what the function prepares.
    """
    with _lock:
        _programs[object()] = _pool.submit(_quietly, function, _settings())


def _quietly(function: Callable[[], Any], settings: tuple) -> None:
    try:
        if _settings() == settings:
            function()
    except Exception as error:
        _log.info("nothing is prepared by %s: %s", function, error)


def find(function: Any, *args: Any, **static: Any) -> Callable[..., Any]:
    """The program for calls of a jitted function with arguments of these shapes and dtypes.

    Looking at every leaf of a deep model takes a millisecond, so a loop looks once.

    Args:
        function: From `jax.jit`.
        *args: Its positional arguments.
        **static: Its static arguments, by name.

    Returns:
        A function of the positional arguments: what `compile_ahead` has compiled, or else `function` itself.
    """
    leaves = jax.tree.leaves(args)
    future = None
    if _programs and not any(isinstance(x, jax.core.Tracer) for x in leaves) and _on_default_device(leaves):
        future = _programs.get(_key(function, args, static))
    return (future and future.result()) or functools.partial(function, **static)


def cancel() -> None:
    """Gives up the programs whose compilation has not begun, so that the process can end."""
    with _lock:
        for key in [key for key, program in _programs.items() if program.cancel()]:
            del _programs[key]


def _key(function: Callable, args: tuple, static: dict[str, Any]) -> Hashable:
    leaves, tree = jax.tree.flatten(args)
    types = tuple((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves)
    return function, tree, types, tuple(sorted(static.items(), key=lambda item: item[0])), _settings()


def _settings() -> tuple:
    """The settings of JAX on which a program depends, as they are in this thread."""
    config: Any = jax.config  # its attributes are created at run time, so mypy does not know them
    return (
        config.jax_enable_x64,
        config.jax_disable_jit,
        config.jax_default_matmul_precision,
        config.jax_numpy_dtype_promotion,
        config.jax_numpy_rank_promotion,
        _default_device(),
    )


def _abstract(x: Any, is_on_host: bool) -> jax.ShapeDtypeStruct:
    """`is_on_host`: whether the array is in the memory of the host."""
    place = jax.sharding.SingleDeviceSharding(_default_device(), memory_kind=host_memory.KIND) if is_on_host else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place, weak_type=getattr(x, "weak_type", False))


def _on_default_device(leaves: list[Any]) -> bool:
    devices = {d for x in leaves if isinstance(x, jax.Array) for d in x.devices()}
    return devices <= {_default_device()}


def _default_device() -> Any:
    config: Any = jax.config  # its attributes are created at run time, so mypy does not know them
    chosen = config.jax_default_device
    return jax.devices()[0] if chosen is None or isinstance(chosen, str) else chosen
