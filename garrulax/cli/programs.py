"""The cache of compiled programs on disk, which the commands that write text keep."""

import os
import sys
from pathlib import Path
from typing import Any

import jax

LIMIT = 2 << 30  # bytes


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
    config: Any = jax.config  # its attributes are created at run time, so mypy does not know them
    if config.jax_compilation_cache_dir is None:
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            remove_oldest(folder, LIMIT)
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
            print(f"compiled programs are not kept: {error}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def remove_oldest(folder: Path, limit: int) -> None:
    """Removes the oldest files of a folder until half of `limit` bytes is left, if it holds more than `limit`.

    (JAX can bound the folder too, but only where the package filelock is installed.)
    """
    files = [(file.stat(), file) for file in folder.iterdir() if file.is_file()]
    total = sum(stat.st_size for stat, _ in files)
    if total <= limit:
        return
    for stat, file in sorted(files, key=lambda item: item[0].st_mtime):
        file.unlink(missing_ok=True)  # another process may have removed it
        total -= stat.st_size
        if total <= limit // 2:
            return
