"""A run: a model, and how it is trained on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engram_jax.config import names
from engram_jax.config.checks import check_literals
from engram_jax.config.model import ModelConfig
from engram_jax.errors import require


@dataclass(frozen=True)
class DataConfig:
    corpus: str = "python"
    """`python` (the standard library), `python+packages`, a folder, file or glob (.txt .md .py .jsonl, also .gz .zst),
    `tfds:NAME`, `arrayrecord:GLOB`; or several with their shares of the windows: `python:0.7,/path/books:0.3`."""
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
        require(self.max_documents >= 0, f"max_documents={self.max_documents} must not be negative; 0 reads all.")
        require(self.worker_count >= 0, f"worker_count={self.worker_count} must not be negative; 0 takes threads.")
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
    frozen: tuple[str, ...] = ()
    """Parameters that do not move, by patterns of their names (`*` is anything): blocks.* embedding_vd head_dv. Nothing
    is kept for them, they are not clipped with the others, and a frozen router's balancing bias rests too. For the
    tables see table_optimizer."""
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
    table_optimizer: names.RowOptimizer = "catch_up_adam"
    """catch_up_adam: dense Adam's trajectory at the cost of the rows looked up, 8 bytes of state per number.
    rowwise_adagrad, rowwise_rmsprop: 4 and 8 bytes per row. sinkhorn: V4.1's, 4 bytes per number. The latter and
    dense_adam, the test oracle, cost time in proportion to the table. lazy_adam: rows stand still while nobody reads
    them, as in most sparse optimizers; for comparison. frozen: tables are read only, and nothing is kept for their
    rows."""
    table_lr_multiplier: float = 5.0
    sinkhorn_momentum: float = 0.95
    sinkhorn_iters: int = 11
    """Normalisations of rows and columns in turn, rows first and last: an odd number."""
    sinkhorn_tau: float = 1e-3
    """Rows whose momentum's norm is at most this share of the table's mean do not move."""

    def __post_init__(self):
        check_literals(self)
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

    placement: names.Placement = "device"
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
    monitor_every: int = 100
    """Steps between looks into the memory: gates, collisions, staleness, hit rate (0: none)."""

    def __post_init__(self):
        check_literals(self)
        require(0 < self.hot_rows <= 1, f"memory.hot_rows={self.hot_rows} must lie in (0, 1].")
        for name in ("promote_every", "monitor_every"):
            require(getattr(self, name) >= 0, f"memory.{name}={getattr(self, name)} must be 0 or positive.")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    seed: int = 0
    init_from: str = ""
    """Folder of a run whose newest checkpoint this one begins with: parameters, balancing biases and tables, but step
    0, a new optimizer state and its own schedule, sequence length and data (training/init_from.py). Not read again
    once this run has a checkpoint."""
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
    """Devices over which routed experts are distributed; other parameters are sharded over them too. Need not
    divide the experts: up to an eighth of them may be missing for an even share."""
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
