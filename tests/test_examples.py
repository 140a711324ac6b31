"""Examples and the README's Python run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["quickstart", "custom_pass", "generate"])
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fuse_attention" in done.stdout or "MultiplyByInverse" in done.stdout


def test_parity_example() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/test_parity.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "graphopt parity" in done.stdout
    assert re.search(r"test_engine_is_the_model\[3-21\]: last_hidden_state: max abs \S+, relative \S+", done.stdout)


@pytest.mark.parametrize("processes", ["0", "1"])
def test_what_was_compared_is_told_from_other_processes_too(processes: str, tmp_path: Path) -> None:
    """The failure as well, with what was compared before it."""
    (tmp_path / "test_it.py").write_text(
        "import torch\n"
        "def test_it(parity):\n"
        "    for off in (0.0, 1.0):\n"
        "        parity(lambda x: {'y': x}, lambda x: {'y': x + off}, {'x': torch.ones(2)})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", processes, "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("test_it: y: max abs 0, relative 0, cosine 1.0000000 (2 values, 0 left out)") == 1


def test_pipeline_example_is_valid() -> None:
    from graphopt.compiler import read_config
    from graphopt.pipeline import load_passes

    lasts = {
        "minilm": "remove_padding",
        "minilm_int8": "quantize",
        "minilm_mixed": "quantize",
        "smollm2": "fuse_activation",
    }
    for name, last in lasts.items():
        config = read_config(ROOT / "examples" / f"{name}.yaml")
        assert config.passes is not None
        assert [step.kind for step in load_passes(config.passes)][-1] == last


def test_readme_python(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_readme_names_every_pass_and_command() -> None:
    from graphopt.cli import app
    from graphopt.pipeline import known_passes

    text = (ROOT / "README.md").read_text()
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    missing = [
        name for name in (*known_passes(), *commands) if f"`{name}`" not in text and f"graphopt {name}" not in text
    ]
    assert missing == []
