# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The allocation law on your own text
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/engram-jax/engram_jax/blob/main/notebooks/allocation_law.ipynb)
#
# A mixture-of-experts model has many weights that a given token does not use. Engram's question: should all of these
# idle weights be experts, or should some be rows of an n-gram memory? The paper answers with a curve: the loss against
# the experts' share, with its lowest point at about four fifths. Here you draw that curve for a text of your choice, with
# error bars. No accelerator is needed: choose a CPU runtime. Two cores take about ten minutes.
#
# The first cell does something only on Colab. It must run before anything imports JAX, because Colab has an older JAX
# than this project needs.

# %%
import importlib.metadata
import importlib.util
import subprocess
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("engram_jax") is None:
    source = "engram_jax @ git+https://github.com/engram-jax/engram_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
    importlib.invalidate_caches()
if "google.colab" in sys.modules:
    loaded = [name for name in ("numpy", "scipy", "jax") if name in sys.modules]
    replaced = [name for name in loaded if sys.modules[name].__version__ != importlib.metadata.version(name)]
    if replaced:
        raise RuntimeError(f"{replaced} got new versions: choose Runtime > Restart session, then run all cells again.")

# %%
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import flax
import jax
from IPython.display import Image, Markdown, display

print("Python", sys.version.split()[0], " jax", jax.__version__, " flax", flax.__version__)
print(jax.devices())

# %% [markdown]
# ## Your text
#
# By default the text is the source code of Python's standard library, which every machine that runs this cell has. For a
# text of your own, set `corpus` to a folder, a pattern (`"books/*.txt"`) or a single file. `.txt`, `.md`, `.py` and
# `.jsonl` files are read, also compressed (`.gz`, `.zst`). On Colab:
#
# ```python
# from google.colab import files
# corpus = next(iter(files.upload()))      # from your computer
#
# import urllib.request
# corpus, _ = urllib.request.urlretrieve("https://the.address/of-a-text", "text.txt")      # from the web
# ```
#
# A megabyte is about enough: the length of a long novel. With less text, the runs see it several times, and a table of
# n-grams learns a repeated text by heart.

# %%
corpus = os.environ.get("ENGRAM_NB_TEXT", "python")

# %% [markdown]
# ## One base, several allocations
#
# All runs are made from one small MoE model. It has four blocks and 24 experts, of which each token uses two. $\rho$ is
# the experts' share of the idle weights. At $\rho = 100\,\%$ there is no memory. For a smaller $\rho$ the model has fewer
# experts, and the saved weights become table rows. The number of weights that a token *uses* stays the same.
#
# The number of experts is whole, so the shares are only close to those you ask for.

# %%
from engram_jax.config import replace
from engram_jax.data.loader import load_data
from experiments.runs.sizes import moe_tiny
from experiments.studies.trained.allocation import ALLOCATION, with_heads
from experiments.studies.engine.declared import prove
from experiments.studies.engine.report import budget_table
from experiments.runs.twins import active_width

steps = int(os.environ.get("ENGRAM_NB_STEPS", 100))
seeds = int(os.environ.get("ENGRAM_NB_SEEDS", 2))
shares = [int(share) for share in os.environ.get("ENGRAM_NB_SHARES", "40 60 75 90 100").split()]

small = replace(
    moe_tiny(),
    model__vocab_size=2048,
    model__hidden_size=64,
    data__corpus=corpus,
    data__seq_len=128,
    data__holdout_fraction=0.1,
    data__max_documents=int(os.environ.get("ENGRAM_NB_DOCUMENTS", 0)),
    optimizer__warmup_steps=steps // 10,
    train__steps=steps,
    train__eval_every=0,
    train__eval_batches_final=32,
    train__tensorboard=False,
    checkpoint__every=0,
)
base = with_heads(replace(small, model__intermediate_size=active_width(small.model.moe)), heads=4, width=8)

text = load_data(base.data, base.model.vocab_size)
per_run = steps * base.data.batch_size * base.data.seq_len
print(f"A run reads {per_run:,} tokens: {per_run / text.train.stream.num_tokens:.2f} times the training text.")

# %% [markdown]
# ## The proof that they cost the same
#
# A comparison is fair only between models of equal cost. `prove` checks this from the settings alone, before anything is
# trained. Two models may differ by at most one percent in total parameters, in the parameters that a token uses, and in
# FLOPs per token. They must also see the same tokens. Otherwise `prove` raises an error. The table shows the numbers.

# %%
# The whole study draws a second curve, at three times the compute: its points are called 3C-rho. One is enough here.
offered = [dataclasses.replace(point, series="") for point in ALLOCATION.at(base) if point.name.startswith("rho")]
nearest = [min(offered, key=lambda point, share=share: abs(point.x - share)) for share in shares]
points = [point for point in offered if point in nearest]
question = "At equal cost, which share of the idle parameters should be experts (rho), the rest being memory?"
study = dataclasses.replace(ALLOCATION, question=question)

prove(points)
display(Markdown("\n".join(budget_table(study, points))))

# %% [markdown]
# ## Training
#
# Every point is trained with each seed. A seed is one start of the weights and one order of the text, the same for all
# points. A line appears when a run is done. The first run of each point also compiles its program.
#
# `python -m experiments.study allocation` works in the same way. Every run has a folder of its own, and finished runs are
# not repeated. If you interrupt this cell, run it again: it continues where it stopped.

# %%
from engram_jax.training.loop import train
from engram_jax.commands.command_line import keep_compiled_programs
from experiments.studies.engine.execute import agree_on_plan, execute

study_dir = Path(tempfile.mkdtemp(prefix="engram_")) / "allocation"

# %%
def train_quietly(config, folder):
    """One run; its own lines are kept in the folder and not shown here."""
    keep_compiled_programs(config)
    started = time.perf_counter()
    result = train(config, folder, log=lambda line: None)
    if result.evaluation is not None:
        print(f"      held-out loss {result.evaluation.loss:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    return result.status


agree_on_plan(study_dir, study.name, points)
status = execute(study_dir, points, seeds, train_quietly, print)

# %% [markdown]
# ## The curve
#
# Left: your text. The squares are means over the seeds, the small dots are single runs, the dashed line is a parabola. A
# seed makes all points better or worse together. This common part is left out of the error bars. So they are often
# smaller than the squares, although the dots lie apart. Right: the paper's two curves, each counted from its own lowest
# point, because their losses lie far from yours. Compare *shapes*, not heights.
#
# Below the picture is the verdict. The same rules compute it for every study. If its first sentence says that the points
# do not follow the parabola, then do not read the parabola's lowest point as the best share.

# %%
from experiments.studies.engine.report import write_report

report = write_report(study, points, seeds, study_dir)
display(Image(filename=str(study_dir / "study.png"), width=1000))
for section in report.split("\n## ")[1:]:
    if section.startswith(("Verdict", "Losses")):
        display(Markdown(f"### {section}"))

# %% [markdown]
# ## What you see, and what it cannot tell
#
# Look first at *the step from 100 % to the next point*: is some memory better than no memory? Then look at *the slope on
# the left*. In the paper the loss rises again below about 80 %, because experts are missing. At 40 % it is nearly as high
# as without memory. At the size of this notebook it often does not rise: more memory is better over the whole picture.
# That is no contradiction:
#
# * **Training is short.** A run reads 0.2 million tokens; the paper's smaller budget reads some 59 billion. A row is
#   useful after its n-gram was seen a few times, but experts need long to become different from each other. So a model
#   learns first what n-grams can know.
# * **The model is small.** It has 0.6 million active weights. Most of what it can learn follows from two or three
#   neighbouring tokens. A larger model also learns much that no n-gram can know.
# * **The text is of one kind.** Source code repeats itself, prose does so less. Try both.
# * **Nothing is tuned** for each point. The experts of the points with memory are a little narrower, which pays for
#   reading the memory. In the paper's wide models this is too little to show.
#
# The error bars say how much another start and another order of the same text would change the *differences*. They do
# not say how much another text or another size would change them.
#
# ## Larger
#
# * *Narrower intervals, more points, longer runs:* raise `seeds`, add `shares`, or raise `steps`. Then run the cells from
#   there on again. (Three seeds are the studies' default, and two are the least that shows a spread.) A run takes about a
#   minute.
# * *The same study as one command*, in a clone of the repository:
#   `uv run python -m experiments.study allocation --data.corpus my_texts/`. It can be resumed, and several processes can
#   share it. With `--scale small` it has the size of one GPU: 141 million parameters and $6.5 \cdot 10^{16}$ FLOPs for a
#   run, and at its second budget 303 million and $1.9 \cdot 10^{17}$. `--print` shows the runs and their costs first.
# * *Towards the paper's size*, on a TPU pod: `uv run python -m experiments.plan --budget 2e20 --topology v5p:4x4x4` plans
#   the models, the tokens and the chip-hours of a point of the paper's curve. Training such a point needs a TPU pod;
#   nothing in this notebook does.
# * *What is in the memory?* [Inside a memory](inside_a_memory.ipynb).
