"""Draws memory_store.svg and memory_store.png:  python docs/images/memory_store.py"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

STORE, READER, PLAIN, INK = "#dbe9f6", "#fbe6d0", "#f2f2f2", "#222222"
FORWARD, BACKWARD = "#1f4e79", "#b0413e"

plt.rcParams |= {"font.family": "DejaVu Sans", "svg.fonttype": "none", "svg.hashsalt": "memory_store"}
fig, ax = plt.subplots(figsize=(11, 5.2))
ax.set(xlim=(-0.5, 110), ylim=(0, 52))
ax.axis("off")


def frame(x, y, width, height, color, title):
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.5", fc=color, ec="none")
    ax.add_patch(style)
    ax.text(x + 1.5, y + height - 2.4, title, weight="bold", fontsize=10.5, color=INK, va="center")


def box(x, y, width, height, name, detail, color="white"):
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", fc=color, ec=INK, lw=0.9)
    ax.add_patch(style)
    ax.text(x + width / 2, y + height / 2 + 1.4, name, ha="center", va="center", fontsize=10, color=INK)
    ax.text(x + width / 2, y + height / 2 - 1.6, detail, ha="center", va="center", fontsize=8, color="#555555")


def arrow(start, end, color, label="", at=(0.0, 0.0)):
    line = {"arrowstyle": "-|>", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=line)
    ax.text(*at, label, fontsize=8, color=color, ha="center", va="center")


frame(13, 1, 63, 50, STORE, "THE STORE   engram_jax/memory/")
frame(84, 1, 25, 50, READER, "THE MODEL")

box(0, 36, 10, 8, "tokens", "[B, T]", PLAIN)
box(15, 36, 14, 8, "hash", "row ids [B, T, H]")
box(33, 36, 18, 8, "plan", "distinct rows by owner")
box(56, 36, 18, 8, "exchange", "rows to who asked")
box(33, 20.5, 18, 8, "load, save", "rows and their slots")
box(56, 20.5, 18, 8, "row optimizer", "read, update")
box(27, 4, 26, 8, "placement", "device | host | tiered | numpy")
box(57, 4, 17, 8, "exchange", "sums to the owner")
box(86, 36, 21, 8, "reader", "gate, value, convolution")
box(86, 20.5, 21, 8, "blocks", "of tokens and rows")
box(86, 4, 21, 8, "loss", "its gradient by the rows")

arrow((10, 40), (15, 40), FORWARD)
arrow((29, 40), (33, 40), FORWARD)
arrow((42, 36), (42, 28.5), FORWARD, "local ids", (46.2, 32.3))
arrow((40.5, 12), (40.5, 20.5), FORWARD)
arrow((43.5, 20.5), (43.5, 12), BACKWARD, "in place", (47.2, 16.3))
arrow((51, 26.3), (56, 26.3), FORWARD)
arrow((56, 22.7), (51, 22.7), BACKWARD)
arrow((65, 28.5), (65, 36), FORWARD, "up to date", (69.4, 32.3))
arrow((74, 40), (86, 40), FORWARD, "[B, T, H, D]", (80, 41.8))
arrow((96.5, 36), (96.5, 28.5), FORWARD)
arrow((96.5, 20.5), (96.5, 12), FORWARD)
arrow((86, 8), (74, 8), BACKWARD, "[B, T, H, D]", (80, 9.8))
arrow((67, 12), (67, 20.5), BACKWARD, "gradients", (71.4, 16.3))

ax.text(0, 30, "blue: forward", fontsize=8.5, color=FORWARD)
ax.text(0, 27.5, "red: back", fontsize=8.5, color=BACKWARD)

folder = Path(__file__).parent
fig.savefig(folder / "memory_store.svg", bbox_inches="tight", metadata={"Date": None})
fig.savefig(folder / "memory_store.png", bbox_inches="tight", dpi=150)
