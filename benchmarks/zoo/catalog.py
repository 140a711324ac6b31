"""The animals: a line for each transformers class, with what its small config changes.

``Animal("LlamaForCausalLM", "decoder")`` is enough: the config's fields take the small sizes of :data:`SMALL`. Keywords
change fields; a dict changes the fields of a config inside the config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Two layers, four heads whose size is not hidden size / heads where the config allows it, and odd vocabulary.
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 72,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "image_size": 24,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Animal:
    """A class of transformers with a small config."""

    model: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        return self.model + (f" ({self.label})" if self.label else "")


def _family(family: str, **models: dict[str, Any]) -> list[Animal]:
    return [Animal(model, family, changes) for model, changes in models.items()]


_DEEPSEEK = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
_MOE = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
_T5 = {"d_model": 48, "d_kv": 16, "d_ff": 72, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_BART = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72, "decoder_ffn_dim": 72, "init_std": 0.2,
}  # fmt: skip
_WAVES = {
    "conv_dim": [24, 24, 24], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip

ENCODERS = _family(
    "encoder",
    BertModel={},
    BertForMaskedLM={},
    RobertaModel={},
    XLMRobertaModel={},
    CamembertModel={},
    DistilBertModel={"dim": 48, "n_heads": 4, "hidden_dim": 72, "n_layers": 2},
    AlbertModel={"embedding_size": 24},
    ElectraModel={"embedding_size": 24},
    MPNetModel={},
    DebertaModel={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    DebertaV2Model={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ModernBertModel={"local_attention": 6, "global_attn_every_n_layers": 2},
    LongformerModel={"attention_window": [4, 4]},
    BigBirdModel={"attention_type": "original_full"},
    NystromformerModel={"num_landmarks": 4, "segment_means_seq_len": 12},
    ConvBertModel={},
    SqueezeBertModel={"embedding_size": 48},
    MobileBertModel={
        "initializer_range": 0.1,
        "embedding_size": 24,
        "intra_bottleneck_size": 24,
        "true_hidden_size": 24,
    },
    FNetModel={},
    RoFormerModel={"embedding_size": 48},
    EsmModel={"position_embedding_type": "rotary"},
    Data2VecTextModel={},
    NomicBertModel={},
    EuroBertModel={},
    MraModel={},
    XLMModel={"emb_dim": 48, "n_layers": 2, "n_heads": 4},
    FlaubertModel={"emb_dim": 48, "n_layers": 2, "n_heads": 4},
    JinaEmbeddingsV3Model={},
)
DECODERS = _family(
    "decoder",
    GPT2LMHeadModel={"n_embd": 48, "n_layer": 2, "n_head": 4},
    OpenAIGPTLMHeadModel={"n_embd": 48, "n_layer": 2, "n_head": 4},
    GPTNeoForCausalLM={"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    GPTNeoXForCausalLM={"rotary_pct": 0.5},
    GPTJForCausalLM={"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 6},
    CodeGenForCausalLM={"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 6},
    GPTBigCodeForCausalLM={"n_embd": 48, "n_layer": 2, "n_head": 4},
    CTRLLMHeadModel={"n_embd": 48, "n_layer": 2, "n_head": 4, "dff": 72},
    OPTForCausalLM={"ffn_dim": 72, "word_embed_proj_dim": 48},
    BloomForCausalLM={"n_layer": 2, "n_head": 4},
    FalconForCausalLM={"new_decoder_architecture": True, "num_kv_heads": 2},
    MptForCausalLM={"d_model": 48, "n_heads": 4, "n_layers": 2},
    LlamaForCausalLM={},
    MistralForCausalLM={"sliding_window": 5},
    MinistralForCausalLM={"sliding_window": 5},
    Qwen2ForCausalLM={},
    Qwen3ForCausalLM={},
    GemmaForCausalLM={},
    Gemma2ForCausalLM={"sliding_window": 5, "query_pre_attn_scalar": 16},
    Gemma3ForCausalLM={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    PhiForCausalLM={"rotary_pct": 0.5},
    Phi3ForCausalLM={},
    StableLmForCausalLM={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    Starcoder2ForCausalLM={"sliding_window": 5},
    OlmoForCausalLM={},
    Olmo2ForCausalLM={},
    Olmo3ForCausalLM={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    CohereForCausalLM={},
    Cohere2ForCausalLM={"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    GraniteForCausalLM={"attention_multiplier": 0.3},
    SmolLM3ForCausalLM={},
    Exaone4ForCausalLM={"sliding_window": 5},
    Glm4ForCausalLM={},
    NemotronForCausalLM={},
    HeliumForCausalLM={"head_dim": 12},
    BitNetForCausalLM={},
    ArceeForCausalLM={},
    Llama4ForCausalLM={
        "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 4, "intermediate_size_mlp": 72,
    },
    XGLMForCausalLM={"d_model": 48, "attention_heads": 4, "ffn_dim": 72, "num_layers": 2},
    BioGptForCausalLM={},
    ModernBertDecoderForCausalLM={"local_attention": 6, "global_attn_every_n_layers": 2},
)  # fmt: skip
EXPERTS = _family(
    "experts",
    GptOssForCausalLM={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    MixtralForCausalLM={"num_local_experts": 4, "num_experts_per_tok": 2},
    Qwen2MoeForCausalLM={"num_experts": 4, "shared_expert_intermediate_size": 40, **_MOE},
    Qwen3MoeForCausalLM={"num_experts": 4, **_MOE},
    OlmoeForCausalLM={"num_experts": 4, "num_experts_per_tok": 2},
    PhimoeForCausalLM={"num_local_experts": 4},
    GraniteMoeForCausalLM={"num_local_experts": 4, "num_experts_per_tok": 2},
    JetMoeForCausalLM={"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2},
    DbrxForCausalLM={
        "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 48},
    },
    DeepseekV2ForCausalLM={
        **_DEEPSEEK, **_MOE, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "topk_method": "greedy", "num_key_value_heads": 4, "n_shared_experts": 1,
    },
    DeepseekV3ForCausalLM={
        **_DEEPSEEK, **_MOE, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "num_key_value_heads": 4, "n_shared_experts": 1,
    },
    Glm4MoeForCausalLM={
        **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    Ernie4_5_MoeForCausalLM={**_MOE, "moe_num_experts": 4, "moe_k": 2},
)  # fmt: skip
ENCODER_DECODERS = _family(
    "encoder-decoder",
    T5ForConditionalGeneration=_T5,
    MT5ForConditionalGeneration=_T5,
    UMT5ForConditionalGeneration=_T5,
    T5EncoderModel=_T5,
    LongT5ForConditionalGeneration={**_T5, "local_radius": 3},
    BartForConditionalGeneration=_BART,
    MBartForConditionalGeneration=_BART,
    MarianMTModel={**_BART, "decoder_start_token_id": 1},
    PegasusForConditionalGeneration=_BART,
    BlenderbotForConditionalGeneration=_BART,
    M2M100ForConditionalGeneration=_BART,
    ProphetNetForConditionalGeneration={
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 72,
    },
    WhisperForConditionalGeneration={
        **_BART, "max_source_positions": 20, "max_target_positions": 24, "num_mel_bins": 16, "decoder_start_token_id": 1,
    },
)  # fmt: skip
VISION = _family(
    "vision",
    ViTModel={},
    ViTForImageClassification={},
    DeiTModel={},
    BeitModel={},
    SwinModel={"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3, "patch_size": 2},
    Swinv2Model={"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3, "patch_size": 2},
    Dinov2Model={},
    Dinov2WithRegistersModel={},
    DINOv3ViTModel={},
    IJepaModel={},
    ViTMAEModel={"mask_ratio": 0.0},
    PvtModel={
        "hidden_sizes": [16, 32], "depths": [2, 2], "num_attention_heads": [2, 4], "sequence_reduction_ratios": [2, 1],
        "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2], "num_encoder_blocks": 2,
    },
    SegformerModel={
        "hidden_sizes": [16, 32], "depths": [2, 2], "num_attention_heads": [2, 4], "sr_ratios": [2, 1],
        "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "num_encoder_blocks": 2,
    },
    HieraModel={
        "image_size": [24, 24], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "patch_size": [3, 3],
        "patch_stride": [2, 2], "query_stride": [2, 2], "masked_unit_size": [4, 4], "patch_padding": [1, 1],
        "num_query_pool": 1,
    },
    SamVisionModel={
        "window_size": 2, "global_attn_indexes": [1], "output_channels": 16, "image_size": 40, "mlp_dim": 72,
        "num_pos_feats": 8,
    },
    SiglipVisionModel={},
    CLIPVisionModel={},
    CLIPModel={},
    SiglipModel={},
    ChineseCLIPModel={},
    CLIPSegModel={},
    BlipModel={},
    AltCLIPModel={},
)  # fmt: skip
AUDIO = _family(
    "audio",
    Wav2Vec2Model=_WAVES,
    HubertModel=_WAVES,
    UniSpeechModel=_WAVES,
    WavLMModel={**_WAVES, "num_buckets": 16, "max_bucket_distance": 40},
    SEWModel={**_WAVES, "squeeze_factor": 2},
    Data2VecAudioModel={**_WAVES, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
    ASTModel={"num_mel_bins": 16, "max_length": 32, "frequency_stride": 4, "time_stride": 4, "patch_size": 8},
    WhisperModel={
        **_BART, "max_source_positions": 20, "max_target_positions": 24, "num_mel_bins": 16, "decoder_start_token_id": 1,
    },
)  # fmt: skip

ANIMALS: list[Animal] = [*ENCODERS, *DECODERS, *EXPERTS, *ENCODER_DECODERS, *VISION, *AUDIO]
