"""Rules that turn a budget of training FLOPs into matched runs: dense, MoE and MoE with memory (docs/scaling.md).

    C training FLOPs, N active parameters, D tokens: C = 6 N D, as the paper counts (arXiv 2601.07372, section 3.1)

Known points are the paper's backbones; between them and below them numbers follow power laws through them. What is
taken from a publication says which one; everything else here is an assumption, and docs/scaling.md lists those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from engram_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    replace,
    require,
)
from engram_jax.counts import Parameters, backbone_parameters
from experiments.runs.twins import active_width, engram_twin

KINDS = ("dense", "moe", "engram")
SMALLEST, LARGEST = 1e14, 1e23
"""Budgets. Below, router and hyper-connections outweigh the experts; above, nothing published is near."""


@dataclass(frozen=True)
class Ratios:
    """What stays the same from budget to budget. The defaults are the paper's, of its allocation study (3.1)."""

    tokens_per_parameter: float = 103.0
    """D / N: at 2e20 FLOPs 568 M active parameters are printed, and C = 6 N D then leaves 58.7 B tokens."""
    sparsity: float = 10.0
    """P_tot / P_act, vocabulary matrices in neither."""
    rho: float = 0.775
    """Experts' share of the sparse parameters in the model with memory: the middle of the paper's 75 to 80 %."""

    def __post_init__(self):
        tokens = self.tokens_per_parameter
        require(0 < tokens < math.inf, f"tokens_per_parameter={tokens} must be positive and finite.")
        require(1.5 <= self.sparsity <= 50, f"sparsity={self.sparsity} (P_tot / P_act) must lie between 1.5 and 50.")
        require(0.2 <= self.rho < 1, f"rho={self.rho} must lie in [0.2, 1): it is the experts' share.")


PAPER = Ratios()


# --- size ---


@dataclass(frozen=True)
class Backbone:
    """A published shape: its active parameters, blocks and width."""

    active: float
    num_layers: int
    hidden_size: int


PAPER_3B = Backbone(568e6, 12, 1280)
"""Sections 3.1 and 6.2: 12 blocks; 568 M active fit 1280 wide, as the mHC paper's 12 blocks are."""
PAPER_27B = Backbone(3808e6, 30, 2560)
TINY_LAYERS, TINY_ACTIVE = 4, 1.2e6
"""Of moe_tiny, from which the number of blocks grows to PAPER_3B's."""


def active_parameters(budget: float, ratios: Ratios = PAPER) -> float:
    """N of C = 6 N D with D = tokens_per_parameter x N.

    Raises:
      ConfigError: a budget for which these rules are not meant.
    """
    require(
        SMALLEST <= budget <= 1.001 * LARGEST,  # 10.0**23 is not 1e23
        f"budget={budget:g} FLOPs lies outside of {SMALLEST:g} to {LARGEST:g}, for which these rules are meant.",
    )
    return math.sqrt(budget / (6 * ratios.tokens_per_parameter))


def num_layers(active: float) -> int:
    """Blocks: a power law through (moe_tiny, 4), (568 M, 12) and (3.8 B, 30); at least 4, for two with memory."""
    small, large = PAPER_3B, PAPER_27B
    if active < small.active:
        exponent = math.log(small.num_layers / TINY_LAYERS) / math.log(small.active / TINY_ACTIVE)
    else:
        exponent = math.log(large.num_layers / small.num_layers) / math.log(large.active / small.active)
    return max(4, round(small.num_layers * (active / small.active) ** exponent))


def hidden_size(active: float) -> int:
    """Width, to a multiple of 32, 64 or 128: a power law through the two published shapes; below them such that
    active / (blocks x width^2) stays what it is at 568 M, and with it the experts' share of a token's arithmetic."""
    small, large = PAPER_3B, PAPER_27B
    if active < small.active:
        width = small.hidden_size * math.sqrt(active / small.active * small.num_layers / num_layers(active))
    else:
        exponent = math.log(large.hidden_size / small.hidden_size) / math.log(large.active / small.active)
        width = small.hidden_size * (active / small.active) ** exponent
    multiple = 32 if width < 512 else 64 if width < 1024 else 128
    return max(64, multiple * round(width / multiple))


def attention(width: int) -> AttentionConfig:
    """MLA in the paper's proportions: heads 1.6 x width in all, of 128 and 64 rotated; narrower in narrow models."""
    head = next((head for least, head in ((1024, 128), (384, 64), (128, 32)) if width >= least), 16)
    even = 4 if head == 128 else 2
    heads = even * round(1.6 * width / head / even)
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=heads,
        qk_nope_head_dim=head,
        qk_rope_head_dim=head // 2,
        v_head_dim=head,
        kv_lora_rank=min(512, width // 2),
    )


def memory_settings(model: ModelConfig) -> EngramConfig:
    """The paper's proportions: two modules, in the second block and before the middle, {2,3}-grams, 8 heads, rows of
    half the width in all (27B: 1280 of 2560; section 6.2's reference: 640 of 1280, blocks 2 and 6)."""
    layers = (1, max(2, model.num_hidden_layers // 2 - 1))
    return EngramConfig(engram_layer_ids=layers, engram_n_heads=8, engram_head_dim=model.hidden_size // 32)


def _between(active: float, at_tiny: float, at_3b: float) -> float:
    """A power law through a setting's values at moe_tiny and at 568 M, and those values beyond the two."""
    share = math.log(active / TINY_ACTIVE) / math.log(PAPER_3B.active / TINY_ACTIVE)
    return at_tiny * (at_3b / at_tiny) ** min(1.0, max(0.0, share))


def vocab_size(active: float) -> int:
    """From 4,096 to the paper's 129,280, to a multiple of 128."""
    return 128 * round(_between(active, 4096, 129_280) / 128)


def seq_len(active: float) -> int:
    """From 256 to the paper's 4,096, a power of two."""
    return 2 ** round(math.log2(_between(active, 256, 4096)))


# --- training ---


def learning_rate(budget: float) -> float:
    """DeepSeek LLM's law (arXiv 2401.02954, eq. 1) for AdamW, to two digits. Muon's updates are scaled to AdamW's RMS
    so that it can share AdamW's rate (Moonlight, arXiv 2502.16982): that it is the best one for Muon is assumed."""
    return float(f"{0.3118 * budget**-0.1250:.2g}")


def batch_tokens(budget: float) -> float:
    """Tokens in a step by the same law."""
    return 0.2920 * budget**0.3271


def batch_size(budget: float, length: int, devices: int = 1) -> int:
    """Sequences in a step: to a multiple of 64 (of 16 below 64), of 8 in sequences below 16, and of the devices.

    Raises:
      ConfigError: more devices than sequences.
    """
    wanted = batch_tokens(budget) / length
    even = 64 if wanted >= 64 else 16 if wanted >= 16 else 8
    multiple = math.lcm(devices, even)
    if even < multiple > wanted / 4:  # too coarse: what the devices alone ask for
        multiple = devices
    require(
        devices < 1.5 * wanted,
        f"--topology with {devices} devices: at {budget:g} FLOPs a step has about {wanted:.0f} sequences of {length} "
        f"tokens, and every device needs one. Take a slice of at most {max(1, round(wanted))} devices.",
    )
    return multiple * max(1, round(wanted / multiple))


# --- runs ---


def non_vocabulary(counts: Parameters) -> int:
    """P_tot as the paper's section 3.1 counts: without embedding and head."""
    return counts.total - counts.groups["embedding"] - counts.groups["head"]


def moe_run(budget: float, ratios: Ratios = PAPER, devices: int = 1) -> RunConfig:
    """The MoE of that budget; the others are its twins.

    Raises:
      ConfigError: a budget for which the rules are not meant, or more devices than sequences.
    """
    active = active_parameters(budget, ratios)
    width, layers, length = hidden_size(active), num_layers(active), seq_len(active)
    is_large = active > 200e6
    shell = ModelConfig(
        vocab_size=vocab_size(active),
        hidden_size=width,
        num_hidden_layers=layers,
        attention=attention(width),
        hc_mult=4,
        remat="full" if is_large else "none",
        loss_chunk_len=512 if is_large else 0,
    )
    model = _experts_for(shell, active, ratios.sparsity)
    batch = batch_size(budget, length, devices)
    tokens = budget / (6 * backbone_parameters(model).active)
    steps = max(1, round(tokens / (batch * length)))
    return RunConfig(
        model=model,
        data=DataConfig(corpus="python+packages", seq_len=length, batch_size=batch),
        optimizer=OptimizerConfig(learning_rate=learning_rate(budget), warmup_steps=min(2000, round(0.04 * steps))),
        train=TrainConfig(steps=steps, eval_every=max(1, steps // 20)),
        checkpoint=CheckpointConfig(every=min(1000, max(1, steps // 20))),
    )


def dense_run(moe: RunConfig) -> RunConfig:
    """The MoE's active parameters in dense blocks; their width also pays for the router, a tenth of a tiny model."""

    def at(width: int) -> ModelConfig:
        return replace(moe, model__moe__n_routed_experts=0, model__intermediate_size=width).model

    target = backbone_parameters(moe.model).active
    return replace(moe, model=at(_width_for(target, at, width_multiple(moe.model.moe.moe_intermediate_size))))


def engram_run(moe: RunConfig, ratios: Ratios = PAPER) -> RunConfig:
    """The MoE with memory for experts, as near to rho as whole experts allow."""
    experts, multiple = moe.model.moe, width_multiple(moe.model.moe.moe_intermediate_size)
    given = experts.num_experts_per_tok + ratios.rho * (experts.n_routed_experts - experts.num_experts_per_tok)
    best: RunConfig | None = None
    # The reader makes experts narrower, so rho is met by more of them than their number alone says: 11 % at 2e14.
    for number in range(max(int(given) - 1, experts.num_experts_per_tok), experts.n_routed_experts):
        try:
            twin = engram_twin(moe, memory_settings(moe.model), number, multiple)
        except ConfigError:  # these leave nothing for the tables
            break
        if best is not None and abs(_rho(twin.model) - ratios.rho) > abs(_rho(best.model) - ratios.rho):
            break  # rho grows with their number
        best = twin
    missed = "nothing" if best is None else f"{_rho(best.model):.3f}"
    if best is None or abs(_rho(best.model) - ratios.rho) > 0.02:
        raise ConfigError(
            f"rho={ratios.rho} cannot be had: of {experts.n_routed_experts} experts, whole ones given up for a memory "
            f"come to {missed}. Take another rho, or a larger sparsity."
        )
    return best


def triple(budget: float, ratios: Ratios = PAPER, devices: int = 1) -> dict[str, RunConfig]:
    """The three runs of a budget by kind, each with its name (`engram_2e20`).

    Raises:
      ConfigError: as `moe_run`, and a rho that leaves no memory.
    """
    moe = moe_run(budget, ratios, devices)
    made = {"dense": dense_run(moe), "moe": moe, "engram": engram_run(moe, ratios)}
    return {kind: replace(made[kind], name=f"{kind}_{spelt(budget)}") for kind in KINDS}


def spelt(budget: float) -> str:
    """2e20, 1.5e19: as a budget is written in a run's name."""
    digits, exponent = f"{budget:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def width_multiple(width: int) -> int:
    """What a width is rounded to: a power of two, at most 1/128 of it, so that active parameters meet to 0.5 %."""
    return 2 ** max(0, int(math.log2(width / 128))) if width >= 128 else 1


def _experts_for(shell: ModelConfig, active: float, sparsity: float) -> ModelConfig:
    """The MoE with that many active parameters and, by its number of experts, that P_tot / P_act."""

    def at(width: int, experts: int) -> ModelConfig:
        moe = MoEConfig(n_routed_experts=experts, moe_intermediate_size=width)
        return replace(RunConfig(model=shell), model__moe=moe, model__intermediate_size=active_width(moe)).model

    experts, width, top = 106, 1, MoEConfig().num_experts_per_tok
    for _ in range(4):  # the router's size depends on the experts, their width on what the router leaves
        width = _width_for(active, lambda width, experts=experts: at(width, experts), 1)
        width = _width_for(active, lambda width, experts=experts: at(width, experts), width_multiple(width))
        one, two = (non_vocabulary(backbone_parameters(at(width, number))) for number in (top, top + 1))
        target = sparsity * backbone_parameters(at(width, experts)).active
        experts = max(top + 1, top + round((target - one) / (two - one)))
    return at(width, experts)


def _width_for(active: float, at: Callable[[int], ModelConfig], multiple: int) -> int:
    """The width, a multiple of `multiple`, at which the model has that many active parameters: they grow linearly."""
    one, two = (backbone_parameters(at(width)).active for width in (multiple, 2 * multiple))
    width = multiple * (1 + round((active - one) / (two - one)))
    require(width > 0, f"{active:,.0f} active parameters are used up before the feed-forward layers: raise the budget.")
    return width


def _rho(model: ModelConfig) -> float:
    """Experts' share of the sparse parameters, rows counted before they are rounded to primes."""
    counts, moe = backbone_parameters(model), model.moe
    idle = counts.groups["routed_experts"] * (1 - moe.num_experts_per_tok / moe.n_routed_experts)
    rows = sum(model.engram.vocab_size_per_order) * model.engram.engram_n_heads * len(model.engram.engram_layer_ids)
    return idle / (idle + rows * model.engram.engram_head_dim)
