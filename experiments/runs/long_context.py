"""Second stages at a longer context: YaRN from a trained run's checkpoint (the paper's table 2; docs/long_context.md).

python -m experiments.run engram_tiny_2k --train.init_from runs/engram_tiny
"""

from __future__ import annotations

from engram_jax.config import RunConfig, YarnConfig, replace
from experiments.runs.registry import register
from experiments.runs.sizes import engram_27b, engram_tiny, moe_27b, moe_tiny

# --- tiny: 256 -> 2,048 positions ---


def _tiny_2k(run: RunConfig, name: str) -> RunConfig:
    """A quarter of the first stage's tokens, eight times its length, at the rate it ended with."""
    return replace(
        run,
        model__attention__yarn=YarnConfig(factor=8.0, original_max_position_embeddings=run.data.seq_len),
        data__seq_len=2048,
        data__batch_size=2,
        optimizer__learning_rate=3e-4,
        optimizer__warmup_steps=6,
        optimizer__decay_at=(),
        optimizer__decay_to=(),
        train__steps=60,
        train__eval_every=0,
        train__init_from=f"runs/{name}",
    )


@register
def moe_tiny_2k() -> RunConfig:
    """moe_tiny at eight times its length: the baseline of engram_tiny_2k.

    Command:  python -m experiments.run moe_tiny_2k
    Cost:     60 steps of 4,096 tokens, several minutes on two CPU cores; needs runs/moe_tiny.
    Expected: beyond position 256 a loss below the one moe_tiny has there (experiments/LOG.md).
    """
    return _tiny_2k(moe_tiny(), "moe_tiny")


@register
def engram_tiny_2k() -> RunConfig:
    """Does a short stage with YaRN make eight times the trained length usable, and the memory stay worth its place?

    Command:  python -m experiments.run moe_tiny_2k engram_tiny_2k
    Cost:     about moe_tiny_2k's; needs runs/engram_tiny.
    Expected: beyond position 256 a loss below engram_tiny's there, and below moe_tiny_2k's (experiments/LOG.md).
    """
    return _tiny_2k(engram_tiny(), "engram_tiny")


# --- the paper's stage (arXiv 2601.07372, section 4.2: DeepSeek-V3's strategy) ---


def _paper_32k(run: RunConfig, name: str) -> RunConfig:
    """Printed: 5,000 steps at 32,768 tokens, 30 B tokens; YaRN with s = 10, alpha = 1, beta = 32, f = 0.707.

    Decided here, for the paper does not say:
      batch          192. 30 B tokens make 183 sequences a step, which fits no mesh; these are 31.5 B.
      learning rate  4e-5 throughout: what the first stage ended with, as in DeepSeek-V3's extension.
      warm-up        100 steps: the optimizer state is new.
      tables         trained on like everything else (--optimizer.table_optimizer frozen leaves them as they are).
    """
    return replace(
        run,
        model__attention__yarn=YarnConfig(factor=10.0),
        data__seq_len=32_768,
        data__batch_size=192,
        optimizer__learning_rate=4e-5,
        optimizer__warmup_steps=100,
        optimizer__decay_at=(),
        optimizer__decay_to=(),
        train__steps=5000,
        train__init_from=f"runs/{name}",
        checkpoint__every=250,
    )


@register
def moe_27b_32k() -> RunConfig:
    """The long-context stage of the paper's MoE-27B: 32,768 tokens, 5,000 steps.

    Command:  python -m experiments.run moe_27b_32k --data.corpus ... --slice v5p-64
    Cost:     1.7e21 FLOPs; a pod; needs runs/moe_27b.
    Expected: the baseline of the paper's long-context table (LongPPL, RULER).
    """
    return _paper_32k(moe_27b(), "moe_27b")


@register
def engram_27b_32k() -> RunConfig:
    """The long-context stage of the paper's Engram-27B: 32,768 tokens, 5,000 steps.

    Command:  python -m experiments.run engram_27b_32k --data.corpus ... --slice v5p-64
    Cost:     about moe_27b_32k's; needs runs/engram_27b.
    Expected: better than moe_27b_32k on LongPPL and RULER.
    """
    return _paper_32k(engram_27b(), "engram_27b")
