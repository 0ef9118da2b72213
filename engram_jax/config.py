"""Every setting of a run, as frozen dataclasses that check themselves when they are built.

Field names are the field's own: DeepSeek's and Hugging Face's where they exist (`hidden_size`, `n_routed_experts`,
`engram_n_heads`). A wrong value raises `ConfigError` with the field, the value and the remedy, before any compiling.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field, its value and the remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_literals(config: Any) -> None:
    """Raises if a field annotated `Literal[...]` holds something else (tyro checks the command line, not Python)."""
    for name, hint in get_type_hints(type(config)).items():
        if getattr(hint, "__origin__", None) is Literal:
            value, allowed = getattr(config, name), get_args(hint)
            require(value in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


@dataclass(frozen=True)
class EngramConfig:
    """The memory: which layers read it, how n-grams become rows, how wide a row is (paper.md 1; V4.1's names)."""

    engram_layer_ids: tuple[int, ...] = ()
    """Zero-based blocks that begin with an Engram reader. Empty: no memory, and the model is the plain backbone."""
    engram_variant: Literal["paper", "deepseek_v41", "qwen_ple"] = "paper"
    """Which published hash and gate: see memory/hashing.py and layers/engram.py."""
    engram_max_ngram_size: int = 3
    """Largest n-gram order N; orders 2..N are looked up."""
    engram_n_heads: int = 8
    """Hash heads per order."""
    engram_head_dim: int = 80
    """Width of one row. A token reads (N - 1) * engram_n_heads rows per Engram layer."""
    engram_vocab_size: int | tuple[int, ...] = 2_262_400
    """Rows per head before rounding up to distinct primes: one number, or one per order."""
    engram_pad_token_id: int = 2
    """Raw token id that stands where a window reaches past its start (EOS for qwen_ple)."""
    engram_compressed_vocab_size: int = 0
    """Canonical ids after tokenizer compression. 0: take it from the tokenizer; otherwise it must match."""
    engram_kernel_size: int = 4
    """Taps of the short causal convolution, dilated by the largest order. 0: none."""
    engram_conv_norm_eps: float = 1e-20
    """Epsilon of the norm before the convolution (the demo: 1e-5). The gate's norms use the model's rms_norm_eps."""
    engram_seed: int = 0
    engram_cross_documents: bool = False
    """True restores the published demo's behaviour: windows run across document boundaries in packed rows."""
    engram_bias: bool = False
    """Biases on the key and value projections (the demo has them, the paper does not)."""

    def __post_init__(self):
        _check_literals(self)
        ids, n = self.engram_layer_ids, self.engram_max_ngram_size
        require(
            list(ids) == sorted(set(ids)) and all(i >= 0 for i in ids),
            f"engram_layer_ids={ids} must be ascending, distinct and zero-based.",
        )
        require(n >= 2, f"engram_max_ngram_size={n} must be at least 2.")
        for name in ("engram_n_heads", "engram_head_dim"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        sizes = self.engram_vocab_size
        if isinstance(sizes, tuple):
            require(
                len(sizes) == n - 1,
                f"engram_vocab_size={sizes} has {len(sizes)} entries; orders 2..{n} need {n - 1} (or one number).",
            )
        require(all(s >= 2 for s in self.vocab_size_per_order), f"engram_vocab_size={sizes} must be at least 2.")
        require(self.engram_kernel_size >= 0, f"engram_kernel_size={self.engram_kernel_size} must be 0 or positive.")

    @property
    def enabled(self) -> bool:
        return bool(self.engram_layer_ids)

    @property
    def vocab_size_per_order(self) -> tuple[int, ...]:
        """Base rows per head for orders 2..N."""
        sizes = self.engram_vocab_size
        return sizes if isinstance(sizes, tuple) else (sizes,) * (self.engram_max_ngram_size - 1)

    @property
    def num_rows_per_token(self) -> int:
        """Rows one token reads in one Engram layer."""
        return (self.engram_max_ngram_size - 1) * self.engram_n_heads

    @property
    def memory_dim(self) -> int:
        """Width of the concatenated rows (the paper's d_mem)."""
        return self.num_rows_per_token * self.engram_head_dim


@dataclass(frozen=True)
class YarnConfig:
    """A longer context than the model was trained at, by stretched rotations (YaRN; layers/rope.py has the equations).

    Names are DeepSeek's `rope_scaling` fields, values the Engram paper's long-context stage (paper.md 3.2) but for
    `factor`, 10 there.
    """

    factor: float = 1.0
    """How many times longer. 1: none of this applies."""
    beta_fast: float = 32.0
    """Frequencies that turn at least this often within the original length stay (YaRN's beta)."""
    beta_slow: float = 1.0
    """Those that turn at most this often are divided by `factor` (YaRN's alpha); between the two lies a ramp."""
    mscale: float = 0.707
    """With `mscale_all_dim`: what the rotated parts of queries and keys are multiplied by, relative to all scores."""
    mscale_all_dim: float = 0.707
    """Scores are multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)^2. 0: by 1."""
    original_max_position_embeddings: int = 4096
    """The length that the model was trained at before."""

    def __post_init__(self):
        require(self.factor >= 1, f"yarn.factor={self.factor} must be at least 1 (1: off).")
        require(
            self.beta_fast > self.beta_slow > 0,
            f"yarn.beta_fast={self.beta_fast} must be above yarn.beta_slow={self.beta_slow}, and both positive.",
        )
        for name in ("mscale", "mscale_all_dim"):
            require(getattr(self, name) >= 0, f"yarn.{name}={getattr(self, name)} must be 0 or positive.")
        length = self.original_max_position_embeddings
        require(length > 0, f"yarn.original_max_position_embeddings={length} must be positive.")

    @property
    def enabled(self) -> bool:
        return self.factor > 1

    @property
    def max_position_embeddings(self) -> int:
        """Positions that the stretched rotations are meant for."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclass(frozen=True)
class AttentionConfig:
    kind: Literal["mla", "gqa"] = "mla"
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    """GQA only."""
    qk_nope_head_dim: int = 128
    """Per-head width without position (MLA); the whole head width of GQA is qk_nope + qk_rope."""
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_lora_rank: int = 512
    """MLA only: width of the compressed key-value latent."""
    rope_theta: float = 10_000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)

    def __post_init__(self):
        _check_literals(self)
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even.")
        require(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1.")
        require(
            self.kind == "mla" or self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}.",
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE: shared plus routed experts, balanced by a per-expert bias instead of a large auxiliary loss."""

    n_routed_experts: int = 0
    """0: every block has a dense feed-forward layer of `intermediate_size`."""
    num_experts_per_tok: int = 6
    n_shared_experts: int = 2
    moe_intermediate_size: int = 1536
    first_k_dense_replace: int = 1
    """Leading blocks that keep a dense feed-forward layer."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    bias_update_speed: float = 1e-3
    """Step of the balancing bias per training step (Wang 2024a; V4.1 uses 0.001)."""
    seq_aux_alpha: float = 1e-4
    """Weight of the sequence-level balance loss."""
    implementation: Literal["auto", "every_expert", "ragged", "blocked"] = "auto"
    """How the routed experts are computed; all are dropless and equal (layers/moe.py)."""
    capacity_factor: float = 1.5
    """With train.mesh_expert: room in a block of the exchange, relative to evenly routed tokens. What does not fit is
    carried in further rounds, so it changes speed and memory, not the numbers (layers/expert_parallel.py)."""

    def __post_init__(self):
        _check_literals(self)
        if self.n_routed_experts:
            require(
                0 < self.num_experts_per_tok <= self.n_routed_experts,
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in "
                f"1..n_routed_experts={self.n_routed_experts}.",
            )
        require(self.capacity_factor > 0, f"moe.capacity_factor={self.capacity_factor} must be positive.")

    @property
    def enabled(self) -> bool:
        return self.n_routed_experts > 0


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    intermediate_size: int = 1024
    """Width of a dense feed-forward layer."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)
    hc_mult: int = 4
    """Residual streams of the hyper-connections. 1: an ordinary residual network."""
    hc_sinkhorn_iters: int = 20
    hc_gate_init: float = 0.01
    rms_norm_eps: float = 1e-20
    """1e-20 is what the 27B backbone and V4.1 use."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Dtype of activations and matrix products. Parameters and optimizer state are float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, every block, or all but the matrix products."""
    attend_across_documents: bool = False
    """True: attention in a packed row does not stop at document boundaries."""
    loss_chunk_len: int = 0
    """Positions of each sequence whose logits exist at a time (0: all), to bound the memory of the logits."""

    def __post_init__(self):
        _check_literals(self)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hc_mult"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        last = max(self.engram.engram_layer_ids, default=-1)
        require(
            last < self.num_hidden_layers,
            f"engram_layer_ids={self.engram.engram_layer_ids} names block {last}, but there are only "
            f"num_hidden_layers={self.num_hidden_layers} (ids are zero-based).",
        )
        require(
            not self.engram.enabled or 0 <= self.engram.engram_pad_token_id < self.vocab_size,
            f"engram_pad_token_id={self.engram.engram_pad_token_id} is not below vocab_size={self.vocab_size}.",
        )


@dataclass(frozen=True)
class DataConfig:
    corpus: str = "python"
    """`python` (the standard library), `python+packages`, a folder, file or glob (.txt .md .py .jsonl, also .gz .zst),
    `tfds:NAME`, or `arrayrecord:GLOB`."""
    text_key: str = "text"
    """The field that holds the text in JSONL, tfds and ArrayRecord (JSON) documents."""
    tokenizer: str = ""
    """Path of a tokenizer.json. Empty: a byte-level BPE of `model.vocab_size` is trained on the corpus and cached."""
    seq_len: int = 256
    batch_size: int = 16
    """Sequences per step over all processes and gradient-accumulation parts."""
    holdout_fraction: float = 0.05
    """Share of documents, chosen by document hash, that only evaluation sees."""
    seed: int = 0
    cache_dir: str = ""
    """Where tokenizers and token files are cached. Empty: $ENGRAM_CACHE or ~/.cache/engram_jax."""
    max_documents: int = 0
    """Read at most this many documents (0: all)."""
    worker_count: int = 0
    """Grain worker processes that assemble batches (0: threads in this process)."""

    def __post_init__(self):
        require(self.seq_len > 1, f"seq_len={self.seq_len} must be at least 2.")
        require(self.batch_size > 0, f"batch_size={self.batch_size} must be positive.")
        require(0 < self.holdout_fraction < 1, f"holdout_fraction={self.holdout_fraction} must lie between 0 and 1.")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for embeddings, head, norms and scalars, a row optimizer for the tables."""

    learning_rate: float = 4e-4
    schedule: Literal["step", "cosine"] = "step"
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.8, 0.9)
    """Step schedule: fractions of the run at which the rate drops."""
    decay_to: tuple[float, ...] = (0.316, 0.1)
    """Step schedule: the rate after each drop, relative to the peak. Cosine ends at the last of these."""
    weight_decay: float = 0.1
    """On matrices and embeddings; never on norms, scalars or tables."""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    muon_momentum: float = 0.95
    muon_steps: tuple[int, int] = (8, 2)
    """Newton-Schulz steps: fast ones, then settling ones. V4 takes 8 and 2, Moonlight 5 and 0 at half the cost."""
    muon_update_rms: float = 0.18
    """Update RMS that Muon is rescaled to, so that it shares AdamW's learning rate (V4: 0.18). Sinkhorn's too."""
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-20
    clip_norm: float = 1.0
    """Global norm over all gradients, row gradients included. 0: no clipping."""
    table_optimizer: Literal["catch_up_adam", "dense_adam", "rowwise_adagrad", "rowwise_rmsprop", "sinkhorn"] = (
        "catch_up_adam"
    )
    """catch_up_adam: dense Adam's trajectory at the cost of the rows looked up, 8 bytes of state per number.
    rowwise_adagrad, rowwise_rmsprop: 4 and 8 bytes per row. sinkhorn: V4.1's, 4 bytes per number. The latter and
    dense_adam, the test oracle, cost time in proportion to the table."""
    table_lr_multiplier: float = 5.0
    sinkhorn_momentum: float = 0.95
    sinkhorn_iters: int = 11
    """Normalisations of rows and columns in turn, rows first and last: an odd number."""
    sinkhorn_tau: float = 1e-3
    """Rows whose momentum's norm is at most this share of the table's mean do not move."""

    def __post_init__(self):
        _check_literals(self)
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive.")
        require(
            len(self.decay_at) == len(self.decay_to),
            f"decay_at={self.decay_at} and decay_to={self.decay_to} must have the same length.",
        )
        require(
            list(self.decay_at) == sorted(self.decay_at) and all(0 < f < 1 for f in self.decay_at),
            f"decay_at={self.decay_at} must ascend within (0, 1).",
        )
        require(
            0 <= self.adam_b1 < self.adam_b2**0.5 < 1,
            f"adam_b1={self.adam_b1}, adam_b2={self.adam_b2}: catch-up Adam needs 0 <= b1 < sqrt(b2) < 1.",
        )
        for name in ("sinkhorn_momentum", "sinkhorn_tau"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1).")
        require(
            self.sinkhorn_iters > 0 and self.sinkhorn_iters % 2 == 1,
            f"sinkhorn_iters={self.sinkhorn_iters} must be odd and positive: rows are normalised first and last.",
        )


@dataclass(frozen=True)
class MemoryConfig:
    """Where the tables lie and how their rows travel. Only `row_dtype` touches the numbers of a run."""

    placement: Literal["device", "host", "tiered", "numpy"] = "device"
    """`device`; `host`: pinned host memory, read and written inside the compiled step; `tiered`: the rows used most on
    the device, the rest on the host; `numpy`: arrays or memory-mapped files of the Python process, on any backend."""
    row_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 rows are rounded stochastically when written; optimizer state stays float32."""
    transport: Literal["auto", "all_to_all", "ragged_all_to_all"] = "auto"
    """How rows cross the mesh. auto: ragged on TPU, all_to_all elsewhere (XLA:CPU knows no other)."""
    prefetch: bool = True
    """Read the next batch's rows before this one's update: `numpy` beside the computation, `host` and `tiered` in the
    compiled step of an accelerator. The numbers are the same."""
    hot_rows: float = 0.1
    """tiered: share of the rows kept on the device."""
    promote_every: int = 20
    """tiered: steps between exchanges of hot against cold rows (0: never)."""
    mmap_dir: str = ""
    """numpy: folder for memory-mapped tables. Empty: in memory."""
    sight_every: int = 100
    """Steps between looks into the memory: gates, collisions, staleness, hit rate (0: none)."""

    def __post_init__(self):
        _check_literals(self)
        require(0 < self.hot_rows <= 1, f"memory.hot_rows={self.hot_rows} must lie in (0, 1].")
        for name in ("promote_every", "sight_every"):
            require(getattr(self, name) >= 0, f"memory.{name}={getattr(self, name)} must be 0 or positive.")
        require(
            not self.mmap_dir or self.placement == "numpy",
            f"memory.mmap_dir={self.mmap_dir!r} has a meaning for memory.placement=numpy only, not {self.placement}.",
        )


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    seed: int = 0
    grad_accum: int = 1
    """Parts the batch is split into; the memory is still fetched and updated once per step."""
    log_every: int = 10
    eval_every: int = 200
    """Steps between evaluations on the held-out documents (0: only at the end)."""
    eval_batches: int = 8
    """Batches in an evaluation during training; the one at the end uses the whole hold-out up to eval_batches_final."""
    eval_batches_final: int = 64
    tensorboard: bool = True
    mesh_data: int = -1
    """Devices on the data axis (-1: all that the other axes leave)."""
    mesh_fsdp: int = 1
    """Devices over which parameters are sharded."""
    mesh_expert: int = 1
    """Devices over which routed experts are distributed; other parameters are sharded over them too."""
    mesh_context: int = 1
    """Devices over which each sequence is cut."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward widths and the vocabulary are cut."""

    def __post_init__(self):
        require(self.steps > 0, f"steps={self.steps} must be positive.")
        require(self.grad_accum > 0, f"grad_accum={self.grad_accum} must be positive.")
        for name in ("log_every", "eval_batches", "eval_batches_final", "mesh_expert", "mesh_context", "mesh_tensor"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200
    """Steps between checkpoints (0: only at the end)."""
    keep: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self):
        require(self.keep > 0, f"checkpoint.keep={self.keep} must be positive.")


@dataclass(frozen=True)
class RunConfig:
    """One run, complete: printed at start, saved beside the checkpoint, and all that restoring needs."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        batch, parts = self.data.batch_size, self.train.grad_accum
        require(batch % parts == 0, f"data.batch_size={batch} must be a multiple of train.grad_accum={parts}.")
        yarn, length = self.model.attention.yarn, self.data.seq_len
        require(
            not yarn.enabled or length <= yarn.max_position_embeddings,
            f"data.seq_len={length} lies beyond model.attention.yarn.factor={yarn.factor:g} times "
            f"yarn.original_max_position_embeddings={yarn.original_max_position_embeddings}: raise the factor.",
        )


def replace(config: T, **changes: Any) -> T:
    """`dataclasses.replace` that also reaches into nested configs: `replace(run, train__steps=50)`."""
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for path, value in changes.items():
        head, _, rest = path.partition("__")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    for head, inner in nested.items():
        flat[head] = replace(getattr(config, head), **inner)
    return dataclasses.replace(config, **flat)  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Rebuilds a config from `to_dict`'s output; an unknown field raises `ConfigError`."""
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    require(not unknown, f"{cls.__name__} has no field {', '.join(sorted(unknown))}: saved by another version?")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)


def differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """The leaves in which two configs differ, one line each: `train.steps: 50 here, 100 there`."""

    def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat = {}
        for key, value in values.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    a, b = flatten(to_dict(ours)), flatten(to_dict(theirs))
    return [f"{key}: {a.get(key)!r} here, {b.get(key)!r} there" for key in sorted(a | b) if a.get(key) != b.get(key)]
