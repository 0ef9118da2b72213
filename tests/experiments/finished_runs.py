"""What a finished run leaves in its folder, without training it; and what a study finds in such runs."""

import json

from engram_jax.config import replace, to_dict
from experiments.studies.engine.findings import findings
from experiments.studies.engine.results import results


def finish(config, folder, loss=None, corpus="abc"):
    """What training leaves in a run's folder, without training."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = replace(config, model__engram__engram_compressed_vocab_size=77)
    (folder / "config.json").write_text(json.dumps(to_dict(resolved)))
    result = {"loss": loss or 4.0, "bits_per_byte": 1.5, "corpus_sha256": corpus, "buckets": {}}
    (folder / "result.json").write_text(json.dumps(result))
    return 0


def findings_of(study, points, seeds, study_dir):
    """The findings of the finished runs of a folder."""
    return findings(study, points, seeds, results(points, seeds, study_dir))


def the(found, kind, **values):
    """The only finding of a kind with these values."""
    [one] = [x for x in found if isinstance(x, kind) and all(getattr(x, name) == v for name, v in values.items())]
    return one
