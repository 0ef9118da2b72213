"""What each attention and each reader says about itself; no file here imports jax when it is imported.

`engram_jax.registries` names the descriptions. Settings are checked with them, counts and file names come from them,
and `layer()` imports the Flax module that computes.
"""
