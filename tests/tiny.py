"""Small models with random weights."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from graphopt.sources import Source, transformers_source


def tiny_bert(attention: str = "sdpa", layers: int = 2) -> Source:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return transformers_source(BertModel(config), name="tiny-bert")


def tiny_llama(attention: str = "sdpa", layers: int = 2) -> Source:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, attn_implementation=attention, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers_source(LlamaForCausalLM(config), name="tiny-llama")
