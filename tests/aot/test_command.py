"""The command: exit statuses, what it writes, and how remedies are ranked; the compiler is played by the test."""

import json

import pytest

from engram_jax.aot.chips import topology
from engram_jax.aot.remedies import remedies
from engram_jax.config import ConfigError, replace
from engram_jax.errors import FAILED, MISTAKEN, RunError
from experiments import compile as command
from experiments.pods import compile_report
from experiments.runs.registry import build

GB = 10**9


def played(needs, seconds=lambda config: 1.0, host=lambda config: 0):
    """A compiler for which `needs(config)` bytes and `seconds(config)` are what a step takes."""

    def compile_programs(config, where, programs, keep_hlo=None, detail=True, quick=False):
        needed, available = needs(config), where.chip.hbm_bytes
        estimates = {
            name: {"seconds": seconds(config), "mfu": 0.5, "chip_hours": 1.0}
            for name in ("analytic", "overlapped", "in turn", "compiler")
        }
        report = {
            "mesh": {"data": 1, "fsdp": where.devices},
            "memory": {
                "groups": {"params": needed // 2, "temporaries": needed - needed // 2},
                "needed": needed,
                "reported": needed + GB,
                "peak": needed,
                "available": available,
                "fits": needed <= available,
            },
            "host": {
                "tables": host(config),
                "needed": host(config),
                "available": where.chip.host_bytes,
                "fits": host(config) <= where.chip.host_bytes,
            },
            "flops": {"model": 1e12, "compiled": 1.4e12, "every_branch": 2e12},
            "bytes": {"hbm": 1e9, "host_link": 0},
            "collectives": [
                {
                    "kind": "all-gather",
                    "axes": ["fsdp"],
                    "group": 4,
                    "shape": "bf16[8,8]",
                    "times": 3.0,
                    "result_bytes": 512,
                    "sent": 1152.0,
                    "sent_between_slices": 0.0,
                    "scope": "jit(train_step)/gather",
                }
            ],
            "times": {"resources": {"compute": 0.1, "hbm": 0.2, "network": 0.3}, "estimates": estimates},
            "costliest": [{"scope": "jit(train_step)/ffn", "cycles_share": 0.25}],
            "warnings": [],
            "largest": [{"array": "f32[9] fusion", "bytes": 36, "scope": "x"}],
            "long_loops": [],
            "unknown_loops": 0,
            "silent_kernels": [],
        }
        return {program: report for program in programs}

    return compile_programs


@pytest.fixture
def compiler(monkeypatch):
    def use(*arguments, **settings):
        monkeypatch.setattr("engram_jax.aot.child.compile_apart", played(*arguments, **settings))

    return use


def test_what_fits_ends_with_0_and_is_written_twice(compiler, tmp_path, capsys):
    compiler(lambda config: 10 * GB)
    assert command.main(["moe_tiny", "--topology", "v5e-4", "--out", str(tmp_path)]) == command.FITS
    report = json.loads((tmp_path / "moe_tiny-v5e-4.json").read_text())
    assert report["fits"] and set(report["programs"]) == {"train", "eval"}
    page, text = capsys.readouterr().out, (tmp_path / "moe_tiny-v5e-4.md").read_text()
    for shown in (page, text):
        assert "train: HBM of one chip" in shown and "all-gather" in shown and "fits" in shown
    assert "| params |" in text


def test_what_does_not_fit_ends_with_3_and_says_what_to_change(compiler, tmp_path, capsys):
    compiler(lambda config: 30 * GB)
    given = [
        "moe_small",
        "--topology",
        "v5e-4",
        "--out",
        str(tmp_path),
        "--programs",
        "train",
        "--train.mesh_fsdp",
        "1",
    ]
    assert command.main(given) == command.TOO_LARGE
    page = capsys.readouterr().out
    assert "13.1 GB a chip more than there is" in page
    assert "--train.mesh_fsdp 4" in page and "--model.remat full" in page


def test_tables_too_large_for_the_hosts_do_not_fit_either(compiler, tmp_path, capsys):
    compiler(lambda config: GB, host=lambda config: 200 * GB)
    assert command.main(["engram_small", "--topology", "v5e-4", "--out", str(tmp_path)]) == command.TOO_LARGE
    assert "hosts' memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["moe_tinny", "--topology", "v5e-4"], "moe_tiny"),
        (["moe_tiny"], "--topology v5p-64"),
        (["moe_tiny", "--topology", "v5e-5"], "v5e-4 = 2x2"),
        (["moe_tiny", "--topology", "v5e-4", "--slices", "0"], "--slices"),
        (["moe_tiny", "--topology", "v5e-4", "--programs", "serve"], "train, eval, decode"),
        (["moe_tiny", "--topology", "v5e-4", "--train.stepz", "4"], "--train.steps"),
        (["--topology", "v5e-4"], "comes first"),
    ],
)
def test_a_mistake_ends_with_2_before_anything_compiles(arguments, said, compiler, capsys):
    compiler(lambda config: pytest.fail("compiled"))
    assert command.main(arguments) == MISTAKEN
    assert said in capsys.readouterr().err


def test_a_compiler_that_gives_up_ends_with_1(monkeypatch, capsys):
    def gives_up(*_):
        raise RunError("The compiler's process was ended by signal 6: Check failed")

    monkeypatch.setattr("engram_jax.aot.child.compile_apart", gives_up)
    assert command.main(["moe_tiny", "--topology", "v5e-4"]) == FAILED
    assert "signal 6" in capsys.readouterr().err


def test_overrides_reach_the_compiler(compiler, tmp_path):
    seen = []
    compiler(lambda config: seen.append(config) or GB)
    given = [
        "moe_tiny",
        "--model.remat",
        "full",
        "--topology",
        "v5e-4",
        "--train.mesh_fsdp",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert command.main(given) == 0
    assert (seen[0].model.remat, seen[0].train.mesh_fsdp) == ("full", 2)


def test_the_mesh_is_chosen_unless_an_axis_is_named(compiler, tmp_path):
    seen = []
    compiler(lambda config: seen.append(config.train) or GB)
    given = ["moe_small", "--topology", "v5e-16", "--out", str(tmp_path), "--programs", "train"]
    command.main(given)
    command.main([*given, "--train.mesh_fsdp=4"])
    assert [(t.mesh_data, t.mesh_fsdp * t.mesh_expert) for t in seen] == [(-1, 16), (-1, 4)]


# --- remedies ---


def test_remedies_are_ranked_by_time_among_those_that_fit():
    """Cutting the weights fits and is fast; recomputing fits and is slower; smaller parts alone do not fit."""

    def needs(config):
        return (30 - 16 * (config.train.mesh_fsdp > 1) - 14 * (config.model.remat == "full")) * GB

    def seconds(config):
        return 1.0 + 0.3 * (config.model.remat == "full") + 0.1 * config.train.grad_accum

    config = replace(build("moe_small"), model__remat="none")
    ranked = compile_report.suggest(config, topology("v5e-4"), ["train"], played(needs, seconds))
    fitting = [remedy for remedy, report in ranked if report and report["fits"]]
    assert fitting[0].changes == {"train__mesh_fsdp": 4, "train__mesh_data": -1}
    assert {"model__remat": "full"} in [remedy.changes for remedy in fitting]
    verdicts = [report["fits"] for _, report in ranked if report]
    assert verdicts == sorted(verdicts, reverse=True)
    times = [compile_report.step_seconds(report) for _, report in ranked if report and report["fits"]]
    assert times == sorted(times)
    assert "fits" in compile_report.ranking(ranked)


def test_a_remedy_that_is_refused_comes_last():
    def refuses(config, where, programs, *_):
        if config.train.mesh_fsdp > 1:
            raise ConfigError("no")
        return played(lambda config: 90 * GB)(config, where, programs)

    ranked = compile_report.suggest(build("moe_small"), topology("v5e-4"), ["train"], refuses)
    assert ranked[-1][1] is None
    assert "None of them fits" in compile_report.ranking(ranked)


@pytest.mark.parametrize(("placement", "offered"), [("device", 1), ("tiered", 1), ("host", 0), ("numpy", 0)])
def test_tables_leave_the_chips_only_if_they_take_room_there(placement, offered):
    config = replace(build("engram_27b"), memory__placement=placement)
    changes = [remedy.changes for remedy in remedies(config, topology("v5p-64"))]
    assert changes.count({"memory__placement": "host"}) == offered


def test_remedies_leave_out_what_is_taken_and_never_change_the_model():
    config = replace(build("engram_27b"), train__mesh_fsdp=64, train__grad_accum=20, memory__placement="host")
    left = remedies(config, topology("v5p-64"))
    axes = {f"train__mesh_{axis}" for axis in ("tensor", "context", "fsdp", "data")}
    assert all(set(r.changes) <= {*axes, "train__grad_accum"} for r in left)
    for remedy in remedies(build("engram_27b"), topology("v5p-64")):
        changed = remedy.apply(build("engram_27b"))
        assert changed.model == replace(
            build("engram_27b").model, remat="full", loss_chunk_len=changed.model.loss_chunk_len
        )
        assert changed.data == build("engram_27b").data
