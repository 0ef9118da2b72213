"""Trains runs that you declare in a Python file of your own. The same command again resumes.

  engram-jax train my_runs.py:small                     trains the run that the function small() returns
  engram-jax train my_runs.py:small my_runs.py:large    one after the other, then compares them (the first: baseline)
  engram-jax train my_runs.py --list                    lists the functions in the file that return a run

Options come after the runs:

  --print                prints the settings, parameters, FLOPs and bytes, and stops
  --help                 after FILE.py:FUNCTION: every field of the run, with its default
  --run_dir DIR          folder for checkpoints and metrics (default: runs/FUNCTION); several runs: a folder each in it
  --train.steps 50       changes a field of the run; tuples: 1 4, booleans: True or False
  --slice v5p-64         sets the mesh axes and batch parts for a TPU slice

FUNCTION takes no arguments and returns an engram_jax.RunConfig; --help shows its docstring. The settings may name
variants that the file registers (engram_jax.registries). Example of a file:

  from engram_jax import DataConfig, EngramConfig, ModelConfig, RunConfig

  def small() -> RunConfig:
      \"""A small model with memory in its second block.\"""
      engram = EngramConfig(engram_layer_ids=(1,), engram_vocab_size=10_000)
      return RunConfig(model=ModelConfig(engram=engram), data=DataConfig(corpus="my_texts/"))

Several hosts: run this on each of them. TPU slices, GKE and Slurm are detected; otherwise pass --coordinator HOST:PORT
--num_processes N --process_id I. DIR must be a folder that all hosts share.
"""

from __future__ import annotations

from collections.abc import Sequence

from engram_jax.commands import user_file
from engram_jax.commands.command_line import training_status
from engram_jax.commands.run_options import parse, take_slice, train_all
from engram_jax.config import require
from engram_jax.errors import FINISHED

HELP = ("-h", "--help")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return training_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    first_option = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    targets, overrides = arguments[:first_option], arguments[first_option:]
    if not targets and (not overrides or overrides[0] in HELP):
        print((__doc__ or "").strip())
        return FINISHED
    require(bool(targets), f"the file comes first: engram-jax train FILE.py:FUNCTION {' '.join(overrides)}")
    if overrides == ["--list"]:
        for target in targets:
            print("\n".join(user_file.runs_listed(split(target)[0])))
        return FINISHED
    if overrides and overrides[0] in HELP and not split(targets[0])[1]:
        print(f"{(__doc__ or '').strip()}\n\nRuns of {targets[0]}:\n")
        print("\n".join(user_file.runs_listed(targets[0])))
        return FINISHED
    # All are parsed before the first is trained: a mistake in the last one should not surface hours later.
    overrides, where = take_slice(overrides)
    runs = {}
    for target in targets:
        file, name = split(target)
        if not name:
            require(file.endswith(".py"), f"{target} is not FILE.py:FUNCTION.")
            sentence = user_file.runs_declared(file)
            require(False, f"{target}: name a function, engram-jax train {file}:FUNCTION. {sentence}")
        require(name not in runs, f"{target}: two runs are called {name!r}, and each needs a folder of its own.")
        config, about = user_file.run_of(file, name)
        runs[name] = parse(where(config), overrides, f"engram-jax train {target}", about)
    return train_all(runs)


def split(target: str) -> tuple[str, str]:
    """`my_runs.py:small` -> (`my_runs.py`, `small`); no function: an empty name."""
    file, colon, name = target.rpartition(":")
    return (file, name) if colon and file and name.isidentifier() else (target, "")
