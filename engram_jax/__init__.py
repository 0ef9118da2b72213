"""engram_jax: conditional memory (Engram) beside Mixture-of-Experts, in JAX and Flax."""

__version__ = "0.1.0"
