"""Peers that read the GGUF file itself, in the 4 bits that it has: llama.cpp and OpenVINO GenAI. They are installed by hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.assets import smollm2
from benchmarks.decoding_sides import WARM, Side, SideError, Text, milliseconds


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SideError(f"{package} is not installed ({error})") from error


class LlamaCpp(Side):
    """llama.cpp through llama-cpp-python, built for this processor."""

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        super().__init__()
        module = _module("llama_cpp", "llama-cpp-python")
        own = {"n_threads": threads, "n_threads_batch": threads, "n_batch": 512, "verbose": False}
        self.model = module.Llama(str(smollm2()), n_ctx=2048, **own)
        self.facts = {"version": module.__version__}

    def begin(self, tokens: list[int], room: int) -> Text:
        return LlamaText(self.model, tokens)


class LlamaText(Text):
    def __init__(self, model: Any, tokens: list[int]) -> None:
        self.model, self.length = model, len(tokens)
        model.reset()
        self.token = self.feed(*tokens)

    def feed(self, *tokens: int) -> int:
        self.model.eval(list(tokens))
        return int(self.model.sample(temp=0.0))

    def rewind(self) -> None:
        self.model.n_tokens = self.length


def llama_logits(threads: int, length: int) -> Callable[[list[int]], Any]:
    """llama.cpp's logits ``[tokens, vocabulary]``, f32, of a text. SideError if it is not installed."""
    module = _module("llama_cpp", "llama-cpp-python")
    own = {"n_threads": threads, "n_threads_batch": threads, "n_batch": length, "verbose": False}
    model = module.Llama(str(smollm2()), n_ctx=length, logits_all=True, **own)

    def run(tokens: list[int]) -> Any:
        model.reset()
        model.eval(tokens)
        return model.scores[: len(tokens)].copy()

    return run


class OpenVinoGenai(Side):
    """OpenVINO GenAI's pipeline, which does not stop between tokens: its own times for each."""

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        super().__init__()
        self.genai, self.openvino = _module("openvino_genai", "openvino-genai"), _module("openvino", "openvino")
        scheduler = self.genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # the same prompt is read several times
        options = {"INFERENCE_NUM_THREADS": threads, "scheduler_config": scheduler}
        self.pipeline = self.genai.LLMPipeline(str(smollm2()), "CPU", **options)
        self.facts = {"version": self.genai.__version__.split("-")[0]}

    def begin(self, tokens: list[int], room: int) -> Text:
        raise NotImplementedError

    def _generate(self, tokens: list[int], count: int) -> Any:
        import numpy as np

        ids = np.array([tokens], np.int64)
        config = self.genai.GenerationConfig(max_new_tokens=count, do_sample=False, ignore_eos=True)
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(np.ones_like(ids)))
        return self.pipeline.generate(inputs, config)

    def prefill(self, prompt: list[int], room: int, runs: int) -> list[float]:
        self._generate(prompt, 1)
        return [milliseconds(lambda: self._generate(prompt, 1)) for _ in range(runs)]

    def decode(self, prompt: list[int], room: int, steps: int) -> list[float]:
        found = self._generate(prompt, WARM + steps)
        return [float(found.perf_metrics.get_tpot().mean)]
