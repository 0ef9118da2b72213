"""The analysis `gates`: where the memory's gates open, and what their opening goes with."""

from experiments.studies.analyses.analysis_base import analysis

GATES = analysis(
    __name__,
    question="Where do the memory's gates open, and do they open where the memory helps?",
    caveats=(
        "Streams have no names: stream 0 of one seed need not do what stream 0 of another seed does. The spread over "
        "seeds of a single stream holds this difference too.",
        "The paper shows the branch whose gates look most like phrases (figure 7). A chosen branch and chosen lines "
        "show what can happen; the correlations show what does happen.",
        "A gate scales a value whose size varies: a wide gate on a small value adds little.",
    ),
)
