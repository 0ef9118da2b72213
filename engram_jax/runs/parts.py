"""From a RunConfig and a tokenizer to the parts of a run: store, model structure, optimizer, initial state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer

from engram_jax.config import ConfigError, RunConfig, replace, require
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import MemoryState
from engram_jax.memory.hashing import compresses_ids
from engram_jax.memory.store import MemoryStore
from engram_jax.model import Model, named_key, split
from engram_jax.optimizers.groups import make_optimizer
from engram_jax.optimizers.roles import roles
from engram_jax.optimizers.schedules import learning_rate, learning_rates
from engram_jax.registries import ATTENTION, PLACEMENTS, READERS, ROW_OPTIMIZERS
from engram_jax.runs.state import TrainState
from engram_jax.sharding import BATCH, make_mesh, spec
from engram_jax.transports import default_transport


@dataclass(frozen=True, eq=False)
class Parts:
    """The static half of a run. `config` is resolved: it holds the values that `assemble` found out."""

    config: RunConfig
    mesh: Mesh
    store: MemoryStore
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule

    def model(self, params: dict, buffers: dict) -> Model:
        return nnx.merge(self.graphdef, params, buffers)

    def init_state(self) -> TrainState:
        """A new run's state, made sharded. Call under `jax.set_mesh(parts.mesh)`."""
        # XLA:CPU takes 18 s to optimize the random bits of a tiny model, which are drawn once; 8 s without.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        state = jax.jit(self._init, compiler_options=options)()
        return with_changes(state, memory=self.store.init(named_key(jax.random.key(self.config.train.seed), "memory")))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state without tables, for restoring. Call under `jax.set_mesh`."""

        def on_devices(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # eval_shape knows the mesh's axes but not its devices, and nothing of optax's replicated counters.
            dims = P() if x.sharding is None else x.sharding.spec
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, dims))

        return jax.tree.map(on_devices, jax.eval_shape(self._init))

    def _init(self) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        _, params, buffers = split(Model(self.config.model, named_key(key, "model")))
        memory = MemoryState({}, self.store.none_used())
        step = jnp.zeros((), jnp.int32, out_sharding=spec())
        return TrainState(step, params, buffers, self.optimizer.init(params), memory)


def assemble(config: RunConfig, tokenizer: Tokenizer, devices: Sequence[Any] | None = None) -> Parts:
    """Checks a run against its tokenizer and the devices, and builds its parts, without making an array.

    Raises:
      ConfigError: the tokenizer does not fit the config, or the mesh does not fit the devices or the batch.
    """
    mesh = _mesh(config, devices)
    engram = config.model.engram
    if engram.enabled and compresses_ids(engram):
        token_map = TokenMap.from_tokenizer(tokenizer)
    else:
        token_map = TokenMap.identity(config.model.vocab_size)
    if engram.enabled:
        token_map.check(engram, config.model.vocab_size)
        config = replace(config, model__engram__engram_compressed_vocab_size=token_map.size)
        engram = config.model.engram
    optimizer = config.optimizer
    rates = optimizer.table_lr_multiplier * learning_rates(optimizer, config.train.steps)
    platform = mesh.devices.flat[0].platform
    require(
        (platform, config.memory.transport) != ("cpu", "ragged_all_to_all"),
        "memory.transport=ragged_all_to_all: XLA has no such exchange on CPU. Choose auto or all_to_all.",
    )
    store = MemoryStore.create(
        engram,
        token_map,
        ROW_OPTIMIZERS[optimizer.table_optimizer].create(optimizer, rates),
        placement=PLACEMENTS[config.memory.placement].create(config.memory, platform),
        shards=mesh.size,
        init_std=engram.engram_initializer_range,
        row_dtype=config.memory.row_dtype,
        transport=default_transport(mesh.devices.flat[0].device_kind, mesh.size)
        if config.memory.transport == "auto"
        else config.memory.transport,
        seed=config.train.seed,
    )
    schedule = learning_rate(optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(lambda: Model(config.model, jax.random.key(0)))
        graphdef, params, _ = split(abstract)
    transformation = make_optimizer(optimizer, schedule, params, roles(config.model))
    return Parts(config, mesh, store, graphdef, transformation, schedule)


def _mesh(config: RunConfig, devices: Sequence[Any] | None) -> Mesh:
    train, model = config.train, config.model
    try:
        mesh = make_mesh(
            train.mesh_data,
            train.mesh_fsdp,
            devices,
            expert=train.mesh_expert,
            context=train.mesh_context,
            tensor=train.mesh_tensor,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    parts = config.data.batch_size // train.grad_accum
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    require(
        parts % shards == 0,
        f"data.batch_size={config.data.batch_size} over train.grad_accum={train.grad_accum} leaves {parts} sequences "
        f"at a time, not a multiple of the {shards} devices on the axes {', '.join(BATCH)}: raise batch_size, lower "
        "grad_accum, use fewer devices, or give some to train.mesh_context or train.mesh_tensor.",
    )
    moe = model.moe
    for field, size, axes in (
        ("model.hidden_size", model.hidden_size, ("fsdp", "expert", "context")),
        ("data.seq_len", config.data.seq_len, ("context", "tensor")),
        ("model.vocab_size", model.vocab_size, ("tensor",)),
        ("model.moe.moe_intermediate_size", moe.moe_intermediate_size if moe.enabled else 0, ("tensor",)),
        ("model.intermediate_size", model.intermediate_size, ("tensor",)),
    ):
        factor = math.prod(mesh.shape[axis] for axis in axes)
        settings = " x ".join(f"train.mesh_{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
        require(size % factor == 0, f"{field}={size} is not a multiple of {settings}: choose factors of it.")
    idle = -moe.n_routed_experts % train.mesh_expert
    require(
        8 * idle <= moe.n_routed_experts,
        f"model.moe.n_routed_experts={moe.n_routed_experts} over train.mesh_expert={train.mesh_expert} leaves {idle} "
        "places for experts idle, and an eighth of the experts is the most: choose a factor of it, or nearly one.",
    )
    ATTENTION[model.attention.kind].check_mesh(model.attention, mesh.shape)
    if model.engram.enabled:
        READERS[model.engram.engram_variant].check_mesh(model.engram, config.data.seq_len, mesh.shape)
    require(
        train.mesh_expert == 1 or moe.enabled,
        f"train.mesh_expert={train.mesh_expert}, but the model has no experts: give these devices to train.mesh_fsdp.",
    )
    return mesh
