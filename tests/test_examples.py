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
