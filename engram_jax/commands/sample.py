"""`engram-jax sample RUN_DIR PROMPT`: continues prompts with a trained run."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

from engram_jax import files
from engram_jax.commands.command_line import exit_status, field_paths, keep_compiled_programs, parsed
from engram_jax.config import ConfigError, names, require
from engram_jax.errors import INTERRUPTED, RunError

if TYPE_CHECKING:  # they bring jax, which --help does not wait for
    from engram_jax.data.tokenizer import Tokenizer
    from engram_jax.inference.engine import Engine
    from engram_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues prompts with a trained run, until a document ends or max_tokens is reached.

    For example:
      engram-jax sample runs/small "def read_file(path):"
      engram-jax sample runs/small --prompts prompts.txt --out answers.jsonl
      engram-jax sample runs/small --interactive
    """

    run_dir: tyro.conf.Positional[Annotated[Path, arg(metavar="RUN_DIR")]]
    """The run's folder."""
    prompt: tyro.conf.Positional[Annotated[str, arg(metavar="[PROMPT]")]] = ""
    """The text to continue. Empty: the model writes a document from its beginning."""
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file of prompts, instead of one prompt: one a line, or JSON lines with "prompt". Answers are JSON lines."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """File for the answers to --prompts; default: standard output. Until all are finished they are in OUT.partial."""
    interactive: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read prompts from the terminal. Each continues the text so far; /new starts again, Ctrl-D ends."""
    max_tokens: int = 200
    """New tokens at most, 1 or more."""
    temperature: float = 0.8
    """Divides the logits before drawing, 0 or more. 0: always the most probable token."""
    top_k: int = 50
    """Draw only from this many of the most probable tokens. 0: from all."""
    top_p: float = 1.0
    """Draw only from the fewest most probable tokens that together have this probability, in (0, 1]. 1: from all."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = ()
    """Texts before which a continuation ends."""
    seed: int = 0
    """Of the drawing, 0 to 2^32-1. The same seed gives the same text."""
    max_len: int = 0
    """Tokens of a prompt with its continuation. 0: the length the model was trained at; one longer prompt gets more."""
    batch_size: int = 8
    """Prompts that are continued together (with --prompts), 1 or more."""
    placement: names.Placement | Literal[""] = ""
    """The memory that holds the tables. Empty: as in training."""
    mesh_fsdp: int = 1
    """Devices over which the weights and the prompts are cut, 1 or more."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward widths and the vocabulary are cut, 1 or more."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    return sample(parsed(Options, arguments, "engram-jax sample", field_paths))


def sample(options: Options) -> int:
    """Prints what becomes of the prompts; 1 if one of them cannot be continued, and the others were."""
    from engram_jax.data.tokenizer import load_tokenizer
    from engram_jax.inference.engine import Engine
    from engram_jax.inference.sampling import Sampling
    from engram_jax.runs.load import load_run

    sampling = Sampling(options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    require(
        not (options.interactive and options.prompts),
        "--interactive and --prompts: choose one of them.",
    )
    prompts = read_prompts(options.prompts) if options.prompts else [options.prompt]
    if options.prompts and options.out:
        check_writable(options.out)  # before the first of many hours
    mesh = {"fsdp": options.mesh_fsdp, "tensor": options.mesh_tensor}
    state, parts = load_run(options.run_dir, log=_say, mesh=mesh, placement=options.placement)
    keep_compiled_programs(parts.config)
    tokenizer = load_tokenizer(options.run_dir / "tokenizer.json")
    batch_size = options.batch_size if options.prompts else options.mesh_fsdp
    ids = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    max_len = options.max_len or parts.config.data.seq_len
    if not options.max_len and len(ids) >= max_len:
        max_len = len(ids) + options.max_tokens
    _warn_beyond(parts.config, max_len)
    engine = Engine(parts, state, batch_size, max_len)
    del state  # the engine keeps what it needs, in half the bytes
    if options.prompts:
        return answer_file(engine, tokenizer, prompts, sampling, options)
    if options.interactive:
        return converse(engine, tokenizer, sampling, options.stop)
    if (error := engine.error(ids)) is not None:
        raise ConfigError(error)
    print(options.prompt, end="", flush=True)
    show(engine, tokenizer, ids, sampling, options.stop)
    return 0


def show(engine: Engine, tokenizer: Tokenizer, ids: list[int], sampling: Sampling, stop: Sequence[str]) -> str:
    """Streams the continuation to the terminal, then a line about its speed to standard error; returns the text."""
    from engram_jax.inference.text import pieces

    text, started, times = "", time.perf_counter(), []
    for piece in pieces(engine, tokenizer, [ids], sampling, stop):
        times += [time.perf_counter()] * piece.tokens
        print(piece.text, end="", flush=True)
        text += piece.text
    print()
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        _say(f"[{len(times)} tokens, the first after {times[0] - started:.2f} s, then {rate:.0f} tokens/s]")
    if len(ids) + len(times) >= engine.max_len:
        _say(f"[ended at max_len={engine.max_len} tokens]")
    return text


def converse(engine: Engine, tokenizer: Tokenizer, sampling: Sampling, stop: Sequence[str]) -> int:
    """Each line goes on from all text before it, of which the model reads only what is new."""
    _say("Type a text to be continued; the next one continues from there. /new starts again, Ctrl-D ends.")
    text = ""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line.strip() == "/new":
            text = ""
            continue
        text += line
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        if (error := engine.error(ids)) is not None:
            _say(f"error: {error} /new starts again.")
            continue
        try:
            text += show(engine, tokenizer, ids, sampling, stop)
        except KeyboardInterrupt:
            print()


def answer_file(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, options: Options
) -> int:
    """Writes one JSON line per prompt, in order; a prompt that cannot be continued gets its error as the answer.

    Raises:
      ConfigError: the file cannot be written, before anything was computed.
      RunError: it cannot be written any more; says where the answers are.
    """
    from engram_jax.inference.text import pieces

    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    answers: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    good = []
    for i, one in enumerate(ids):
        if (error := engine.error(one)) is None:
            good.append(i)
            answers[i] |= {"text": "", "tokens": 0}
        else:
            answers[i]["error"] = error
    started = time.perf_counter()
    try:
        with _kept(options.out) as keep:
            for piece in pieces(engine, tokenizer, [ids[i] for i in good], sampling, options.stop):
                answer = answers[good[piece.prompt]]
                answer["text"] += piece.text
                answer["tokens"] += piece.tokens
                if piece.ended:
                    keep(_line(answer))
    except KeyboardInterrupt:
        return INTERRUPTED
    seconds = time.perf_counter() - started
    _write([_line(answer) for answer in answers], options.out)
    total = sum(answer.get("tokens", 0) for answer in answers)
    _say(f"[{len(good)} of {len(prompts)} prompts, {total} tokens, {total / seconds:.0f} tokens/s]")
    return 0 if len(good) == len(prompts) else 1


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: JSON lines with a text "prompt", or else one prompt a line; empty lines are left out.

    Raises:
      ConfigError: it cannot be read, a line is JSON without a prompt, or there is none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={path} cannot be read: {error}") from None
    require(bool(lines), f"prompts={path} has no prompts: write one a line, or JSON lines with a prompt each.")
    if not lines[0].lstrip().startswith("{"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        require(isinstance(prompt, str), f'prompts={path}, line {number}: not JSON with a text "prompt".')
        prompts.append(prompt)
    return prompts


def _warn_beyond(config: Any, max_len: int) -> None:
    trained, yarn = config.data.seq_len, config.model.attention.yarn
    limit = max(trained, yarn.max_position_embeddings) if yarn.enabled else trained
    if max_len > limit:
        stretched = f", and YaRN stretches its positions to {yarn.max_position_embeddings}" if yarn.enabled else ""
        _say(f"warning: max_len={max_len} tokens; the model was trained at {trained}{stretched}. Expect less beyond.")


def check_writable(out: Path) -> None:
    """Raises `ConfigError` if a file cannot be written there; leaves nothing behind."""
    try:
        files.check_writable(out)
    except OSError as error:
        raise ConfigError(
            f"out={out} cannot be written: {error.strerror}. Name a file in a folder that is there and can be written."
        ) from None


def _line(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def _kept(out: Path | None) -> Iterator[Callable[[str], None]]:
    """Takes finished answers as they come: they are in OUT.partial whatever ends the program, even a kill.

    Without `out` they are printed should it end early.
    """
    if out is None:
        lines: list[str] = []
        try:
            yield lines.append
        except BaseException:  # Ctrl-C among them
            print("".join(lines), end="", flush=True)
            raise
        return
    partial, count = _partial(out), 0
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={out}: {partial} cannot be written: {error.strerror}. Name another file.") from None

    def keep(line: str) -> None:
        nonlocal count
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            raise RunError(f"{partial} cannot be written any more: {error.strerror}. Make room and repeat.") from None
        count += 1

    try:
        yield keep
    except BaseException:
        _say(f"[ended early: {count} finished answers are in {partial}]")
        raise
    finally:
        with suppress(OSError):  # of what `keep` could not flush, and said
            file.close()


def _write(lines: Sequence[str], out: Path | None) -> None:
    """All answers, in order; the file appears when it is complete, and then OUT.partial has served."""
    if out is None:
        print("".join(lines), end="")
        return
    try:
        files.write_text(out, "".join(lines))
    except OSError as error:
        raise RunError(
            f"out={out} cannot be written any more: {error.strerror}. The answers are in {_partial(out)}, in the order "
            "in which they were finished."
        ) from None
    _partial(out).unlink(missing_ok=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
