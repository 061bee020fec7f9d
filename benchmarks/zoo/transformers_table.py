"""Networks of transformers in small configurations, by the name of their class."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.inputs import Inputs
from benchmarks.zoo.network import ZooNetwork

Settings = Mapping[str, Any]

TEXT = Inputs(vocabulary=199)
IMAGE = Inputs(keyword="pixel_values", size=64)
WORDS = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2}
POSITIONS = {"max_position_embeddings": 64}
WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ENCODER = {**WORDS, **POSITIONS, **WIDTH}
DECODER = {**ENCODER, "num_key_value_heads": 2, "use_cache": False}
CALLED_D = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQUENCES = {
    **WORDS,
    **POSITIONS,
    **CALLED_D,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "use_cache": False,
    "decoder_start_token_id": 2,
}
PATCHES = {**WIDTH, "image_size": 64, "patch_size": 16}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128]}
SOUNDS = {
    **WIDTH, "vocab_size": 32, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def configured(values: Any) -> Any:
    """Create a configuration from (its class, its settings), including those nested in its settings."""
    if isinstance(values, tuple) and len(values) == 2 and isinstance(values[0], str) and isinstance(values[1], Mapping):
        import transformers

        return getattr(transformers, values[0])(**{name: configured(value) for name, value in values[1].items()})
    return values


def build(name: str, configuration: str, settings: Settings) -> nn.Module:
    """Create the class with random weights from its configuration."""
    import transformers

    return getattr(transformers, name)(configured((configuration, settings))).eval()


def entries(prefix: str, heads: str, settings: Settings, inputs: Inputs, configuration: str | None = None) -> dict[str, ZooNetwork]:
    """Create an entry for each head (a suffix of class names) of one family."""
    make: Callable[[str], ZooNetwork] = lambda name: ZooNetwork(  # noqa: E731
        partial(build, name, configuration or f"{prefix}Config", settings), inputs
    )
    return {prefix + head: make(prefix + head) for head in heads.split()}


FOUR = "ForSequenceClassification ForTokenClassification ForQuestionAnswering ForMaskedLM"
ONE = "ForSequenceClassification"
CAUSAL = "ForCausalLM"
PADDED_BY_ONE = replace(TEXT, padding=1)
ROBERTA = {**ENCODER, "pad_token_id": 1}
DISTIL = {**WORDS, **POSITIONS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}

ENCODERS = {
    **entries("Bert", FOUR, ENCODER, TEXT),
    **entries("Roberta", FOUR, ROBERTA, PADDED_BY_ONE),
    **entries("DistilBert", FOUR, DISTIL, TEXT),
    **entries("Albert", FOUR, {**ENCODER, "embedding_size": 32}, TEXT),
    **entries("Electra", FOUR, {**ENCODER, "embedding_size": 32}, TEXT),
    **entries("MPNet", FOUR, ROBERTA, PADDED_BY_ONE),
    **entries("DebertaV2", FOUR, {**DEBERTA, "share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"}, TEXT),
    **entries("Deberta", ONE, DEBERTA, TEXT),
    **entries("Bert", "Model ForNextSentencePrediction", ENCODER, TEXT),
    **entries("XLMRoberta", ONE, ROBERTA, PADDED_BY_ONE),
    **entries("Camembert", "ForTokenClassification", ROBERTA, PADDED_BY_ONE),
    **entries("ModernBert", ONE + " ForMaskedLM", {**ENCODER, "global_attn_every_n_layers": 2, "local_attention": 16}, TEXT),
    **entries("MobileBert", ONE, {**ENCODER, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}, TEXT),
    **entries("SqueezeBert", ONE, {**ENCODER, "embedding_size": 64}, TEXT),
    **entries("RoFormer", ONE, ENCODER, TEXT),
    **entries("ConvBert", ONE, {**ENCODER, "embedding_size": 64, "head_ratio": 2}, TEXT),
    **entries("FNet", ONE, ENCODER, TEXT),
    **entries("Nystromformer", ONE, {**ENCODER, "num_landmarks": 8, "segment_means_seq_len": 8}, TEXT),
    **entries("Funnel", ONE, {**WORDS, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128}, TEXT),
    **entries("XLNet", ONE, {**WORDS, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}, TEXT),
    **entries("Esm", "ForMaskedLM", {**ROBERTA, "mask_token_id": 4}, PADDED_BY_ONE),
    **entries("Canine", ONE, {**WIDTH, "num_hash_buckets": 64, "local_transformer_stride": 16, **POSITIONS, "pad_token_id": 0}, TEXT),
    **entries("Longformer", ONE, {**ROBERTA, "attention_window": 8}, PADDED_BY_ONE),
    **entries("BigBird", ONE, {**ENCODER, "attention_type": "original_full"}, TEXT),
    **entries("LayoutLM", ONE, ENCODER, TEXT),
    **entries("NomicBert", ONE, ENCODER, TEXT),
}
"""Text encoders: the most common with `FOUR` heads, the others with one."""

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {**WORDS, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False}

DECODERS = {
    **entries("GPT2", "LMHeadModel " + ONE, GPT2, TEXT),
    **entries("OPT", CAUSAL, {**DECODER, "ffn_dim": 128, "word_embed_proj_dim": 64}, TEXT),
    **entries("Llama", CAUSAL + " " + ONE, DECODER, TEXT),
    **entries("Qwen2", CAUSAL, DECODER, TEXT),
    **entries("Qwen3", CAUSAL, {**DECODER, "head_dim": 16}, TEXT),
    **entries("Gemma", CAUSAL, {**DECODER, "head_dim": 16}, TEXT),
    **entries("Gemma2", CAUSAL, {**DECODER, "head_dim": 16, "sliding_window": 16}, TEXT),
    **entries("Gemma3", CAUSAL, {**DECODER, "head_dim": 16, "sliding_window": 16}, TEXT, "Gemma3TextConfig"),
    **entries("Phi", CAUSAL, DECODER, TEXT),
    **entries("Phi3", CAUSAL, DECODER, TEXT),
    **entries("Mixtral", CAUSAL, {**DECODER, **EXPERTS}, TEXT),
    **entries("Mistral", CAUSAL, {**DECODER, "sliding_window": 16}, TEXT),
    **entries("Qwen2Moe", CAUSAL, {
        **DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    }, TEXT),
    **entries("GptOss", CAUSAL, {**DECODER, **EXPERTS, "head_dim": 16, "sliding_window": 16}, TEXT),
    **entries("GPTNeoX", CAUSAL, DECODER, TEXT),
    **entries("GPTNeo", CAUSAL, {
        **WORDS, **POSITIONS, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "use_cache": False,
    }, TEXT),
    **entries("GPTJ", CAUSAL, {**GPT2, "rotary_dim": 8}, TEXT),
    **entries("Bloom", CAUSAL, {**WORDS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False}, TEXT),
    **entries("Falcon", CAUSAL, DECODER, TEXT),
    **entries("StableLm", CAUSAL, DECODER, TEXT),
    **entries("Olmo2", CAUSAL, DECODER, TEXT),
    **entries("Cohere", CAUSAL, DECODER, TEXT),
    **entries("Granite", CAUSAL, DECODER, TEXT),
    **entries("SmolLM3", CAUSAL, DECODER, TEXT),
    **entries("Starcoder2", CAUSAL, DECODER, TEXT),
    **entries("Mamba", CAUSAL, {**WORDS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False}, TEXT),
}  # fmt: skip
"""Text decoders."""

ENCODED = replace(TEXT, decoder=6)
T5 = {**WORDS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "use_cache": False, "decoder_start_token_id": 0}

SEQUENCE_TO_SEQUENCE = {
    **entries("T5", "ForConditionalGeneration", T5, ENCODED),
    **entries("T5", "EncoderModel", T5, TEXT),
    **entries("Bart", "ForConditionalGeneration", SEQUENCES, ENCODED),
    **entries("Bart", ONE, SEQUENCES, TEXT),
    **entries("Marian", "MTModel", SEQUENCES, ENCODED),
    **entries("Pegasus", "ForConditionalGeneration", SEQUENCES, ENCODED),
    **entries("MBart", "ForConditionalGeneration", SEQUENCES, ENCODED),
    **entries("M2M100", "ForConditionalGeneration", SEQUENCES, ENCODED),
    **entries("MT5", "ForConditionalGeneration", T5, ENCODED),
}
"""Text encoder-decoders."""

CLASSES = "ForImageClassification"
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 4}
SEGFORMER = {**STAGES, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 64}
DETR = {
    **CALLED_D, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 10, "use_timm_backbone": False,
    "use_pretrained_backbone": False, "backbone": None,
    "backbone_config": ("ResNetConfig", {**RESNET, "out_features": ["stage4"]}),
}  # fmt: skip
DINOV2 = ("Dinov2Config", {
    **WIDTH, "image_size": 56, "patch_size": 14, "out_features": ["stage1", "stage2"],
    "reshape_hidden_states": False, "apply_layernorm": True,
})  # fmt: skip

VISION = {
    **entries("ViT", CLASSES + " Model", PATCHES, IMAGE),
    **entries("DeiT", CLASSES, PATCHES, IMAGE),
    **entries("Swin", CLASSES, SWIN, IMAGE),
    **entries("Swinv2", CLASSES, SWIN, IMAGE),
    **entries("ConvNext", CLASSES, STAGES, IMAGE),
    **entries("ConvNextV2", CLASSES, STAGES, IMAGE),
    **entries("Segformer", CLASSES + " ForSemanticSegmentation", SEGFORMER, IMAGE),
    **entries("Yolos", "ForObjectDetection", {**PATCHES, "image_size": [64, 64], "num_detection_tokens": 10}, IMAGE),
    **entries("Detr", "ForObjectDetection", DETR, IMAGE),
    **entries("Beit", CLASSES, PATCHES, IMAGE),
    **entries("Dinov2", CLASSES, {**WIDTH, "image_size": 56, "patch_size": 14}, replace(IMAGE, size=56)),
    **entries("ResNet", CLASSES, RESNET, IMAGE),
    **entries("RegNet", CLASSES, {**RESNET, "layer_type": "y", "groups_width": 16}, IMAGE),
    **entries("Bit", CLASSES, {
        "hidden_sizes": [64, 64, 128, 128], "embedding_size": 32, "depths": [1, 1, 1, 1], "num_groups": 8,
    }, IMAGE),
    **entries("MobileNetV1", CLASSES, {"depth_multiplier": 0.25, "image_size": 64}, IMAGE),
    **entries("MobileNetV2", CLASSES, {"depth_multiplier": 0.35, "image_size": 64}, IMAGE),
    **entries("MobileViT", CLASSES, {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
    }, IMAGE),
    **entries("MobileViTV2", CLASSES, {"image_size": 64, "width_multiplier": 0.25}, IMAGE),
    **entries("PoolFormer", CLASSES, STAGES, IMAGE),
    **entries("PvtV2", CLASSES, {"image_size": 64, "hidden_sizes": [16, 32, 80, 128], "depths": [1, 1, 1, 1]}, IMAGE),
    **entries("Levit", CLASSES, {
        "image_size": 64, "hidden_sizes": [64, 96, 128], "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4], "key_dim": [16, 16, 16],
    }, IMAGE),
    **entries("EfficientNet", CLASSES, {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}, IMAGE),
    **entries("FocalNet", CLASSES, {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]}, IMAGE),
    **entries("Hiera", CLASSES, {
        "image_size": [64, 64], "embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8],
    }, IMAGE),
    **entries("DepthAnything", "ForDepthEstimation", {
        "backbone_config": DINOV2, "reassemble_hidden_size": 64, "patch_size": 14, "neck_hidden_sizes": [16, 32],
        "reassemble_factors": [2, 1], "fusion_hidden_size": 16, "head_hidden_size": 16,
    }, replace(IMAGE, size=56)),
    **entries("ConditionalDetr", "ForObjectDetection", DETR, IMAGE),
    **entries("RTDetr", "ForObjectDetection", {
        "d_model": 64, "encoder_hidden_dim": 64, "encoder_in_channels": [32, 64, 128], "decoder_in_channels": [64, 64, 64],
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_layers": 2, "num_queries": 10, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "backbone_config": ("RTDetrResNetConfig", {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}),
    }, IMAGE),
    **entries("ViTMSN", CLASSES, PATCHES, IMAGE),
    **entries("GLPN", "ForDepthEstimation", {**STAGES, "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 16}, IMAGE),
}  # fmt: skip
"""Networks for images."""

BOTH = replace(TEXT, keyword="pixel_values", size=64)
CLIP_TEXT, CLIP_IMAGE = {**ENCODER, "projection_dim": 32}, {**PATCHES, "projection_dim": 32}
CLIP = {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 32}
SIGLIP = {"text_config": {**ENCODER, "projection_size": 64}, "vision_config": PATCHES}
EQUAL_LENGTH = replace(TEXT, shortest=14, longest=14)
SPECTRUM = Inputs(spectrum=(80, 100), decoder=6)
AST = {**WIDTH, "patch_size": 16, "max_length": 64, "num_mel_bins": 32}

MULTIMODAL = {
    **entries("CLIP", "Model", CLIP, BOTH),
    **entries("CLIP", "TextModelWithProjection", CLIP_TEXT, TEXT, "CLIPTextConfig"),
    **entries("CLIP", "VisionModelWithProjection", CLIP_IMAGE, IMAGE, "CLIPVisionConfig"),
    **entries("CLIP", CLASSES, CLIP, IMAGE),
    **entries("Siglip", "Model", SIGLIP, replace(EQUAL_LENGTH, keyword="pixel_values", size=64)),
    **entries("Siglip", CLASSES, SIGLIP, IMAGE),
    **entries("Vilt", "ForQuestionAnswering", {**ENCODER, **PATCHES, "max_image_length": -1, "num_labels": 10}, BOTH),
    **entries("Blip", "ForImageTextRetrieval", {
        "text_config": {**ENCODER, "encoder_hidden_size": 64}, "vision_config": PATCHES, "projection_dim": 32,
    }, BOTH),
    **entries("ChineseCLIP", "Model", CLIP, BOTH),
    **entries("Whisper", "ForConditionalGeneration", {
        **SEQUENCES, "num_mel_bins": 80, "max_source_positions": 50, "max_target_positions": 16, "suppress_tokens": [],
        "begin_suppress_tokens": None,
    }, SPECTRUM),
    **entries("Whisper", "ForAudioClassification", {**SEQUENCES, "max_source_positions": 50}, replace(SPECTRUM, decoder=0)),
    **entries("Wav2Vec2", "ForCTC " + ONE, SOUNDS, Inputs(sounds=4000)),
    **entries("Hubert", "ForCTC " + ONE, SOUNDS, Inputs(sounds=4000)),
    **entries("WavLM", "ForCTC", {**SOUNDS, "num_buckets": 16, "max_bucket_distance": 32}, Inputs(sounds=4000)),
    **entries("Data2VecAudio", "ForCTC", SOUNDS, Inputs(sounds=4000)),
    **entries("UniSpeech", "ForCTC", {**SOUNDS, "num_ctc_classes": 32}, Inputs(sounds=4000, masked=False)),
    **entries("SEW", "ForCTC", {**SOUNDS, "conv_dim": (32,) * 13, "squeeze_factor": 2}, Inputs(sounds=4000, masked=False)),
    **entries("AST", "ForAudioClassification", AST, Inputs(spectrum=(64, 32), spectrum_keyword="input_values")),
    **entries("Speech2Text", "ForConditionalGeneration", {
        **SEQUENCES, "input_feat_per_channel": 80, "input_channels": 1, "conv_channels": 32, "max_source_positions": 200,
        "max_target_positions": 16,
    }, Inputs(spectrum=(100, 80), decoder=6)),
}  # fmt: skip
"""Networks for texts with images, and for sounds."""

NETWORKS: dict[str, ZooNetwork] = {**ENCODERS, **DECODERS, **SEQUENCE_TO_SEQUENCE, **VISION, **MULTIMODAL}
