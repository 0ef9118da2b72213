"""The task `ruler`: scores of RULER's families at any length, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engram_jax.config import ConfigError, require
from engram_jax.evaluation.statistics import Metric, mean
from engram_jax.evaluation.tasks import Result, Shared

if TYPE_CHECKING:
    from engram_jax.evaluation.evaluated_run import EvaluatedRun
    from engram_jax.evaluation.ruler.items import Family, Item
    from engram_jax.evaluation.ruler.words import Texts

SHOWN = 2
"""Items of each family that the results file shows, with the model's answers."""
SHOWN_CHARACTERS = 400


class Part(NamedTuple):
    """One family at one length."""

    family: Family
    label: str
    items: list[Item]

    @property
    def name(self) -> str:
        return f"{self.family.name}@{self.label}"


@dataclass(frozen=True)
class Ruler:
    """RULER (Hsieh et al. 2024): needles, variables, word counts and questions in text of any length."""

    lengths: tuple[int, ...] = ()
    """Lengths of the items in tokens, answer included. Empty: the length the run was trained at (data.seq_len)."""
    families: tuple[str, ...] = ()
    """Families by name (niah_single_1, vt) or group (niah_single, qa). Empty: all 13. Also as --tasks ruler:vt,qa."""
    samples: int = 100
    """Items of each family at each length (RULER: 500)."""
    essays: str = ""
    """Text for the haystacks, as data.corpus is given. Empty: --corpus, or the documents that the run held out."""
    squad: str = ""
    """SQuAD's JSON (dev-v2.0.json) for qa_1. Empty: invented facts, which are easier."""
    hotpot: str = ""
    """HotpotQA's JSON (hotpot_dev_distractor_v1.json) for qa_2. Empty: invented facts, which are easier."""
    data: str = ""
    """Folder of items that RULER's own scripts made (FAMILY/validation.jsonl), instead of items made here."""
    save: str = ""
    """Folder for all items with the model's answers, as RUN/FAMILY@LENGTH.jsonl. Empty: they are not saved."""

    def __post_init__(self):
        require(self.samples > 0, f"ruler.samples={self.samples} must be positive.")
        for length in self.lengths:
            require(length > 0, f"ruler.lengths={self.lengths}: each must be positive.")

    def __call__(self, model: EvaluatedRun, shared: Shared, argument: str = "") -> Result:
        from engram_jax.evaluation.ruler.families import chosen
        from engram_jax.evaluation.ruler.files import write_items
        from engram_jax.evaluation.ruler.scoring import SCORES

        families = chosen([*self.families, *(name for name in argument.split(",") if name)])
        count = min(self.samples, shared.limit or self.samples)
        parts, too_long = self._parts(model, shared, families, count)
        model.warn_if_longer(max(item.length for part in parts for item in part.items), "ruler: the longest item")
        scores, details = {}, {}
        for part in parts:
            model.log(f"ruler: {part.name}, {len(part.items)} items")
            predictions = answers(model, part.items)
            score = SCORES[part.family.match]
            scores[part.name] = mean(
                [score(text, item.outputs) for text, item in zip(predictions, part.items, strict=True)],
                unit="%",
                higher_is_better=True,
            )
            details[part.name] = _describe(part, predictions)
            if self.save:
                write_items(Path(self.save) / model.name / f"{part.name}.jsonl", part.items, predictions)
        metrics = scores | averages(scores)
        return Result(metrics, {"seed": shared.seed, "samples": count, "too_long": too_long, "families": details})

    def _parts(
        self, model: EvaluatedRun, shared: Shared, families: Sequence[Family], count: int
    ) -> tuple[list[Part], dict[str, int]]:
        """All items, and for each family that does not fit, its shortest length (`cwe@512` -> 1029).

        Raises:
          ConfigError: no family fits.
        """
        from engram_jax.evaluation.ruler.files import read_items
        from engram_jax.evaluation.ruler.items import DoesNotFitError, make_items

        if self.data:
            folder = Path(self.data)
            return [Part(f, folder.name, read_items(folder, f, model.tokenizer, count)) for f in families], {}
        texts = self._texts(model, shared)
        parts, too_long = [], {}
        for length in self.lengths or (model.context,):
            for family in families:
                try:
                    items = make_items(family, model.tokenizer, length, count, shared.seed, texts)
                except DoesNotFitError as error:
                    too_long[f"{family.name}@{length}"] = error.least
                    continue
                parts.append(Part(family, str(length), items))
        if not parts:
            name, least = min(too_long.items(), key=lambda entry: entry[1])
            raise ConfigError(
                f"ruler.lengths is too short for every family: {name} needs {least:,} tokens with this tokenizer, with "
                "its answer. Give greater lengths."
            )
        for name, least in too_long.items():
            model.log(f"ruler: {name} is left out, because its items need about {least:,} tokens with this tokenizer.")
        return parts, too_long

    def _texts(self, model: EvaluatedRun, shared: Shared) -> Texts:
        from engram_jax.evaluation.documents import OwnText, open_documents
        from engram_jax.evaluation.ruler.question_files import read_hotpot, read_squad
        from engram_jax.evaluation.ruler.words import Texts

        squad = read_squad(self.squad) if self.squad else None
        hotpot = read_hotpot(self.hotpot) if self.hotpot else None
        documents = open_documents(model, replace(shared, corpus=self.essays or shared.corpus, limit=0), OwnText(model))
        return Texts.of((model.tokenizer.decode(ids.tolist()) for ids in documents), squad=squad, hotpot=hotpot)


def answers(model: EvaluatedRun, items: Sequence[Item]) -> list[str]:
    """The model's greedy text after each prompt, up to the item's answer budget."""
    texts = [""] * len(items)
    for budget in sorted({item.tokens_to_generate for item in items}):
        indices = [i for i, item in enumerate(items) if item.tokens_to_generate == budget]
        prompts = [[model.tokenizer.bos_id, *model.tokenizer.encode(items[i].prompt)] for i in indices]
        for i, ids in zip(indices, model.greedy(prompts, budget), strict=True):
            texts[i] = model.tokenizer.decode(ids)
    return texts


def averages(scores: Mapping[str, Metric]) -> dict[str, Metric]:
    """Averages by group, such as `niah_single@LENGTH`, and `ruler@LENGTH` over all 13 families; whole groups only."""
    from engram_jax.evaluation.ruler.families import FAMILIES, GROUPS

    labels = dict.fromkeys(name.partition("@")[2] for name in scores)
    result = {}
    for label in labels:
        for group in (*GROUPS, "ruler"):
            names = [f"{f.name}@{label}" for f in FAMILIES.values() if group in (f.group, "ruler")]
            if len(names) > 1 and all(name in scores for name in names):
                result[f"{group}@{label}"] = _average([scores[name] for name in names])
    return result


def _average(scores: Sequence[Metric]) -> Metric:
    """Every family weighs the same, and their items are independent."""
    errors = [score.stderr for score in scores]
    known = [error for error in errors if error is not None]
    return Metric(
        value=sum(score.value for score in scores) / len(scores),
        stderr=math.hypot(*known) / len(scores) if len(known) == len(scores) else None,
        count=sum(score.count for score in scores),
        clusters=sum(score.clusters for score in scores),
        unit="%",
        higher_is_better=True,
    )


def _describe(part: Part, predictions: Sequence[str]) -> dict[str, Any]:
    lengths = [item.length for item in part.items]
    return {
        **part.family.settings,
        "match": part.family.match,
        "tokens_to_generate": max(item.tokens_to_generate for item in part.items),
        "mean_length": sum(lengths) / len(lengths),
        "max_length": max(lengths),
        "shown": [
            {"prompt_end": item.prompt[-SHOWN_CHARACTERS:], "outputs": item.outputs, "prediction": text}
            for item, text in zip(part.items[:SHOWN], predictions, strict=False)
        ],
    }
