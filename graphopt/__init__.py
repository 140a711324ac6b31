"""graphopt: a declared list of passes takes a PyTorch transformer to a deployable engine, every step proven against eager."""

from graphopt.artifact import load
from graphopt.compiler import Compiled, compile, compile_file, verify
from graphopt.decode_parity import decode_parity
from graphopt.errors import GraphoptError
from graphopt.ir import Graph
from graphopt.models import load_model
from graphopt.parity import compare
from graphopt.runtime.engine import Engine
from graphopt.sources import Source
from graphopt.tensors import DimRange
from graphopt.text import parse
from graphopt.tracing import trace

__all__ = [
    "Compiled", "DimRange", "Engine", "Graph", "GraphoptError", "Source", "compare", "compile", "compile_file",
    "decode_parity", "load", "load_model", "parse", "trace", "verify",
]  # fmt: skip
