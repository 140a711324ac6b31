"""Engines: what a build gives, called with numpy or torch tensors; and text from those with a cache."""

from graphopt.runtime.decoder import Decoder
from graphopt.runtime.generation import Generation, Generator, Piece
from graphopt.runtime.sampling import Sampling

__all__ = ["Decoder", "Generation", "Generator", "Piece", "Sampling"]
