"""The plan: what it prints can be pasted and trains what it says, estimates are labelled, mistakes are told."""

import json
import re
import shlex

import pytest

from engram_jax.aot.chips import topology
from engram_jax.aot.slices import laid_out
from engram_jax.commands import run_options
from engram_jax.config import ConfigError, replace, to_dict
from engram_jax.counts import flops_per_token, leaves, parameters
from engram_jax.runs import settings
from experiments.plan import main, plan
from experiments.pods import estimates
from experiments.pods.launch import commands, gcloud_type, overrides
from experiments.runs.registry import build


@pytest.fixture(scope="module")
def said():
    """Runs the command; returns its status, and what it says."""

    def run(capsys, *words, **settings):
        status = main(list(words), **settings)
        return status, *capsys.readouterr()

    return run


def replayed(line):
    """The run that a printed `python -m experiments.run` line trains."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "experiments.run"]
    rest, where = run_options.take_slice(words[4:])
    return run_options.parse(where(build(words[3])), rest, "command", "about").config


def with_text(run):
    return replace(run, data__corpus="$CORPUS", data__tokenizer="$TOKENIZER")


@pytest.mark.parametrize(
    ("budget", "slice_name", "ratios"),
    [(2e20, "v5p:4x4x4", {}), (2e14, "v5p-32", {}), (3e19, "v5e-128", {"rho": 0.6, "tokens_per_parameter": 50.0})],
)
def test_the_printed_commands_train_the_planned_runs(capsys, said, budget, slice_name, ratios):
    options = [word for name, value in ratios.items() for word in (f"--{name}", str(value))]
    status, out, _ = said(capsys, "--budget", f"{budget:g}", "--topology", slice_name, *options)
    assert status == 0
    from experiments.runs.scaling import Ratios

    made = plan(budget, topology(slice_name), Ratios(**ratios))
    lines = [line for line in out.splitlines() if line.startswith("python -m experiments.run ")]
    assert len(lines) == 3
    for line, planned in zip(lines, made.values(), strict=True):
        assert replayed(line) == with_text(planned.run)


def test_commands_for_a_slice_of_ones_own():
    where = topology("v5p-64")
    run = laid_out(build("engram_2e20"), where)
    lines = commands(run, where, corpus="/a b/*", tokenizer="/t.json", run_dir="gs://bucket/runs")
    assert lines[1:3] == [
        "python -m tpu create engram-2e20 --type v5p-128 --queued --run-dir gs://bucket/runs/engram_2e20",
        "python -m tpu wait engram-2e20",
    ]
    from tpu.__main__ import parser

    for line in lines[1:]:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "tpu"]
        ours = words[3 : words.index("--")] if "--" in words else words[3:]
        assert parser().parse_args(ours).name == "engram-2e20"
    assert lines[3].endswith("-- --slice v5p:4x4x4 --data.corpus '/a b/*' --data.tokenizer /t.json")


@pytest.mark.parametrize(
    ("slice_name", "kind"), [("v5e-8", "v5e-8"), ("v4-64", "v4-128"), ("v5p:4x4x12", "v5p-384"), ("7x-64", "")]
)
def test_the_type_that_gcloud_rents_out(slice_name, kind):
    assert gcloud_type(topology(slice_name)) == kind


def test_overrides_are_the_differences():
    base = build("engram_tiny")
    run = replace(base, name="other", train__steps=7, model__engram__engram_layer_ids=(1, 3), data__corpus="a b")
    assert overrides(run, base) == [
        *("--model.engram.engram_layer_ids", "1", "3", "--data.corpus", "'a b'", "--train.steps", "7")
    ]


def test_the_page_tells_estimates_from_counts(capsys, said):
    status, out, _ = said(capsys, "--budget", "2e20", "--topology", "v5p-64")
    assert status == 0
    for words in ("Nothing was measured", "assumes 38% of the peak", "--compile asks", "fits", "568 M", "rho 77"):
        assert words in out


def test_json_is_the_plan(capsys, said):
    status, out, _ = said(capsys, "--budget", "2e18", "--topology", "v5e-16", "--kinds", "moe", "engram", "--json")
    known = json.loads(out)
    assert status == 0 and list(known["runs"]) == ["moe", "engram"] and known["topology"]["chips"] == 16
    engram = known["runs"]["engram"]
    model = build("engram_2e18").model
    counts = parameters(model)
    assert engram["active"] == counts.active and engram["memory"] == counts.memory
    assert engram["tokens"] == engram["steps"] * engram["batch_size"] * engram["seq_len"]
    assert engram["flops"] == pytest.approx(engram["tokens"] * flops_per_token(model, engram["seq_len"]))
    assert engram["six_n_d"] == pytest.approx(2e18, rel=0.01)
    hours = engram["flops"] / 197e12 / 3600
    assert engram["estimate"]["chip_hours_at_peak"] == pytest.approx(hours)
    assert engram["estimate"]["chip_hours"] == pytest.approx(hours / 0.2)


def test_counted_memory_is_what_is_stored():
    """By another sum: 8 bytes a weight under Muon and 12 under AdamW, all cut over the mesh; a gradient of 4."""
    where = topology("v5p-64")
    run = laid_out(build("engram_27b"), where)
    cut = run.train.mesh_fsdp * run.train.mesh_expert
    groups = estimates.memory(run, where)
    sizes = {kind: 0 for kind in ("adam", "all")}
    for leaf in leaves(run.model):
        sizes["all"] += leaf.size
        if leaf.group in ("embedding", "head"):
            sizes["adam"] += leaf.size
    stored = (8 * sizes["all"] + 4 * sizes["adam"]) / cut
    assert groups["weights and optimizer"] == pytest.approx(stored, rel=0.01)
    assert groups["gradients"] == 4 * sizes["all"] / cut
    # 5.792 B numbers of memory: a row and two moments in float32, and a count to a row of 80
    assert groups["tables"] == pytest.approx(5.792e9 * (12 + 0.1) / 64, rel=0.01)
    tiered = replace(run, memory__placement="tiered", memory__hot_rows=0.25)
    assert estimates.memory(tiered, where)["tables"] == groups["tables"] / 4
    assert "tables" not in estimates.memory(replace(run, memory__placement="host"), where)


def test_what_is_too_large_is_said(capsys, said):
    status, out, _ = said(capsys, "--budget", "1e23", "--topology", "v5e-16", "--kinds", "moe")
    assert status == 3 and "too large" in out


def test_a_small_step_is_not_estimated_to_take_no_time():
    where = topology("v5p-4")
    needs = plan(2e14, where)["moe"].needs
    assert needs.seconds == 5e-3 > needs.seconds_at_peak / needs.mfu
    assert needs.chip_hours == pytest.approx(5e-3 * build("moe_2e14").train.steps * 4 / 3600)


def fake_compiler(config, where, programs, keep_hlo, detail, quick):
    """What experiments/compile.py is told of a step, of this size and these times."""
    assert programs == ("train",) and config.train.mesh_fsdp > 1
    estimates = {name: {"seconds": s, "mfu": 0.5, "chip_hours": 100 * s} for name, s in TIMES.items()}
    memory = {"needed": 42e9, "fits": config.model.moe.n_routed_experts < 100}
    return {"train": {"memory": memory, "times": {"estimates": estimates}, "mesh": {}}}


TIMES = {"overlapped": 1.25, "in turn": 2.5}


@pytest.mark.parametrize(("kind", "status"), [("engram", 0), ("moe", 3)])
def test_the_compilers_numbers_are_shown_as_such(capsys, said, monkeypatch, kind, status):
    monkeypatch.setattr("engram_jax.aot.remedies.advice", lambda *_: [])
    words = ("--budget", "2e20", "--topology", "v5p-64", "--compile", "--kinds", kind)
    got, out, err = said(capsys, *words, compile_programs=fake_compiler)
    assert got == status and "Compiling" in err and "--compile asks" not in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "42 GB" in rows["memory, compiled"] and "1.25 to 2.5 s" in rows["step, compiled"]
    assert "125 to 250" in rows["chip-hours, compiled"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "2e20"], "--topology is missing"),
        (["--topology", "v5p-64"], "--budget 0 must be positive"),
        (["--budget", "1e30", "--topology", "v5p-64"], "outside of 1e+14 to 1e+23"),
        (["--budget", "1e3", "--topology", "v5p-64"], "outside of 1e+14 to 1e+23"),
        (["--budget", "2e20", "--topology", "v9-3"], "Use a chip (v4, v5e, v5p, v6e, 7x)"),
        (["--budget", "2e20", "--topology", "v5p-63"], "v5p-64 = 4x4x4"),
        (["--budget", "2e14", "--topology", "v5p-512"], "512 devices: at 2e+14 FLOPs a step has about 54 sequences"),
        (
            ["--budget", "2e20", "--topology", "v5p-64", "--kinds", "moo"],
            "--kinds moo is unknown. The kinds are dense",
        ),
        (["--budget", "2e20", "--topology", "v5p-64", "--rho", "2"], "rho=2.0 must lie"),
        (["--budget", "2e20", "--topology", "v5p-64", "--kinds"], "--kinds is empty. Give some of dense"),
        (["--budget", "2e20", "--topology", "v5p-64", "--tokens_per_parameter", "inf"], "positive and finite"),
        (["--bugdet", "2e20"], "the nearest is '--budget'"),
    ],
)
def test_a_mistake_is_one_line(capsys, said, words, message):
    status, out, err = said(capsys, *words)
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_help_says_what_there_is(capsys, said):
    status, out, _ = said(capsys, "--help")
    assert status == 0 and re.search(r"--budget C .*FLOPs", out) and "--compile" in out and "engram_2e20" in out


@pytest.mark.parametrize("name", ["engram_27b", "moe_2e20"])
def test_a_run_may_go_on_on_any_slice(name, tmp_path):
    def on(chips):
        return laid_out(build(name), topology(chips))

    (tmp_path / "config.json").write_text(json.dumps(to_dict(on("v5p-64"))))
    for chips in ("v5p-128", "v6e-256"):
        settings.check(tmp_path, on(chips))
    with pytest.raises(ConfigError, match=r"other settings \(train\.steps"):
        settings.check(tmp_path, replace(on("v5p-128"), train__steps=1_000))
