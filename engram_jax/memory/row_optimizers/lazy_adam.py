"""Lazy Adam for rows: what sparse embedding optimizers usually do, kept for comparison.

Legend: U rows of a batch, R all rows of a table, D row width. Update number k = step + 1 has learning rate
`learning_rates[k - 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_jax.memory.row_optimizers.adam import DenseAdam


@dataclass(frozen=True, eq=False)
class LazyAdam(DenseAdam):
    """Adam in which a row and its moments move only at the steps that look it up, bias-corrected by the global step:

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        row = row - lr_k (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

    with m and v as the last look-up left them, however long ago. It is here to be compared with and is not dense Adam:
    that goes on moving a row on its momentum while nobody reads it, and lets the moments decay. (At (0.9, 0.95) a row
    seen once goes a thirteenth of the way here.) `CatchUpAdam` does both at the same cost.
    """

    whole_table = False
