"""The analysis `frequency`: loss, gates and age of rows by the frequency of n-grams, on read and on unread text."""

from experiments.studies.analyses.analysis_base import analysis

FREQUENCY = analysis(
    __name__,
    question="How do loss, gates and the rows' age go with the frequency of n-grams, on training and held-out text?",
    caveats=(
        "Frequencies count exact token n-grams in the text that the run has read. The memory also reads shorter "
        "n-grams, whose frequency goes with that of the longer ones.",
        "A row's age and uses count every n-gram that hashes to the row. In a table as small as these, an n-gram that "
        "was never seen also finds rows that other n-grams keep fresh.",
        "The training text is a sample from the whole run: the model may have forgotten part of what it read early.",
    ),
)
