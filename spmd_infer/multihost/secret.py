"""The secret that the processes of a job share, by which they know each other's messages from a stranger's."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from spmd_infer.errors import ClusterError

JOB_SECRET = "SPMD_INFER_JOB_SECRET"  # noqa: S105  the variable's name
LEAST_LENGTH = 16


def secret_file(env: Mapping[str, str]) -> Path:
    """Where a user's own secret is kept: ``$XDG_CONFIG_HOME/spmd-infer/job-secret``."""
    base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME") or Path.home()) / ".config")
    return Path(base) / "spmd-infer" / "job-secret"


def job_secret(env: Mapping[str, str]) -> bytes:
    """The secret of this job: ``SPMD_INFER_JOB_SECRET``, else the one in the user's own file, made on first use.

    The file serves jobs whose hosts share the user's home folder, as clusters with SLURM do.

    Raises:
        ClusterError: the secret is too short, or the file can be read by others or not made.
    """
    said = env.get(JOB_SECRET)
    if said is not None:
        if len(said) < LEAST_LENGTH:
            raise ClusterError(
                f"{JOB_SECRET} has {len(said)} characters, expected {LEAST_LENGTH} or more; make one with: "
                "openssl rand -hex 32"
            )
        return said.encode()
    path = secret_file(env)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(path)
        found = path.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ClusterError(
                f"{path} can be read by others (user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}); "
                f"remove it, or set {JOB_SECRET}"
            )
        text = path.read_bytes().strip()
    except OSError as error:
        raise ClusterError(f"no job secret: {path}: {error.strerror}; set {JOB_SECRET}") from error
    if len(text) < LEAST_LENGTH:
        raise ClusterError(f"{path} holds {len(text)} characters, expected {LEAST_LENGTH} or more; remove it")
    return text


def _make(path: Path) -> None:
    """Make the file whole or not at all; of several processes that try at once one wins."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(part, path)
        except FileExistsError:
            return
    finally:
        part.unlink(missing_ok=True)
