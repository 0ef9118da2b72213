"""The exceptions that a user sees. Each is one line: what is wrong, with its value, and what to do."""


class TpuError(Exception):
    """A mistake in the arguments; nothing was done. `python -m tpu` prints it and exits with 2."""


class CloudError(TpuError):
    """gcloud or a worker refused. `python -m tpu` prints it and exits with 1."""


class NotMounted(CloudError):
    """A worker could not mount the run's bucket."""


class NotFound(CloudError):
    """The resource does not exist, or exists no longer."""


class Deleted(NotFound):
    """The watched slice does not exist: somebody else deleted it, or nobody created it."""
