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
# # Engram in a few minutes
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/engram-jax/engram_jax/blob/main/notebooks/quickstart.ipynb)
#
# You will look up a line of text in an n-gram memory by hand, train a small language model that owns such a memory, and
# then see where in a line it listens to it. No accelerator is needed: choose a CPU runtime, two cores take about three
# minutes.
#
# The first cell does something on Colab only. It must come before anything imports JAX, because Colab brings an older
# JAX than this project uses.

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

# %% [markdown]
# Versions and devices first: when something differs on your machine, this is what to compare.

# %%
import math
import os
import tempfile
from pathlib import Path

import flax
import jax
import matplotlib.pyplot as plt
import numpy as np

from engram_jax.counts import describe

print("Python", sys.version.split()[0], " jax", jax.__version__, " flax", flax.__version__)
print(jax.devices())

# %% [markdown]
# ## What Engram is
#
# 1. Much of what a language model must know is *local and fixed*: after `import numpy as` comes `np`. Computing that
#    again with many layers, for every token, is a waste.
# 2. Engram stores it in big tables instead. The address of a table row is a **hash of the last two or three tokens**.
# 3. So the rows a text needs are known before the model runs. They can lie in any memory, also a slow one, and be
#    fetched ahead of time; a larger table costs no more computation per token.
# 4. Different n-grams may collide in a row. Several hash heads with tables of different prime sizes make it unlikely
#    that two n-grams collide in *all* of them.
# 5. A **gate** compares the row with the model's present state and decides how much of it to let in.
#
# For the token at position $t$, with the rows of all heads side by side as $e_t$ and the model's state $h_t$:
#
# $$\text{row}_{t,n,k} = \Big(\bigoplus_{i=0}^{n-1} x_{t-i}\, m_i\Big) \bmod p_{n,k}, \qquad
#   \alpha_t = \sigma\big(\text{match}(h_t, W_K e_t)\big), \qquad
#   h_t \leftarrow h_t + \alpha_t\, W_V e_t + \dots$$
#
# Here $\oplus$ is XOR, $m_i$ are fixed odd numbers, $p_{n,k}$ is the prime size of head $k$ for n-grams of length $n$,
# and the dots are a short convolution over neighbouring positions.

# %% [markdown]
# ## A run is a value
#
# `engram_tiny` is a model of the repository's ladder. Here it is cut down to what trains while you read on: three
# blocks, of which block 1 (counting from 0) begins by reading the memory, and a table with about 50,000 rows for each of
# eight hash heads. The list below says where the parameters are. *Memory* is the largest group, and of all its rows a
# token touches just eight.

# %%
from engram_jax.config import replace
from experiments.runs.registry import build

steps = int(os.environ.get("ENGRAM_NB_STEPS", 150))
run = replace(
    build("engram_tiny"),
    name="quickstart",
    model__num_hidden_layers=3,
    model__moe__n_routed_experts=8,
    model__engram__engram_layer_ids=(1,),
    model__engram__engram_vocab_size=50_000,
    data__seq_len=128,
    data__holdout_fraction=0.1,
    data__max_documents=int(os.environ.get("ENGRAM_NB_DOCUMENTS", 0)),
    optimizer__warmup_steps=steps // 10,
    train__steps=steps,
    train__log_every=5,
    train__eval_every=50,
)
print(describe(run))

# %% [markdown]
# ## Text, tokens, canonical ids
#
# The training text is the source code of Python's own standard library: it is on every machine that runs this cell. A
# tenth of its files is held out to measure the model on. The first call trains a tokenizer and tokenises everything,
# which takes a little while; later calls find it in the cache.

# %%
from engram_jax.data.loader import load_data

text = load_data(run.data, run.model.vocab_size)
tokenizer = text.tokenizer

# %% [markdown]
# A tokenizer knows the same word several times: with a space before it, capitalised, in capitals. The model should see
# these differences, but as an *address* in the memory they would only scatter what belongs together. So the memory
# maps every token to a **canonical id** first. These are the canonical ids that absorb the most tokens:

# %%
from collections import defaultdict

from engram_jax.memory.compression import TokenMap, canonicalize_numpy

token_map = TokenMap.from_tokenizer(tokenizer.backend)
print(f"{token_map.vocab_size} tokens have {token_map.size} canonical ids.\n")

members = defaultdict(list)
for token, canonical in enumerate(token_map.canonical_ids):
    members[int(canonical)].append(tokenizer.decode([token]))
for canonical, texts in sorted(members.items(), key=lambda item: -len(item[1]))[:6]:
    print(f"id {canonical:4}  {len(texts):3} tokens  {texts[:8]}")

# %% [markdown]
# ## Which rows does a sentence read?
#
# Two lines of code share `item in self.` and differ around it. For each token of the first we print the rows that its
# 2-gram and its 3-gram read, one per hash head; `=` marks a row that the second line reads too.
#
# What to look for: at ` in` the 2-gram `item in` is common to both lines, but the 3-grams `for item in` and
# `while item in` are not, so only the first group of rows is shared. One token later both groups are. Nothing was
# learned yet: addresses depend on the tokens alone.

# %%
from engram_jax.memory.hashing import hash_constants, ngram_row_ids_numpy

constants = hash_constants(run.model.engram, token_map)
layer, heads = run.model.engram.engram_layer_ids[0], run.model.engram.engram_n_heads


def rows_of(line):
    canonical = canonicalize_numpy(token_map, np.array(tokenizer.encode(line)))
    return ngram_row_ids_numpy(constants, layer, canonical)


line, other = "for item in self.items:", "while item in self.values:"
shared = set(rows_of(other).ravel())
print(f"{'':8} {'rows of the 2-gram':^{9 * heads}} | {'rows of the 3-gram':^{9 * heads}}")
for token, rows in zip(tokenizer.encode(line), rows_of(line), strict=True):
    cells = [f"{row:8}{'=' if row in shared else ' '}" for row in rows]
    print(f"{tokenizer.decode([token]):8} {''.join(cells[:heads])} | {''.join(cells[heads:])}")
print(f"\nThe table of block {layer} has {constants.num_rows(layer):,} rows, divided among {2 * heads} heads.")

# %% [markdown]
# ## Training
#
# The same loop that trains the large models. In each step it hashes the batch, fetches its rows, computes the loss
# and its gradients, and updates the weights and *the rows of the batch, nothing else in the table*. The first step
# waits for the compiler.
#
# If you run this on your own machine, you can interrupt it: it saves what it has and stops.

# %%
from engram_jax.training.loop import train

run_dir = Path(tempfile.mkdtemp(prefix="engram_"))
result = train(run, run_dir)

# %% [markdown]
# ## Did it learn?
#
# The loss is the average surprise per token in nats: $-\ln$ of the probability the model gave to the token that came.
# Two lines put it in proportion. Guessing evenly among all $V$ tokens costs $\ln V$. Knowing how frequent each token
# is, and nothing of what stands before it, costs the entropy of these frequencies. Whatever the model saves below the
# second line, it has learned about context. The held-out files cost more than the training text: it has seen other
# passages of the training files, and with them their names and habits, but nothing of these.

# %%
from engram_jax.training.metrics import read_metrics

metrics = read_metrics(run_dir)
train_points = np.array([(m["step"], m["loss"]) for m in metrics if "loss" in m])
validation_points = np.array([(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m])
frequency = np.bincount(text.train.stream.tokens, minlength=run.model.vocab_size) / text.train.stream.num_tokens
unigram = -np.sum(frequency * np.log(np.maximum(frequency, 1e-12)))

fig, ax = plt.subplots(figsize=(7, 3.5))
ax.plot(*train_points.T, label="training")
ax.plot(*validation_points.T, "o", label="held-out files")
ax.axhline(math.log(run.model.vocab_size), color="gray", linestyle=":", label="even guess")
ax.axhline(unigram, color="gray", linestyle="--", label="token frequencies only")
ax.set(xlabel="step", ylabel="loss (nats per token)", title=f"Held-out loss {result.evaluation.loss:.3f}")
ax.legend()
plt.show()

# %% [markdown]
# How much of the table did this take? A row that no batch ever asked for is still as it was drawn at the start, and
# cost nothing since.

# %%
table = result.state.memory.tables[str(layer)]
touched = np.asarray(table.slots["last_step"]) > 0
print(f"{touched.sum():,} of {touched.size:,} rows were read and updated at least once ({touched.mean():.1%}).")
print(
    f"Held-out loss {result.evaluation.loss:.3f} nats per token, {result.evaluation.bits_per_byte:.3f} bits per byte."
)

# %% [markdown]
# ## A sample
#
# After so little training this is not a program, but it should look like Python from a distance: indentation, `self.`,
# brackets that mostly match. Every new token is hashed with the ones before it and reads the memory like any other.

# %%
from engram_jax.inference.engine import Engine
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.text import continued

engine = Engine(result.parts, result.state, batch_size=result.parts.mesh.size, max_len=256)
prompt = "def __init__(self"
print(prompt, end="")
sampling = Sampling(max_tokens=120, temperature=0.7)
for _, piece in continued(engine, tokenizer, [[tokenizer.bos_id, *tokenizer.encode(prompt)]], sampling):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Where does it listen to the memory?
#
# For each token of a line (left to right) and each residual stream of the model (top to bottom), the picture shows how
# far the gate opens: 0 keeps the rows out, 1 lets them in whole. The paper reports that in a large model it opens at
# the *end* of set phrases and names, where the last tokens say it all. A model of a few minutes has only begun to tell
# useful rows from rows it has hardly ever seen, so expect a tendency, not a rule. Change the line and try: code that
# every file contains, then nonsense.

# %%
from engram_jax.analysis.gates import plot_gates, token_gates

line = "if __name__ == '__main__':\n    for i in range(len(self.items)):\n        raise ValueError('not found')"
plot_gates(*token_gates(result.parts, result.state, tokenizer, line))

# %% [markdown]
# ## And now?
#
# You have seen the whole path: tokens, canonical ids, rows, gate, loss, update of the touched rows. Ways on:
#
# * *What is in the table?* [Inside a memory](inside_a_memory.ipynb): who shares a row, which rows are alike, and what
#   is lost when one is wiped.
# * *How much memory should a model have?* [The allocation law on your own text](allocation_law.ipynb).
# * *In a model that is not ours?* [Your own model](your_own_model.ipynb).
# * *Does the memory pay?* That takes an equal: the same size and cost without it. On your own machine, in a clone of
#   the repository, `python -m experiments.run moe_tiny engram_tiny` trains both and compares them.
# * *Your own text:* add `data__corpus="some/folder"` to the `replace(...)` above and run everything below it again.
# * *How it works:* the folder `docs/` says where a row lives, how it is addressed and who updates it.
