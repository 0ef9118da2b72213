"""Gives a trained model a new memory and trains only the memory. The same command again resumes.

  engram-jax attach runs/backbone with_memory                    a memory of the paper's proportions
  engram-jax attach runs/backbone with_memory --train.steps 2000 --model.engram.engram_layer_ids 1 4

RUN_DIR (runs/backbone) is a run without memory. NAME (with_memory) is the new run; its folder is runs/NAME, or
--run_dir. The new run begins with the parameters of RUN_DIR, and they do not change. Readers and tables are new, and
their first update of the hidden states is zero.

Options come after RUN_DIR NAME, the same as for engram-jax train:

  --print                prints the settings, parameters, FLOPs and bytes, and stops
  --help                 after RUN_DIR NAME: every field of the run, with its default
  --run_dir DIR          folder of the new run
  --train.steps 50       changes a field; tuples: 1 4, booleans: True or False
  --slice v5p-64         sets the mesh axes and batch parts for a TPU slice
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from engram_jax.commands.command_line import training_status
from engram_jax.commands.run_options import parse, show, take_slice, train
from engram_jax.config import EngramConfig, ModelConfig, RunConfig, replace, require
from engram_jax.errors import FINISHED

MEMORY_SHARE = 0.25
"""Size of the tables relative to the backbone: the paper's, 5.8 of 20.9 B parameters in Engram-27B."""


def attached(source: RunConfig, run_dir: Path, name: str) -> RunConfig:
    """The run that trains a memory for the backbone in `run_dir`, whose config is `source`.

    Raises:
      ConfigError: the source has a memory already.
    """
    require(
        not source.model.engram.enabled,
        f"{run_dir} has a memory already (engram_layer_ids={source.model.engram.engram_layer_ids}): attach wants a "
        "backbone without one. To train that memory further, train a run with train.init_from and optimizer.frozen.",
    )
    backbone = ("blocks.*", "embedding_vd", "final_norm.*")
    return replace(
        source,
        name=name,
        model__engram=default_memory(source.model),
        optimizer__frozen=backbone if source.model.tie_word_embeddings else (*backbone, "head_dv"),
        train__init_from=str(run_dir),
    )


def default_memory(model: ModelConfig) -> EngramConfig:
    """The paper's proportions: read in the second block and before the middle, half the hidden size wide."""
    from engram_jax.counts import backbone_parameters

    layers = model.num_hidden_layers
    ids = tuple(sorted({min(1, layers - 1), max(min(2, layers - 1), (layers - 1) // 2)}))
    engram = EngramConfig(engram_layer_ids=ids, engram_head_dim=max(8, model.hidden_size // 32))
    rows = MEMORY_SHARE * backbone_parameters(model).total / (engram.memory_dim * len(ids))
    return replace(engram, engram_vocab_size=max(2, round(rows)))


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return training_status(lambda: attach(list(arguments)))


def attach(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return FINISHED
    require(
        len(arguments) >= 2 and not arguments[1].startswith("-"),
        "give the backbone's folder and a name for the new run: engram-jax attach RUN_DIR NAME",
    )
    (folder, name), overrides = arguments[:2], arguments[2:]
    run_dir = Path(folder)
    require(
        os.path.isfile(run_dir / "config.json"),
        f"{run_dir} is not a run: it has no config.json. Train one with `engram-jax train`.",
    )
    from engram_jax.runs.settings import read_config

    overrides, where = take_slice(overrides)
    config = where(attached(read_config(run_dir), run_dir, name))
    command = f"engram-jax attach {folder} {name}"
    options = parse(config, overrides, command, (__doc__ or "").strip())
    if options.print:
        show(options.config)
        return FINISHED
    new_dir = options.run_dir or Path("runs") / name
    require(new_dir.resolve() != run_dir.resolve(), f"--run_dir {new_dir} is the backbone's own: give another.")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a run that has not ended, or was damaged
        loss = float(json.loads((run_dir / "result.json").read_text())["loss"])
        print(f"{run_dir} ended with a validation loss of {loss:.4f}: what step 0 must show, on the same data.")
    return train(options, new_dir)
