"""Declared runs, the studies on them, and their results. The library `engram_jax` never imports this package."""
