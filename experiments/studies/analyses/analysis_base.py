"""The studies that look into the pair's runs. What they do is in the module of each one's name.

Those bring jax and Matplotlib, which `experiments.study --list` does not wait for.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path

from experiments.studies.engine.declared import Analysis, FinishedRun, Study
from experiments.studies.trained.pair import PAIR


def later(module: str) -> Analysis:
    """`analyse` of a module beside this one, imported when it is called."""

    def analyse(runs: Sequence[FinishedRun], folder: Path) -> list[str]:
        return importlib.import_module(f"experiments.studies.{module}").analyse(runs, folder)

    return analyse


def looking(name: str, question: str, caveats: tuple[str, ...]) -> Study:
    return dataclasses.replace(
        PAIR, name=name, question=question, caveats=caveats, analyse=later(name), trained_in=PAIR.name
    )


KNOCK_OUT = looking(
    name="knock_out",
    question="What does a model with memory still know when its memory is switched off, by the kind of token?",
    caveats=(
        "A model whose memory is taken away is a model that nobody trained: the loss also holds what the silence of a "
        "part does to the others, not only what was stored there. The twin shows the scale of that.",
        "Kinds are told apart by rules (Python's tokenizer for source; capitals and digits for prose), which err on "
        "names at the beginning of sentences and on other languages.",
        "The paper's shares are of benchmark scores of a 27B model; these are next tokens of the held-out text.",
    ),
)


FREQUENCY = looking(
    name="frequency",
    question="How do loss, gates and the rows' age go with the frequency of n-grams, on training and held-out text?",
    caveats=(
        "Frequencies are of exact token n-grams in what the run has read; the memory itself also sees shorter ones, "
        "whose frequency goes with it.",
        "A row's age and uses count every n-gram that hashes to it: in a table as small as these, an n-gram that was "
        "never seen also finds rows that others keep fresh.",
        "The training text is a sample from the whole run: what was read early may be forgotten in part.",
    ),
)


GATES = looking(
    name="gates",
    question="Where do the memory's gates open, and do they open where the memory helps?",
    caveats=(
        "Streams have no names: stream 0 of one seed need not do what stream 0 of another does, and the spread over "
        "seeds of single streams holds that too.",
        "The paper shows the branch whose gates look most like phrases (figure 7); a chosen branch and chosen lines "
        "show what can happen, and the correlations what does.",
        "A gate scales a value that is not the same everywhere: a wide gate on a small value adds little.",
    ),
)


DEPTH = looking(
    name="depth",
    question="Does memory make a model deeper: do its layers predict what it will say earlier, and are they like later "
    "layers of the baseline, more than another seed's are?",
    caveats=(
        "The divergence is from each model's own final prediction: a model that is surer in the end is further from "
        "its beginnings without being shallower.",
        "The lens reads a state with a head that was trained for the last one only; a layer may know what it cannot "
        "show.",
        "Soft alignment is a mean over the nearest layers, so it is drawn away from both ends: a_j > j at the first "
        "layers and a_j < j at the last say nothing by themselves. The fewer the layers, the coarser.",
        "Differences of alignment share their references (the baseline's runs), so their spread over seeds is not that "
        "of independent runs.",
        "The paper takes the named entities of Few-NERD; these are identifiers and names, by rules, that the tokenizer "
        "splits.",
    ),
)
