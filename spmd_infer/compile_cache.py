"""The folder in which XLA keeps compiled programs between runs. What is read from it is run, so it must be private."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

VARIABLE = "SPMD_INFER_COMPILE_CACHE"
"""Environment variable: a folder, or ``off``."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/spmd-infer/xla``, below ``~/.cache`` by default."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "spmd-infer" / "xla"


def kept_file(name: str) -> Path | None:
    """Where something else is kept for the user beside compiled programs; None where nothing is to be kept."""
    said = os.environ.get(VARIABLE, "")
    if said.lower() == "off":
        return None
    folder = Path(said).expanduser() if said else default_folder()
    if problem_of(folder) is not None:
        return None
    return folder / name


def problem_of(folder: Path) -> str | None:
    """Why a folder cannot be trusted or used; None where it can, or does not exist yet."""
    try:
        state = folder.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISDIR(state.st_mode):
        return "is not a folder"
    if state.st_uid != os.geteuid():
        return f"belongs to user {state.st_uid}, not to {os.geteuid()}"
    if state.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(state.st_mode):o}); run: chmod 700 {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    return None


def use_compile_cache(folder: str | Path | None = None) -> Path | None:
    """Let programs compiled in this process be found by later ones.

    Args:
        folder: where; default what ``SPMD_INFER_COMPILE_CACHE`` says (``off`` for nowhere), else ``default_folder()``.

    Returns:
        The folder, made with mode 700 where it was missing; None where there is no cache, after a warning unless that
        was asked for. Work goes on without one.
    """
    said = os.environ.get(VARIABLE, "") if folder is None else str(folder)
    if said.lower() == "off":
        return None
    path = Path(said).expanduser() if said else default_folder()
    problem = problem_of(path)
    if problem is None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be made: {error.strerror}"
    if problem is not None:
        warnings.warn(f"no compile cache: {path} {problem}", RuntimeWarning, stacklevel=2)
        return None
    import jax

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
