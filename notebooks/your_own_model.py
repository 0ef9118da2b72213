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
# # Engram in a model of your own
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/engram-jax/engram_jax/blob/main/notebooks/your_own_model.ipynb)
#
# Here a small transformer, written in plain Flax NNX and trained with plain optax, gets an n-gram memory in a few lines.
# Each of these lines is marked `# ENGRAM`. You will do it twice. First the table is an ordinary parameter. Then the table
# lies in the **store**, which updates only the rows that a batch reads. No accelerator is needed: choose a CPU runtime.
# Two cores take about two minutes.
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
import os
import sysconfig
import time
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

print("Python", sys.version.split()[0], " jax", jax.__version__, " flax", flax.__version__)
print(jax.devices())

# %% [markdown]
# ## Text
#
# The text is the source code of Python's standard library, as bytes. So there are 256 tokens and no tokenizer. Every
# tenth file is held out.

# %%
steps = int(os.environ.get("ENGRAM_NB_STEPS", 200))
batch_size, seq_len = 16, 128

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
held_out = np.frombuffer(b"".join(file.read_bytes() for file in files[::10]), np.uint8)
training = np.frombuffer(b"".join(file.read_bytes() for i, file in enumerate(files) if i % 10), np.uint8)
print(f"{len(files)} files, {len(training):,} bytes to train on, {len(held_out):,} held out")


def windows(text, seed, count):
    """`count` random windows: int32 [count, seq_len + 1], inputs and, one further, targets."""
    starts = np.random.default_rng(seed).integers(0, len(text) - seq_len, count)
    return text[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


# %% [markdown]
# ## What to remember
#
# `EngramConfig` says what the memory is. Here it looks up n-grams of 2 to 5 bytes, each by two hash heads of about
# 50,000 rows. So a position reads eight rows of 16 numbers. `hash_constants` derives multipliers and prime sizes, and
# `ngram_row_ids` turns tokens into row ids. The ids of a tokenizer would be compressed first
# (`TokenMap.from_tokenizer`). With bytes, every id stands for itself.

# %%
from engram_jax.config import EngramConfig, ModelConfig
from engram_jax.layers.engram import EngramReader
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.dense_table import DenseTable
from engram_jax.memory.hashing import hash_constants, ngram_row_ids
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryStore

layer = 1  # the memory is read before block 1
engram = EngramConfig(
    engram_layer_ids=(layer,),
    engram_max_ngram_size=5,
    engram_n_heads=2,
    engram_head_dim=16,
    engram_vocab_size=50_000,
    engram_pad_token_id=0,
)
token_map = TokenMap.identity(256)
constants = hash_constants(engram, token_map)
print(f"{constants.num_rows(layer):,} rows in {len(constants.head_rows(layer))} heads")
print("rows of the last byte of 'impor':", ngram_row_ids(constants, layer, jnp.array(list(b"impor")))[-1])

# %% [markdown]
# ## The model
#
# Only the marked lines are special here. The **reader** is an ordinary layer of this project, with projections, a gate
# and a short convolution. It takes the hidden state and the rows, and returns an update of the hidden state. The reader
# expects residual *streams*, and an ordinary transformer has one stream: hence the extra dimension. Rows come from a
# `DenseTable` inside the model, or from outside as an argument.

# %%
width, num_heads, num_blocks = 128, 4, 3


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, k, v = (part.reshape(*x.shape[:2], num_heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention_norm, self.ffn_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.ffn_norm(x))))


class Transformer(nnx.Module):
    def __init__(self, memory, rngs):
        """memory: None, "table" (a parameter of the model) or "store" (rows come as an argument)."""
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.positions = nnx.Embed(seq_len, width, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(num_blocks)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)
        sizes = ModelConfig(256, width, num_blocks, hc_mult=1, engram=engram)
        self.reader = EngramReader(sizes, rngs=rngs) if memory else None  # ENGRAM
        table_size = constants.num_rows(layer), engram.engram_head_dim
        self.table = DenseTable(*table_size, rngs=rngs) if memory == "table" else None  # ENGRAM

    def __call__(self, tokens, rows=None):
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        for i, block in enumerate(self.blocks):
            if i == layer and self.reader is not None:
                if self.table is not None:
                    rows = self.table(ngram_row_ids(constants, layer, tokens))  # ENGRAM
                x = x + self.reader(x[:, :, None], rows)[:, :, 0]  # ENGRAM
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model, batch, rows=None):
    """Mean loss in nats per byte."""
    logits = model(batch[:, :-1], rows)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


# %% [markdown]
# ## Training
#
# One loop trains all three models. It measures the compile time separately. All models get the same batches in the same
# order, and the same held-out windows.

# %%
rates = np.asarray(optax.warmup_cosine_decay_schedule(0, 3e-3, max(steps // 10, 1), steps, 3e-4)(jnp.arange(steps)))
table_rates = 5 * rates  # the paper's choice for tables
adamw = optax.adamw(lambda count: jnp.asarray(rates)[count], b1=0.9, b2=0.95, weight_decay=0.1)
held_out_batch = windows(held_out, seed=0, count=64)


def train(name, state, step_fn, eval_fn):
    """Losses [steps], held-out points [(step, loss)], seconds per step, the last state."""
    losses, points, seconds = [], [], []
    for step in range(steps):
        batch, start = windows(training, seed=step, count=batch_size), time.perf_counter()
        state, loss = step_fn(state, batch, step)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            points.append((step + 1, float(eval_fn(state, held_out_batch, step + 1))))
    per_step = np.median(seconds[1:])
    print(f"{name:24} held out {points[-1][1]:.3f} nats per byte, {per_step * 1e3:5.0f} ms per step")
    return np.array(losses), np.array(points), per_step, state


# %% [markdown]
# **Without memory.** One `jax.jit` holds the model, its gradient and an optax update.

# %%
def make_steps(graphdef, optimizer):
    """A training step and an evaluation for models whose parameters are all their own."""

    @partial(jax.jit, donate_argnums=0)
    def step_fn(state, batch, step):
        params, slots = state
        loss, grads = jax.value_and_grad(lambda params: loss_of(nnx.merge(graphdef, params), batch))(params)
        updates, slots = optimizer.update(grads, slots, params)
        return (optax.apply_updates(params, updates), slots), loss

    eval_fn = jax.jit(lambda state, batch, step: loss_of(nnx.merge(graphdef, state[0]), batch))
    return step_fn, eval_fn


graphdef, params = nnx.split(Transformer(None, nnx.Rngs(0)))
results = {"without memory": train("without memory", (params, adamw.init(params)), *make_steps(graphdef, adamw))}

# %% [markdown]
# **The table as a parameter.** The step is the same. Only the optimizer must know the table, which needs a larger
# learning rate and no weight decay. The first rows of the table are copied from the store's first rows. So the two forms
# can be compared.

# %%
store = MemoryStore.create(engram, token_map, CatchUpAdam(table_rates, b1=0.9, b2=0.95))  # ENGRAM
key = str(layer)

model = Transformer("table", nnx.Rngs(0))
model.table.rows_rd[...] = store.materialize(store.init(jax.random.key(0)), 0)[key]
graphdef, params = nnx.split(model)
labels = jax.tree.map_with_path(lambda path, _: "table" if "table" in jax.tree_util.keystr(path) else "rest", params)
table_adam = optax.adam(lambda count: jnp.asarray(table_rates)[count], b1=0.9, b2=0.95, eps=1e-20)
optimizer = optax.partition({"rest": adamw, "table": table_adam}, labels)  # ENGRAM
results["table as a parameter"] = train(
    "table as a parameter", (params, optimizer.init(params)), *make_steps(graphdef, optimizer)
)
del model, params, optimizer

# %% [markdown]
# **The store.** The table leaves the model. Which rows a batch needs follows from its tokens (`plan`), so they are read
# before the model runs (`fetch`) and enter as an argument. The loss is differentiated with respect to *the rows*. The
# store adds up the gradients of rows that were read twice (`reduce`) and updates the rows of the batch (`update`). No
# array of the table's size is computed anywhere.
#
# The optimizer of the store is *catch-up Adam*. Dense Adam also moves a row in the steps that do not read it. Catch-up
# Adam adds these moves, in closed form, when the row is read again.

# %%
graphdef, params = nnx.split(Transformer("store", nnx.Rngs(0)))


@partial(jax.jit, donate_argnums=0)
def store_step(state, batch, step):
    params, slots, memory = state
    plan = store.plan(batch[:, :-1])  # ENGRAM
    rows = store.fetch(memory, plan, step)  # ENGRAM

    def loss_fn(params, rows):
        return loss_of(nnx.merge(graphdef, params), batch, rows[key])

    loss, (grads, row_grads) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, rows)
    updates, slots = adamw.update(grads, slots, params)
    memory = store.update(memory, plan, store.reduce(plan, row_grads), step)  # ENGRAM
    return (optax.apply_updates(params, updates), slots, memory), loss


@jax.jit
def store_eval(state, batch, step):
    params, _, memory = state
    rows = store.fetch(memory, store.plan(batch[:, :-1]), step)
    return loss_of(nnx.merge(graphdef, params), batch, rows[key])


state = (params, adamw.init(params), store.init(jax.random.key(0)))
results["store"] = train("store", state, store_step, store_eval)

# %% [markdown]
# ## What you see
#
# * The two forms of the memory are one model. They read the same rows, and their curves lie on each other. The cell below
#   prints the largest difference: it is rounding, which training amplifies. (We changed the first rows of a run of the
#   *table* form in the seventh digit. One of its losses then differed by up to 0.03.)
# * The memory helps a lot here. Do not expect as much elsewhere. A byte model must learn spelling, and n-grams of bytes
#   *are* spelling. After so few steps the model without memory knows little more than pairs of letters.
# * The models do not cost the same: the reader adds weights, and the table many more. For a comparison at equal
#   parameters and FLOPs run `uv run python -m experiments.run moe_tiny engram_tiny` in a clone.
# * The training loss is lower than the held-out loss, more so with memory: rows also learn what only the training files
#   contain.
# * With the table as a parameter, every step computes a gradient and an Adam update of the whole table. With the store,
#   it computes them for the rows that were read. At 400,000 rows of 16 numbers that is a small difference. Set
#   `engram_vocab_size=500_000` and run everything again: the time of the first form grows with the table, the time of the
#   store does not.

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
smooth = min(10, steps)
styles = {"without memory": ("gray", "-"), "table as a parameter": ("tab:orange", "-"), "store": ("tab:blue", "--")}
for name, (losses, points, seconds, _) in results.items():
    color, line = styles[name]
    mean = np.convolve(losses, np.ones(smooth) / smooth, "valid")
    ax.plot(np.arange(len(mean)) + smooth, mean, line, color=color, label=f"{name} ({seconds * 1e3:.0f} ms per step)")
    ax.plot(*points.T, "o", color=color, fillstyle="full" if line == "-" else "none")
ax.set(xlabel="step", ylabel="loss (nats per byte)", title="Training (lines) and held-out files (points)")
ax.legend()
plt.show()

(plain, plain_points, *_), (dense, dense_points, *_), (stored, stored_points, _, (_, _, memory)) = results.values()
print(f"Held out, memory against none: {stored_points[-1, 1] - plain_points[-1, 1]:+.3f} nats per byte.")
print(f"Store against table: the training losses differ by {np.abs(stored - dense).max():.1e} at most.")
used = int(memory.rows_used[key])
print(f"{used:,} of {constants.num_rows(layer):,} rows were ever read in training.")

# %% [markdown]
# ## And in your model?
#
# * *What to copy:* the lines marked `# ENGRAM`. The reader takes the hidden state `[batch, seq, streams, width]` and the
#   rows `[batch, seq, heads, head_dim]`. The store takes the token ids, also of packed documents (`segment_ids`).
# * *With a tokenizer:* `TokenMap.from_tokenizer(tokenizer)` instead of `TokenMap.identity`, so that `Name` and ` name`
#   share their rows.
# * *On several devices:* `MemoryStore.create(..., shards=mesh.size)` under `jax.set_mesh(mesh)` cuts the rows over all
#   devices. To try it on a CPU, set `XLA_FLAGS=--xla_force_host_platform_device_count=4`: JAX then shows four devices.
# * *On a TPU:* nothing here needs one. TPU pods are for models that one machine cannot hold. A table may be too
#   large even for the memory of all chips. Then it lies in the memory of their hosts (`placement`), and only the rows of
#   a batch cross.
#
# [docs/memory.md](../docs/memory.md) says where a row lies, how it is addressed and how it is updated.
# [Inside a memory](inside_a_memory.ipynb) opens a trained table.
