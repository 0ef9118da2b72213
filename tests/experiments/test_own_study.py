"""Studies by registration: the one that docs/extending.md shows, and those that the clone has."""

import pytest
from examples import module_of
from finished_runs import findings_of, finish, the

from experiments import study as command
from experiments.studies import STUDIES
from experiments.studies.engine.differences import Differences


@pytest.fixture
def kernel(tmp_path_factory):
    module = module_of("extending.md", "KERNEL = ", tmp_path_factory.mktemp("package"))
    yield STUDIES.register("kernel", module.KERNEL)
    STUDIES.unregister("kernel")


def test_the_example_is_trained_and_reported(capsys, tmp_path, monkeypatch, kernel):
    trained = []

    def train(config, folder):
        trained.append(folder.name)
        size, seed = config.model.engram.engram_kernel_size, config.train.seed
        return finish(config, folder, 4 + {2: 0.01, 4: 0.0, 8: -0.02}[size] + 0.1 * seed + 0.001 * seed * size)

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "check_corpus", lambda *_: None)
    assert command.main(["--list"]) == 0
    assert "kernel          How many tokens should the memory's short convolution" in capsys.readouterr().out
    assert command.main(["kernel", "--seeds", "3", "--out", str(tmp_path), "--train.steps", "30"]) == 0
    assert trained == [f"kernel{size}-seed{seed}" for seed in range(3) for size in (2, 4, 8)]
    report = (tmp_path / "kernel" / "tiny" / "report.md").read_text()
    assert report in capsys.readouterr().out and "A larger convolution has more weights" in report

    points = kernel.at(kernel.scales["tiny"]())
    assert [point.x for point in points] == [2, 4, 8]
    monkeypatch.setattr("experiments.studies.engine.results.check_finished", lambda *_: None)  # of 30 steps
    found = the(findings_of(kernel, points, 3, tmp_path / "kernel" / "tiny"), Differences)
    assert found.baseline == "kernel4" and found.found("more") == {"better": ["kernel8"], "worse": ["kernel2"]}


def test_a_study_is_registered_under_its_own_name():
    assert [study.name for study in STUDIES.values()] == list(STUDIES)
    assert command.main(["nosuch"]) == 2
