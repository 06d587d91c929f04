"""The cache of compiled programs on disk, which the commands that write text keep."""

import os
import sys
from pathlib import Path

import jax

LIMIT = 2 << 30  # bytes; JAX removes what has not been used for longest


def cache_folder() -> Path:
    """The folder of the cache: garrulax/programs in the user's folder for caches."""
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "garrulax" / "programs"


def keep_programs(wanted: bool) -> None:
    """Makes JAX keep compiled programs, unless they are not wanted or JAX_COMPILATION_CACHE_DIR says where.

    A folder that cannot be written is no reason to fail: programs are then compiled again each time.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"compiled programs are not kept: {error}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
