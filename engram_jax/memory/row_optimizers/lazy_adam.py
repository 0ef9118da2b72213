"""Lazy Adam for rows, the usual Adam of sparse embedding optimizers, for comparison.

Legend: U rows of a batch, R all rows of a table, D row width. Update number k = step + 1 has learning rate
`learning_rates[k - 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_jax.memory.row_optimizers.adam import DenseAdam


@dataclass(frozen=True, eq=False)
class LazyAdam(DenseAdam):
    """Adam that moves a row and its moments only at the steps that look it up, bias-corrected by the global step:

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        row = row - lr_k (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

    m and v are those of the last look-up. This is not dense Adam, which goes on moving a row by its momentum between
    look-ups and lets the moments decay. (At (0.9, 0.95) a row that is seen once moves a thirteenth as far as under
    dense Adam.) `CatchUpAdam` equals dense Adam at the cost of this rule.
    """

    whole_table = False
