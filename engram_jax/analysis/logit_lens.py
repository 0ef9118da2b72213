"""The logit lens: the prediction of a model that ended after a block, and its distance from the real prediction.

A block's state passes the final norm and the head, as the last block's state does (nostalgebraist 2020). The distance
is the Kullback-Leibler divergence. The paper (section 6.1, figure 4a) does not say its direction, so both are here:

    final||layer   sum p_final log(p_final / p_layer): nats lost by coding the model's prediction with the layer's
    layer||final   sum p_layer log(p_layer / p_final): punishes a layer for what the model later rules out

Legend: B batch, T tokens, C positions whose logits exist at a time, D hidden size, V vocabulary, L states of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engram_jax.analysis.hidden_states import state_batches
from engram_jax.config import require
from engram_jax.evaluation.evaluated_run import EvaluatedRun, chunk_length
from engram_jax.evaluation.statistics import Metric, ratio
from engram_jax.pictures import SMALL, STYLES, TITLE, plain_axes
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState
from engram_jax.sharding import placed

DIRECTIONS = ("final||layer", "layer||final")


def divergences(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p||q) and KL(q||p) in nats over the last axis, from log-probabilities: [2, ...]."""
    by = log_p - log_q
    return jnp.stack([jnp.sum(jnp.exp(log_p) * by, axis=-1), jnp.sum(jnp.exp(log_q) * -by, axis=-1)])


def logit_lens(
    model: EvaluatedRun, sequences: Sequence[np.ndarray], documents: Sequence[int] | None = None
) -> dict[str, list[Metric]]:
    """By direction, the mean divergence over the predicted ids: an entry for the embedding and for each block. The last
    block's entry is 0.

    Args:
      sequences: ids of documents with their bos, or windows of them (evaluation/windows.py); padded and batched here.
      documents: number of each sequence's document, by which standard errors are clustered. None: one each.

    Raises:
      ConfigError: a sequence has no ids.
    """
    require(all(map(len, sequences)), "a sequence has no ids: begin it with the tokenizer's bos.")
    owners = np.arange(len(sequences)) if documents is None else np.unique(documents, return_inverse=True)[1]
    owners = owners[[len(ids) > 1 for ids in sequences]]
    read = [ids[:-1] for ids in sequences if len(ids) > 1]  # the last id is only predicted
    num_states = model.parts.config.model.num_hidden_layers + 1
    sums = np.zeros((len(DIRECTIONS), num_states, int(owners.max(initial=-1)) + 1))
    sizes = np.zeros(sums.shape[-1])
    for first, is_token_BT, states_LBTD in state_batches(model, read):
        B, T = is_token_BT.shape
        chunk = chunk_length(B, T, model.parts.config.model.vocab_size)
        with jax.set_mesh(model.parts.mesh):
            parts = [_divergences(model.parts, chunk, model.state, states_LBTD, start) for start in range(0, T, chunk)]
            all_2LBT = np.concatenate(jax.device_get(parts), axis=-1).astype(np.float64)
        summed_2LB = np.where(is_token_BT, all_2LBT, 0).sum(-1)
        for row, owner in enumerate(owners[first : first + B]):
            sums[:, :, owner] += summed_2LB[:, :, row]
            sizes[owner] += is_token_BT[row].sum()
    return {
        direction: [ratio(of_layer, sizes, unit="nats") for of_layer in of_direction]
        for direction, of_direction in zip(DIRECTIONS, sums, strict=True)
    }


@partial(jax.jit, static_argnums=(0, 1))
def _divergences(parts: Parts, chunk: int, state: TrainState, states_LBTD: jax.Array, start: jax.Array) -> jax.Array:
    """Both divergences of every state, float32 [2, L, B, C]."""
    model = parts.model(state.params, state.buffers)
    states_LBCD = placed(jax.lax.dynamic_slice_in_dim(states_LBTD, start, chunk, axis=2), None, "batch", "seq", None)

    def log_probabilities(x_BCD: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(model.logits(model.final_norm(x_BCD)).astype(jnp.float32), axis=-1)

    final_BCV = log_probabilities(states_LBCD[-1])
    # One layer's logits at a time.
    all_L2BC = jax.lax.map(lambda x_BCD: divergences(final_BCV, log_probabilities(x_BCD)), states_LBCD)
    return placed(jnp.moveaxis(all_L2BC, 1, 0), None, None, None, None)


def draw_lens(axes: Axes, curves: Mapping[str, np.ndarray], first: int = -1) -> None:
    """Draws curves [runs, L] by label: the mean over runs as a line, each run as dots. `first`: number of entry 0."""
    for (label, curve_RL), (color, marker) in zip(curves.items(), STYLES * len(curves), strict=False):
        layers = first + np.arange(curve_RL.shape[1])
        axes.plot(layers, curve_RL.mean(0), color=color, linewidth=1.5, label=label)
        for curve_L in curve_RL:
            axes.plot(layers, curve_L, marker, color=color, markersize=3, alpha=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer" if first >= 0 else "layer (-1: embedding)")
    axes.set_ylabel("KL divergence (nats)")
    axes.set_ylim(bottom=0)
    plain_axes([axes])
    axes.legend(frameon=False, fontsize=SMALL)


def plot_lens(lenses: Mapping[str, Sequence[Mapping[str, Sequence[Metric]]]]) -> Figure:
    """A figure with a panel for each direction and a curve for each label; save it with `figure.savefig`."""
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    for axes, direction in zip(figure.subplots(1, len(DIRECTIONS)), DIRECTIONS, strict=True):
        curves = {
            label: np.array([[metric.value for metric in lens[direction]] for lens in runs])
            for label, runs in lenses.items()
        }
        draw_lens(axes, curves)
        axes.set_title(f"KL({direction})", fontsize=TITLE)
    return figure
