"""How the processes of a job end; listed in docs/clusters.md and in the help of ``spmd-infer``."""

OTHER_FAILED = 70
"""This rank ended because another one failed, or because a watchdog ended the job. The message names the rank."""

REQUEUE = 75
"""Stopped early on SIGTERM, at a step that all ranks agreed on: start the job again to go on."""

TERMINATED = 143
"""Ended by SIGTERM in a program that has no point where it can stop, or by a second SIGTERM."""
