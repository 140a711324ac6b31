"""What decodes SmolLM2, each side in a process of its own that waits to be told its turn:
``python -m benchmarks.decoding_sides SIDE MODEL FOLDER`` reads a command a line as JSON and answers each with a line.

MODEL is the transformers directory; FOLDER an engine directory, or where a peer's own form of the model goes. Nothing but
the standard library is imported before a side needs it, so that a side may run in another environment."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OPTIMUM = ROOT / "build" / "optimum-venv" / "bin" / "python"
WARM = 3  # steps of a turn that are not timed: they bring the weights back into the caches


# The end that tells


class SideError(RuntimeError):
    """A side that cannot run here, and why in one line."""


class Worker:
    """A side in a process of its own. It does nothing between its turns."""

    def __init__(self, side: str, model: Path, folder: Path, threads: int, python: Path | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        command = [str(python or sys.executable), "-W", "ignore", "-m", "benchmarks.decoding_sides"]
        self._process = subprocess.Popen(
            [*command, side, str(model), str(folder), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT,
        )  # fmt: skip
        self.facts: dict[str, Any] = self._answer()

    def ask(self, do: str, **options: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **options}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SideError(
                ([line for line in self._log.read().splitlines() if line.strip()] or ["it ended"])[-1][:300]
            )
        return json.loads(line)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


# Sides


class Text(ABC):
    """A prompt that was read, and goes on token by token. ``token`` is the most likely next one."""

    token: int

    @abstractmethod
    def feed(self, token: int) -> int:
        """Read one more token; the most likely one after it."""

    @abstractmethod
    def rewind(self) -> None:
        """Back to the prompt's end."""


class Side(ABC):
    """One way to decode. ``facts``: what a table should say about it."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._texts: dict[tuple[int, int], tuple[Text, int]] = {}

    @abstractmethod
    def begin(self, tokens: list[int], room: int) -> Text:
        """Read a prompt into a fresh cache, which must hold ``room`` tokens."""

    def prefill(self, prompt: list[int], room: int, runs: int) -> list[float]:
        """Milliseconds from the tokens to the next one, after a run that is not timed."""
        self.begin(prompt, room)
        return [milliseconds(lambda: self.begin(prompt, room)) for _ in range(runs)]

    def decode(self, prompt: list[int], room: int, steps: int) -> list[float]:
        """Milliseconds of each step behind the prompt, which was read once."""
        text, token = self._text(prompt, room)
        times = []
        for _ in range(WARM + steps):
            start = time.perf_counter()
            token = text.feed(token)
            times.append(1000 * (time.perf_counter() - start))
        return times[WARM:]

    def tokens(self, prompt: list[int], room: int, count: int) -> list[int]:
        """The greedy tokens behind the prompt."""
        text, token = self._text(prompt, room)
        found = [token]
        while len(found) < count:
            found.append(text.feed(found[-1]))
        return found

    def _text(self, prompt: list[int], room: int) -> tuple[Text, int]:
        key = len(prompt), room
        if key in self._texts:
            self._texts[key][0].rewind()
        else:
            text = self.begin(prompt, room)
            self._texts[key] = text, text.token
        return self._texts[key]


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


class Graphopt(Side):
    """An engine directory, by the Decoder and Sampler that Generator has."""

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        import graphopt
        from graphopt.runtime.sampling import Sampler, Sampling

        super().__init__()
        use_torch(threads)
        self.engine = graphopt.load(folder, check=False)
        self.sampler = Sampler(Sampling())

    def begin(self, tokens: list[int], room: int) -> Text:
        return EngineText(self, tokens)

    def memory(self, prompt: list[int], steps: int) -> dict[str, list[int]]:
        """Bytes of the cache and of the process after the prompt, and after so many steps more."""
        from benchmarks.building import resident, settle

        text = EngineText(self, prompt)
        token, found = text.feed(text.token), []
        for count in (0, steps):
            for _ in range(count):
                token = text.feed(token)
            settle()
            found.append((text.decoder.cache.nbytes, resident()["VmRSS"]))
        return {"cache": [cache for cache, _ in found], "resident": [process for _, process in found]}


class EngineText(Text):
    def __init__(self, side: Graphopt, tokens: list[int]) -> None:
        from graphopt.runtime.decoder import Decoder

        self.decoder, self.sampler, self.read = Decoder(side.engine, 1), side.sampler, tokens
        self.token = self._choose(tokens)
        decoder = self.decoder
        self._kept = {**decoder.cache.tensors}, decoder.lengths, decoder._mask

    def _choose(self, tokens: list[int]) -> int:
        return self.sampler.choose(self.decoder.feed([tokens]), [self.read])[0]

    def feed(self, token: int) -> int:
        return self._choose([token])

    def rewind(self) -> None:
        """A growing cache's tensors are never written again; a static one's end counts alone."""
        tensors, self.decoder.lengths, self.decoder._mask = self._kept
        self.decoder.cache.tensors = {**tensors}


class Eager(Side):
    """transformers' own model in PyTorch, with a DynamicCache."""

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        import torch
        import transformers

        super().__init__()
        use_torch(threads)
        self.torch, self.transformers = torch, transformers
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.forward: Callable[..., Any] = self.model.forward

    def begin(self, tokens: list[int], room: int) -> Text:
        return DynamicText(self, tokens, self.transformers.DynamicCache(config=self.model.config))

    def next(self, tokens: Sequence[int], cache: Any) -> int:
        with self.torch.inference_mode():
            ids = self.torch.tensor([list(tokens)])
            results = self.forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(results.logits[0, -1].argmax())


class DynamicText(Text):
    def __init__(self, side: Eager, tokens: list[int], cache: Any) -> None:
        self.side, self.cache, self.length = side, cache, len(tokens)
        self.token = self.side.next(tokens, cache)
        self._kept = [(layer.keys, layer.values) for layer in cache.layers]

    def feed(self, token: int) -> int:
        return self.side.next([token], self.cache)

    def rewind(self) -> None:
        for layer, (keys, values) in zip(self.cache.layers, self._kept, strict=True):
            layer.keys, layer.values = keys, values


class CompiledTorch(Eager):
    """The same by torch.compile for each shape, with a StaticCache."""

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        super().__init__(model, folder, threads)
        self.forward = self.torch.compile(self.model.forward, dynamic=False, fullgraph=True)

    def begin(self, tokens: list[int], room: int) -> Text:
        config = self.model.config
        with self.torch.inference_mode():
            cache = self.transformers.StaticCache(config=config, max_cache_len=room)
            cpu = self.torch.device("cpu")
            cache.early_initialization(1, config.num_key_value_heads, config.head_dim, self.torch.float32, cpu)
        return StaticText(self, tokens, cache)


class StaticText(DynamicText):
    def rewind(self) -> None:
        with self.side.torch.inference_mode():
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.length)


class Genai(Side):
    """onnxruntime-genai with its own model builder; logits of the last token only, a cache that is written in place."""

    precision = "fp32"

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        super().__init__()
        try:
            self.genai: Any = importlib.import_module("onnxruntime_genai")
        except ImportError as error:
            raise SideError(f"onnxruntime-genai is not installed ({error})") from error
        build_genai(model, folder, threads, self.precision)
        self.model = self.genai.Model(str(folder))
        self.facts = {"version": self.genai.__version__}

    def begin(self, tokens: list[int], room: int) -> Text:
        return GenaiText(self, tokens, room)


class GenaiInt4(Genai):
    """The same with weights of 4 bits."""

    precision = "int4"


class GenaiText(Text):
    """A step is generate_next_token: it reads the token that the one before chose."""

    def __init__(self, side: Genai, tokens: list[int], room: int) -> None:
        options = side.genai.GeneratorParams(side.model)
        options.set_search_options(max_length=room, do_sample=False)
        self.generator, self.length = side.genai.Generator(side.model, options), len(tokens)
        self.generator.append_tokens(tokens)
        self.rewound = False
        self.token = self._choose()

    def _choose(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def feed(self, token: int) -> int:
        if self.rewound:
            self.generator.append_tokens([token])
            self.rewound = False
        return self._choose()

    def rewind(self) -> None:
        self.generator.rewind_to(self.length)
        self.rewound = True


def build_genai(model: Path, folder: Path, threads: int, precision: str, *, all_logits: bool = False) -> None:
    """The model by their builder, with our threads; logits of the last token unless ``all_logits``; only the vocabulary's
    last token, never likely, ends a text."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(model), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
    command += [] if all_logits else ["--extra_options", "prune_lm_head=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SideError(f"its model builder failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1
    file.write_text(json.dumps(config))


class Optimum(Eager):
    """optimum's export and ORTModelForCausalLM, in an environment with a transformers that it knows."""

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        Side.__init__(self)
        use_torch(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        older_config(model, folder)
        self.torch = torch
        self.model = ORTModelForCausalLM.from_pretrained(folder, export=True, session_options=options)
        self.forward = self.model.forward
        self.facts = {"version": f"onnxruntime {onnxruntime.__version__}"}

    def begin(self, tokens: list[int], room: int) -> Text:
        return OptimumText(self, tokens)

    def logits(self, tokens: Sequence[int], past: Any, length: int) -> tuple[int, Any]:
        """The next token, and the cache. The mask and the positions are of the whole text and of the new tokens."""
        with self.torch.inference_mode():
            ids, mask = self.torch.tensor([list(tokens)]), self.torch.ones(1, length + len(tokens), dtype=int)
            places = self.torch.arange(length, length + len(tokens))[None]
            results = self.forward(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=past)
            return int(results.logits[0, -1].argmax()), results.past_key_values


class OptimumText(Text):
    def __init__(self, side: Optimum, tokens: list[int]) -> None:
        self.side, self.length = side, len(tokens)
        self.token, self.past = side.logits(tokens, None, 0)
        self._kept = self.past, self.length

    def feed(self, token: int) -> int:
        found, self.past = self.side.logits([token], self.past, self.length)
        self.length += 1
        return found

    def rewind(self) -> None:
        self.past, self.length = self._kept


def older_config(model: Path, folder: Path) -> None:
    """A copy of the directory with rotary parameters where transformers 4 looks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": "float32"}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


# The machine's limits


class Limits(Side):
    """How fast memory is read and matrices are multiplied, for as many threads."""

    READ = 150_000_000  # numbers in fp32: 600 MB
    SIDE = 2048

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        import torch

        super().__init__()
        use_torch(threads)
        self.numbers = torch.ones(self.READ)
        self.product = large_product(self.SIDE, threads)
        self.facts = {"bytes": 4 * self.READ, "operations": 2 * self.SIDE**3}

    def begin(self, tokens: list[int], room: int) -> Text:
        raise NotImplementedError

    def read(self, runs: int) -> list[float]:
        self.numbers.sum()
        return [milliseconds(self.numbers.sum) for _ in range(runs)]

    def multiply(self, runs: int) -> list[float]:
        self.product()
        return [milliseconds(self.product) for _ in range(runs)]


def large_product(side: int, threads: int) -> Callable[[], Any]:
    """A square MatMul by a constant in onnxruntime."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    weight, given = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [side, side])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [side, side])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": given})


def use_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


# The end that is told

SIDES: dict[str, Callable[[Path, Path, int], Side]] = {
    "graphopt": Graphopt,
    "genai": Genai,
    "genai_int4": GenaiInt4,
    "eager": Eager,
    "compiled": CompiledTorch,
    "optimum": Optimum,
    "limits": Limits,
}


def _side(name: str) -> Callable[[Path, Path, int], Side]:
    if name in SIDES:
        return SIDES[name]
    from benchmarks import gguf_sides

    return {"llama_cpp": gguf_sides.LlamaCpp, "openvino_genai": gguf_sides.OpenVinoGenai}[name]


def main(name: str, model: str, folder: str, threads: str) -> None:
    """Answer commands until there are no more. What libraries print goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = _side(name)(Path(model), Path(folder), int(threads))
    print(json.dumps(side.facts), file=answers, flush=True)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(side, command.pop("do"))(**command)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
