"""A task of another package, offered through the entry-point group, whose rows do as they are told."""

from pathlib import Path

TASK = """
import os, signal, time

class Shout:
    def __init__(self, engine):
        self.engine = engine

    def __call__(self, texts, mark="!"):
        from spmd_infer.errors import TaskError

        time.sleep(float(os.environ.get("SHOUT_S", "0")))
        for text in texts:
            if not isinstance(text, str):
                raise TaskError(f"{text!r} cannot be shouted")
            if text == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "alone" and len(texts) > 1:
                os.kill(os.getpid(), signal.SIGSEGV)
            if text == "raise":
                raise RuntimeError("no such word")
        return [{"shout": text.upper() + mark, "together": len(texts)} for text in texts]
"""


def install_shout(folder: Path) -> Path:
    """A folder that, on the path for imports, offers the task ``shout``."""
    (folder / "shouting.py").write_text(TASK)
    info = folder / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[spmd_infer.tasks]\nshout = shouting:Shout\n")
    return folder
