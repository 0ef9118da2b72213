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
# You will look up a line of text in an n-gram memory by hand. Then you will train a small language model with such a
# memory, and see at which words of a line the model uses it. No accelerator is needed: choose a CPU runtime. Two cores
# take about three minutes.
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

# %% [markdown]
# The next cell prints versions and devices. Compare them if something differs on your machine.

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
# 1. Much of what a language model must know is *local and fixed*: after `import numpy as` comes `np`. It is a waste to
#    compute that again with many layers, for every token.
# 2. Engram stores it in big tables instead. The address of a table row is a **hash of the last two or three tokens**.
# 3. So the rows that a text needs are known before the model runs. They can lie in any memory, also a slow one, and be
#    fetched ahead of time. A larger table costs no more computation per token.
# 4. Different n-grams may share a row: they collide. Several hash heads with tables of different prime sizes make it
#    unlikely that two n-grams collide in *all* heads.
# 5. A **gate** compares the row with the model's present state and decides how much of the row to let in.
#
# For the token at position $t$, with the rows of all heads side by side as $e_t$ and the model's state $h_t$:
#
# $$\text{row}_{t,n,k} = \Big(\bigoplus_{i=0}^{n-1} x_{t-i}\, m_i\Big) \bmod p_{n,k}, \qquad
#   \alpha_t = \sigma\big(\text{match}(h_t, W_K e_t)\big), \qquad
#   h_t \leftarrow h_t + \alpha_t\, W_V e_t + \dots$$
#
# Here $\oplus$ is XOR, and $m_i$ are fixed odd numbers. $p_{n,k}$ is the prime size of head $k$ for n-grams of length
# $n$. The dots are a short convolution over neighbouring positions.

# %% [markdown]
# ## A run is a value
#
# `engram_tiny` is one of the repository's declared models. Here it is made smaller, so that it trains while you read on.
# It has three blocks. Block 1 (counting from 0) begins by reading the memory, a table with about 50,000 rows for each of
# eight hash heads. The list below says where the parameters are. *Memory* is the largest group, and a token touches only
# eight of its rows.

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
# The training text is the source code of Python's own standard library, which every machine that runs this cell has. A
# tenth of its files is held out to measure the model. The first call trains a tokenizer and tokenises all files, which
# takes a little while. Later calls find the result in the cache.

# %%
from engram_jax.data.loader import load_data

text = load_data(run.data, run.model.vocab_size)
tokenizer = text.tokenizer

# %% [markdown]
# A tokenizer knows the same word several times: with a space before it, capitalised, in capitals. The model should see
# these differences. But in an *address* they would only give different rows to the same word. So the memory first maps
# every token to a **canonical id**. These canonical ids stand for the most tokens:

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
# Two lines of code share `item in self.` and differ around it. For each token of the first line we print the rows that
# its 2-gram and its 3-gram read, one per hash head. `=` marks a row that the second line reads too.
#
# What to look for: at ` in` both lines have the 2-gram `item in`, but one has the 3-gram `for item in` and the other
# `while item in`. So only the first group of rows is shared. One token later both groups are shared. The model has not
# learned anything yet: addresses depend on the tokens alone.

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
# This is the same loop that trains the large models. Each step hashes the batch, fetches its rows, and computes the loss
# and its gradients. Then it updates the weights and *the rows of the batch, and no other row of the table*. The first
# step waits for the compiler.
#
# On your own machine you can interrupt this cell: it saves a checkpoint and stops.

# %%
from engram_jax.training.loop import train

run_dir = Path(tempfile.mkdtemp(prefix="engram_"))
result = train(run, run_dir)

# %% [markdown]
# ## Did it learn?
#
# The loss is the average surprise per token in nats: $-\ln$ of the probability that the model gave to the next token.
# Two lines put it in proportion. A guess that is even among all $V$ tokens costs $\ln V$. A guess by the frequency of
# each token, without its context, costs the entropy of these frequencies. A loss below the second line means that the
# model has learned about context. The held-out files cost more than the training text. Of the training files the model
# has seen other passages, with their names and habits; of the held-out files it has seen nothing.

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
# How much of the table did the training use? A row that no batch ever read still has its random first value, and has
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
# After so little training the text is not a program, but it should look like Python from a distance: indentation,
# `self.`, brackets that mostly match. Every new token is hashed with the tokens before it, and reads the memory.

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
# ## Where does the model use its memory?
#
# The picture has one column for each token of a line. It has one row for each residual stream: the model carries several
# hidden states side by side. The colour shows how far the gate opens: 0 keeps the rows out, 1 lets them in whole. The
# paper reports that in a large model the gate opens at the *end* of set phrases and names. There the last tokens are
# enough to know what follows. After a few minutes of training, a model has only begun to tell useful rows
# from rows that it has hardly ever seen. So expect a tendency, not a rule. Change the line and try: code that every file
# contains, then nonsense.

# %%
from engram_jax.analysis.gates import plot_gates, token_gates

line = "if __name__ == '__main__':\n    for i in range(len(self.items)):\n        raise ValueError('not found')"
plot_gates(*token_gates(result.parts, result.state, tokenizer, line))

# %% [markdown]
# ## What next?
#
# You have seen the whole path: tokens, canonical ids, rows, gate, loss, update of the touched rows. You can go on with:
#
# * *What is in the table?* [Inside a memory](inside_a_memory.ipynb): which n-grams share a row, which rows are alike, and
#   what is lost when a row is set to zero.
# * *How much memory should a model have?* [The allocation law on your own text](allocation_law.ipynb).
# * *In a model of your own?* [Your own model](your_own_model.ipynb).
# * *Does the memory pay?* To answer this you need a model of the same size and cost without it. In a clone of the
#   repository, on your own machine, `uv run python -m experiments.run moe_tiny engram_tiny` trains both and compares them.
# * *Your own text:* add `data__corpus="some/folder"` to the `replace(...)` above and run everything below it again.
# * *How it works:* [docs/memory.md](../docs/memory.md) says where a row lies, how it is addressed and how it is updated.
