"""CKA: how alike two models' states of the same tokens are, layer by layer, in any basis; and soft alignment: which
layer of one model a layer of the other is most like.

    CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),    K = X X^T, L = Y Y^T

HSIC is the unbiased estimate (Song et al. 2012, eq. 5), averaged over minibatches before the division (Nguyen et al.
2021), as in the paper (section 6.1). Unlike the biased estimate, it does not approach 1 with fewer tokens than
dimensions. It may fall slightly below 0.

Legend: A layers of one model, B of the other, N tokens of a minibatch, D hidden size (either model's own).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engram_jax.config import require
from engram_jax.pictures import SMALL

FEW_CELLS = 64
"""Most cells of a heat map that shows its numbers."""


def cka(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Similarity of every layer of one model to every layer of another: float64 [A, B], 1 for equal states.

    Rotations, reflections, shifts and uniform scalings of either model's states change nothing.

    Args:
      batches: pairs (x_AND, y_BND), both models' states of the same N tokens in the same order.

    Raises:
      ConfigError: there is no batch, or one has fewer than 4 tokens: HSIC then has no unbiased estimate.
    """
    both = ours = theirs = None
    for x_AND, y_BND in batches:
        require(x_AND.shape[1] == y_BND.shape[1], f"{x_AND.shape[1]} and {y_BND.shape[1]} tokens: CKA compares pairs.")
        k_ANN, l_BNN = _grams(x_AND), _grams(y_BND)
        terms = _hsic(k_ANN, l_BNN), _hsic_with_itself(k_ANN), _hsic_with_itself(l_BNN)
        both, ours, theirs = terms if both is None else (both + terms[0], ours + terms[1], theirs + terms[2])
    require(both is not None, "CKA needs at least one batch of tokens.")
    assert both is not None and ours is not None and theirs is not None
    return both / np.sqrt(ours[:, None] * theirs[None, :])


def minibatches(x_AND: np.ndarray, y_BND: np.ndarray, size: int = 256, seed: int = 0):
    """The tokens in random order, `size` at a time, so that a minibatch mixes documents. Left-over tokens are dropped,
    unless there are fewer than `size` in all.

    Raises:
      ConfigError: a size below 4.
    """
    require(size >= 4, f"size={size}: HSIC has no unbiased estimate from fewer than 4 tokens.")
    order = np.random.default_rng(seed).permutation(x_AND.shape[1])
    size = min(size, len(order))
    for start in range(0, len(order) - size + 1, max(size, 1)):
        chosen = order[start : start + size]
        yield x_AND[:, chosen], y_BND[:, chosen]


def _grams(x_AND: np.ndarray) -> np.ndarray:
    """Linear kernels with a zero diagonal, float64 [A, N, N]."""
    require(x_AND.shape[1] >= 4, f"{x_AND.shape[1]} tokens: HSIC has no unbiased estimate from fewer than 4.")
    x_AND = x_AND.astype(np.float64)
    x_AND = x_AND - x_AND.mean(1, keepdims=True)  # changes nothing but rounding: a common shift drops out below
    k_ANN = x_AND @ x_AND.transpose(0, 2, 1)
    diagonal = np.arange(k_ANN.shape[1])
    k_ANN[:, diagonal, diagonal] = 0
    return k_ANN


def _hsic(k_ANN: np.ndarray, l_BNN: np.ndarray) -> np.ndarray:
    """Unbiased estimates for all pairs of layers: [A, B]."""
    n = k_ANN.shape[1]
    k_AN, l_BN = k_ANN.sum(2), l_BNN.sum(2)
    trace = k_ANN.reshape(len(k_ANN), -1) @ l_BNN.reshape(len(l_BNN), -1).T
    sums = k_AN.sum(1)[:, None] * l_BN.sum(1)[None, :] / ((n - 1) * (n - 2))
    return (trace + sums - 2 / (n - 2) * (k_AN @ l_BN.T)) / (n * (n - 3))


def _hsic_with_itself(k_ANN: np.ndarray) -> np.ndarray:
    """The estimate for each layer with itself: [A]."""
    return np.array([_hsic(k[None], k[None])[0, 0] for k in k_ANN])


def soft_alignment(similarity_AB: np.ndarray, k: int) -> np.ndarray:
    """The layer of the first model that each layer of the second is like, the paper's a_j (eq. 9): float64 [B].

    It is the mean of the numbers (from 0) of the `k` most similar layers, weighted by similarity. Paper: k = 5 of 30.

    Raises:
      ConfigError: k is not in 1..A.
    """
    layers = len(similarity_AB)
    require(0 < k <= layers, f"k={k} must lie in 1..{layers}, the number of layers.")
    nearest_kB = np.argsort(-similarity_AB, axis=0, kind="stable")[:k]
    weights_kB = np.take_along_axis(similarity_AB, nearest_kB, axis=0)
    return (weights_kB * nearest_kB).sum(0) / weights_kB.sum(0)


def draw_cka(
    axes: Axes, similarity_AB: np.ndarray, alignment_B: np.ndarray | Sequence[float], rows: str, columns: str
) -> None:
    """Draws a heat map with layer 0 of both at the lower left, the line of soft alignment, and the diagonal."""
    image = axes.imshow(similarity_AB, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="equal")
    layers = np.arange(similarity_AB.shape[1])
    axes.plot(layers, layers, "--", color="white", linewidth=1, label="same layer")
    axes.plot(layers, alignment_B, "-o", color="#D55E00", linewidth=1.5, markersize=3, label="soft alignment")
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(-0.5, len(similarity_AB) - 0.5)
    axes.set_xlabel(f"layer of {columns}")
    axes.set_ylabel(f"layer of {rows}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if similarity_AB.size <= FEW_CELLS:
        for (i, j), value in np.ndenumerate(similarity_AB):
            axes.annotate(  # above the middle, where the lines pass
                f"{value:.2f}",
                (j, i),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=SMALL,
                color="white",
            )
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="CKA", fraction=0.046, pad=0.02)


def plot_cka(similarity_AB: np.ndarray, k: int, rows: str, columns: str) -> Figure:
    """A figure of `draw_cka` with `soft_alignment`; save it with `figure.savefig`."""
    figure = Figure(figsize=(5, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw_cka(axes, similarity_AB, soft_alignment(similarity_AB, k), rows, columns)
    axes.legend(fontsize=SMALL, loc="upper left")
    return figure
