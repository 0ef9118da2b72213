"""lm-evaluation-harness on a run: its adapter against the model run once over each text, and its own command line."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.errors import RunError, missing_extra
from engram_jax.evaluation import lm_eval as command
from engram_jax.evaluation.evaluated_run import Scored
from engram_jax.evaluation.lm_eval_model import EngramLM, until_first
from engram_jax.evaluation.lm_eval_task import LmEval, result_of
from engram_jax.evaluation.tasks import Shared
from engram_jax.registries import TASKS

MAX_LENGTH = 24


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@partial(jax.jit, static_argnums=0)
def whole_logits(parts, state, tokens_1T):
    """Logits after each token of one sequence, without padding: [T, V]."""
    rows = parts.store.fetch(state.memory, parts.store.plan(tokens_1T), state.step)
    model = parts.model(state.params, state.buffers)
    return model.logits(model.hidden(tokens_1T, rows)[0])[0]


def recomputed(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request by itself: log-probability and whether greedy, from what fits of the ids."""
    ids = (context + continuation)[-(MAX_LENGTH + 1) :]
    with jax.set_mesh(model.parts.mesh):
        logits_TV = np.asarray(whole_logits(model.parts, model.state, np.array([ids[:-1]], np.int32)), np.float64)
    after_TV = logits_TV[-len(continuation) :]
    top_T1 = after_TV.max(-1, keepdims=True)
    log_p_TV = after_TV - top_T1 - np.log(np.exp(after_TV - top_T1).sum(-1, keepdims=True))
    picked = [log_p_TV[i, token] for i, token in enumerate(continuation)]
    return float(sum(picked)), after_TV.argmax(-1).tolist() == continuation


@pytest.fixture(scope="module")
def adapter(model):
    return EngramLM(model, max_length=MAX_LENGTH)


# --- log-likelihoods ---


def test_batches_equal_one_request_at_a_time(adapter, model, rng):
    """Ragged lengths, in and beyond what fits, in one call."""
    # Their sequences have one of two lengths, so that the reference compiles twice.
    asked, lengths = [], [(5, 3), (7, 1), (1, 7), (20, 5), (4, 21), (1, 24), (20, 6), (60, 5)]
    for context_length, continuation_length in lengths:
        context = [model.tokenizer.bos_id, *rng.integers(3, 300, context_length - 1).tolist()]
        asked.append((None, context, rng.integers(3, 300, continuation_length).tolist()))
    found = adapter._loglikelihood_tokens(asked, disable_tqdm=True)
    for (value, is_greedy), (_, context, continuation), length in zip(found, asked, lengths, strict=True):
        expected, greedy = recomputed(model, context, continuation)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4), length
        assert is_greedy == greedy
        assert adapter._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True) == [
            (pytest.approx(value, rel=1e-5), is_greedy)
        ]


def test_the_greedy_flag(adapter, model, rng):
    """True for what greedy writes, false as soon as one id is another one."""
    context = [model.tokenizer.bos_id, *rng.integers(3, 300, 7).tolist()]
    ids = list(context)
    for _ in range(4):
        tokens_1T = np.array([ids + [0] * (MAX_LENGTH - len(ids))], np.int32)
        with jax.set_mesh(model.parts.mesh):
            logits_TV = whole_logits(model.parts, model.state, tokens_1T)
        ids.append(int(np.argmax(logits_TV[len(ids) - 1])))
    greedy = ids[len(context) :]
    others = [[*greedy[:i], (greedy[i] + 1) % 300, *greedy[i + 1 :]] for i in range(4)]
    found = adapter._loglikelihood_tokens([(None, context, ids) for ids in [greedy, *others]], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, False, False, False]


class Recorder:
    """Stands for a run: remembers what it is asked, gives id i of a sequence a loss of i."""

    name, context = "recorder", 64

    def __init__(self, tokenizer, answers=()):
        self.tokenizer, self.scored, self.generated, self.said, self.unwritten = tokenizer, [], [], [], []
        self.answers = list(answers)

    def score(self, sequences):
        self.scored += [list(ids) for ids in sequences]
        return [Scored(np.arange(1, len(ids), dtype=np.float32), np.ones(len(ids) - 1, bool)) for ids in sequences]

    def generate(self, prompts, sampling, ends):
        self.generated.append((prompts, sampling))
        for index in range(len(prompts)):
            ids = self.tokenizer.encode(self.answers.pop(0))
            while ids and not ends(index, ids.pop(0)):
                pass
            self.unwritten.append(self.tokenizer.decode(ids))

    def warn_if_longer(self, length, what):
        if length > self.context:
            self.said.append((length, what))


@pytest.fixture
def recorder(model):
    return Recorder(model.tokenizer)


def test_texts_become_ids_as_in_the_harness(recorder):
    encode, bos = recorder.tokenizer.encode, recorder.tokenizer.bos_id
    pairs = [("def self", " return"), ("def self  ", "return"), ("", "value"), ("(", ")")]
    found = EngramLM(recorder).loglikelihood(requests(*pairs), disable_tqdm=True)
    whole = {(bos, *encode(text)): context for context, text in (
        ("def self", "def self return"), ("def self", "def self  return"), ("", "value"), ("(", "()"),
    )}  # fmt: skip
    assert {tuple(ids) for ids in recorder.scored} == set(whole)
    # The spaces at the end of a context count for the continuation: id i has a loss of i.
    for (ids, context), (value, _) in zip(whole.items(), found, strict=True):
        assert value == -sum(range(1 + len(encode(context)), len(ids)))


def test_a_long_context_loses_its_beginning(recorder):
    ids = list(range(100, 180))
    [(value, _)] = EngramLM(recorder)._loglikelihood_tokens([(None, ids[:70], ids[70:])], disable_tqdm=True)
    assert recorder.scored == [ids[-65:]] and value == -sum(range(55, 65))
    with pytest.raises(ConfigError, match=r"max_length=64 must be at least 65"):
        EngramLM(recorder)._loglikelihood_tokens([(None, [1], list(range(65)))])


def test_rolling_windows_score_each_id_once(recorder, monkeypatch):
    """The example in the harness's own documentation: ten ids, four at a time, the last window with full context."""
    monkeypatch.setattr(recorder.tokenizer, "encode", lambda text: list(range(10)) if text else [], raising=True)
    found = EngramLM(recorder, max_length=4).loglikelihood_rolling(requests(("ten ids",), ("",)), disable_tqdm=True)
    bos = recorder.tokenizer.bos_id
    assert sorted(recorder.scored, key=lambda ids: ids[1]) == [[bos, 0, 1, 2, 3], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
    assert found == [-(1 + 2 + 3 + 4) - (1 + 2 + 3 + 4) - (3 + 4), 0]


def test_rolling_equals_recomputation(adapter, model):
    text = "import value\nself.def = (for) : return 漢 éß" * 4
    ids = model.tokenizer.encode(text)
    assert 2 * MAX_LENGTH < len(ids) < 3 * MAX_LENGTH
    [value] = adapter.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    whole, expected = [model.tokenizer.bos_id, *ids], 0.0
    for start in range(0, len(ids), MAX_LENGTH):
        stop = min(start + MAX_LENGTH, len(ids))
        context_start = max(0, stop - MAX_LENGTH)
        expected += recomputed(model, whole[context_start : start + 1], whole[start + 1 : stop + 1])[0]
    assert value == pytest.approx(expected, rel=1e-4)


# --- generation ---


def test_texts_end_before_the_first_stop(model):
    recorder = Recorder(model.tokenizer, ["value: x\n\nself.def", "for for", "import"])
    asked = [("def", {"until": ["\n", "self"], "max_gen_toks": 9}), ("(" * 90, {"until": "or", "max_gen_toks": 9}),
             ("abc", {"until": "or", "max_gen_toks": 9})]  # fmt: skip
    adapter = EngramLM(recorder)
    assert adapter.generate_until(requests(*asked), disable_tqdm=True) == ["value: x", "f", "imp"]
    (first, sampling), (others, _) = recorder.generated  # one call for equal settings, the longest context first
    encode, bos = recorder.tokenizer.encode, recorder.tokenizer.bos_id
    assert first == [[bos, *encode("def")]]
    assert others == [[bos, *encode("(" * 90)][-(64 - 9) :], [bos, *encode("abc")]]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (9, 0, 0)
    # No more was written than the stop took.
    assert recorder.unwritten[0].endswith("self.def") and recorder.unwritten[1].endswith(" for")


def test_a_run_writes_what_greedy_writes_up_to_the_stop(model):
    contexts = ["def self", "import value for", "("]
    whole = model.greedy([[model.tokenizer.bos_id, *model.tokenizer.encode(text)] for text in contexts], 12)
    texts = [model.tokenizer.decode(ids) for ids in whole]
    stop = texts[1][len(texts[1]) // 2 :][:2]
    asked = [(text, {"until": [stop], "max_gen_toks": 12}) for text in contexts]
    found = EngramLM(model).generate_until(requests(*asked), disable_tqdm=True)
    assert found == [text.partition(stop)[0] for text in texts] and found[1] != texts[1]


@pytest.mark.parametrize(
    ("settings", "temperature", "top_k"),
    [
        ({"do_sample": False, "temperature": 0.7, "top_k": 3}, 0, 0),
        ({"do_sample": True, "temperature": 0.7, "top_k": 3}, 0.7, 3),
        ({"temperature": 0.5}, 0.5, 0),
        ({}, 0, 0),
    ],
)
def test_drawing_is_as_the_task_says(model, settings, temperature, top_k):
    recorder = Recorder(model.tokenizer, ["x"])
    EngramLM(recorder, seed=5).generate_until(requests(("def", {"max_gen_toks": 3, **settings})), disable_tqdm=True)
    sampling = recorder.generated[0][1]
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.seed) == (temperature, top_k, 3, 5)


def test_settings_that_cannot_be_met(recorder):
    adapter = EngramLM(recorder)
    with pytest.raises(ConfigError, match=r"max_gen_toks=256 leaves no room .* max_length=64"):
        adapter.generate_until(requests(("def", {"until": []})))
    with pytest.raises(ConfigError, match="repetition_penalty"):
        adapter.generate_until(requests(("def", {"max_gen_toks": 4, "repetition_penalty": 2.0})))
    with pytest.raises(ConfigError, match="max_length=-1"):
        EngramLM(recorder, max_length=-1)
    EngramLM(recorder, max_length=100)
    assert recorder.said == [(100, "lm_eval: max_length")]
    assert until_first("a b a", ["", "x", "b"]) == "a "


# --- the harness on a run, with tasks from a folder ---


@pytest.fixture(autouse=True)
def no_other_tasks(monkeypatch, tmp_path_factory, request):
    """The harness reads the settings of its 15,000 tasks each time, which takes longer than all these tests."""
    if "slow" not in request.keywords:
        elsewhere = tmp_path_factory.mktemp("none") / "manager.py"
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(elsewhere))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks and their data; nothing of it comes from a network."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(2)
    words = ["def", "self", "return", "value", "import", "for"]
    rows = [
        {"text": " ".join(rng.choice(words, rng.integers(2, 9))), "choices": ["self", "value import", ")"], "label": i}
        for i in [0, 1, 2] * 3
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    choice = {"task": "own_choice", "output_type": "multiple_choice", "doc_to_text": "{{text}}:",
              "doc_to_choice": "{{choices}}", "doc_to_target": "label",
              "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    rolling = {"task": "own_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "{{text}}",
               "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte"}]}  # fmt: skip
    for task in (choice, rolling):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    (folder / "own_group.yaml").write_text(json.dumps({"group": "own_group", "task": ["own_choice"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}]}))  # fmt: skip
    return folder, rows


@pytest.fixture(scope="module")
def expected(tasks, model):
    """(accuracy, bits per byte) from single requests."""
    _, rows = tasks
    lm, right, nats, size = EngramLM(model), 0, 0.0, 0
    for row in rows:
        pairs = [(row["text"] + ":", " " + choice) for choice in row["choices"]]
        values = [lm.loglikelihood(requests(pair), disable_tqdm=True)[0][0] for pair in pairs]
        right += int(np.argmax(values)) == row["label"]
        nats -= lm.loglikelihood_rolling(requests((row["text"],)), disable_tqdm=True)[0]
        size += len(row["text"].encode())
    return right / len(rows), nats / size / np.log(2)


def test_the_harness_from_its_command_line(tasks, expected, run_dir, tmp_path, monkeypatch, capsys):
    folder, _ = tasks
    arguments = ["--model", "engram_jax", "--model_args", f"run_dir={run_dir},batch_tokens=256", "--tasks"]
    arguments += ["own_choice,own_rolling", "--include_path", str(folder), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    assert command.main() == 0
    [file] = tmp_path.rglob("results*.json")
    saved = json.loads(file.read_text())
    results = saved["results"]
    assert saved["config"]["step"] == 4 and saved["config"]["memory_scale"] == {"0": 1.0, "1": 1.0}
    assert results["own_choice"]["acc,none"] == pytest.approx(expected[0])
    assert results["own_rolling"]["bits_per_byte,none"] == pytest.approx(expected[1], rel=1e-5)
    assert "|own_choice" in capsys.readouterr().out


def test_the_harness_as_a_task(tasks, expected, model):
    folder, rows = tasks
    assert TASKS["lm_eval"] is LmEval
    task = LmEval(include=str(folder))
    accuracy = task(model, Shared(), "own_choice").metrics["acc"]
    assert accuracy.value == pytest.approx(expected[0]) and accuracy.count == len(rows) and accuracy.higher_is_better
    assert accuracy.stderr == pytest.approx(np.sqrt(expected[0] * (1 - expected[0]) / (len(rows) - 1)))
    group = task(model, Shared(limit=6), "own_group")
    assert set(group.metrics) == {"acc", "own_choice.acc"} and group.metrics["own_choice.acc"].count == 6
    json.dumps(group.details)


def test_results_under_short_names():
    results = {
        "results": {
            "some": {"alias": "some", "acc,none": 0.25, "acc_stderr,none": 0.1,
                     "em,strict": 1, "em_stderr,strict": "N/A"},
            "part": {"alias": " - part", "ppl,none": 3.5},
        },
        "n-samples": {"some": {"original": 9, "effective": 4}},
        "higher_is_better": {"some": {"acc": True}, "part": {"ppl": False}},
        "versions": {"some": 1},
    }  # fmt: skip
    metrics = result_of("some", results).metrics
    assert list(metrics) == ["acc", "em[strict]", "part.ppl"]
    assert (metrics["acc"].value, metrics["acc"].stderr, metrics["acc"].count) == (0.25, 0.1, 4)
    assert metrics["em[strict]"].stderr is None and not metrics["part.ppl"].higher_is_better


def test_model_arguments_as_one_string(run_dir):
    lm = EngramLM.create_from_arg_string(f"run_dir={run_dir},max_length=12,memory_scale=0.5,batch_tokens=99,seed=3")
    assert (lm.max_length, lm.model.batch_tokens, lm.seed) == (12, 99, 3)
    assert lm.get_model_info()["memory_scale"] == {"0": 0.5, "1": 0.5}


# --- mistakes ---


def test_mistakes_are_one_line(tasks, tmp_path, run_dir, monkeypatch, capsys):
    folder, _ = tasks
    for model_args, status, message in (
        ("max_length=9", 2, "run_dir is missing"),
        (f"run_dir={run_dir},max_len=9", 2, "max_len is unknown. The arguments are run_dir, max_length"),
        (f"run_dir={run_dir},max_length=long", 2, "max_length='long' is not a whole number"),
        (f"run_dir={tmp_path}", 1, "is not a run"),
    ):
        arguments = ["--model", "engram_jax", "--model_args", model_args, "--tasks", "own_choice"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--include_path", str(folder)])
        assert command.main() == status
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_tasks_that_cannot_be_had(tasks, model, tmp_path):
    folder, _ = tasks
    with pytest.raises(ConfigError, match="lm_eval needs a task of the harness"):
        LmEval()(model, Shared())
    with pytest.raises(ConfigError, match="no task 'own_choise'; the nearest is 'own_choice'"):
        LmEval(include=str(folder))(model, Shared(), "own_choise")
    with pytest.raises(ConfigError, match=r"lm_eval\.include='nowhere' is not a folder"):
        LmEval(include="nowhere")(model, Shared(), "own_choice")
    data = {"data_files": {"test": str(folder / "absent.jsonl")}}
    broken = {"task": "own_broken", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test",
              "doc_to_text": "", "doc_to_target": "", "output_type": "loglikelihood"}  # fmt: skip
    (tmp_path / "broken.yaml").write_text(json.dumps(broken))
    with pytest.raises(RunError, match=r"'own_broken' cannot be loaded: FileNotFoundError: .*absent"):
        LmEval(include=str(tmp_path))(model, Shared(), "own_broken")


def test_without_the_harness_it_is_named(model, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        LmEval()(model, Shared(), "own_choice")
    assert str(refused.value) == missing_extra("lm_eval", "eval")
    assert command.main() == 2 and missing_extra("lm_eval", "eval") in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_has_its_own_tasks(model):
    with pytest.raises(ConfigError, match=r"no task 'hellaswg'; the nearest is 'hellaswag'"):
        LmEval()(model, Shared(), "hellaswg")
