"""The exceptions that a user sees: one clear line each, with what is wrong, its value and the remedy."""


class TpuError(Exception):
    """A mistake in the arguments: nothing was done. `python -m tpu` prints it and exits with 2."""


class CloudError(TpuError):
    """gcloud, or a worker, refused. `python -m tpu` exits with 1."""


class NotMounted(CloudError):
    """A worker could not mount the run's bucket."""


class NotFound(CloudError):
    """The resource does not exist (any more)."""


class Deleted(NotFound):
    """The slice that is watched: somebody else deleted it, or never made it."""
