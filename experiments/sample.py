"""Continues a prompt with a trained run:  python -m experiments.sample RUN_DIR "prompt" [--max_tokens 200 ...]"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from engram_jax.config import ConfigError
from engram_jax.training.errors import RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues a prompt with a trained run, token by token, until the document ends or max_tokens is reached."""

    run_dir: tyro.conf.Positional[Path]
    """A run's folder, as experiments.run wrote it."""
    prompt: tyro.conf.Positional[str] = ""
    """The text to continue; empty: a document from its beginning."""
    max_tokens: int = 200
    """New tokens at most."""
    temperature: float = 0.8
    """How freely to draw; 0: always the most probable token."""
    top_k: int = 50
    """Draw from this many of the most probable tokens only (0: all)."""
    seed: int = 0
    """The same seed gives the same text."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 after a mistake in the arguments, 1 if the run cannot be read."""
    options = tyro.cli(Options, args=list(arguments), prog="python -m experiments.sample", use_underscores=True)
    try:
        sample(options)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def sample(options: Options) -> None:
    """Prints the prompt, and the continuation as it comes."""
    # Here, because they bring jax, which --help does not wait for.
    from tokenizers.decoders import DecodeStream

    from engram_jax.data.tokenizer import load_tokenizer
    from engram_jax.inference.sampling import Sampling, generate
    from engram_jax.training.run_folder import load_run

    sampling = Sampling(options.max_tokens, options.temperature, options.top_k, options.seed)
    state, parts = load_run(options.run_dir, log=lambda line: print(line, file=sys.stderr))
    tokenizer = load_tokenizer(options.run_dir / "tokenizer.json")
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    # The stream holds back the bytes of an unfinished character.
    stream = DecodeStream(ids=prompt_ids, skip_special_tokens=True)
    print(options.prompt, end="", flush=True)
    for token in generate(parts, state, prompt_ids, sampling, tokenizer.eos_id):
        print(stream.step(tokenizer.backend, token) or "", end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
