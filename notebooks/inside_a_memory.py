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
# # Inside a memory
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/engram-jax/engram_jax/blob/main/notebooks/inside_a_memory.ipynb)
#
# A language model with Engram looks up short runs of tokens in a big table. Here you train such a model for a few
# minutes and then open its table. Which rows does a sentence read? Which other n-grams read them? What did the rows learn?
# What does the model no longer know when a single entry is set to zero? You need only some Python, and no accelerator:
# choose a CPU runtime. Two cores take about six minutes.
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
from pathlib import Path

import flax
import jax
import matplotlib.pyplot as plt
import numpy as np

print("Python", sys.version.split()[0], " jax", jax.__version__, " flax", flax.__version__)
print(jax.devices())

# %% [markdown]
# ## A model to open
#
# The model has three blocks. Block 1 (counting from 0) begins by reading the memory: a table with about 100,000 rows for
# each of eight hash *heads*. The model learns from the source code of Python's standard library, which every machine
# that runs this cell has. Numbers to expect: an even guess among the 4,096 tokens costs 8.3 nats per token. The training
# loss should end between 3 and 4, and the loss on the held-out files near 4.

# %%
from engram_jax.config import replace
from engram_jax.training.loop import train
from experiments.runs.registry import build

steps = int(os.environ.get("ENGRAM_NB_STEPS", 250))
run = replace(
    build("engram_tiny"),
    name="inside_a_memory",
    model__num_hidden_layers=3,
    model__moe__n_routed_experts=8,
    model__engram__engram_layer_ids=(1,),
    model__engram__engram_vocab_size=100_000,
    data__seq_len=128,
    data__holdout_fraction=0.1,
    data__max_documents=int(os.environ.get("ENGRAM_NB_DOCUMENTS", 0)),
    optimizer__warmup_steps=steps // 10,
    train__steps=steps,
    train__log_every=25,
    train__eval_every=0,
    checkpoint__every=0,
)
run_dir = Path(tempfile.mkdtemp(prefix="engram_"))
result = train(run, run_dir)

# %% [markdown]
# ## From a sentence to rows
#
# Three steps lead from text to rows. The model takes part in none of them:
#
# 1. The text becomes **tokens**, and every token becomes a **canonical id**. `Name`, ` name` and `NAME` share one
#    canonical id, because they should have the same address.
# 2. At every token, the ids of the last two and of the last three tokens are the **2-gram** and the **3-gram**.
# 3. Each n-gram is **hashed** to one big number. The remainders of that number by four different primes are its rows in
#    four heads. So a token reads eight rows, four for each length.
#
# In the table below, follow one token from left to right. At the first token the window reaches beyond the beginning of
# the text. There it contains padding, shown as `^`.

# %%
from IPython.display import HTML, display

from engram_jax.memory.compression import canonicalize_numpy
from engram_jax.memory.hashing import hash_constants, ngram_row_ids_numpy

sentence = "    for i, name in enumerate(self.names):\n        if not isinstance(name, str):\n            raise TypeError"

tokenizer, store = result.text.tokenizer, result.parts.store
constants, token_map = store.constants, store.token_map
layer, heads = 1, run.model.engram.engram_n_heads
heads_of = {2: slice(0, heads), 3: slice(heads, 2 * heads)}  # of a token's eight rows, those of its 2-gram and 3-gram


def readable(tokens):
    """Text of tokens with its white space shown."""
    return tokenizer.decode(tokens, skip_special_tokens=False).replace(" ", "·").replace("\n", "↵")


def show(header, lines):
    """A table below the cell."""
    cells = [[str(cell).replace("&", "&amp;").replace("<", "&lt;") for cell in line] for line in lines]
    tagged = [[f"<th>{title}</th>" for title in header], *([f"<td>{cell}</td>" for cell in line] for line in cells)]
    rows = "".join(f'<tr style="text-align:left">{"".join(line)}</tr>' for line in tagged)
    display(HTML(f'<table style="font-family:monospace">{rows}</table>'))


ids = np.array(tokenizer.encode(sentence))
canonical = canonicalize_numpy(token_map, ids)
rows = ngram_row_ids_numpy(constants, layer, canonical)  # [token, head]
words = [readable([i]) for i in ids]


def ngram_at(t, order):
    return " ".join(["^"] * max(order - 1 - t, 0) + words[max(t + 1 - order, 0) : t + 1])


lines = []
for t in range(min(12, len(ids))):
    cells = [words[t], ids[t], canonical[t]]
    for order, of_order in heads_of.items():
        cells += [ngram_at(t, order), ", ".join(f"{row}" for row in rows[t, of_order])]
    lines.append(cells)
show(["token", "its id", "canonical id", "2-gram", "its rows", "3-gram", "its rows"], lines)
print(f"{len(ids)} tokens (the first {len(lines)} are shown) read {rows.size} rows of {constants.num_rows(layer):,}.")

# %% [markdown]
# ## Which other n-grams read these rows?
#
# Hashing goes one way: from an n-gram to a row. To read the table backwards, we hash *every* n-gram of the training
# text and note its rows. There are many more n-grams than rows in a head, so rows are shared: that is a **collision**.
# Below is one 2-gram with its four rows, and the three most frequent n-grams in each of these rows.
#
# What to look for: in every head the 2-gram shares its row with other n-grams. Another n-gram may disturb it in one head.
# But no other n-gram shares all four rows with it. The four rows together belong to this 2-gram alone.

# %%
from engram_jax.analysis.ngrams import Ngrams, expected_share, has_twin, nearest, owners, shared_in_heads

stream = result.text.train.stream
text_canonical = canonicalize_numpy(token_map, stream.tokens)
ngrams = Ngrams.of(text_canonical, stream.starts, order=2, pad_id=constants.pad_id)
ngram_rows = ngrams.rows(constants, layer)  # [n-gram, head]


def written(g):
    """An n-gram as the text writes it where it first occurs."""
    end = ngrams.first_G[g] + 1
    return readable(stream.tokens[end - ngrams.order : end])


def find(phrase):
    """The place of a phrase's last 2-gram among those of the text; None if the text never has it."""
    return ngrams.index(canonicalize_numpy(token_map, np.array(tokenizer.encode(phrase)))[-ngrams.order :])


chosen = find(" raise ValueError")
if chosen is None:
    chosen = 0  # a text that has no such phrase: its most frequent 2-gram
lines = []
for head, row in enumerate(ngram_rows[chosen]):
    found = owners(ngram_rows, row)
    some = ",  ".join(f"{written(g)} ({ngrams.counts_G[g]:,} times)" for g in found[:3])
    lines.append([head, row, len(found), some])
print(f"The 2-gram {written(chosen)} occurs {ngrams.counts_G[chosen]:,} times in the text.")
show(["head", "row", "n-grams in it", "the most frequent of them"], lines)

# %% [markdown]
# Next, the same is counted over all 2-grams of the text. The model cannot tell two 2-grams apart only if they have the
# *same four rows*.

# %%
shared = shared_in_heads(ngram_rows)
print(f"{len(ngrams):,} distinct 2-grams, and about {constants.head_rows(layer)[0]:,} rows in each head:\n")
for count in range(heads + 1):
    print(f"  {np.mean(shared == count):6.1%} share their row with some other in {count} of {heads} heads")
print(f"\n  {np.mean(has_twin(ngram_rows)):6.1%} share all {heads} rows with one and the same other: indistinguishable.")

# %% [markdown]
# How large must a table be? Below, the same 2-grams are hashed into heads of other sizes. Each curve shows a share of the
# 2-grams:
#
# * upper curve: they share their row in one head (the line is what chance predicts),
# * middle curve: in each of the four heads they share their row with *some* other 2-gram,
# * lowest curve: they share their rows with *one and the same* 2-gram in all four heads.
#
# With four heads the model can tell 2-grams apart even where every single row is shared. But a shared row learns from all
# its n-grams at once, and the frequent ones drown the rare ones. More rows mean less of this noise.

# %%
sizes = np.unique(np.geomspace(1_000, 3_000_000, 12).astype(int))
in_one, in_all, twins = [], [], []
for size in sizes:
    other = hash_constants(dataclasses.replace(run.model.engram, engram_vocab_size=int(size)), token_map)
    other_rows = ngrams.rows(other, layer)
    in_heads = shared_in_heads(other_rows)
    in_one.append(np.mean(in_heads) / heads)
    in_all.append(np.mean(in_heads == heads))
    twins.append(np.mean(has_twin(other_rows)))

fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
ax.semilogx(sizes, expected_share(len(ngrams), sizes), color="lightgray", linewidth=5, label="one head, by chance")
ax.semilogx(sizes, in_one, "o", color="tab:blue", label="one head")
ax.semilogx(sizes, in_all, "s-", color="tab:orange", label="some other in each of the 4 heads")
ax.semilogx(sizes, twins, "^-", color="tab:green", label="the same other in all 4 heads")
ax.axvline(constants.head_rows(layer)[0], color="gray", linestyle=":", label="this model's table")
ax.set(xlabel="rows per head", ylabel="share of the text's 2-grams", title="How many 2-grams share a row?")
ax.yaxis.set_major_formatter("{x:.0%}")
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## What is in a row?
#
# Before training, rows are random numbers: no row is like another. Training moves a row so that it helps to predict the
# tokens *after* its n-gram. So n-grams with similar continuations should end up with similar rows. We compare directions:
# the **cosine** of two vectors is 1 if they point the same way, and near 0 if they are unrelated.
#
# We first compare all four rows of an n-gram side by side, and then the rows of one head alone. We use only 2-grams whose
# rows were updated at least eight times, because other rows have hardly moved.

# %%
with jax.set_mesh(result.parts.mesh):
    learned = np.asarray(store.materialize(result.state.memory, result.state.step)[str(layer)])
updates = np.asarray(result.state.memory.tables[str(layer)].uses)[ngram_rows].min(axis=1)
known = np.flatnonzero(updates >= min(8, steps // 3))
vectors = learned[ngram_rows[known]]  # [n-gram, head, width]
print(f"{len(known):,} of {len(ngrams):,} 2-grams take part.")

phrases = [" raise ValueError", " if not", " is None", "import os", " isinstance(", " return self", "self."]
lines = []
for phrase in phrases:
    g = find(phrase)
    if g is None or g not in known:
        continue
    for of, vectors_of in ("all four heads", vectors.reshape(len(known), -1)), ("head 0 alone", vectors[:, 0]):
        near, cosines = nearest(vectors_of, int(np.searchsorted(known, g)), count=5)
        some = ",  ".join(f"{written(known[i])} ({cosine:.2f})" for i, cosine in zip(near, cosines, strict=True))
        lines.append([written(g) if of.startswith("all") else "", of, some])
show(["2-gram", "compared by", "nearest (cosine)"], lines)

# %% [markdown]
# What to look for, with all four heads: ` raise ValueError` lies near other exceptions, and `import os` near other
# imports. ` if not` lies near `elif`, `assert` and ` and not`. ` is None` lies near n-grams that also end a line with a
# colon. The table learned this from the text alone. With one head the list is less clear: its vectors are short, and a
# row is a mixture of what all its n-grams need. A cosine of 1.00 there does not mean that two n-grams are alike: they
# read the same row.

# %% [markdown]
# ## When does the model use its rows?
#
# The hash finds rows without looking at what the sentence means. Then the model decides: a **gate** compares the rows
# with the model's present state, and opens between 0 (keep out) and 1 (let in). The picture has one column per token, and
# one line per residual stream of the model (this model carries two hidden states side by side).
#
# What to look for: where both lines are dark, the model does not use the rows. After so little training the gate often
# judges wrongly. The next experiment shows what the rows were really worth.

# %%
from engram_jax.analysis.gates import plot_gates, token_gates

plot_gates(*token_gates(result.parts, result.state, tokenizer, sentence))

# %% [markdown]
# ## Forget one entry
#
# Now the experiment. We set the four rows of one 2-gram to zero and leave the millions of other numbers as they are. Then
# we measure the loss of every token of the sentence again. We do this with each 2-gram of the sentence in turn. The
# measure is the surprise in **nats**: $-\ln$ of the probability that the model gave to the next token. Zero is certainty,
# and +0.7 means that the probability was halved.
#
# The first picture is for the 2-gram whose loss hurts most. Often it is the middle of a word that the tokenizer cut, like
# `en ume rate`, or the first half of a set phrase. For comparison, the crosses show the model with its whole memory
# switched off. Where a cross lies below the bars, the memory misleads.

# %%
from engram_jax.evaluation.knock_out import forget_rows, scale_memory
from engram_jax.evaluation.evaluated_run import EvaluatedRun

model = EvaluatedRun(run.name, result.parts, result.state, tokenizer, run_dir)


def losses(state):
    """The surprise at every token of the sentence, in nats."""
    return dataclasses.replace(model, state=state).score([[tokenizer.bos_id, *ids]])[0].losses


def without(t, order):
    """The state in which the n-gram that ends at token t is forgotten."""
    kept = np.full((1, rows.shape[1]), -1)
    kept[0, heads_of[order]] = rows[t, heads_of[order]]
    with jax.set_mesh(result.parts.mesh):
        return forget_rows(store, result.state, str(layer), kept)


whole = losses(result.state)
with jax.set_mesh(result.parts.mesh):
    silent = losses(scale_memory(result.state, {layer: 0.0}))
change = np.array([losses(without(t, order=2)) - whole for t in range(len(ids))])  # [forgotten, token]

worst = int(change.max(axis=1).argmax())
hit = int(change[worst].argmax())
fig, ax = plt.subplots(figsize=(12, 4), layout="constrained")
positions = np.arange(len(ids))
ax.bar(positions - 0.2, whole, 0.4, color="lightsteelblue", label="whole memory")
ax.bar(positions + 0.2, whole + change[worst], 0.4, color="tab:red", label=f"without  {ngram_at(worst, 2)}")
ax.plot(positions, silent, "x", color="black", label="no memory at all")
ax.set_xticks(positions, words, rotation=60, ha="right", parse_math=False)
ax.set(ylabel="surprise (nats)", title="One 2-gram forgotten")
ax.axvspan(worst - 0.5, worst + 0.5, color="gold", alpha=0.3, label="here the forgotten rows are read")
ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=4)
plt.show()

print(f"Forgotten: {ngram_at(worst, 2)}")
print(f"Most changed: {words[hit]}, from {whole[hit]:.2f} to {whole[hit] + change[worst, hit]:.2f} nats.")
print(f"The sentence: {whole.mean():.3f} nats per token, without the 2-gram {(whole + change[worst]).mean():.3f},")
print(f"              without any memory {silent.mean():.3f}.")

# %% [markdown]
# The next picture shows all 2-grams at once: one line per forgotten 2-gram, one column per token. Red: the token became
# more surprising. Blue: it became less surprising. The rows of a token can help to predict later tokens only. So
# everything left of the dashed diagonal and on it is exactly zero, unless the same 2-gram occurs twice. Most of the
# colour lies just right of the diagonal: an entry helps to predict the next token. The colour further right came by
# attention and the short convolution.
#
# Expect more red than blue, but some blue too: an entry says what usually follows, and this sentence may continue
# differently.

# %%
reach = np.abs(change).max()
fig, ax = plt.subplots(figsize=(11, 9), layout="constrained")
image = ax.imshow(change, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
ax.plot([-0.5, len(ids) - 0.5], [-0.5, len(ids) - 0.5], color="gray", linestyle="--", linewidth=1)
ax.set_xticks(positions, words, rotation=60, ha="right", parse_math=False)
ax.set_yticks(positions, [ngram_at(t, 2) for t in range(len(ids))], parse_math=False)
ax.set(xlabel="token that is predicted", ylabel="2-gram that is forgotten", title="What one entry is worth")
fig.colorbar(image, label="change of the surprise (nats)", fraction=0.04, pad=0.02)
plt.show()

next_token = np.diagonal(change, offset=1)
later = np.triu(change, k=2)
print(f"Next token: {next_token.mean():+.3f} nats on average; {np.mean(next_token > 0):.0%} of them got worse.")
print(f"All later tokens together: {later.sum(axis=1).mean():+.3f} nats per forgotten 2-gram.")

# %% [markdown]
# ## What this can and cannot tell
#
# * It is one sentence, and a model of a few minutes. The pictures show the mechanism, not its worth. To measure the
#   worth, compare whole corpora and several seeds: `uv run python -m experiments.study --list`, in a clone, lists such
#   studies.
# * Rows set to zero in a finished model show what *this* model relies on. They do not show what a model trained without
#   them would lack: that model would have learned to work without them.
#
# Things to try:
#
# * Change `sentence`, for example to the name of a module that you know well.
# * Set `order=3` in the last cells.
# * Set `model__engram__engram_vocab_size=1_000` at the top. Then about a hundred n-grams share every row: see what happens
#   to the nearest rows.
#
# * *The whole path from text to sample:* [quickstart](quickstart.ipynb).
# * *How many rows should a model have?* [the allocation law on your own text](allocation_law.ipynb).
# * *The memory in a model of your own:* [your own model](your_own_model.ipynb).
