"""Settings of the model: backbone, attention, experts, memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engram_jax.config import names
from engram_jax.config.checks import check_literals
from engram_jax.errors import require
from engram_jax.registries import ATTENTION, READERS


@dataclass(frozen=True)
class EngramConfig:
    """The memory: which layers read it, how n-grams become rows, how wide a row is (arXiv 2601.07372, section 2).

    Names are DeepSeek-V4.1's.
    """

    engram_layer_ids: tuple[int, ...] = ()
    """Blocks that begin with an Engram reader: distinct, ascending, from 0. Empty: the model has no memory."""
    engram_variant: names.Reader = "paper"
    """The reader, with its hash and gate. paper, deepseek_v41, qwen_ple: the published Engrams. over_encoding: n-gram
    embeddings averaged with the vocabulary's (docs/memory.md)."""
    engram_max_ngram_size: int = 3
    """The largest n-gram order N, at least 2. Orders 2..N are looked up."""
    engram_n_heads: int = 8
    """Hash heads per order, at least 1."""
    engram_head_dim: int = 80
    """Width of one row, at least 1. A token reads (N - 1) * engram_n_heads rows per Engram layer."""
    engram_vocab_size: int | tuple[int, ...] = 2_262_400
    """Rows per head, at least 2, before rounding up to distinct primes: one number, or one number per order."""
    engram_pad_token_id: int = 2
    """The raw token id that fills a window before its start, below vocab_size (EOS for qwen_ple)."""
    engram_compressed_vocab_size: int = 0
    """Number of canonical ids after tokenizer compression. 0: take it from the tokenizer; else the two must agree."""
    engram_kernel_size: int = 4
    """Taps of the short causal convolution, which is dilated by the largest order. 0: no convolution."""
    engram_conv_norm_eps: float = 1e-20
    """Epsilon of the norm before the convolution (1e-5 in the demo). The gate's norms use the model's rms_norm_eps."""
    engram_seed: int = 0
    """Seed of the hash's multipliers, 0 or positive."""
    engram_cross_documents: bool = False
    """True: windows of n-grams run across the documents of a packed row, as in the published demo."""
    engram_bias: bool = False
    """True: the key and value projections have biases, as in the demo. The paper has none."""
    engram_initializer_range: float = 0.02
    """Standard deviation of new rows, 0 or positive. The paper does not give it."""
    engram_amplification: float = 1.0
    """over_encoding: factor of the average, positive. 1: as published. sqrt(hidden_size): as in LongCat (Liu et al.
    2026, arXiv 2601.21204), so that the first attention does not drown the input."""
    engram_without: tuple[Literal["multi_branch", "compression", "gate", "wide_hash"], ...] = ()
    """Parts to leave out, to measure what each is good for (paper 6.2). multi_branch: one key and one gate, for the
    state that a sub-layer would read from the streams. compression: raw token ids are hashed. gate: the gate is 1 and
    there are no keys. wide_hash: the mix of an n-gram has 31 bits, as in MaxText, not 63. To leave out the convolution,
    set engram_kernel_size=0."""

    def __post_init__(self):
        check_literals(self)
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
        for name in ("kernel_size", "initializer_range"):
            value = getattr(self, f"engram_{name}")
            require(value >= 0, f"engram_{name}={value} must be 0 or positive.")
        require(self.engram_amplification > 0, f"engram_amplification={self.engram_amplification} must be positive.")
        without = self.engram_without
        require(len(set(without)) == len(without), f"engram_without={without} names a part twice.")
        require(
            not {"multi_branch", "gate"} <= set(without),
            f"engram_without={without}: gate and multi_branch cannot both be removed; keep one.",
        )
        READERS[self.engram_variant].check_settings(self)

    @property
    def enabled(self) -> bool:
        """Whether the model has a memory."""
        return bool(self.engram_layer_ids)

    @property
    def has_gates(self) -> bool:
        """Whether the readers have gates. Imports jax."""
        return self.enabled and READERS[self.engram_variant].layer(self).has_gates

    @property
    def vocab_share(self) -> float:
        """Factor of the vocabulary's embedding in the model's input."""
        return READERS[self.engram_variant].vocab_share(self) if self.enabled else 1.0

    @property
    def reach(self) -> int:
        """How many positions back the readers look, beside the n-grams' own."""
        return READERS[self.engram_variant].reach(self) if self.enabled else 0

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
    """Stretched rotations (YaRN), for a longer context than the model was trained at (equations: layers/rope.py).

    Names are DeepSeek's `rope_scaling` fields. Values are those of the Engram paper's long-context stage (arXiv
    2601.07372, table 2), except `factor`, which is 10 there.
    """

    factor: float = 1.0
    """How many times longer the context is, at least 1. 1: no stretching."""
    beta_fast: float = 32.0
    """Frequencies that turn at least this often within the original length stay (YaRN's beta)."""
    beta_slow: float = 1.0
    """Frequencies that turn at most this often are divided by `factor` (YaRN's alpha); between the two lies a ramp.
    Positive and below `beta_fast`."""
    mscale: float = 0.707
    """With `mscale_all_dim`: factor of the rotated parts of queries and keys, relative to all scores; 0 or positive."""
    mscale_all_dim: float = 0.707
    """Scores are multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)^2; 0 or positive. 0: by 1."""
    original_max_position_embeddings: int = 4096
    """The length in tokens that the model was trained at before, positive."""

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
        """Whether rotations are stretched."""
        return self.factor > 1

    @property
    def max_position_embeddings(self) -> int:
        """Positions that the stretched rotations are meant for."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclass(frozen=True)
class AttentionConfig:
    """Attention: the variant and its sizes. Names are DeepSeek's."""

    kind: names.Attention = "mla"
    """The variant. mla: multi-head latent attention (DeepSeek-V2). gqa: grouped-query attention."""
    num_attention_heads: int = 4
    """Query heads, at least 1."""
    num_key_value_heads: int = 4
    """gqa: key-value heads, a factor of num_attention_heads. 1 is multi-query attention."""
    qk_nope_head_dim: int = 128
    """mla: width of a head's queries and keys without position. gqa: a head is qk_nope + qk_rope wide."""
    qk_rope_head_dim: int = 64
    """mla: width of a head's rotated queries and keys. Even."""
    v_head_dim: int = 128
    """mla: width of a head's values. In gqa values are as wide as keys."""
    kv_lora_rank: int = 512
    """mla: width of the compressed key-value latent."""
    rope_theta: float = 10_000.0
    """Base of the rotations' wavelengths, above 1."""
    yarn: YarnConfig = field(default_factory=YarnConfig)

    def __post_init__(self):
        check_literals(self)
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even.")
        require(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1.")
        ATTENTION[self.kind].check(self)

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE: shared and routed experts, balanced by a bias per expert instead of a large auxiliary loss."""

    n_routed_experts: int = 0
    """Routed experts per block. 0: every block has a dense feed-forward layer of `intermediate_size`."""
    num_experts_per_tok: int = 6
    """Routed experts that a token uses, 1..n_routed_experts."""
    n_shared_experts: int = 2
    """Experts that every token uses, 0 or more. They are computed as one layer."""
    moe_intermediate_size: int = 1536
    """Width of one expert."""
    first_k_dense_replace: int = 1
    """How many leading blocks keep a dense feed-forward layer."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """From the router's logits to scores. sigmoid: DeepSeek-V3. softmax: DeepSeek-V2."""
    norm_topk_prob: bool = True
    """True: the scores of a token's chosen experts are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor of the routed experts' sum."""
    bias_update_speed: float = 1e-3
    """Change of the balancing bias per training step (Wang 2024a; 0.001 in V4.1)."""
    seq_aux_alpha: float = 1e-4
    """Weight of the sequence-level balance loss."""
    implementation: Literal["auto", "every_expert", "ragged", "blocked"] = "auto"
    """How the routed experts are computed. All ways drop no token and give equal results (layers/moe.py)."""
    capacity_factor: float = 1.5
    """With train.mesh_expert: room in a block of the exchange, relative to evenly routed tokens; positive. Tokens that
    do not fit go in further rounds: it changes speed and memory, not the numbers (layers/expert_parallel.py)."""

    def __post_init__(self):
        check_literals(self)
        if self.n_routed_experts:
            require(
                0 < self.num_experts_per_tok <= self.n_routed_experts,
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in "
                f"1..n_routed_experts={self.n_routed_experts}.",
            )
        require(self.capacity_factor > 0, f"moe.capacity_factor={self.capacity_factor} must be positive.")

    @property
    def enabled(self) -> bool:
        """Whether the model has experts."""
        return self.n_routed_experts > 0


@dataclass(frozen=True)
class ModelConfig:
    """A model: the backbone's sizes, attention, experts and memory."""

    vocab_size: int = 4096
    """Token ids, positive. The tokenizer must have as many."""
    hidden_size: int = 256
    """Width of a residual stream, positive."""
    num_hidden_layers: int = 4
    """Blocks, positive."""
    intermediate_size: int = 1024
    """Width of a dense feed-forward layer, positive."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)
    hc_mult: int = 4
    """Residual streams of the hyper-connections, positive. 1: an ordinary residual network."""
    hc_sinkhorn_iters: int = 20
    """Sinkhorn iterations that make the mix of streams doubly stochastic."""
    hc_gate_init: float = 0.01
    """Initial size of the token-dependent part of the hyper-connections' coefficients."""
    rms_norm_eps: float = 1e-20
    """Epsilon of the RMS norms; 1e-20 in the 27B backbone and in V4.1."""
    initializer_range: float = 0.02
    """Standard deviation of new weights. Projections back into the streams start at 1/sqrt(2 num_hidden_layers) of
    it."""
    tie_word_embeddings: bool = False
    """True: the output head is the embedding table."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Dtype of activations and matrix products. Parameters and optimizer state are float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes. none: nothing. full: every block and Engram reader. dots: everything but the
    matrix products."""
    attend_across_documents: bool = False
    """True: attention in a packed row does not stop at document boundaries."""
    loss_chunk_len: int = 0
    """Positions of each sequence whose logits exist at a time, to bound the memory of the logits. 0: all."""

    def __post_init__(self):
        check_literals(self)
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
        require(
            self.hc_mult > 1 or "multi_branch" not in self.engram.engram_without,
            f"hc_mult={self.hc_mult} already has one branch: remove multi_branch from "
            f"engram_without={self.engram.engram_without}, or raise hc_mult.",
        )

    @property
    def engram_branches(self) -> int:
        """States that an Engram reader gates separately: the streams, or one without multi_branch."""
        return 1 if "multi_branch" in self.engram.engram_without else self.hc_mult

    @property
    def itemsize(self) -> int:
        """Bytes of one activation."""
        return {"bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]
