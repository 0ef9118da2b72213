"""engram_jax: conditional memory (Engram) beside Mixture-of-Experts, in JAX and Flax."""

from engram_jax.version import __version__ as __version__
