"""The analysis `knock_out`: what a trained model still knows when its memory is switched off (paper, section 6.3)."""

from experiments.studies.analyses.analysis_base import analysis

KNOCK_OUT = analysis(
    __name__,
    question="What does a model with memory still know when its memory is switched off, by the kind of token?",
    caveats=(
        "Nobody trained the model without its memory. Its loss also holds what the silence of one part does to the "
        "other parts, not only what the memory stored. The twin shows the size of this effect.",
        "Rules tell the kinds of tokens apart: Python's tokenizer for source, capitals and digits for prose. The rules "
        "err on names at the beginning of sentences and on other languages.",
        "The paper's shares are of benchmark scores of a 27B model; the shares here are of next tokens of the held-out "
        "text.",
    ),
)
