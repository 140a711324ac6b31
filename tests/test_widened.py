"""bf16 on ONNX Runtime's CPU provider: computed in fp32 and rounded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import onnx_ir as ir
import pytest
import torch
from transformers import BertConfig, BertModel, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.onnx.weights import embed
from graphopt.backends.onnxruntime.engine import caller_of, make_session
from graphopt.backends.onnxruntime.widened import widened
from graphopt.errors import BackendError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.runtime import Generator
from graphopt.runtime.engine import to_numpy, to_torch
from graphopt.sources import transformers_source
from tests.onnx_helpers import ONNXRUNTIME, emit
from tests.rules import SIZES, inputs_of, load, program

TWO = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: bf16[batch, sequence, 8]
    weight %w: bf16[8]
    %y: bf16[batch, sequence, 8] = aten.mul.Tensor(self=%x, other=%w)
    %z: bf16[batch, sequence, 8] = aten.add.Tensor(self=%y, other=%x)
    output z = %z
"""


def test_an_op_of_bf16_is_one_of_fp32_between_casts() -> None:
    graph = load(program(TWO))
    made, found = widened(graph)
    assert made.text() == program("""
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: bf16[batch, sequence, 8]
    weight %w: bf16[8]
    %to: f32[batch, sequence, 8] = aten.to.dtype(self=%x, dtype=f32)
    %to_1: f32[8] = aten.to.dtype(self=%w, dtype=f32)
    %mul: f32[batch, sequence, 8] = aten.mul.Tensor(self=%to, other=%to_1)
    %y: bf16[batch, sequence, 8] = aten.to.dtype(self=%mul, dtype=bf16)
    %to_3: f32[batch, sequence, 8] = aten.to.dtype(self=%y, dtype=f32)
    %add: f32[batch, sequence, 8] = aten.add.Tensor(self=%to_3, other=%to)
    %z: bf16[batch, sequence, 8] = aten.to.dtype(self=%add, dtype=bf16)
    output z = %z
    """)
    assert found == ["%y = aten.mul.Tensor", "%z = aten.add.Tensor"]
    assert graph.text() == program(TWO)  # the one that was given stays


def test_what_has_no_bf16_and_casts_of_it_stay_as_they_are() -> None:
    graph = load(program("""
    dim batch in [1, ...]
    input %x: f32[batch, 8]
    %a: bf16[batch, 8] = aten.to.dtype(self=%x, dtype=bf16)
    %b: f32[batch, 8] = aten.to.dtype(self=%a, dtype=f32)
    %y: f32[batch, 8] = aten.mul.Tensor(self=%b, other=%x)
    output y = %y
    """))  # fmt: skip
    assert widened(graph) == (graph, [])


BODIES = {
    "two": TWO,
    "a dtype among the arguments": """
    dim sequence in [1, ...]
    input %x: bf16[sequence, 8]
    %r: bf16[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=bf16)
    %c: bf16[sequence, 1] = aten.unsqueeze.default(self=%r, dim=1)
    %y: bf16[sequence, 8] = aten.mul.Tensor(self=%x, other=%c)
    output y = %y
    """,
    "tensors in a list, several results, another dtype": """
    dim sequence in [1, ...]
    input %x: bf16[sequence, 8]
    %h: bf16[sequence, 8] = aten.mul.Tensor(self=%x, other=0.3)
    %c: bf16[sequence, 16] = aten.cat.default(tensors=[%x, %h], dim=1)
    %v: bf16[sequence, 4], %i: i64[sequence, 4] = aten.topk.default(self=%c, k=4, dim=1)
    %g: bool[sequence, 4] = aten.gt.Scalar(self=%v, other=0.5)
    output v = %v
    output i = %i
    output g = %g
    """,
    "a norm and an attention": """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: bf16[batch, 4, sequence, 8]
    weight %w: bf16[8]
    %n: bf16[batch, 4, sequence, 8] = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%w, eps=1e-06)
    %y: bf16[batch, 4, sequence, 8] = graphopt.attention.default(q=%n, k=%n, v=%x, scale=0.35)
    output y = %y
    """,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_results_are_those_of_bf16(name: str, sizes: Mapping[str, int]) -> None:
    graph = load(program(BODIES[name]))
    inputs = inputs_of(graph, dict(sizes))
    expected = run(graph, inputs)
    call, feeds = caller(widened(graph)[0]), {name: to_numpy(tensor) for name, tensor in inputs.items()}
    for (output, wanted), got in zip(expected.items(), call(None, feeds), strict=True):
        found = to_torch(got)
        assert found.dtype == wanted.dtype, output
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def caller(graph: Graph) -> Any:
    emitter = Emitter(graph, ONNXRUNTIME)
    embed(emitter)
    return caller_of(make_session(ir.to_proto(emitter.model).SerializeToString()))


def test_what_onnxruntime_has_no_kernel_for_is_named_with_its_source() -> None:
    graph = load(program(TWO))
    node = next(iter(graph.nodes))
    twice = graph.insert(node.op, node.args, before=node, origin=("encoder", "model.py:7"))
    graph.replace(node.output, twice.output)
    graph.prune()
    with pytest.raises(BackendError, match="Could not find an implementation for Mul") as caught:
        make_session(emit(graph, ONNXRUNTIME).SerializeToString())
    assert caught.value.where == "encoder | model.py:7"


SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def test_a_model_in_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = transformers_source(BertModel(BertConfig(intermediate_size=128, **SMALL)).eval().bfloat16())
    made = graphopt.compile(source, tmp_path / "e")
    assert made.report.engine is not None
    assert made.report.engine.worst < 3e-2
    assert any("no kernels for bf16 on the CPU" in warning for warning in made.report.warnings)
    feeds = {name: torch.ones(3, 5, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    engine = graphopt.load(tmp_path / "e")
    with torch.inference_mode():
        wanted = source.module(**feeds).last_hidden_state
    got = engine(**feeds)["last_hidden_state"]
    assert got.dtype == torch.bfloat16
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 3e-2
    arrays = engine(**{name: tensor.numpy() for name, tensor in feeds.items()})
    assert arrays["last_hidden_state"].dtype == ml_dtypes.bfloat16
    assert bool((to_torch(arrays["last_hidden_state"]) == got).all())


@pytest.mark.parametrize("layout", ["static", "growing"])
def test_a_decoder_in_bf16(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=128, num_key_value_heads=2, **SMALL)).eval().bfloat16()
    cache = {"kind": "insert_kv_cache", "layout": layout} | ({"max_length": 32} if layout == "static" else {})
    passes: list[dict[str, Any]] = [{"kind": "canonicalize"}, {"kind": "fuse_attention"}, cache]
    graphopt.compile(transformers_source(model), tmp_path / "e", passes=passes)
    rows = Generator(graphopt.load(tmp_path / "e")).generate([[1, 2, 3]], max_new_tokens=6)
    ids = torch.tensor([[1, 2, 3]])
    for token in rows[0].tokens:
        with torch.inference_mode():
            logits = model(ids).logits[0, -1].float()
        assert float(logits.max() - logits[token]) < 2e-2 * float(logits.abs().max())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_alibi_of_falcon_which_is_made_in_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(alibi=True, new_decoder_architecture=False, **SMALL)).eval()
    made = graphopt.compile(transformers_source(model), tmp_path / "e")
    assert made.report.engine is not None
    assert made.report.engine.worst < 1e-4
