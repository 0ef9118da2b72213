"""How each parameter is optimized, by the last part of its name: behind optimizer groups, weight decay, state sizes.

`ROLES` has the parameters of the backbone. Attention and readers declare theirs (variants/weights.py), and
`roles(config)` has those of a whole model.

The suffix of a matrix's name has a letter for each dim. Its role says which dims are contracted with the input and
which are the output ("d->nh"). Letters in neither part, and every stacking dim in front, index separate matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engram_jax.config import ModelConfig
from engram_jax.registries import ATTENTION, READERS
from engram_jax.variants.weights import WeightSpec

Kind = Literal["matrix", "embedding", "vector"]


@dataclass(frozen=True)
class Role:
    """How a parameter is optimized.

    A matrix gets Muon and weight decay, an embedding AdamW and weight decay, a vector AdamW without weight decay.
    """

    kind: Kind
    inputs: tuple[int, ...] = ()
    """The input dims of a matrix, counted from the end."""
    outputs: tuple[int, ...] = ()
    """The output dims of a matrix, counted from the end."""
    stays_float32: bool = False
    """Products use a matrix in float32. They use other matrices, and embeddings, in the model's dtype."""


_MATRICES = {
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
}
_EMBEDDINGS = ("embedding_vd", "head_dv")
_VECTORS = ("gain", "alpha", "bias_pre", "bias_post", "bias_res")
_STAY_FLOAT32 = ("router_de", "phi_pre_cm", "phi_post_cm", "phi_res_cm")


def role_of(name: str, text: str, stays_float32: bool = False) -> Role:
    """The role of a parameter named `name` that is declared as "d->nh", "vector" or "embedding".

    Raises:
      ValueError: the letters of a matrix are not those of the name's suffix.
    """
    if text == "vector":
        return Role("vector")  # no vector is ever rounded
    if text == "embedding":
        return Role("embedding", stays_float32=stays_float32)
    dims, (inputs, _, outputs) = name.rsplit("_", 1)[-1], text.partition("->")
    if not outputs or not set(inputs + outputs) <= set(dims):
        raise ValueError(
            f"parameter {name}: role={text!r} must be vector, embedding, or an equation of the letters after the "
            'last "_" of the name, such as "d->nh" for q_dnh.'
        )
    ends = (tuple(dims.index(d) - len(dims) for d in part) for part in (inputs, outputs))
    return Role("matrix", *ends, stays_float32=stays_float32)


ROLES: dict[str, Role] = (
    {name: role_of(name, text, name in _STAY_FLOAT32) for name, text in _MATRICES.items()}
    | dict.fromkeys(_EMBEDDINGS, Role("embedding"))
    | dict.fromkeys(_VECTORS, Role("vector"))
)
"""The backbone's parameters."""


def roles(config: ModelConfig) -> dict[str, Role]:
    """The roles of all parameters of a model.

    Muon sees an attention projection as one matrix over all its heads (Moonlight, DeepSeek-V4), and the keys and value
    of an Engram reader as separate matrices although one product computes them.

    Raises:
      ValueError: two layers give one name two roles.
    """
    found = dict(ROLES)
    declared: list[WeightSpec] = ATTENTION[config.attention.kind].weights(config)
    if config.engram.enabled:
        declared = declared + READERS[config.engram.engram_variant].weights(config)
    for weight in declared:
        role = role_of(weight.leaf, weight.role, weight.stays_float32)
        if found.setdefault(weight.leaf, role) != role:
            raise ValueError(
                f"parameter {weight.name}: role={weight.role!r} is not the role of another layer's {weight.leaf!r}: "
                "choose another name."
            )
    return found
