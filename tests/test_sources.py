"""transformers_source: example inputs, their axes and limits for each kind of model, and that the models run on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from graphopt.compiler import make_proof
from graphopt.errors import ModelError
from graphopt.ir import Graph
from graphopt.probes import sampler_like
from graphopt.schemas.pipeline import Exact
from graphopt.sources import Source, transformers_source
from graphopt.tensors import DimRange
from graphopt.tracing import trace

TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TWO_SIDES: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
T5 = t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
WAVES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16, 16), "conv_kernel": (5, 3, 2), "conv_stride": (3, 2, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WHISPER = TWO_SIDES | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 20, "pad_token_id": 0}
AST: dict[str, Any] = IMAGE | {"frequency_stride": 4, "time_stride": 4, "max_length": 20, "num_mel_bins": 8}
del AST["image_size"]

TOKENS = ("batch", "sequence")
DECODER = ("batch", "decoder_sequence")
PICTURE = ("batch", None, None, None)


def bert(**options: Any) -> Any:
    return t.BertModel(t.BertConfig(**(TEXT | options)))


def llama(**options: Any) -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**(TEXT | options)))


def vit(**options: Any) -> Any:
    return t.ViTModel(t.ViTConfig(**(IMAGE | options)))


def bart() -> Any:
    return t.BartModel(t.BartConfig(**TWO_SIDES, max_position_embeddings=24))


def clip() -> Any:
    return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16))


def whisper() -> Any:
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER))


Axes = dict[str, tuple[str | None, ...]]
#: By kind: the model, the shapes of the inputs, their axes, the limits of sizes.
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]], Axes, dict[str, DimRange]]] = {
    "encoder": (
        bert, dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (2, 6)),
        dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), TOKENS), {"sequence": DimRange(1, 24)},
    ),
    "decoder": (
        llama, {"input_ids": (2, 6), "attention_mask": (2, 6)}, {"input_ids": TOKENS, "attention_mask": TOKENS},
        {"sequence": DimRange(1, 24)},
    ),
    "encoder-decoder": (
        bart, {"input_ids": (2, 6), "attention_mask": (2, 6), "decoder_input_ids": (2, 5)},
        {"input_ids": TOKENS, "attention_mask": TOKENS, "decoder_input_ids": DECODER},
        {"sequence": DimRange(1, 24), "decoder_sequence": DimRange(1, 24)},
    ),
    "encoder-decoder without positions": (
        lambda: t.T5ForConditionalGeneration(T5),
        {"input_ids": (2, 6), "attention_mask": (2, 6), "decoder_input_ids": (2, 5)},
        {"input_ids": TOKENS, "attention_mask": TOKENS, "decoder_input_ids": DECODER}, {},
    ),
    "square images": (vit, {"pixel_values": (2, 3, 16, 16)}, {"pixel_values": PICTURE}, {}),
    "images of two sizes": (
        lambda: vit(image_size=(16, 24), patch_size=(4, 4)), {"pixel_values": (2, 3, 16, 24)}, {"pixel_values": PICTURE}, {},
    ),
    "gray images": (lambda: vit(num_channels=1), {"pixel_values": (2, 1, 16, 16)}, {"pixel_values": PICTURE}, {}),
    "text and images": (
        clip, {"input_ids": (2, 6), "attention_mask": (2, 6), "pixel_values": (2, 3, 16, 16)},
        {"input_ids": TOKENS, "attention_mask": TOKENS, "pixel_values": ("images", None, None, None)},
        {"sequence": DimRange(1, 24)},
    ),
    "waves": (
        lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**WAVES)), {"input_values": (2, 162)},
        {"input_values": ("batch", "samples")}, {"samples": DimRange(29, None)},
    ),
    "spectra to text": (
        whisper, {"input_features": (2, 8, 24), "decoder_input_ids": (2, 5)},
        {"input_features": ("batch", None, None), "decoder_input_ids": DECODER}, {},
    ),
    "spectra": (
        lambda: t.ASTModel(t.ASTConfig(**AST)), {"input_values": (2, 20, 8)}, {"input_values": ("batch", None, None)}, {},
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def source_of(make: Callable[[], nn.Module]) -> Source:
    torch.manual_seed(0)
    return transformers_source(make())


def traced(source: Source) -> Graph:
    return trace(source.module, source.inputs, source.axes, defaults=source.dims)


@kinds
def test_inputs_of_each_kind(kind: str) -> None:
    make, shapes, axes, dims = KINDS[kind]
    source = source_of(make)
    assert {name: tuple(tensor.shape) for name, tensor in source.tensors.items()} == shapes
    assert source.axes == axes
    assert source.dims == dims
    assert not source.module.training
    assert source.mask == ("attention_mask" if "attention_mask" in shapes else None)
    for name, tensor in source.tensors.items():
        assert tensor.dtype == (torch.int64 if name.endswith(("ids", "mask")) else torch.float32)
        assert name not in source.vocabulary or 0 <= int(tensor.min()) <= int(tensor.max()) < source.vocabulary[name]


@kinds
def test_a_model_of_each_kind_is_traced_and_computes_the_same(kind: str) -> None:
    source = source_of(KINDS[kind][0])
    graph = traced(source)
    proof = make_proof(source, graph)
    assert len(proof.probes) >= 3
    assert proof.of_graph(graph, Exact()).holds


@kinds
def test_caches_are_switched_off_in_every_copy_of_the_config(kind: str) -> None:
    """An encoder-decoder gives its decoder a copy of its own."""
    source = source_of(KINDS[kind][0])
    configs = {id(config): config for part in source.module.modules() if (config := getattr(part, "config", None))}
    assert not any(getattr(config, "use_cache", False) for config in configs.values())
    assert len(configs) > 1 or kind not in ("encoder-decoder without positions", "text and images")


@pytest.mark.parametrize(
    ("make", "longest"),
    [
        (bert, 24),
        (lambda: t.RobertaModel(t.RobertaConfig(**TEXT, pad_token_id=1)), 22),
        (lambda: t.MPNetModel(t.MPNetConfig(**TEXT, pad_token_id=1)), 22),
        (lambda: t.GPT2Model(t.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=24)), 24),
        (lambda: t.CLIPTextModel(t.CLIPTextConfig(**TEXT)), 24),
        (lambda: t.T5EncoderModel(T5), None),
    ],
    ids=["bert", "positions after the padding id", "mpnet", "gpt2", "clip", "relative positions"],
)
def test_texts_are_as_long_as_the_model_has_positions(make: Callable[[], nn.Module], longest: int | None) -> None:
    source = source_of(make)
    graph = traced(source)
    assert graph.dims["sequence"] == DimRange(1, longest)
    for length in (longest or 100, 1):
        inputs = source.sample()({"batch": 2, "sequence": length}, torch.Generator().manual_seed(0))
        with torch.no_grad():
            source.module(**inputs)


def test_no_longer_text_would_do() -> None:
    source = source_of(lambda: t.RobertaModel(t.RobertaConfig(**TEXT, pad_token_id=1)))
    inputs = source.sample()({"batch": 1, "sequence": 23}, torch.Generator().manual_seed(0))
    with pytest.raises((IndexError, RuntimeError)):
        source.module(**inputs)


@pytest.mark.xfail(strict=True, reason="max_target_positions is not read: the range of decoder_sequence has no end")
def test_a_decoder_of_speech_is_as_long_as_it_has_positions() -> None:
    assert traced(source_of(whisper)).dims["decoder_sequence"] == DimRange(1, 20)


def test_waves_are_at_least_as_long_as_two_frames_need() -> None:
    source = source_of(KINDS["waves"][0])
    shortest = source.dims["samples"].min
    with torch.no_grad():
        frames = [source.module(torch.randn(1, n)).last_hidden_state.shape[1] for n in (shortest - 1, shortest)]
    assert frames == [1, 2]


# Padding


def sampled(source: Source, batch: int = 8, sequence: int = 12) -> dict[str, Tensor]:
    return source.sample()({"batch": batch, "sequence": sequence}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", [0, 7, 98])
@pytest.mark.parametrize("make", [bert, llama])
def test_padding_has_the_padding_id_and_nothing_else_has_it(make: Callable[..., nn.Module], padding: int) -> None:
    source = source_of(lambda: make(pad_token_id=padding))
    assert source.padding == {"input_ids": padding}
    inputs = sampled(source)
    assert torch.equal(inputs["input_ids"] == padding, inputs["attention_mask"] == 0)
    assert bool((inputs["attention_mask"] == 0).any())


@pytest.mark.parametrize("padding", [None, 99, 250])
def test_ids_outside_the_vocabulary_are_no_padding(padding: int | None) -> None:
    config = t.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=24)
    config.pad_token_id = padding
    assert source_of(lambda: t.GPT2Model(config)).padding == {}


@pytest.mark.xfail(strict=True, reason="-1, which the first Llama configs have, is taken for a token")
def test_a_negative_padding_id_is_no_padding() -> None:
    source = source_of(lambda: llama(pad_token_id=-1))
    source.module(**sampled(source))


def test_pads_of_both_sides_unless_the_model_reads_one_place() -> None:
    first = [sampled(source_of(make))["attention_mask"][:, 0] for make in (bert, clip_text)]
    assert (bool((first[0] == 0).any()), bool((first[1] == 0).any())) == (True, False)


def clip_text() -> Any:
    return t.CLIPTextModel(t.CLIPTextConfig(**TEXT))


def test_a_model_without_a_vocabulary_reads_characters() -> None:
    options = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    config = t.CanineConfig(**options, num_hash_buckets=16, num_hash_functions=2, local_transformer_stride=8)
    source = source_of(lambda: t.CanineModel(config))
    assert source.vocabulary["input_ids"] == 128
    assert int(source.tensors["input_ids"].max()) < 128


# Refusals


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (lambda: t.PatchTSTModel(t.PatchTSTConfig(d_model=16, num_hidden_layers=1)), "past_values"),
        (lambda: t.TimeSeriesTransformerModel(t.TimeSeriesTransformerConfig(prediction_length=4, d_model=16)), "past_values"),
    ],
    ids=["PatchTSTModel", "TimeSeriesTransformerModel"],
)  # fmt: skip
def test_a_model_that_reads_something_else_is_refused(make: Callable[[], nn.Module], reads: str) -> None:
    with pytest.raises(ModelError) as error:
        transformers_source(make())
    assert f"reads {reads}, and example inputs are made for input_ids, pixel_values" in error.value.what
    assert error.value.hint == "write a factory that returns a graphopt.Source with example inputs"


@pytest.mark.xfail(strict=True, raises=AttributeError, reason="the config is read before it is known to be one")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 3),
        lambda: t.Speech2TextModel(t.Speech2TextConfig(**TWO_SIDES)),
        lambda: t.EncodecModel(t.EncodecConfig(num_filters=4, hidden_size=8, codebook_dim=8, codebook_size=8)),
    ],
    ids=["no transformers model", "spectra of another name", "waves without convolutions of that name"],
)
def test_models_of_another_kind_are_refused_by_name(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError):
        transformers_source(make())


# Sources by hand


def test_a_mask_is_found_by_name_and_content() -> None:
    ones, other = torch.ones(2, 3), torch.tensor([[1.0, 2.0]])
    assert Source(nn.Identity(), {"x": other, "my_mask": ones}, {}).mask == "my_mask"
    assert Source(nn.Identity(), {"mask": other}, {}).mask is None
    assert Source(nn.Identity(), {"mask": None, "other_mask": ones}, {}).mask == "other_mask"
    assert Source(nn.Identity(), {"x": ones}, {}).mask is None
    assert Source(nn.Identity(), {"mask": ones, "x": ones}, {}, mask="x").mask == "x"


def test_only_the_mask_is_known_to_be_true_or_false() -> None:
    ones = torch.ones(2, 3)
    assert Source(nn.Identity(), {"mask": ones, "x": ones}, {}).truths == ("mask",)
    assert Source(nn.Identity(), {"mask": None, "x": ones}, {}, mask="mask").truths == ()
    assert Source(nn.Identity(), {"x": ones}, {}).truths == ()


def test_traced_sizes_and_given_tensors() -> None:
    source = Source(nn.Identity(), {"x": torch.ones(2, 3, 4), "y": None}, {"x": ("rows", None, "columns")})
    assert source.traced == {"rows": 2, "columns": 4}
    assert list(source.tensors) == ["x"]


def test_a_sampler_of_ones_own_is_used() -> None:
    examples = {"x": torch.zeros(2, 3)}
    own = sampler_like(examples, {"x": ("rows", None)})
    source = Source(nn.Identity(), dict(examples), {"x": ("rows", None)}, sampler=own)
    assert source.sample() is own
