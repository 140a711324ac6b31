"""transformers' ``generate`` on an engine: searches, sampling, processors, criteria and streamers are transformers' own.

::

    model = EngineForCausalLM.from_pretrained("engine", threads=2)
    tokens = tokenizer(["a", "bcd"], padding=True, padding_side="left", return_tensors="pt")
    model.generate(**tokens, max_new_tokens=20, num_beams=4)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphopt import artifact
from graphopt.errors import EngineError, InputError
from graphopt.runtime.decoder import Decoder, longest_text, vocabulary_of
from graphopt.runtime.engine import Engine

TOKENS = "input_ids"
#: What transformers calls a cache: 5.24 renamed it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class EngineTexts:
    """What transformers hands around as ``cache`` (before 5.24 ``past_key_values``): what has been read, and which columns of it
    were no padding."""

    is_compileable = is_croppable = False
    is_linear = (False,)  # whether layers are of linear attention, which 5.24 asks

    def __init__(self, engine: Engine, batch: int) -> None:
        self.engine, self.decoder, self.vocabulary = engine, Decoder(engine, batch), vocabulary_of(engine)
        self.mask = torch.zeros(batch, 0, dtype=torch.bool)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns have been read, those of padding included."""
        return self.mask.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the texts be these rows of themselves."""
        rows = beam_idx.cpu().long()
        if not torch.equal(rows, torch.arange(len(self.mask))):  # selecting copies the whole cache
            self.decoder.select(rows)
            self.mask = self.mask[rows]

    def read(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Read on, ``tokens`` ``[batch, new]`` where the ``mask`` of all columns is 1; the logits behind the last of them."""
        whole = self._whole(tokens, mask)
        new = whole[:, self.get_seq_length() :]
        if positions is not None:
            _check_positions(positions.cpu(), self.decoder.lengths[:, None] + new.cumsum(1) - 1, new)
        rows = [row[real].tolist() for row, real in zip(tokens.cpu(), new, strict=True)]
        # The next step overwrites what a bound cache gave, and a caller may keep it.
        logits = self.decoder.feed(rows)[:, None].clone()
        self.mask = whole
        return logits

    def _whole(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The mask of all columns, if it is one that the texts can go on with."""
        batch, past = self.mask.shape
        if len(tokens) != batch:
            raise InputError(f"{TOKENS} has {len(tokens)} rows, the cache {batch}")
        low, high, last = int(tokens.min()), int(tokens.max()), self.vocabulary - 1
        if not 0 <= low <= high <= last:
            raise InputError(f"{TOKENS} has ids from {low} to {high}, the engine knows those from 0 to {last}")
        shape = batch, past + tokens.shape[1]
        given = torch.ones(shape) if mask is None else mask.cpu()
        whole = given == 1
        if given.shape != shape or not (whole | (given == 0)).all():
            raise InputError(
                f"attention_mask must be zeros and ones {list(shape)}, past columns included; it is {list(given.shape)}"
            )
        if not torch.equal(whole[:, :past], self.mask):
            raise InputError(
                "attention_mask says otherwise of columns that have been read already",
                hint="give the mask of the first call with the new columns' behind it, or start without the cache",
            )
        if not whole[:, -1].all():
            row = int((~whole[:, -1]).nonzero()[0])
            raise InputError(f"row {row} ends in padding", hint="pad on the left: tokenizer.padding_side = 'left'")
        return whole


class EngineForCausalLM(GenerationMixin):  # type: ignore[misc]  # transformers has no types
    """A model for transformers' ``generate`` that runs an engine with a cache; logits are of each row's last token only.

    ``config`` and ``generation_config`` are those of the model that was compiled; without them ``generate`` has to be told
    special tokens such as ``eos_token_id``. Rows are padded on the left, if at all. A result's ``cache`` (before transformers
    5.24 ``past_key_values``) lets the next call go on from there, once. What an engine cannot do is refused with InputError."""

    main_input_name = TOKENS
    input_modalities = output_modalities = ("text",)
    _is_stateful = False

    def __init__(
        self,
        engine: Engine,
        *,
        config: PreTrainedConfig | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        if engine.layout is None or engine.prologue is not None:
            raise EngineError("the engine is no decoder with a cache", hint="compile one with the pass insert_kv_cache")
        self.engine = engine
        self.config = config or PreTrainedConfig(vocab_size=vocabulary_of(engine))
        if generation_config is None:
            generation_config = GenerationConfig.from_model_config(self.config)
            generation_config.use_cache = True  # the config's is about a cache inside the model
        self.generation_config = generation_config
        self.device = torch.device("cpu")  # where tokens are read; the engine runs where it was built for
        self.dtype = engine.outputs["logits"].dtype

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> EngineForCausalLM:
        """The engine of a directory, with its config.json and generation_config.json where it has them.

        ``options`` are those of :func:`graphopt.load`: check, threads, provider ..."""
        engine, folder = artifact.load(folder, **options), Path(folder)
        config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
        given = (folder / "generation_config.json").is_file()
        return cls(engine, config=config, generation_config=GenerationConfig.from_pretrained(folder) if given else None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: EngineTexts | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        return_dict: bool | None = None,
        past_key_values: EngineTexts | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Read ``input_ids`` on top of ``cache``; the logits ``[batch, 1, vocabulary]`` behind each row's last token.

        ``attention_mask`` is of all columns, past ones included. ``cache`` (``past_key_values`` is its older name) is what an
        earlier call returned; it reads on in place."""
        others.pop("tokenizer", None)  # what generate has read stop strings with
        _refuse(others | {"return_dict=False": return_dict is False, "logits_to_keep": logits_to_keep != 1})
        if input_ids is None or input_ids.dim() != 2 or not input_ids.numel():
            raise InputError(f"an engine reads {TOKENS} [batch, sequence]", hint="give the ids of the tokens")
        given = past_key_values if cache is None else cache
        texts = EngineTexts(self.engine, len(input_ids)) if given is None else given
        if not isinstance(texts, EngineTexts) or texts.engine is not self.engine:
            raise InputError(
                f"the cache is a {type(texts).__name__} that is not this engine's",
                hint="leave it out for new texts, or give what an earlier call returned",
            )
        logits = texts.read(input_ids, attention_mask, position_ids)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: None if use_cache is False else texts})

    __call__ = forward

    def can_generate(self) -> bool:
        return True  # for pipelines

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}  # nothing for transformers to switch

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """The first forward makes the cache; here, before anything is read, is refused what could not be carried through."""
        asked = {name: getattr(generation_config, name) for name in ("cache_implementation", "prefill_chunk_size")}
        # That needs logits of several tokens, and a cache that can be cut.
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        _refuse(asked | {"assisted generation (assistant_model, prompt_lookup_num_tokens)": assisted})
        mask, longest = model_kwargs.get("attention_mask"), longest_text(self.engine)
        needed = max_cache_length - (0 if mask is None else int((mask == 0).sum(1).min()))
        if longest is not None and needed > longest:
            raise InputError(
                f"a text could come to {needed} tokens in the cache, which holds {longest}",
                hint=f"generate {needed - longest} tokens less (max_new_tokens), or compile with a longer max_length",
            )

    def init_continuous_batching(self, *_: Any, **__: Any) -> None:
        raise InputError("an engine has no paged cache", hint="use generate without cache_implementation")


def _refuse(given: dict[str, Any]) -> None:
    """InputError for the arguments among these that ask for something."""
    names = sorted(name for name, value in given.items() if value is not None and value is not False)
    if names:
        raise InputError(
            f"an engine cannot do {', '.join(names)}",
            hint=f"leave that out: it reads {TOKENS} and attention_mask and gives the last token's logits",
        )


def _check_positions(given: Tensor, own: Tensor, real: Tensor) -> None:
    """An engine counts positions itself: InputError if the caller counts otherwise."""
    if given.shape not in (own.shape, own[:1].shape) or (given != own)[real].any():
        raise InputError("position_ids do not count the tokens that attention_mask shows", hint="leave them out")
