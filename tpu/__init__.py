"""Commands for Cloud TPU: python -m tpu --help. README.md in this folder is the quick start."""

# The supervisor prints this before its status. So `python -m tpu` finds the status among ssh's own lines.
STATUS_MARK = "engram_jax supervisor: "
