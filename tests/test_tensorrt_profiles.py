"""The profiles and options of the TensorRT backends, without TensorRT."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from graphopt.backends.tensorrt.backend import TensorRtBackend, TensorRtRtxBackend
from graphopt.backends.tensorrt.options import (
    CACHE_LENGTH,
    Options,
    Profile,
    hole_in,
    lengths_of,
    most_run,
    nearest_profile,
    profiles_of,
    shapes_in,
)
from graphopt.errors import PipelineError
from graphopt.ir import Graph, types_of
from graphopt.runtime.cache import CacheLayout
from graphopt.schemas.pipeline import TargetConfig
from tests.rules import load, program

TOKENS = """
    dim batch in [1, 4]
    dim sequence in [2, 64]
"""
BERT = "input %x: i64[batch, sequence]\n    input %past: f32[batch, 3, sequence + 2]\n    output y = %x\n"


def found_in(graph: Graph, options: Options) -> list[Profile]:
    return profiles_of(types_of(graph.inputs), graph.dims, options)


def test_a_profile_for_each_expected_shape_and_one_for_all() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    found = found_in(graph, Options(shapes=({"batch": 1, "sequence": 16}, {"batch": 4, "sequence": 64})))
    exact = [{"batch": (size, size, size), "sequence": (long, long, long)} for size, long in ((1, 16), (4, 64))]
    assert found == [*exact, {"batch": (1, 1, 4), "sequence": (2, 64, 64)}]
    assert shapes_in(graph.inputs["past"].type, found[2]) == [(1, 3, 4), (1, 3, 66), (4, 3, 66)]
    assert nearest_profile(found, {"batch": 1, "sequence": 16}) == 0
    assert nearest_profile(found, {"batch": 1, "sequence": 17}) == 2
    assert nearest_profile(found, {"batch": 5, "sequence": 17}) is None


def test_profiles_need_not_take_all_largest_sizes_at_once() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    own = {"batch": (1, 1, 1), "sequence": (2, 8, 64)}, {"batch": (1, 4, 4), "sequence": (2, 8, 16)}
    assert found_in(graph, Options(profiles=own)) == list(own)


def test_profiles_of_windows_end_where_their_buffers_do() -> None:
    """What is made of dims may be given back."""
    graph = load(program(TOKENS + "    " + BERT))
    inputs = types_of(graph.inputs)
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=16, sequence="sequence"))
    made = profiles_of(inputs, graph.dims, Options(), layout)
    assert made[-1]["sequence"][2] == 16
    assert profiles_of(inputs, graph.dims, Options(profiles=tuple(map(dict, made))), layout) == made


def test_profiles_may_be_given() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    own = {"batch": (1, 2, 4), "sequence": (2, 8, 64)}, {"batch": (1, 1, 1), "sequence": (2, 8, 32)}
    assert found_in(graph, Options(profiles=own)) == list(own)
    assert nearest_profile(list(own), {"batch": 1, "sequence": 9}) == 1


def test_a_decoders_steps_are_most_of_what_it_runs() -> None:
    step: Profile = {"batch": (1, 2, 4), "sequence": (1, 1, 1)}
    prompt: Profile = {"batch": (1, 2, 4), "sequence": (1, 32, 64)}
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=None, sequence="sequence"))
    assert most_run([prompt, step], layout) == [step]
    assert most_run([prompt], layout) == [prompt]
    assert most_run([step, prompt], None) == [step, prompt]


def test_profiles_of_an_encoder_are_of_its_own_sizes() -> None:
    """Options are a decoder's, which has a size more."""
    graph = load(program(TOKENS + "    " + BERT))
    shapes = tuple({"batch": 1, "sequence": 16, "decoder_sequence": size} for size in (1, 8))
    exact = {"batch": (1, 1, 1), "sequence": (16, 16, 16)}
    assert found_in(graph, Options(shapes=shapes)) == [exact, {"batch": (1, 1, 4), "sequence": (2, 64, 64)}]
    own: Any = {"batch": (1, 1, 4), "sequence": (2, 8, 64)}
    assert found_in(graph, Options(profiles=({**own, "decoder_sequence": (1, 1, 9)},))) == [own]


@pytest.mark.parametrize("expected", [(), ({"batch": 1, "sequence": 8},), ({"batch": 2, "sequence": 1},)], ids=str)
def test_a_decoder_has_a_profile_for_single_tokens(expected: tuple[dict[str, int], ...]) -> None:
    """But for one that is asked for."""
    graph = load(program(TOKENS.replace("[2, 64]", "[1, 64]") + "    " + BERT))
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=None, sequence="sequence"))
    made = profiles_of(types_of(graph.inputs), graph.dims, Options(shapes=expected), layout)
    assert [profile["sequence"] for profile in made].count((1, 1, 1)) == 1
    assert len(made) == 2 + len(expected) - any(shape["sequence"] == 1 for shape in expected)


@pytest.mark.parametrize(
    ("profiles", "hole"),
    [
        ([(1, 4, 2, 64)], None),
        ([(1, 2, 2, 64), (3, 4, 2, 64)], None),
        ([(1, 4, 2, 16), (1, 1, 17, 64)], {"batch": 2, "sequence": 17}),
        ([(1, 2, 2, 64), (1, 4, 8, 64)], {"batch": 3, "sequence": 2}),
    ],
)
def test_sizes_that_fit_no_profile_are_found(profiles: list[tuple[int, ...]], hole: dict[str, int] | None) -> None:
    """By trying all of them, too."""
    graph = load(program(TOKENS + "    " + BERT))
    made: list[Profile] = [{"batch": (a, a, b), "sequence": (c, c, d)} for a, b, c, d in profiles]
    assert hole_in(graph.dims, made) == hole
    sizes = [{"batch": batch, "sequence": long} for batch in range(1, 5) for long in range(2, 65)]
    assert any(nearest_profile(made, each) is None for each in sizes) == (hole is not None)


def test_buffers_of_several_lengths_have_profiles_of_their_own() -> None:
    """Of what they hold."""
    graph = load(program(TOKENS.replace("[2, 64]", "[1, 64]") + "    " + BERT))
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=None, sequence="sequence", whole=["past"]))
    options = Options(cache_lengths=(32, 8), shapes=({"batch": 4, "sequence": 16},))
    lengths = lengths_of(options, layout)
    made = profiles_of(types_of(graph.inputs), graph.dims, options, layout, lengths)
    found = [(each["batch"], each["sequence"], each[CACHE_LENGTH]) for each in made]
    step, any_batch, four = (1, 1, 1), (1, 1, 4), (4, 4, 4)
    assert found == [
        (any_batch, step, (8, 8, 8)), (any_batch, (1, 8, 8), (8, 8, 8)),
        (four, (16, 16, 16), (32, 32, 32)), (any_batch, step, (32, 32, 32)), (any_batch, (1, 32, 32), (32, 32, 32)),
        (four, (16, 16, 16), (64, 64, 64)), (any_batch, step, (64, 64, 64)), (any_batch, (1, 64, 64), (64, 64, 64)),
    ]  # fmt: skip
    assert hole_in(graph.dims, made, layout) is None
    assert lengths == [8, 32, 64]
    sizes = {"batch": 1, "sequence": 1}
    assert [nearest_profile(made, {**sizes, CACHE_LENGTH: length}) for length in (8, 9, 32, 64)] == [0, None, 3, 6]


@pytest.mark.parametrize(
    ("longest", "given", "lengths"),
    [
        (511, None, []),
        (512, None, [256, 512]),
        (2304, None, [256, 1024, 2304]),
        (131072, None, [256, 1024, 4096, 16384, 65536, 131072]),
        (2304, (), []),
        (2304, (512,), [512, 2304]),
        (None, None, []),
    ],
)
def test_lengths_of_buffers(longest: int | None, given: tuple[int, ...] | None, lengths: list[int]) -> None:
    """Each four times the one before, unless they are given; a cache that grows has none."""
    layout = cast(CacheLayout, SimpleNamespace(max_length=longest, whole=["past"]))
    assert lengths_of(Options(cache_lengths=given), layout) == lengths


BATCH = {"batch": (1, 1, 4)}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shapes": [{"batch": 1}]}, "no size for sequence"),
        ({"shapes": [{"batch": 5, "sequence": 8}]}, "batch = 5 is outside"),
        ({"profiles": [{"batch": (1, 1, 1)}]}, "no size for sequence"),
        ({"profiles": [{**BATCH, "sequence": (2, 8, 32)}]}, "and no profile takes 33"),
        ({"profiles": [{**BATCH, "sequence": (4, 8, 64)}]}, "and no profile takes 2"),
        ({"profiles": [{**BATCH, "sequence": (2, 8, 8)}, {**BATCH, "sequence": (12, 12, 64)}]}, "no profile takes 9"),
        ({"profiles": [{"batch": (1, 300, 400), "sequence": (2, 8, 64)}]}, "and a profile is for 400"),
        ({"profiles": [{"batch": (0, 1, 4), "sequence": (2, 8, 64)}]}, "and a profile is for 0"),
    ],
)
def test_sizes_that_are_refused(options: dict[str, Any], reason: str) -> None:
    graph = load(program(TOKENS + "    " + BERT))
    with pytest.raises(PipelineError, match=reason):
        found_in(graph, Options.model_validate(options))


@pytest.mark.parametrize("dims", [TOKENS, ""], ids=["dims", "none"])
@pytest.mark.parametrize("given", [{"shapes": [{"sequenc": 8}]}, {"profiles": [{"sequenc": (1, 1, 1)}]}], ids=str)
def test_sizes_that_the_model_has_not_are_refused(dims: str, given: dict[str, Any]) -> None:
    backend = TensorRtBackend(TargetConfig(backend="tensorrt", options=given))
    with pytest.raises(PipelineError, match="the model has no size 'sequenc'") as error:
        backend.check_graph(load(program(dims + "    input %x: f32[2]\n    output y = %x\n")))
    assert error.value.hint is not None
    assert ("sequence" if dims else "all fixed") in error.value.hint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fp16": True}, "no option 'fp16'"),
        ({"shapes": [{"a": 1}], "profiles": [{"a": (1, 1, 1)}]}, "exclude each other"),
        ({"profiles": [{"a": (2, 1, 3)}]}, r"a: \[2, 1, 3\] is not smallest, expected, largest"),
        ({"profiles": []}, "none are given"),
        ({"workspace": 0}, "greater than or equal to 1"),
        ({"workspace": 10**13}, "less than or equal to"),
        ({"optimization_level": 6}, "less than or equal to 5"),
        ({"split_sums": True, "accumulate": "fp32"}, "split_sums adds up parts in half precision"),
        ({"compute_capabilities": ["8.9"]}, "compute_capabilities are for backend: tensorrt_rtx"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        TensorRtBackend(TargetConfig(backend="tensorrt", options=options))


@pytest.mark.parametrize(
    "options",
    [{"version_compatible": True}, {"hardware_compatible": True}, {"packed_padding": "behind"}, {"timing_cache": "t"}],
    ids=str,
)
def test_options_of_the_other_library_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    TensorRtBackend(TargetConfig(backend="tensorrt", options=options))
    with pytest.raises(PipelineError, match=f"{name} is for backend: tensorrt") as error:
        TensorRtRtxBackend(TargetConfig(backend="tensorrt_rtx", options=options))
    assert error.value.where == f"target.options.{name}"
