"""The studies: what is compared with what, at which equal cost. `STUDIES` holds them by name."""

from experiments.studies.ablations import ABLATIONS
from experiments.studies.allocation import ALLOCATION
from experiments.studies.declared import Study
from experiments.studies.layers import LAYERS
from experiments.studies.looking import DEPTH, FREQUENCY, GATES, KNOCK_OUT
from experiments.studies.memory_scaling import MEMORY_SCALING
from experiments.studies.pair import PAIR

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (PAIR, ALLOCATION, MEMORY_SCALING, ABLATIONS, LAYERS, KNOCK_OUT, FREQUENCY, GATES, DEPTH)
}
