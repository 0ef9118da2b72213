"""Which optimizer moves which parameter: Muon the matrices, AdamW the rest, by leaf name (roles.py); some none at all.

The tables are not here: their rows have an optimizer of their own in the memory store. Neither is clipping, because its
norm includes the row gradients.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import optax

from engram_jax.config import ConfigError, OptimizerConfig
from engram_jax.optimizers.muon import scale_by_muon
from engram_jax.optimizers.roles import ROLES, Role


def parameter_roles(params: Any, roles: Mapping[str, Role] = ROLES) -> Any:
    """Tree of `Role` shaped like `params`.

    Raises:
      ValueError: `roles` does not name a leaf; the message has its path and the nearest known name.
    """

    def role(path: tuple[Any, ...], _: Any) -> Role:
        # A flax Variable is a node of its own, so the name may stand one above the leaf.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = names[-1] if names else ""
        if name not in roles:
            near = difflib.get_close_matches(str(name), roles, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            where = jax.tree_util.keystr(path)
            raise ValueError(f"parameter {where} has no role: declare {name!r} as optimizers/roles.py says{hint}.")
        return roles[name]

    return jax.tree_util.tree_map_with_path(role, params)


def parameter_name(path: tuple[Any, ...]) -> str:
    """A leaf's name as `optimizer.frozen` matches it: `blocks.01-01.attn.q_dnh`."""
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def is_frozen(params: Any, patterns: Sequence[str]) -> Any:
    """Tree of bools shaped like `params`: whose names (`parameter_name`) one of the patterns matches.

    Raises:
      ConfigError: a pattern that matches no parameter, by the nearest names.
    """
    names = jax.tree_util.tree_map_with_path(lambda path, _: parameter_name(path), params)
    known = jax.tree.leaves(names)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, [*known, "blocks.*", "engram.*"], n=3, cutoff=0.3)
            raise ConfigError(
                f"optimizer.frozen={pattern!r} matches no parameter; names are like {', '.join(near or known[:3])}."
            )
    return jax.tree.map(lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), names)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, params: Any, roles: Mapping[str, Role] = ROLES
) -> optax.GradientTransformationExtraArgs:
    """The backbone's optimizer for parameters like `params` (arrays or shapes, nested dicts by leaf name).

    roles: by leaf name, those of a model from `optimizers.roles.roles`.

    Raises:
      ValueError: `roles` does not name a parameter.
      ConfigError: `config.frozen` has a pattern that matches no parameter.
    """
    tree_of_roles = parameter_roles(params, roles)
    frozen = is_frozen(params, config.frozen)
    groups = jax.tree.map(lambda role, rests: "frozen" if rests else role.kind, tree_of_roles, frozen)

    def adamw(weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(schedule, config.adam_b1, config.adam_b2, config.adam_eps, weight_decay=weight_decay)

    matrix = adamw(config.weight_decay)
    if config.matrix_optimizer == "muon":
        # partition hands a group its own leaves and MaskedNode for the others.
        matrix_roles = jax.tree.map(
            lambda role, group: role if group == "matrix" else optax.MaskedNode(), tree_of_roles, groups
        )
        matrix = optax.chain(
            scale_by_muon(config.muon_momentum, config.muon_update_rms, matrix_roles, config.muon_steps),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "matrix": matrix,
        "embedding": adamw(config.weight_decay),
        "vector": adamw(0.0),
    }
    if config.frozen:
        transforms["frozen"] = optax.set_to_zero()
    return optax.partition(transforms, groups)
