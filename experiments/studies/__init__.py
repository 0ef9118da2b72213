"""The studies by name. A study is one new module and one line here (docs/extending.md)."""

from engram_jax.registries import Registry
from experiments.studies.engine.declared import Study

STUDIES: Registry[Study] = Registry(
    "study",
    "studies",
    {
        "pair": "experiments.studies.trained.pair:PAIR",
        "allocation": "experiments.studies.trained.allocation:ALLOCATION",
        "memory_scaling": "experiments.studies.trained.memory_scaling:MEMORY_SCALING",
        "ablations": "experiments.studies.trained.ablations:ABLATIONS",
        "layers": "experiments.studies.trained.layers:LAYERS",
        "knock_out": "experiments.studies.analyses.knock_out:KNOCK_OUT",
        "frequency": "experiments.studies.analyses.frequency:FREQUENCY",
        "gates": "experiments.studies.analyses.gates:GATES",
        "depth": "experiments.studies.analyses.depth:DEPTH",
    },
)
