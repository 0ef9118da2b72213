"""The analysis `depth`: whether memory makes a model deeper, by logit lens and CKA (paper, section 6.1)."""

from experiments.studies.analyses.analysis_base import analysis

DEPTH = analysis(
    __name__,
    question="Does memory make a model deeper: do its layers predict what it will say earlier, and are they like later "
    "layers of the baseline, more than another seed's are?",
    caveats=(
        "The divergence is from each model's own final prediction. A model that is surer in the end is further from "
        "its first layers without being shallower.",
        "The lens reads every layer with a head that was trained for the last layer only. A layer may know what the "
        "head cannot show.",
        "Soft alignment is a mean over the nearest layers, which pulls it away from both ends: a_j > j at the first "
        "layers and a_j < j at the last layers say nothing by themselves. With fewer layers it is coarser.",
        "Differences of alignment share their references (the baseline's runs), so their spread over seeds is not that "
        "of independent runs.",
        "The paper takes the named entities of Few-NERD. This study takes identifiers and names, found by rules, that "
        "the tokenizer splits.",
    ),
)
