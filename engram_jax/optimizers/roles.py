"""What each parameter is, by its leaf name: the one table behind optimizer groups, weight decay and state sizes.

The suffix of a matrix names its dims, and its role says which of them are contracted with the input and which are the
output ("d->nh"). Letters in neither part, and every stacking dim in front, index separate matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix", "embedding", "vector"]


@dataclass(frozen=True)
class Role:
    """How a parameter is optimized.

    A matrix gets Muon and weight decay, an embedding AdamW and weight decay, a vector AdamW without. `inputs` and
    `outputs` are a matrix's dims, counted from the end.
    """

    kind: Kind
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


# Muon sees an attention projection as one matrix over all its heads (Moonlight, DeepSeek-V4), and the reader's keys and
# value as M + 1 matrices although one product computes them.
_MATRICES = {
    "q_dnh": "d->nh",
    "k_dgh": "d->gh",
    "v_dgh": "d->gh",
    "o_nhd": "nh->d",
    "kv_down_dr": "d->r",
    "kv_up_rnh": "r->nh",
    "gate_df": "d->f",
    "up_df": "d->f",
    "down_fd": "f->d",
    "router_de": "d->e",
    "gate_edf": "d->f",
    "up_edf": "d->f",
    "down_efd": "f->d",
    "phi_pre_cm": "c->m",
    "phi_post_cm": "c->m",
    "phi_res_cm": "c->m",
    "key_value_emd": "e->d",
    "slice_hed": "e->d",
}
_EMBEDDINGS = ("embedding_vd", "head_dv")
_VECTORS = (
    *("gain", "query_norm", "key_norm", "conv_norm"),
    *("alpha", "bias_pre", "bias_post", "bias_res"),
    *("conv_kmd", "key_value_bias_md"),
)


def _matrix(name: str, equation: str) -> Role:
    dims = name.rsplit("_", 1)[1]
    inputs, outputs = (tuple(dims.index(d) - len(dims) for d in part) for part in equation.split("->"))
    return Role("matrix", inputs, outputs)


ROLES: dict[str, Role] = (
    {name: _matrix(name, equation) for name, equation in _MATRICES.items()}
    | dict.fromkeys(_EMBEDDINGS, Role("embedding"))
    | dict.fromkeys(_VECTORS, Role("vector"))
)
KEPT_WIDE = ("router_de", "phi_pre_cm", "phi_post_cm", "phi_res_cm")
"""Matrices that products take in float32; the others, and the embeddings, are taken in the model's dtype."""
