"""The ladder: matched triples at four budgets, from a laptop's to the paper's first, a factor of 100 from each to the
next, at the same ratios (experiments/runs/scaling.py).

python -m experiments.run moe_2e16 engram_2e16
python -m experiments.run engram_5e17            # any other budget has the same names, listed or not
python -m experiments.plan --budget 5e17 --topology v5p-4

Two rungs make a slope, the next one tests it; the paper's points are at 2e20 and 6e20 FLOPs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from engram_jax.config import RunConfig, replace
from experiments.runs import scaling
from experiments.runs.registry import FAMILIES, register

RUNGS = (2e14, 2e16, 2e18, 2e20)
WHAT = {
    "dense": "what sparsity buys, the dense twin.",
    "moe": "the MoE baseline.",
    "engram": "does memory beat experts at equal FLOPs and parameters?",
}
EXPECTED = {
    "dense": "a validation loss above moe_{budget}'s.",
    "moe": "a validation loss above engram_{budget}'s.",
    "engram": "a validation loss below moe_{budget}'s.",
}
WHERE = {2e14: "hours on two CPU cores", 2e16: "one accelerator", 2e18: "a slice", 2e20: "a pod, as the paper"}


def at_budget(kind: str, budget: float, name: str = "") -> Callable[[], RunConfig]:
    """The run of that kind (scaling.KINDS) and budget, as a function that is told by its docstring."""
    name, text = name or f"{kind}_{scaling.spelt(budget)}", scaling.spelt(budget)

    def run() -> RunConfig:
        moe = scaling.moe_run(budget)
        made = {"dense": scaling.dense_run, "moe": lambda moe: moe, "engram": scaling.engram_run}[kind](moe)
        return replace(made, name=name)

    run.__name__ = run.__qualname__ = name
    where = f" ({WHERE[budget]})" if budget in WHERE else ""
    run.__doc__ = f"""{text} FLOPs{where}: {WHAT[kind]}

    Command:  python -m experiments.run {name} --data.corpus ... --data.tokenizer ...
    Cost:     {_cost(kind, budget)}
              python -m experiments.plan --budget {text} --topology ... says what of a slice.
    Expected: {EXPECTED[kind].format(budget=text)}
    """
    return run


def _cost(kind: str, budget: float) -> str:
    """By the rules alone: --list does not wait for the solved sizes."""
    if not scaling.SMALLEST <= budget <= scaling.LARGEST:
        return "outside of what the rules are meant for."
    active = scaling.active_parameters(budget)
    total = "" if kind == "dense" else f" of {_short(scaling.PAPER.sparsity * active)}"
    return f"{_short(budget / (6 * active))} tokens, {_short(active)} active{total} parameters without vocabulary."


def _short(number: float) -> str:
    scale, unit = next((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= s)
    return f"{number / scale:.3g} {unit}"


def by_name(name: str) -> Callable[[], RunConfig] | None:
    """`engram_5e17`: the run of any budget."""
    found = re.fullmatch(rf"({'|'.join(scaling.KINDS)})_(\d+(?:\.\d+)?e\d+)", name)
    return at_budget(found[1], float(found[2]), name) if found and math.isfinite(float(found[2])) else None


FAMILIES.append(by_name)
for _budget in RUNGS:
    for _kind in scaling.KINDS:
        register(at_budget(_kind, _budget))
