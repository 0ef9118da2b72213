"""A trained run as a model of EleutherAI's lm-evaluation-harness, for its tasks (MMLU, ARC, HellaSwag, BBH ...).

Text becomes ids as in the harness's own Hugging Face adapter. A text begins with bos. A context's trailing spaces move
to the continuation, then both are encoded as one text. A text that is too long loses ids on the left, bos too. This
module imports lm_eval, so other modules import it only where they need it. Without lm_eval it can be imported too, but
not used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from engram_jax.config import require
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.inference.sampling import Sampling
from engram_jax.version import __version__

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
if TYPE_CHECKING or HAS_LM_EVAL:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
else:
    TemplateLM = object

AT_A_TIME = 256
"""Requests between two steps of the progress bar."""
SAMPLING_FIELDS = ("do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks")
T = TypeVar("T")


class EngramLM(TemplateLM):
    def __init__(self, model: EvaluatedRun, max_length: int = 0, seed: int = 0):
        """
        Args:
          max_length: most ids of context, without the last id of a continuation. 0: the length of training.
          seed: of tasks that draw.

        Raises:
          ConfigError: max_length is negative.
        """
        super().__init__()
        require(max_length >= 0, f"max_length={max_length} must be 0 (the trained context) or positive.")
        self.model, self.max_length, self.seed = model, max_length or model.context, seed
        model.warn_if_longer(self.max_length, "lm_eval: max_length")

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> EngramLM:
        """The model of the harness's --model_args. batch_tokens sets the batch; --batch_size has no effect.

        Raises:
          ConfigError: run_dir is missing, or an argument is unknown.
          RunError: run_dir is not a run.
        """
        known = ("run_dir", "max_length", "batch_tokens", "memory_scale", "seed")
        require("run_dir" in arg_dict, "--model_args: run_dir is missing. Give the run's folder: run_dir=FOLDER.")
        unknown = [name for name in arg_dict if name not in known]
        require(not unknown, f"--model_args: {', '.join(unknown)} is unknown. The arguments are {', '.join(known)}.")
        scales = str(arg_dict["memory_scale"]).split() if "memory_scale" in arg_dict else ()
        batch_tokens = _given(arg_dict, "batch_tokens").get("batch_tokens", EvaluatedRun.batch_tokens)
        model = EvaluatedRun.load(Path(str(arg_dict["run_dir"])), batch_tokens, scales)
        return cls(model, **_given(arg_dict, "max_length", "seed"))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> EngramLM:
        """`create_from_arg_obj` for the text `name=value,name=value`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model, which the harness saves with its results."""
        return {
            "engram_jax_version": __version__,
            "run": str(self.model.run_dir),
            "step": self.model.step,
            "memory_scale": {str(layer): scale for layer, scale in self.model.memory_scale.items()},
            "max_length": self.max_length,
        }

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context: bos."""
        return self.model.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text, after bos unless `add_special_tokens` is False."""
        ids = self.model.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """For each (anything, context ids, continuation ids): the continuation's nats, and whether greedy writes it.

        Raises:
          ConfigError: a continuation is longer than max_length.
        """
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        require(
            longest <= self.max_length,
            f"max_length={self.max_length:,} must be at least {longest:,}, the longest continuation: raise it in "
            "--model_args.",
        )

        def evaluate(chosen: Sequence[tuple[Any, list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
            # The last id is predicted and never read: one more than max_length.
            scored = self.model.score([(c + continuation)[-(self.max_length + 1) :] for _, c, continuation in chosen])
            for (texts, _, continuation), (losses, is_greedy) in zip(chosen, scored, strict=True):
                first = len(losses) - len(continuation)
                result = -float(losses[first:].sum(dtype="float64")), bool(is_greedy[first:].all())
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
                yield result

        return self._by_length(requests, lambda r: len(r[1]) + len(r[2]), evaluate, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, after bos. A text longer than max_length is scored in windows, each id once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's text after each context, up to the first of its stop strings.

        Raises:
          ConfigError: max_gen_toks leaves no room for a context, or a setting is unknown here (a penalty).
        """
        texts = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(index)
        settings = {name: self._settings(requests[indices[0]].args[1]) for name, indices in by_settings.items()}
        for name, indices in by_settings.items():
            sampling, until = settings[name]

            def evaluate(chosen: Sequence[int], sampling=sampling, until=until) -> Iterator[str]:
                contexts = [requests[index].args[0] for index in chosen]
                room = self.max_length - sampling.max_tokens
                heard = Heard(self.model.tokenizer.decode, until, len(chosen))
                self.model.generate([self.tok_encode(context)[-room:] for context in contexts], sampling, heard)
                for index, ids in zip(chosen, heard.ids, strict=True):
                    text = until_first(self.model.tokenizer.decode(ids), until)
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    yield text

            made = self._by_length(indices, lambda index: len(requests[index].args[0]), evaluate, disable_tqdm)
            for index, text in zip(indices, made, strict=True):
                texts[index] = text
        return texts

    def _settings(self, gen_kwargs: dict) -> tuple[Sampling, list[str]]:
        """(sampling, stop strings) of a request."""
        asked: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs)}
        until, max_tokens = asked["until"], asked["max_gen_toks"]
        unknown = [name for name in asked if name not in SAMPLING_FIELDS]
        require(
            not unknown,
            f"generation_kwargs: {', '.join(unknown)} is unknown. Known are {', '.join(sorted(SAMPLING_FIELDS))}.",
        )
        require(
            max_tokens < self.max_length,
            f"max_gen_toks={max_tokens} leaves no room for a context in max_length={self.max_length}: lower the one "
            "with --gen_kwargs or raise the other in --model_args.",
        )
        # Without do_sample, tasks name a temperature that has no effect.
        draws = asked["do_sample"] and asked.get("temperature", 0.0) > 0
        how = {name: asked[name] for name in ("temperature", "top_k", "top_p") if draws and name in asked}
        return replace(Sampling(max_tokens, temperature=0, top_k=0, seed=self.seed), **how), until

    def _by_length(
        self,
        requests: Sequence[T],
        length: Callable[[T], int],
        evaluate: Callable[[Sequence[T]], Iterator[Any]],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Results of `evaluate`, in the order of the requests. The longest go first, so that a failure comes early."""
        order = sorted(range(len(requests)), key=lambda i: -length(requests[i]))
        results: list[Any] = [None] * len(requests)
        with tqdm(total=len(order), disable=disable_tqdm) as bar:
            for start in range(0, len(order), AT_A_TIME):
                indices = order[start : start + AT_A_TIME]
                for index, result in zip(indices, evaluate([requests[i] for i in indices]), strict=True):
                    results[index] = result
                bar.update(len(indices))
        return results


if HAS_LM_EVAL:
    register_model("engram_jax")(EngramLM)  # not as a decorator, behind which type checkers lose sight of the class


class Heard:
    """Collects the ids of texts as they are written; a call tells whether a stop string is complete.

    The id that completes a stop string is kept, since its text may begin before the stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str], count: int):
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        # An id stands for a byte at least, and a character has up to four.
        self._reach = max((len(stop.encode()) for stop in self._stops), default=0) + 4

    def __call__(self, index: int, token: int) -> bool:
        self.ids[index].append(token)
        tail = self._decode(self.ids[index][-self._reach :]) if self._stops else ""
        return any(stop in tail for stop in self._stops)


def until_first(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text


def _given(arguments: dict, *names: str) -> dict[str, int]:
    """The given ones of these arguments, as whole numbers."""
    given = {name: arguments[name] for name in names if name in arguments}
    for name, value in given.items():
        require(str(value).lstrip("-").isdigit(), f"--model_args: {name}={value!r} is not a whole number.")
    return {name: int(value) for name, value in given.items()}
