"""The studies: what is compared with what, at which equal cost. `STUDIES` holds them by name."""

from experiments.studies.analyses.analysis_base import DEPTH, FREQUENCY, GATES, KNOCK_OUT
from experiments.studies.engine.declared import Study
from experiments.studies.trained.ablations import ABLATIONS
from experiments.studies.trained.allocation import ALLOCATION
from experiments.studies.trained.layers import LAYERS
from experiments.studies.trained.memory_scaling import MEMORY_SCALING
from experiments.studies.trained.pair import PAIR

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (PAIR, ALLOCATION, MEMORY_SCALING, ABLATIONS, LAYERS, KNOCK_OUT, FREQUENCY, GATES, DEPTH)
}
