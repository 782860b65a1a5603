"""Every error that spmd-infer raises on purpose.

    SpmdInferError
    ├── AxisError              logical axes that collide or do not match a tensor
    ├── MeshError              a mesh that cannot be parsed or built from the devices
    ├── PlanError              no layout of the devices works
    │   └── DoesNotFitError    …because the model needs more memory than there is
    ├── ModelError             a model or its parameters that the engine cannot run
    ├── BatchError             input whose structure, shape, dtype or size is wrong
    ├── CheckpointError        a file that is damaged, incomplete or not what it says
    │   └── UnknownFormatError …or in a format that no reader handles
    ├── TaskError              a task that the loaded model does not offer, or bad task options
    ├── ClusterError           processes that cannot form, or keep up, one job
    └── JobError               an offline job that cannot begin or go on
        └── JobHeldError       …because another process runs it

``BatchError`` and ``TaskError`` are ``ValueError`` too, so that callers who know nothing of this package catch them
where they would expect to.
"""


class SpmdInferError(Exception):
    """Base of every error raised by spmd-infer."""


class AxisError(SpmdInferError):
    """Logical axes that collide on one mesh axis, or that do not match a tensor's rank."""


class MeshError(SpmdInferError):
    """A mesh specification that cannot be parsed, or that the devices cannot form."""


class PlanError(SpmdInferError):
    """No layout of the given devices can run the model."""


class DoesNotFitError(PlanError):
    """The model needs more memory per device than the devices have.

    Attributes:
        needed_bytes: what the most economical layout needs on its fullest device.
        available_bytes: what a device has.
    """

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class ModelError(SpmdInferError):
    """A model, or parameters for it, that the engine cannot run."""


class BatchError(SpmdInferError, ValueError):
    """Input whose structure, shape, dtype or size is not what the model takes."""


class CheckpointError(SpmdInferError):
    """A checkpoint that is damaged, incomplete, or not what its header says."""


class UnknownFormatError(CheckpointError):
    """A path in a format that no registered reader handles."""


class TaskError(SpmdInferError, ValueError):
    """A task that the loaded model does not offer, or options that make no sense for it."""


class ClusterError(SpmdInferError):
    """Processes that cannot form one job, do not agree, or were told something else than they expected."""


class JobError(SpmdInferError):
    """An offline job that cannot begin or go on: other options than before, changed input, a full disk."""


class JobHeldError(JobError):
    """An offline job that another process runs."""
