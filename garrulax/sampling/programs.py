"""Compiled programs on disk that are found without tracing their functions.

JAX's own cache of compiled programs is asked with the program that is to be compiled, so that each process traces and
lowers it first: with 30 layers as long as loading it takes. Here the key is what the program follows from: the function
and its static arguments (`core.described`), shapes and dtypes, the settings of JAX, versions, device, and the source of
this package. Programs are in the folder of JAX's cache (jax_compilation_cache_dir), beside JAX's own.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import platform
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental import serialize_executable

import garrulax
from garrulax.core.described import NotDescribable, describe, describe_tree

ENDING = ".garrulax"
_log = logging.getLogger("garrulax")
_events = threading.local()  # its `seen`: what JAX said of its own cache in this thread


def folder() -> Path | None:
    """The folder of the cache of compiled programs; None without one, or if it is on no disk of this machine."""
    config: Any = jax.config  # its attributes are created at run time, so mypy does not know them
    name = config.jax_compilation_cache_dir
    if not config.jax_enable_compilation_cache or not name or not os.path.isdir(name):
        return None
    return Path(name)


def file_of(function: Any, args: Any, static: dict[str, Any], options: Any, device: Any) -> Path | None:
    """The file of a program, which need not exist.

    Args:
        function: From `jax.jit`, of this package.
        args: Its positional arguments, abstract.
        static: Its static arguments, by name.
        options: Options of XLA.
        device: On which it runs.

    Returns:
        None if there is no folder, or if an argument is, for example, a function of the user's, which cannot be known
        to be the same in another process.
    """
    where = folder()
    if where is None:
        return None
    leaves, tree = jax.tree.flatten(args)
    types = [(x.shape, str(x.dtype), x.weak_type) for x in leaves]
    try:
        parts = describe(function), describe_tree(tree), describe(types), describe(static), describe(options)
    except NotDescribable:
        return None
    key = hashlib.sha256("\n".join((*parts, _settings(), _place(device), _sources())).encode())
    return where / f"{function.__name__}-{key.hexdigest()}{ENDING}"


def compile_anew(lowered: Any, options: Any) -> tuple[Callable[..., Any], bool]:
    """Compiles a program.

    Args:
        lowered: From `lower` of what `jax.jit` returns.
        options: Of XLA.

    Returns:
        The program, and whether it may be written: only what XLA has compiled now. XLA:CPU cannot serialise a program
        that JAX found in its own cache, or has kept since it found it there: what is read back lacks functions.
    """
    _events.seen = set()
    program = lowered.compile(compiler_options=options)
    return program, "compile_requests_use_cache" in _events.seen and "cache_hits" not in _events.seen


def read(file: Path, args: Any, device: Any) -> Callable[..., Any] | None:
    """The program in a file, for positional arguments like these; None if there is none, or if it cannot be read."""
    try:
        result, content = pickle.loads(zlib.decompress(file.read_bytes()))
        in_tree = jax.tree.structure((args, {}))
        return serialize_executable.deserialize_and_load(content, in_tree, result, execution_devices=[device])
    except FileNotFoundError:
        return None
    except Exception as error:  # it is compiled again, whatever is wrong with the file
        _log.info("the compiled program %s cannot be read: %s", file, error)
        return None


def write(file: Path, program: Any) -> None:
    """Writes a program. What cannot be written is compiled again next time."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        content, _, result = serialize_executable.serialize(program)
        temporary.write_bytes(zlib.compress(pickle.dumps((result, content)), 1))
        temporary.replace(file)  # other processes see the whole file or none
    except Exception as error:  # such as a full disk, or a program with constants
        _log.info("the compiled program %s is not kept: %s", file, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _settings() -> str:
    """The settings of JAX and XLA. A program may not depend on one that changed; then it is compiled once more."""
    config: Any = jax.config
    values = {name: x for name, x in sorted(config.values.items()) if "cache" not in name}
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return f"{values} {flags}"


def _place(device: Any) -> str:
    """The device, its software and, for a CPU, its instructions."""
    versions = jax.__version__, jaxlib.version.__version__, device.client.platform_version
    cpu = _cpu() if device.platform == "cpu" else ""
    return f"{versions} {device.platform} {device.device_kind} {device.id} {cpu}"


def _note(event: str, **_: Any) -> None:
    if hasattr(_events, "seen"):
        _events.seen.add(event.removeprefix("/jax/compilation_cache/"))


jax.monitoring.register_event_listener(_note)


@functools.cache
def _cpu() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def _sources() -> str:
    """A digest of the source of this package."""
    digest, root = hashlib.sha256(garrulax.__version__.encode()), Path(garrulax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
