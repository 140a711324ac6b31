"""``target.options`` of the TensorRT backends, and the optimization profiles that follow from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from graphopt.dims import Dim, Size, evaluate
from graphopt.errors import PipelineError, nearest
from graphopt.runtime.cache import CacheLayout
from graphopt.schemas.common import Schema
from graphopt.tensors import DimRange, TensorType

#: Sizes of one profile by the names of dims: smallest, expected, largest.
Profile = Mapping[str, tuple[int, int, int]]
Capability = Literal["7.5", "8.0", "8.6", "8.9", "12.0"]
#: What linears of half precision are summed in.
Accumulate = Literal["fp32", "long", "fastest"]
PackedPadding = Literal["dropped", "behind"]
T = TypeVar("T")
#: The size in profiles that is the length of a static cache's buffers, where they have several. (No dim has such a name.)
CACHE_LENGTH = "cache.length"
_CACHE_LENGTHS = tuple(256 << shift for shift in range(0, 20, 2))
_COMMON = 128  # what is expected of a size whose range says nothing else


class Options(Schema):
    """How an engine is built. Precision is no option: it is in the graph (``cast``, ``quantize``)."""

    shapes: tuple[dict[str, int], ...] = ()
    """Sizes that are expected, by the names of dims: each gets a profile of its own, beside one for all that ``dims`` allows."""
    profiles: tuple[dict[str, tuple[int, int, int]], ...] | None = None
    """The profiles themselves: smallest, expected and largest size of each dim (for each of ``cache_lengths``)."""
    workspace: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    """The most scratch memory that a kernel may take, in MiB."""
    accumulate: Accumulate = "long"
    """What linears of half precision are summed in. ``fp32``: as eager PyTorch; ``fastest``: whatever the builder's fastest
    kernels do, which may be half precision; ``long``: fp32 where sums are of 2048 features or more. (Linears of packed
    weights are left to the builder.)"""
    packed_padding: PackedPadding = "dropped"
    """Where ``remove_padding`` packs tokens: padding is ``dropped``, and sizes depend on the data; or it goes ``behind`` all
    tokens, no size changes, calls can be CUDA graphs, and only attention takes less time."""
    cache_lengths: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Lengths of a static cache's buffers beside ``max_length``, each with all profiles: a batch begins in the shortest that hold
    its texts, moves to longer ones when they grow, and a step takes as long as buffers are. 256, 1024, 4096 ... up to half of
    ``max_length`` unless given; none with ``[]``, which builds faster. For importers without TensorScatter (up to 10.14), whose
    attention reads copies of buffers."""
    split_sums: bool = False
    """Long sums of linears whose results are few tiles in two or four parts (split-K), for the GPU that is here: few at all
    expected sizes, or at a decoder's single tokens. Each part must fit into half precision, which holds up to 65,504, where the
    whole may."""
    tf32: bool = False
    """Products of fp32 in TF32: faster, with 10 bits of mantissa."""
    sparse_weights: bool = False
    """Kernels for weights that are pruned 2:4."""
    refit: bool = False
    """An engine whose weights can be replaced."""
    version_compatible: bool = False
    """An engine that later versions run as well."""
    hardware_compatible: bool = False
    """An engine that later GPUs (Ampere and newer) run as well."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    """How long the builder searches; 3 unless given."""
    timing_cache: str | None = None
    """Where the builder keeps its timings; a file in the user's cache unless given."""
    compute_capabilities: tuple[Capability, ...] = ()
    """TensorRT-RTX: the devices to build for; all that it supports unless given."""

    @model_validator(mode="after")
    def _one_way(self) -> Options:
        if self.profiles is not None and self.shapes:
            raise ValueError("profiles and shapes exclude each other")
        if self.split_sums and self.accumulate == "fp32":
            raise ValueError("split_sums adds up parts in half precision, and accumulate: fp32 asks for fp32")
        if self.profiles == ():
            raise ValueError("profiles: none are given: leave it out for one of all that dims allow")
        for profile in self.profiles or ():
            for name, (low, best, high) in profile.items():
                if not 0 <= low <= best <= high:
                    raise ValueError(f"profiles: {name}: [{low}, {best}, {high}] is not smallest, expected, largest")
        return self


def profiles_of(
    inputs: Mapping[str, TensorType],
    dims: Mapping[str, DimRange],
    options: Options,
    layout: CacheLayout | None = None,
    lengths: Sequence[int] = (),
) -> list[Profile]:
    """The profiles of an engine: those that are given, or one for each expected shape and one for all that ``dims`` allows.
    A decoder with a static cache (``layout``) has one for single tokens as well. Of what is given, an engine takes the sizes that
    it has: the encoder of a decoder has fewer.

    Where a cache has buffers of several ``lengths``, each has these profiles as far as it holds them.

    PipelineError for sizes that are missing, outside of their range, or without a largest number."""
    found = _of_sizes(inputs, dims, options, layout)
    if layout is None or not lengths:
        return found
    made: list[Profile] = []
    for length, profile in itertools.product(lengths, found):
        if profile[layout.sequence][0] <= length:
            own = _in_buffers(profile, layout.sequence, length)
            made += [own] if own not in made else []
    return made


def _in_buffers(profile: Profile, sequence: str, length: int) -> Profile:
    """A profile for buffers of one length."""
    low, best, high = profile[sequence]
    return {**profile, sequence: (low, min(best, length), min(high, length)), CACHE_LENGTH: (length, length, length)}


def lengths_of(options: Options, layout: CacheLayout | None) -> list[int]:
    """The lengths of a static cache's buffers, shortest first, where attention reads copies of them; none if they have one."""
    if layout is None or layout.max_length is None or not layout.whole:
        return []
    given: Sequence[int] | None = options.cache_lengths
    if given is None:
        given = [length for length in _CACHE_LENGTHS if 2 * length <= layout.max_length]
    return sorted({*given, layout.max_length}) if given else []


def _of_sizes(
    inputs: Mapping[str, TensorType], dims: Mapping[str, DimRange], options: Options, layout: CacheLayout | None
) -> list[Profile]:
    if not dims:
        return [{}]
    if options.profiles is not None:
        given: list[Profile] = [*_own(dims, options.profiles, "target.options.profiles")]
        _check_ranges(dims, given, layout)
        return given
    shapes = _own(dims, options.shapes, "target.options.shapes")
    for name, size in itertools.chain.from_iterable(shape.items() for shape in shapes):
        if size not in dims[name]:
            raise PipelineError(f"{name} = {size} is outside {dims[name]}", where="target.options.shapes")
    exact = [{name: (size, size, size) for name, size in shape.items()} for shape in shapes]
    whole = _whole(inputs, dims)
    if layout is None or layout.max_length is None:
        return [*exact, whole]
    low, best, high = whole[layout.sequence]
    most = layout.window or high  # what buffers of windows take at once
    prefill = {**whole, layout.sequence: (low, min(best, most), most)}
    is_expected = any(shape[layout.sequence] == 1 for shape in shapes)
    decode = [{**whole, layout.sequence: (1, 1, 1)}] if low == 1 and not is_expected else []
    return [*exact, *decode, prefill]


def most_run(profiles: Sequence[Profile], layout: CacheLayout | None) -> list[Profile]:
    """A decoder's profiles of single tokens, which take most of its time; all profiles of anything else."""
    steps = [] if layout is None else [each for each in profiles if each[layout.sequence][1] == 1]
    return steps or list(profiles)


def check_names(dims: Mapping[str, DimRange], options: Options) -> None:
    """PipelineError if sizes are given that a model has not."""
    for where, given in (("profiles", options.profiles), ("shapes", options.shapes)):
        for name in itertools.chain.from_iterable(given or ()):
            if name not in dims:
                hint = nearest(name, dims) if dims else "its sizes are all fixed"
                raise PipelineError(f"the model has no size {name!r}", where=f"target.options.{where}", hint=hint)


def _own(dims: Mapping[str, DimRange], given: Sequence[Mapping[str, T]], where: str) -> list[dict[str, T]]:
    """Given sizes of the dims that there are, each once."""
    found: list[dict[str, T]] = []
    for sizes in given:
        missing = dims.keys() - sizes.keys()
        if missing:
            raise PipelineError(f"no size for {', '.join(sorted(missing))}", where=where)
        own = {name: sizes[name] for name in sizes if name in dims}
        if own not in found:
            found.append(own)
    return found


def _check_ranges(dims: Mapping[str, DimRange], profiles: Sequence[Profile], layout: CacheLayout | None) -> None:
    """Profiles are of sizes that dims allow, and each size of a dim is in some profile. (Not each with all of the others: a long
    text may be for small batches only.)"""
    for name, taken in _taken(dims, profiles, layout).items():
        bounds = dims[name]
        low, high = min(profile[name][0] for profile in profiles), max(profile[name][2] for profile in profiles)
        if low < bounds.min or (bounds.max is not None and high > bounds.max):
            raise PipelineError(
                f"dims allow {name} in {bounds}, and a profile is for {low if low < bounds.min else high}",
                where="target.options.profiles",
                hint="widen dims, or narrow the profile",
            )
        hole = _hole({name: taken}, profiles)
        if hole is not None:
            raise PipelineError(
                f"dims allow {name} in {bounds}, and no profile takes {hole[name]}",
                where="target.options.profiles",
                hint="narrow dims, or widen a profile",
            )


def hole_in(
    dims: Mapping[str, DimRange], profiles: Sequence[Profile], layout: CacheLayout | None = None
) -> dict[str, int] | None:
    """Sizes that dims allow together and that fit no profile, if there are any."""
    return _hole(_taken(dims, profiles, layout), profiles)


def _taken(
    dims: Mapping[str, DimRange], profiles: Sequence[Profile], layout: CacheLayout | None
) -> dict[str, tuple[int, int]]:
    """What is to be taken of each dim: all that it allows, or, without an end, what profiles have. Buffers of windows take no
    more at once than they hold."""
    found = {}
    for name, bounds in dims.items():
        is_windowed = layout is not None and layout.window is not None and name == layout.sequence
        most = max(profile[name][2] for profile in profiles)
        found[name] = bounds.min, most if bounds.max is None or is_windowed else bounds.max
    return found


def _hole(taken: Mapping[str, tuple[int, int]], profiles: Sequence[Profile]) -> dict[str, int] | None:
    """Sizes within ``taken`` that fit no profile: looked for where profiles begin, and behind their ends."""
    starts = []
    for name, (low, high) in taken.items():
        edges = {low, *(profile[name][0] for profile in profiles), *(profile[name][2] + 1 for profile in profiles)}
        starts.append(sorted(size for size in edges if low <= size <= high))
    each = (dict(zip(taken, sizes, strict=True)) for sizes in itertools.product(*starts))
    return next((sizes for sizes in each if not any(_fits(profile, sizes) for profile in profiles)), None)


def _fits(profile: Profile, sizes: Mapping[str, int]) -> bool:
    return all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items() if name in profile)


def _whole(inputs: Mapping[str, TensorType], dims: Mapping[str, DimRange]) -> Profile:
    """All that dims allow; expected is one example of 128 as far as that is allowed."""
    counts = {
        size.name
        for type in inputs.values()
        for size in type.shape[:1]
        if isinstance(size, Dim) and len(type.shape) > 1
    }
    sizes = {}
    for name, bounds in dims.items():
        if bounds.max is None:
            raise PipelineError(
                f"TensorRT needs a largest size for {name!r}",
                where="dims",
                hint=f"dims: {{{name}: [{bounds.min}, 512]}}, or all sizes in target.options.profiles",
            )
        expected = min(max(1 if name in counts else _COMMON, bounds.min), bounds.max)
        sizes[name] = (bounds.min, expected, bounds.max)
    return sizes


def for_two_rows(profile: Profile, lead: Sequence[Size]) -> Profile:
    """The profile, expecting two rows of a product ``[*lead, K]`` if it expects one and allows more."""

    def rows(sizes: Mapping[str, int]) -> int:
        return math.prod(evaluate(size, sizes) for size in lead)

    expected = {name: best for name, (_, best, _) in profile.items()}
    wider = ({**expected, name: min(2, high)} for name, (_, _, high) in profile.items())
    found = next((sizes for sizes in wider if rows(sizes) > 1), None) if rows(expected) == 1 else None
    if found is None:
        return profile
    return {name: (low, found[name], high) for name, (low, _, high) in profile.items()}


def shapes_in(type: TensorType, profile: Profile) -> list[tuple[int, ...]]:
    """An input's smallest, expected and largest shape."""
    return [
        tuple(evaluate(size, {name: sizes[which] for name, sizes in profile.items()}) for size in type.shape)
        for which in range(3)
    ]


def nearest_profile(profiles: list[Profile], sizes: Mapping[str, int]) -> int | None:
    """The profile that sizes fit into and whose expected sizes are nearest to them, by their product; None if there is none."""

    def distance(profile: Profile) -> float:
        off = 1.0
        for name, (_, best, _) in profile.items():
            larger, smaller = max(sizes[name], best), min(sizes[name], best)
            off *= (larger + 1) / (smaller + 1)
        return off

    fitting = [index for index, profile in enumerate(profiles) if _fits(profile, sizes)]
    return min(fitting, key=lambda index: distance(profiles[index]), default=None)
