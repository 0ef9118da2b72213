"""The task `ruler` with models that know the answers, some of them or none; items from files and into files."""

import json
import re

import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.data.tokenizer import train_tokenizer
from engram_jax.evaluation.ruler.families import FAMILIES
from engram_jax.evaluation.ruler.files import read_items
from engram_jax.evaluation.ruler.task import Ruler, answers, averages
from engram_jax.evaluation.statistics import Metric
from engram_jax.evaluation.tasks import Shared
from engram_jax.registries import TASKS


@pytest.fixture(scope="module")
def essays(tmp_path_factory):
    rng = np.random.default_rng(8)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(200)]
    path = tmp_path_factory.mktemp("essays") / "essay.txt"
    path.write_text(" ".join(" ".join(rng.choice(words, 8)) + "." for _ in range(800)))
    return path


@pytest.fixture(scope="module")
def tokenizer(essays):
    return train_tokenizer([essays.read_text()], 350)


class FakeModel:
    """What the task asks of a model; `write` is a prompt's text -> the answer's."""

    name, context = "fake", 800

    def __init__(self, tokenizer, write):
        self.tokenizer, self.write = tokenizer, write
        self.said, self.longest = [], 0

    def log(self, line):
        self.said.append(line)

    def warn_if_longer(self, length, what):
        if length > self.context:
            self.log(f"{what} is longer")

    def greedy(self, prompts, max_tokens):
        assert all(prompt[0] == self.tokenizer.bos_id for prompt in prompts)
        self.longest = max([self.longest, *(len(prompt) + max_tokens for prompt in prompts)])
        return [self.tokenizer.encode(self.write(self.tokenizer.decode(prompt)))[:max_tokens] for prompt in prompts]


def reader(prompt: str) -> str:
    """Answers needles by reading, variables by half, and no questions."""
    if prompt.startswith("Hidden"):
        found = re.findall(r"special (?:number|uuid) for (\S+) is (\S+)\.", prompt)
        question = prompt.rpartition("Question")[2]
        return ", ".join(value for key, value in found if re.search(rf"\b{key}\b", question))
    if prompt.startswith("Follow"):
        asked = prompt.split("\n\nFollow")[1]
        return " ".join(re.findall(r"VAR ([A-Z]{5}) =", asked)[:2])
    return "no idea"


def test_scores_are_shares_of_the_answers_in_percent(tokenizer, essays, tmp_path):
    model = FakeModel(tokenizer, reader)
    task = Ruler(
        lengths=(700, 1400), families=("niah_multikey", "niah_multivalue"), samples=6, save=str(tmp_path / "out")
    )
    result = task(model, Shared(corpus=str(essays), limit=4), "vt,qa")
    metrics = result.metrics
    for label in ("700", "1400"):
        for name in ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multikey", "niah_multivalue"):
            assert metrics[f"{name}@{label}"].value == 100 and metrics[f"{name}@{label}"].stderr == 0
        assert metrics[f"qa@{label}"].value == metrics[f"qa_1@{label}"].value == 0
        assert metrics[f"qa@{label}"].count == 8 and metrics[f"qa_1@{label}"].count == 4
        assert f"ruler@{label}" not in metrics  # not all 13 were measured
    assert metrics["vt@1400"].value == pytest.approx(40) and metrics["vt@1400"].unit == "%"
    assert "vt@700" not in metrics and result.details["too_long"]["vt@700"] > 700
    assert any("vt@700 is left out" in line for line in model.said) and model.longest <= 1400
    assert any("the longest item is longer" in line for line in model.said)
    # What is saved scores the same with a few lines of Python.
    [vt] = (tmp_path / "out" / "fake").glob("vt@*.jsonl")
    lines = [json.loads(line) for line in vt.read_text().splitlines()]
    shares = [sum(answer in line["pred"] for answer in line["outputs"]) / 5 for line in lines]
    assert len(lines) == 4 and np.mean(shares) * 100 == pytest.approx(metrics["vt@1400"].value)
    assert result.details["families"]["vt@1400"]["shown"][0]["prediction"] == lines[0]["pred"]
    json.dumps(result.details)


def test_without_lengths_it_is_the_trained_context(tokenizer, essays):
    model = FakeModel(tokenizer, lambda prompt: "")
    metrics = Ruler(samples=1)(model, Shared(corpus=str(essays)), "qa_1").metrics
    assert list(metrics) == ["qa_1@800"] and metrics["qa_1@800"].stderr is None
    assert not any("longer" in line for line in model.said)


def test_every_item_gets_its_own_budget(tokenizer):
    budgets = {}

    class Counting(FakeModel):
        def greedy(self, prompts, max_tokens):
            budgets[max_tokens] = len(prompts)
            return [self.tokenizer.encode(str(max_tokens)) for _ in prompts]

    from engram_jax.evaluation.ruler.items import Item

    items = [Item(i, f"question {i}", " answer", ("x",), 9, budget) for i, budget in enumerate((30, 50, 30))]
    assert answers(Counting(tokenizer, None), items) == ["30", "50", "30"] and budgets == {30: 2, 50: 1}


def test_groups_weigh_their_families_alike():
    def metric(value, stderr):
        return Metric(value, stderr, count=10, clusters=10, unit="%", higher_is_better=True)

    scores = {f"{name}@9": metric(i, 3.0) for i, name in enumerate(FAMILIES)} | {"qa_1@10": metric(50, 1)}
    means = averages(scores)
    assert set(means) == {"niah_single@9", "niah_multikey@9", "qa@9", "ruler@9"}
    assert means["niah_multikey@9"].value == pytest.approx(4) and means["ruler@9"].value == pytest.approx(6)
    assert means["niah_single@9"].stderr == pytest.approx(3 / 3**0.5)
    assert means["ruler@9"].stderr == pytest.approx(3 / 13**0.5) and means["ruler@9"].count == 130


# --- RULER's own files ---


def test_items_of_rulers_own_scripts(tokenizer, tmp_path):
    folder = tmp_path / "32768"
    (folder / "vt").mkdir(parents=True)
    rows = [
        {"index": 7, "input": "Find X", "outputs": ["A", "B"], "length": 32, "answer_prefix": " Answer:"},
        {"index": 8, "input": "Find Y", "outputs": ["C", "D"], "length": 32},
        {"index": 9, "input": "Find Z", "outputs": ["E"], "length": 32},
    ]
    (folder / "vt" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = FakeModel(tokenizer, lambda prompt: "a and b" if prompt == "Find X Answer:" else "c")
    result = Ruler(data=str(folder), samples=2)(model, Shared(), "vt")
    assert result.metrics["vt@32768"].value == pytest.approx(75) and result.metrics["vt@32768"].count == 2
    item = read_items(folder, FAMILIES["vt"], tokenizer, 9)[0]
    assert item.length == 1 + len(tokenizer.encode("Find X Answer:")) + 30 and item.index == 7


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"input": "x"}\n', '{"input": "x", "outputs": []}\n'])
def test_files_of_another_form(tokenizer, tmp_path, content):
    with pytest.raises(ConfigError, match=r"ruler\.data=.*cannot read"):
        read_items(tmp_path, FAMILIES["vt"], tokenizer, 9)
    (tmp_path / "vt").mkdir()
    (tmp_path / "vt" / "validation.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"ruler\.data: .*validation\.jsonl"):
        read_items(tmp_path, FAMILIES["vt"], tokenizer, 9)


# --- mistakes ---


def test_mistakes_in_the_options(tokenizer, essays):
    assert TASKS["ruler"] is Ruler
    model, shared = FakeModel(tokenizer, reader), Shared(corpus=str(essays))
    with pytest.raises(ConfigError, match=r"no family 'vtt'.*'vt'"):
        Ruler()(model, shared, "vtt")
    with pytest.raises(ConfigError, match=r"too short .*: niah_single_\d@40 needs \d+ tokens"):
        Ruler(lengths=(40,))(model, shared, "niah_single")
    with pytest.raises(ConfigError, match=r"ruler\.samples=0"):
        Ruler(samples=0)
    with pytest.raises(ConfigError, match=r"ruler\.lengths=\(512, -1\)"):
        Ruler(lengths=(512, -1))
    with pytest.raises(ConfigError, match=r"ruler\.squad='nowhere\.json'"):
        Ruler(squad="nowhere.json")(model, shared)
