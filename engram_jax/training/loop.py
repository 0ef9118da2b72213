"""The training loop, top to bottom: data, parts, state, steps, evaluation, result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from engram_jax.config import RunConfig, replace
from engram_jax.data.loader import TextData, eval_batches, load_data, train_batches
from engram_jax.data.ngram_frequency import NgramCounts
from engram_jax.data.repeats import repeats_line
from engram_jax.distributed import is_first
from engram_jax.errors import FINISHED, RunError
from engram_jax.files import write_json
from engram_jax.runs import load, run_folder, settings
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.parts import Parts, assemble
from engram_jax.runs.state import Batch, TrainState
from engram_jax.training import init_from
from engram_jax.training.feed import Feed, on_host
from engram_jax.training.goodput import Goodput
from engram_jax.training.metrics import MetricsWriter, Progress, duration, read_metrics
from engram_jax.training.profile import Profile
from engram_jax.training.run_folder_checks import folder_of_one_run
from engram_jax.training.stepper import Stepper, make_evaluator
from engram_jax.training.stopping import StopRequest
from engram_jax.training.validation import Evaluation, evaluate

Log = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    state: TrainState
    parts: Parts
    text: TextData
    evaluation: Evaluation | None
    """On the held-out documents; None if the run was stopped before its last step."""
    status: int
    """Exit status (errors.py): FINISHED, or why it was stopped."""


def train(config: RunConfig, run_dir: Path | str, log: Log = print, profile: bool = False) -> TrainResult:
    """Trains a run to `config.train.steps`, from the newest checkpoint in its folder if there is one.

        result = train(RunConfig(name="small"), "runs/small")
        result.evaluation.loss                  nats per token on the held-out documents

    Several processes (distributed.py) all call it with the same arguments; the first one writes and logs.

    Args:
      config: the run. A resumed run needs the settings it began with; runs/settings.py lists those that may change.
      run_dir: the run's folder, shared by all processes. It gets config.json, tokenizer.json, metrics.jsonl,
        tensorboard/, checkpoints/ and, at the end, result.json.
      log: gets each line of the log.
      profile: whether to trace a few steps and write where their time goes into profile/.

    Raises:
      ConfigError: the settings cannot work, or differ from those the run was started with; the folder is unfit.
      RunError: the loss or gradient is no longer finite, the disk is full, no checkpoint can be read.
    """
    run_dir = Path(run_dir)
    if not is_first():
        log = _silent
    with Goodput() as goodput, folder_of_one_run(run_dir, log):
        return _train(config, run_dir, log, Profile(run_dir / "profile") if profile else None, goodput)


def _train(config: RunConfig, run_dir: Path, log: Log, profile: Profile | None, goodput: Goodput) -> TrainResult:
    started = time.perf_counter()

    # --- data and the parts of the run ---
    begins = config.train.init_from and not load.has_checkpoint(run_dir)
    source = init_from.find_source(config) if begins else None
    tokenizer = init_from.data_tokenizer(config, run_dir)
    text = load_data(replace(config.data, tokenizer=tokenizer), config.model.vocab_size, log)
    if repeats := repeats_line(text.train, config.data, config.train.steps):
        log(repeats)
    parts = assemble(config, text.tokenizer.backend)
    config = parts.config
    settings.check(run_dir, config)
    meta = run_folder.meta(config, text, parts)
    run_folder.check_alike(meta)
    log(
        f"Run {config.name} in {run_dir}: {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}."
    )

    with (
        jax.set_mesh(parts.mesh),
        Checkpoints(run_dir / "checkpoints", config.checkpoint, parts, log) as checkpoints,
        StopRequest(parts.mesh) as stop,
    ):
        # --- state: restored, or new ---
        checkpoints.check_room(parts.abstract_state())
        restored = checkpoints.restore(parts.abstract_state(), lambda saved: run_folder.check_meta(saved, meta, parts))
        if restored is not None:
            state = restored
        elif source is not None:
            state = init_from.initial_state(parts, source, text.tokenizer.backend, log)
        else:
            state = parts.init_state()
        first_step = int(jax.device_get(state.step))
        if first_step == config.train.steps:
            log(f"All {first_step} steps are done already: only the evaluation is repeated.")
        elif first_step:
            log(f"Resumed at step {first_step} of {config.train.steps}.")
        run_folder.describe(run_dir, config, text)
        goodput.resume(read_metrics(run_dir), first_step)

        feed = Feed(parts.mesh, config.data.batch_size)
        token_losses_on = make_evaluator(parts, log)

        def validate(max_batches: int, counts: NgramCounts | None = None) -> Evaluation:
            def token_losses(batch: dict[str, np.ndarray]) -> np.ndarray:
                return on_host(token_losses_on(state, feed.whole(batch)))

            batches = eval_batches(text.validation, config.data.batch_size, max_batches)
            return evaluate(token_losses, batches, text.tokenizer.byte_lengths(), counts)

        # --- steps ---
        tokens_per_step = config.data.batch_size * config.data.seq_len
        progress = Progress(first_step, config.train.steps, tokens_per_step)
        pending: tuple[int, dict[str, jax.Array], dict[str, jax.Array]] | None = None
        batches = train_batches(
            text.train,
            config.data.batch_size,
            config.data.seed,
            feed.rows,
            config.data.worker_count,
            start_step=first_step,
        )

        def batches_on_devices() -> Iterator[Batch]:
            while True:
                with goodput.on("data"):
                    batch = next(batches)
                yield feed.rows_here(batch)

        with (
            batches,
            MetricsWriter(run_dir, first_step, config.train.tensorboard, writes=is_first()) as writer,
            Stepper(parts, batches_on_devices(), log) as train_step,
        ):

            def report(step: int, metrics: dict[str, jax.Array], seen: dict[str, jax.Array]) -> None:
                """Waits for a step's numbers; called once the next step is under way."""
                values, looks = (
                    {name: float(value) for name, value in numbers.items()}
                    for numbers in jax.device_get((metrics, seen))
                )
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(values[name]):
                        checkpoints.wait()
                        saved = checkpoints.steps
                        good = f"checkpoint {saved[-1]} is the last good one" if saved else "there is no checkpoint yet"
                        raise RunError(
                            f"Step {step}: {name} is {values[name]}, so the run stops; {good}. "
                            "Lower optimizer.learning_rate or optimizer.clip_norm, or lengthen optimizer.warmup_steps."
                        )
                looks = {name: value for name, value in looks.items() if not math.isnan(value)}
                if step % config.train.log_every == 0 or step in (first_step + 1, config.train.steps):
                    rate = progress.tokens_per_second(step)
                    writer.write(step, values | looks | {"tokens_per_second": rate} | goodput.shares())
                    log(progress.line(step, values, rate))
                elif looks:
                    writer.write(step, looks)

            if restored is None and source is not None:
                # On all of the hold-out, so that it can be compared with the source's result.json.
                paused = time.perf_counter()
                with goodput.on("evaluation"):
                    begun = validate(config.train.eval_batches_final)
                progress.pause(time.perf_counter() - paused)
                writer.write(0, {"validation_loss": begun.loss, "bits_per_byte": begun.bits_per_byte})
                log(f"step 0  validation loss {begun.loss:.4f}  {begun.bits_per_byte:.4f} bits/byte, as it begins")

            step, status = first_step, FINISHED
            goodput.turn_to("steps")
            while step < config.train.steps and not status:
                asked = stop.ask()
                if profile is not None:
                    profile.before_step(step - first_step, state)
                # What moves between host and devices here is asked for by name, so that nothing waits unseen.
                with jax.transfer_guard("disallow"):
                    seen = train_step.look(state) if _due(step + 1, config.memory.monitor_every) else {}
                    state, metrics = train_step(state, step)
                step += 1
                if pending is not None:
                    report(*pending)
                pending = (step, metrics, seen)

                is_last = step == config.train.steps
                if _due(step, config.train.eval_every) and not is_last:
                    report(*pending)
                    pending, paused = None, time.perf_counter()
                    with goodput.on("evaluation"):
                        train_step.settle()
                        validation = validate(config.train.eval_batches)
                    writer.write(step, {"validation_loss": validation.loss, "bits_per_byte": validation.bits_per_byte})
                    log(f"step {step}  validation loss {validation.loss:.4f}  {validation.bits_per_byte:.4f} bits/byte")
                    progress.pause(time.perf_counter() - paused)
                if _due(step, config.checkpoint.every) or is_last:
                    if pending is not None:  # never save a step whose numbers nobody has looked at
                        report(*pending)
                        pending = None
                    paused = time.perf_counter()
                    with goodput.on("saving"):
                        train_step.settle()
                        checkpoints.save(step, state, meta)
                    progress.pause(time.perf_counter() - paused)
                status = stop.answer(asked)
            if profile is not None:
                profile.close(step - first_step, state, log)

            if step < config.train.steps:
                log(f"Stopping at step {step}: saving. Ctrl-C again stops at once, without saving.")
                if pending is not None:
                    report(*pending)
                if step > first_step:
                    train_step.settle()
                    checkpoints.save(step, state, meta)
                checkpoints.wait()
                log(f"Stopped at step {step}, saved. The same command continues from here.")
                return TrainResult(state, parts, text, None, status)

            # --- the last evaluation, on everything held out ---
            with goodput.on("evaluation"):
                counts = NgramCounts.of(text.train.stream.tokens, order=3)
                evaluation = validate(config.train.eval_batches_final, counts)
            final = {"validation_loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte}
            if {"step": step, **final} not in read_metrics(run_dir):  # a finished run, started again
                writer.write(step, final)
        with goodput.on("saving"):
            checkpoints.wait()

    if is_first():
        result = {"name": config.name, "step": step, "corpus_sha256": text.corpus_sha256, **evaluation.to_dict()}
        write_json(run_dir / "result.json", result | goodput.shares())
    log(
        f"Done: {config.name}, {step} steps, validation loss {evaluation.loss:.4f}, "
        f"{evaluation.bits_per_byte:.4f} bits/byte, in {duration(time.perf_counter() - started)}. {goodput.line()}"
    )
    return TrainResult(state, parts, text, evaluation, FINISHED)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _silent(_: str) -> None:
    pass
