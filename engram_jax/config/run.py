"""Settings of a run: model, data, optimizers, memory, training, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engram_jax.config import names
from engram_jax.config.checks import check_literals
from engram_jax.config.model import ModelConfig
from engram_jax.errors import require


@dataclass(frozen=True)
class DataConfig:
    """The text to train on, and how it becomes batches of token ids (docs/data.md)."""

    corpus: str = "python"
    """The text: `python` (the standard library), `python+packages`, a folder, file or glob (.txt .md .py .jsonl, also
    .gz .zst), `tfds:NAME`, `arrayrecord:GLOB`. Several with their shares: `python:0.7,/path/books:0.3`."""
    text_key: str = "text"
    """The field that holds the text in JSONL, tfds and ArrayRecord (JSON) documents."""
    tokenizer: str = ""
    """Path of a tokenizer.json. Empty: a byte-level BPE of `model.vocab_size` is trained on the corpus and cached."""
    seq_len: int = 256
    """Tokens of a sequence, at least 2."""
    batch_size: int = 16
    """Sequences of a training step, over all processes and parts; a multiple of train.grad_accum."""
    holdout_fraction: float = 0.05
    """Share of the documents that only evaluation sees, in (0, 1). A document's hash decides."""
    seed: int = 0
    """Seed of the order of the documents and windows."""
    cache_dir: str = ""
    """Folder of cached tokenizers and token files. Empty: $ENGRAM_CACHE or ~/.cache/engram_jax."""
    max_documents: int = 0
    """Documents to read at most. 0: all."""
    worker_count: int = 0
    """Grain worker processes that assemble batches. 0: threads in this process."""

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
    """The peak of the schedule, positive. The tables' rate is table_lr_multiplier times as high."""
    schedule: Literal["step", "cosine"] = "step"
    """The shape after the warmup. step: drops at decay_at. cosine: falls smoothly to the last of decay_to."""
    warmup_steps: int = 2000
    """Steps in which the rate rises from 0 to its peak."""
    decay_at: tuple[float, ...] = (0.8, 0.9)
    """Step schedule: fractions of the run at which the rate drops, ascending in (0, 1)."""
    decay_to: tuple[float, ...] = (0.316, 0.1)
    """Step schedule: the rate after each drop, relative to the peak. Cosine ends at the last of these."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings. Norms, scalars and tables have none."""
    frozen: tuple[str, ...] = ()
    """Parameters that do not move, by patterns of their names (`*` is anything): blocks.* embedding_vd head_dv. They
    have no optimizer state and are not clipped with the others; a frozen router's balancing bias does not move either.
    For the tables see table_optimizer."""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """The optimizer of the matrices inside blocks and readers."""
    muon_momentum: float = 0.95
    """Muon: decay of the momentum, below 1."""
    muon_steps: tuple[int, int] = (8, 2)
    """Muon: Newton-Schulz steps, fast ones and then settling ones. V4 takes 8 and 2, Moonlight 5 and 0 at half the
    cost."""
    muon_update_rms: float = 0.18
    """RMS to which Muon and Sinkhorn rescale their updates, so that they share AdamW's learning rate (V4: 0.18)."""
    adam_b1: float = 0.9
    """Adam and AdamW: decay of the first moment, at least 0 and below sqrt(adam_b2)."""
    adam_b2: float = 0.95
    """Adam and AdamW: decay of the second moment, below 1."""
    adam_eps: float = 1e-20
    """Adam and AdamW: what is added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest global norm of all gradients, row gradients included. 0: no clipping."""
    table_optimizer: names.RowOptimizer = "catch_up_adam"
    """The optimizer of the table rows. catch_up_adam: dense Adam's trajectory at the cost of the rows looked up, 8
    bytes of state per number. rowwise_adagrad, rowwise_rmsprop: 4 and 8 bytes per row. sinkhorn: V4.1's, 4 bytes per
    number; sinkhorn and dense_adam (the test oracle) cost time in proportion to the table. lazy_adam: a row moves only
    when it is read, as in most sparse optimizers. frozen: the tables do not move, and rows have no optimizer state."""
    table_lr_multiplier: float = 5.0
    """The tables' learning rate relative to learning_rate (paper: 5)."""
    sinkhorn_momentum: float = 0.95
    """Sinkhorn: decay of the momentum, in [0, 1)."""
    sinkhorn_iters: int = 11
    """Sinkhorn: normalisations of rows and columns in turn, rows first and last; odd and positive."""
    sinkhorn_tau: float = 1e-3
    """Sinkhorn: rows whose momentum's norm is at most this share of the table's mean do not move, in [0, 1)."""

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
    """The memory that holds the tables, and how rows travel. Of all fields only `row_dtype` changes the losses."""

    placement: names.Placement = "device"
    """device: device memory. host: pinned host memory, read and written inside the compiled step. tiered: the rows that
    are used most on the device, the other rows on the host. numpy: arrays or memory-mapped files of the Python process,
    on any backend."""
    row_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 rows are rounded stochastically when written; optimizer state stays float32."""
    transport: Literal["auto", "all_to_all", "ragged_all_to_all"] = "auto"
    """The collective that carries rows between devices. auto: ragged on TPU, all_to_all elsewhere."""
    prefetch: bool = True
    """Read the next batch's rows before this one's update: `numpy` beside the computation, `host` and `tiered` in the
    compiled step of an accelerator. The numbers are the same."""
    hot_rows: float = 0.1
    """tiered: share of the rows on the device, in (0, 1]."""
    promote_every: int = 20
    """tiered: steps between exchanges of hot against cold rows. 0: never."""
    mmap_dir: str = ""
    """numpy: folder for memory-mapped tables. Empty: in memory."""
    monitor_every: int = 100
    """Steps between measurements of the memory: gates, collisions, staleness, hit rate. 0: none."""

    def __post_init__(self):
        check_literals(self)
        require(0 < self.hot_rows <= 1, f"memory.hot_rows={self.hot_rows} must lie in (0, 1].")
        for name in ("promote_every", "monitor_every"):
            require(getattr(self, name) >= 0, f"memory.{name}={getattr(self, name)} must be 0 or positive.")


@dataclass(frozen=True)
class TrainConfig:
    """The length of the training, its evaluations, and the mesh of devices (docs/training.md)."""

    steps: int = 1000
    """Training steps, at least 1."""
    seed: int = 0
    """Seed of new parameters and rows."""
    init_from: str = ""
    """Folder of a run whose newest checkpoint this run begins with: parameters, balancing biases and tables. The step
    is 0, the optimizer state is new; schedule, sequence length and data are this run's own. Not read again once this
    run has a checkpoint."""
    grad_accum: int = 1
    """Parts of a batch that are computed one after the other, at least 1. Rows are fetched and updated once a step."""
    log_every: int = 10
    """Steps between lines of the log and of metrics.jsonl, at least 1."""
    eval_every: int = 200
    """Steps between evaluations on the held-out documents. 0: only at the end."""
    eval_batches: int = 8
    """Batches of an evaluation during training, at least 1."""
    eval_batches_final: int = 64
    """Batches of the evaluation at the end, at most; at least 1."""
    tensorboard: bool = True
    """Whether to write TensorBoard files beside metrics.jsonl."""
    mesh_data: int = -1
    """Devices over which the batch is cut. -1: all devices that the other axes leave."""
    mesh_fsdp: int = 1
    """Devices over which parameters and batch are cut, at least 1."""
    mesh_expert: int = 1
    """Devices over which the routed experts are distributed, at least 1; other parameters are cut over them too. Need
    not divide the experts: up to an eighth of them may be missing for an even share."""
    mesh_context: int = 1
    """Devices over which each sequence is cut, at least 1."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward widths and the vocabulary are cut, at least 1."""

    def __post_init__(self):
        require(self.steps > 0, f"steps={self.steps} must be positive.")
        require(self.grad_accum > 0, f"grad_accum={self.grad_accum} must be positive.")
        for name in ("log_every", "eval_batches", "eval_batches_final", "mesh_expert", "mesh_context", "mesh_tensor"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, so that the same command resumes it."""

    every: int = 200
    """Steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """The number of newest checkpoints that stay, at least 1."""

    def __post_init__(self):
        require(self.keep > 0, f"checkpoint.keep={self.keep} must be positive.")


@dataclass(frozen=True)
class RunConfig:
    """One run: the model, its data, and how it is trained. Saved as config.json in the run's folder.

        run = RunConfig(model=ModelConfig(hidden_size=512), data=DataConfig(corpus="my_texts/"))
        run = replace(run, train__steps=50, model__engram__engram_layer_ids=(1,))

    A value that cannot work raises `ConfigError` when the config is built, before anything compiles.
    """

    name: str = "run"
    """The name in logs and reports."""
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
