"""The command that continues prompts."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.commands.sample import Options, answer_file, main, show
from engram_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    to_dict,
)
from engram_jax.data.tokenizer import train_tokenizer
from engram_jax.errors import RunError
from engram_jax.inference.sampling import Sampling
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.parts import assemble

VOCAB_SIZE = 300
CONFIG = RunConfig(
    name="small",
    model=ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        attention=AttentionConfig(
            num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=16
        ),
        moe=MoEConfig(
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=16,
            first_k_dense_replace=0,
        ),
        engram=EngramConfig(engram_layer_ids=(0,), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101),
        hc_mult=2,
        hc_sinkhorn_iters=2,
        dtype="float32",
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
)
WORDS = ["def", "self", "return", "value", "import", "for", "none", "éß", "漢", "\n", "(", ")", "=", ".", ":"]


def make_texts(count: int) -> list[str]:
    rng = np.random.default_rng(3)
    return [f"# {i}\n" + " ".join(rng.choice(WORDS, 120)) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_texts(40), VOCAB_SIZE)


@pytest.fixture(scope="module")
def model(tokenizer):
    """(parts, state) on one device, with weights and rows large enough for every token to matter."""
    parts = assemble(CONFIG, tokenizer.backend, jax.devices()[:1])
    rng = np.random.default_rng(11)

    def perturbed(x, scale):
        return jax.device_put(np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
    tables = {name: dataclasses.replace(t, rows=perturbed(t.rows, 1.0)) for name, t in state.memory.tables.items()}
    params = jax.tree.map(lambda p: perturbed(p, 0.1), state.params)
    return parts, dataclasses.replace(state, params=params, memory=dataclasses.replace(state.memory, tables=tables))


# --- the command ---


@pytest.fixture(scope="module")
def trained(model, tokenizer, tmp_path_factory):
    """The folder of a run with one checkpoint."""
    parts, state = model
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.json").write_text(json.dumps(to_dict(parts.config)))
    tokenizer.save(folder / "tokenizer.json")
    with jax.set_mesh(parts.mesh), Checkpoints(folder / "checkpoints", CheckpointConfig(), parts) as checkpoints:
        checkpoints.save(
            2, state, {"hash_constants": parts.store.constants.to_dict(), "vocab_sha256": tokenizer.vocab_sha256}
        )
    return folder


def test_a_trained_run_continues_a_prompt(capsys, trained):
    def sampled(*options):
        assert main([str(trained), "def é", *options]) == 0
        return capsys.readouterr().out

    text = sampled("--max_tokens", "12", "--top_k", "0", "--temperature", "2")
    assert text.startswith("def é") and text.endswith("\n") and len(text) > len("def é\n")
    assert sampled("--max_tokens", "12", "--top_k", "0", "--temperature", "2") == text
    assert sampled("--max_tokens", "12", "--top_k", "0", "--temperature", "2", "--seed", "1") != text


def test_a_file_of_prompts_is_answered_whatever_one_of_them_is(capsys, trained, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts = ["def é", "x " * 400, "", "import"]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ["--prompts", str(file), "--max_tokens", "6", "--top_k", "0", "--temperature", "2", "--batch_size", "2"]
    assert main([str(trained), *options, "--out", str(out)]) == 1
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert "max_len=256 leaves no room" in answers[1]["error"] and "text" not in answers[1]
    assert all(answer["text"] and 1 <= answer["tokens"] <= 6 for answer in (answers[0], answers[2], answers[3]))
    assert "[3 of 4 prompts, " in capsys.readouterr().err
    file.write_text("def é\n\nimport\n")
    assert main([str(trained), *options]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["def é", "import"]


class Drawing:
    """An engine that draws these texts one after the other; `end` is raised within the next."""

    max_len = 1000

    def __init__(self, tokenizer, *texts: str, end: BaseException | None = None):
        self.ids, self.end = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts], end

    def error(self, ids):
        return None

    def stream(self, prompts, sampling, ends):
        for index, ids in enumerate(self.ids):
            for token in ids:
                if not ends(index, token):
                    yield index, token
        if self.end is not None:
            yield len(self.ids), self.ids[0][0]
            raise self.end


def answered(engine, tokenizer, out, prompts=("a", "b"), stop=()):
    options = Options(Path("run"), prompts=Path("prompts"), out=out, stop=stop)
    return answer_file(engine, tokenizer, prompts, Sampling(100, temperature=0), options)


def test_an_answer_counts_its_tokens_where_text_was_held_back(capsys, tokenizer):
    engine, stop = Drawing(tokenizer, "one two"), ("two more",)
    assert answered(engine, tokenizer, None, ["a"], stop) == 0
    count = len(tokenizer.encode("one two"))
    assert json.loads(capsys.readouterr().out) == {"prompt": "a", "text": "one two", "tokens": count}
    assert show(engine, tokenizer, [0], Sampling(100, temperature=0), stop) == "one two"
    assert f"[{count} tokens, " in capsys.readouterr().err


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RuntimeError("a device is gone")])
def test_finished_answers_outlive_the_program(capsys, tokenizer, tmp_path, end):
    out, first = tmp_path / "answers.jsonl", {"prompt": "a", "text": "one", "tokens": len(tokenizer.encode("one"))}
    for path in (out, None):
        engine = Drawing(tokenizer, "one", end=end)
        if isinstance(end, KeyboardInterrupt):
            assert answered(engine, tokenizer, path) == 130
        else:
            with pytest.raises(RuntimeError, match="a device is gone"):
                answered(engine, tokenizer, path)
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl.partial"]
    assert json.loads((tmp_path / "answers.jsonl.partial").read_text()) == first
    streams = capsys.readouterr()
    assert f"[ended early: 1 finished answers are in {out}.partial]" in streams.err and json.loads(streams.out) == first
    assert answered(Drawing(tokenizer, "one", "two"), tokenizer, out) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"] and len(out.read_text().splitlines()) == 2


def test_answers_that_cannot_be_put_in_their_place_are_kept(monkeypatch, tokenizer, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match=r"No space left on device. The answers are in .*answers.jsonl.partial"):
        answered(Drawing(tokenizer, "one", "two"), tokenizer, tmp_path / "answers.jsonl")
    assert len((tmp_path / "answers.jsonl.partial").read_text().splitlines()) == 2


@pytest.mark.parametrize(("out", "message"), [("nowhere/a.jsonl", "No such file"), (".", "Is a directory")])
def test_where_answers_go_is_tried_before_a_model_is_loaded(capsys, monkeypatch, tmp_path, out, message):
    monkeypatch.setattr("engram_jax.runs.load.load_run", None)
    (tmp_path / "prompts").write_text("a\n")
    assert main([str(tmp_path), "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / out)]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: out=") and streams.err.count("\n") == 1
    assert message in streams.err and [file.name for file in tmp_path.iterdir()] == ["prompts"]


def test_a_conversation_goes_on_until_the_end_of_input(capsys, monkeypatch, trained):
    lines = iter(["def é", " more", "x " * 400, "/new", "import"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert main([str(trained), "--interactive", "--max_tokens", "5", "--top_k", "0", "--temperature", "2"]) == 0
    streams = capsys.readouterr()
    assert len(streams.out.splitlines()) >= 4 and streams.err.count("tokens/s]") == 3
    assert "leaves no room for more. /new starts again." in streams.err


@pytest.mark.slow
def test_a_context_longer_than_trained_is_warned_about(capsys, trained):
    assert main([str(trained), "def", "--max_len", "300", "--max_tokens", "2"]) == 0
    assert "warning: max_len=300 tokens; the model was trained at 256." in capsys.readouterr().err
    assert main([str(trained), "é" * 300, "--max_tokens", "2", "--top_k", "0", "--temperature", "2"]) == 0
    error = capsys.readouterr().err
    assert "tokens; the model was trained at 256." in error and "[ended at max_len=" in error


def test_another_tokenizer_is_refused(capsys, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["q"], vocab["z"] = vocab["z"], vocab["q"]
    path.write_text(json.dumps(values))
    assert main([str(tmp_path / "run"), "def"]) == 1
    assert "is not the tokenizer this run was trained with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["{run}", "x", "--temperature", "-1"], 2, "temperature=-1"),
        (["{run}", "--interactive", "--prompts", "{run}/config.json"], 2, "choose one"),
        (["{run}", "--prompts", "{run}/nowhere"], 2, "cannot be read"),
        (["{run}", "--prompts", "{run}/config.json"], 2, "line 1: not JSON"),
        (["{run}", "x", "--mesh_tensor", "8"], 2, "vocab_size=300 is not a multiple"),
        (["{run}/nowhere", "x"], 1, "is not a run"),
    ],
)
def test_mistakes_are_one_line(capsys, trained, options, status, message):
    assert main([option.format(run=trained) for option in options]) == status
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    assert message in streams.err


def test_help_shows_the_options_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--max_tokens" in out and "(default: 200)" in out and "--top_k" in out
