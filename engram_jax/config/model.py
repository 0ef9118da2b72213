"""The model: backbone, attention, experts, memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engram_jax.config.checks import check_literals
from engram_jax.errors import require


@dataclass(frozen=True)
class EngramConfig:
    """The memory: which layers read it, how n-grams become rows, how wide a row is (arXiv 2601.07372, section 2;
    V4.1's names)."""

    engram_layer_ids: tuple[int, ...] = ()
    """Zero-based blocks that begin with an Engram reader. Empty: no memory, and the model is the plain backbone."""
    engram_variant: Literal["paper", "deepseek_v41", "qwen_ple", "over_encoding"] = "paper"
    """Which published hash and gate: see memory/hashing.py and layers/engram.py. over_encoding: another reader of the
    same store, n-gram embeddings averaged with the vocabulary's (layers/over_encoding.py)."""
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
    engram_initializer_range: float = 0.02
    """Standard deviation of new rows; 0 starts them at zero. The paper leaves it open."""
    engram_amplification: float = 1.0
    """over_encoding: the average is multiplied by this. 1: as published; sqrt(hidden_size): as LongCat does (Liu et al.
    2026, arXiv 2601.21204), lest the first attention drown the input."""
    engram_without: tuple[Literal["multi_branch", "compression", "gate", "wide_hash"], ...] = ()
    """Parts left out, to see what each is good for (paper 6.2). multi_branch: one key and one gate, for the one state
    that a sub-layer would read from the streams. compression: raw token ids are hashed. gate: it is 1, and the keys
    are gone. wide_hash: the mix of an n-gram has 31 bits, as in MaxText, not 63. (Convolution: engram_kernel_size.)"""

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
        self._check_without()
        self._check_over_encoding()

    def _check_over_encoding(self) -> None:
        if self.engram_variant != "over_encoding":
            require(
                self.engram_amplification == 1,
                f"engram_amplification={self.engram_amplification} with engram_variant={self.engram_variant!r}: only "
                "over_encoding has an average to amplify. Leave it at 1.",
            )
            return
        for name, needed in (("layer_ids", (0,)), ("kernel_size", 0), ("bias", False), ("without", ())):
            value = getattr(self, f"engram_{name}")
            require(
                value in (needed, ()),
                f"engram_{name}={value} with engram_variant='over_encoding', which is read at the input only, by a "
                f"plain projection: set engram_{name}={needed}.",
            )

    def _check_without(self) -> None:
        without = self.engram_without
        require(len(set(without)) == len(without), f"engram_without={without} names a part twice.")
        require(
            not {"multi_branch", "gate"} <= set(without),
            f"engram_without={without}: without a gate no state is read, so there is no branch to be left: name one.",
        )
        of_the_hash = [part for part in without if part in ("compression", "wide_hash")]
        require(
            not of_the_hash or self.engram_variant in ("paper", "deepseek_v41"),
            f"engram_without={without}: engram_variant={self.engram_variant!r} has its own hash of raw ids, without "
            f"{' or '.join(of_the_hash)} to leave out. Choose engram_variant=paper or deepseek_v41.",
        )

    @property
    def enabled(self) -> bool:
        return bool(self.engram_layer_ids)

    @property
    def has_gates(self) -> bool:
        """Whether readers match rows with the hidden state at all."""
        return self.enabled and self.engram_variant != "over_encoding" and "gate" not in self.engram_without

    @property
    def vocab_share(self) -> float:
        """Weight of the vocabulary's embedding in the model's input: over_encoding averages it with a token's rows."""
        averaged = self.enabled and self.engram_variant == "over_encoding"
        return self.engram_amplification / (1 + self.num_rows_per_token) if averaged else 1.0

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

    Names are DeepSeek's `rope_scaling` fields, values those of the Engram paper's long-context stage (arXiv
    2601.07372, table 2) but for `factor`, 10 there.
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
        check_literals(self)
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even.")
        require(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1.")
        require(
            self.kind == "mla"
            or (self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0),
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
    """What the backward pass recomputes: nothing, every block and Engram reader, or all but the matrix products."""
    attend_across_documents: bool = False
    """True: attention in a packed row does not stop at document boundaries."""
    loss_chunk_len: int = 0
    """Positions of each sequence whose logits exist at a time (0: all), to bound the memory of the logits."""

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
            f"engram_without={self.engram.engram_without}: hc_mult={self.hc_mult} has one branch as it is. Leave "
            "multi_branch out of it, or raise hc_mult.",
        )

    @property
    def engram_branches(self) -> int:
        """States that an Engram layer gates by themselves: the streams, or the one without multi_branch."""
        return 1 if "multi_branch" in self.engram.engram_without else self.hc_mult
