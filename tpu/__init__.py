"""Commands for Cloud TPU: python -m tpu --help. README.md in this folder is the quick start."""

# What precedes the supervisor's status on a worker's output, by which the other side finds it among ssh's own lines.
STATUS_MARK = "engram_jax supervisor: "
