"""Every Hugging Face head: one row per prediction, without padding, for any inputs and outputs of the model."""

import json
from functools import cache

import pytest
import torch
import transformers
from language import SMALL as SIZES
from language import WORDS, folder, inputs, sentences, tokenizer
from torch import Tensor, nn

import anybit
from anybit.data.batches import Batch, predict
from anybit.data.samples import Samples
from anybit.data.tasks import IGNORED
from anybit.sources.huggingface.attention import adapted
from anybit.sources.huggingface.heads import reader_of
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model

SMALL = SIZES | {"num_hidden_layers": 1}
BERT = {**SMALL, "max_position_embeddings": 40}
IMAGE = {**SMALL, "vocab_size": None, "image_size": 16, "patch_size": 8}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_target_positions": 16}
CLIP = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 20, "projection_dim": 8}
SEGFORMER = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8}


def clip() -> transformers.CLIPConfig:
    return transformers.CLIPConfig(
        text_config={**SMALL, **CLIP}, vision_config={**IMAGE, "projection_dim": 8}, projection_dim=8
    )  # fmt: skip


def whisper() -> transformers.WhisperConfig:
    encoder = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 6}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 30}
    return transformers.WhisperConfig(**encoder, **DECODER, **marks, max_source_positions=8)


NETWORKS = {
    "tags": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**BERT, num_labels=5)),
    "hidden words": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "image and text": lambda: transformers.CLIPModel(clip()),
    "projected image": lambda: transformers.CLIPVisionModelWithProjection(clip().vision_config),
    "segmentation": lambda: transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SEGFORMER, num_labels=3)),
    "detection": lambda: transformers.YolosForObjectDetection(
        transformers.YolosConfig(**{**IMAGE, "image_size": [16, 16]}, num_detection_tokens=4, num_labels=2)
    ),
    "map of features": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ),
    "speech": lambda: transformers.WhisperForConditionalGeneration(whisper()),
    "of no task": lambda: transformers.BertForPreTraining(transformers.BertConfig(**BERT)),
}  # fmt: skip
PREDICTIONS = {
    "tags": ("token-classification", (-1, 5)), "hidden words": ("masked-language-model", (-1, 64)),
    "image and text": ("embedding", (6, 16)),
    "projected image": ("embedding", (6, 8)), "segmentation": ("regression", (6, 3, 8, 8)), "detection": ("regression", (6, 4, 7)),
    "map of features": ("embedding", (6, 8)), "speech": ("sequence-to-sequence", (-1, 30)), "of no task": ("regression", (-1, 64)),
}  # fmt: skip
"""Kind -> (task, shape of what is read); -1: as many as the inputs have tokens."""


@cache
def network(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return adapted(NETWORKS[kind]().eval())


def batch_for(kind: str) -> Batch:
    generator = torch.Generator().manual_seed(3)
    if kind in ("projected image", "segmentation", "detection", "map of features"):
        return Batch(torch.randn(6, 3, 32 if kind in ("segmentation", "map of features") else 16, 32 if kind == "segmentation" else 16))
    if kind == "speech":
        mask = (torch.arange(5) < torch.tensor([5, 3, 4, 5, 1, 2])[:, None]).long()
        tokens = torch.randint(3, 30, (6, 5), generator=generator)
        sounds = torch.randn(6, 6, 16, generator=generator)
        return Batch({"input_features": sounds, "decoder_input_ids": tokens, "decoder_attention_mask": mask})
    words = dict(inputs("bert").inputs)
    if kind == "image and text":
        words.pop("token_type_ids")
        return Batch({**words, "pixel_values": torch.randn(6, 3, 16, 16, generator=generator)})
    return Batch(words)


def rows(batch: Batch) -> list:
    """The batch's samples, as in a user's data set."""
    if isinstance(batch.inputs, Tensor):
        return list(batch.inputs)
    return [{name: tensor[index] for name, tensor in batch.inputs.items()} for index in range(len(batch))]


@pytest.mark.parametrize("kind", NETWORKS)
def test_reads_every_head(kind):
    model, batch = network(kind), batch_for(kind)
    reader = reader_of(model)
    task, shape = PREDICTIONS[kind]
    assert reader.task == task
    batch = Batch(batch.inputs, None, reader)
    tokens = batch.mask if kind != "speech" else batch.inputs["decoder_attention_mask"].bool()
    read = predict(model, batch)
    assert tuple(read.shape) == tuple(int(tokens.sum()) if size == -1 else size for size in shape)
    inspected = anybit.inspect(model, rows(batch), export=False)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert sum(torch.Size(layer["weight"]).numel() for layer in inspected["layers"].values()) > 0.8 * weights


@pytest.mark.parametrize("kind", ["detection", "speech", "hidden words"])
def test_calibrates_every_head(kind):
    result = anybit.calibrate(
        network(kind), rows(batch_for(kind)), pipeline="light", weight_bits=(8,), activation_bits=(8,), batch_size=2, cache=False
    )
    assert result.about["task"] == PREDICTIONS[kind][0]
    assert result.report["schemes"][0]["measured"] < 0.02


def test_padding_changes_no_prediction():
    model = network("tags")
    one, other = (Batch(inputs("bert", padding=padding).inputs, None, reader_of(model)) for padding in (0, 7))
    assert torch.allclose(predict(model, one), predict(model, other), atol=1e-5)


def test_token_labels_match_the_rows():
    model, batch = network("tags"), batch_for("tags")
    reader = reader_of(model)
    labels = torch.arange(batch.mask.numel()).view(batch.mask.shape)
    data = [{**row, "labels": label} for row, label in zip(rows(batch), labels, strict=True)]
    seen = torch.cat([one.labels for one in Samples(data, True, reader=reader).batches(4)])
    assert torch.equal(seen, labels[batch.mask])


# Texts


def saved(model: nn.Module, place, mask: bool = False) -> str:
    model.save_pretrained(place)
    words = tokenizer()
    if mask:
        words.add_special_tokens({"mask_token": "[UNK]"})
    words.save_pretrained(place)
    return f"hf:{place}"


def test_word_labels_are_on_first_tokens(tmp_path):
    model = load_model(saved(NETWORKS["tags"](), tmp_path / "net"))
    data = [{"text": " ".join(WORDS[:count]), "label": list(range(count))} for count in (3, 1, 4)]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, data)))
    samples = load_data(str(tmp_path / "tags.jsonl"), model=model)
    batch = next(samples.batches(3))
    assert batch.labels.tolist() == [IGNORED, 0, 1, 2, IGNORED, IGNORED, 0, IGNORED, IGNORED, 0, 1, 2, 3, IGNORED]
    assert anybit.evaluate(model, samples)["tokens"] == 14
    (tmp_path / "tags.jsonl").write_text(json.dumps({"text": "word1 word2", "label": "1"}))
    with pytest.raises(anybit.InvalidInput, match="row 1 has 2 words"):
        load_data(str(tmp_path / "tags.jsonl"), model=model)


def test_masked_words_are_the_same_in_any_order(tmp_path):
    model = load_model(saved(NETWORKS["hidden words"](), tmp_path / "net", mask=True))
    (tmp_path / "texts.txt").write_text("\n".join(sentences(20)))
    samples = load_data(str(tmp_path / "texts.txt"), model=model)
    whole = next(samples.batches(20))
    hidden = whole.labels != IGNORED
    tokens = whole.inputs["input_ids"][whole.mask]
    assert (tokens[hidden] == 1).all() and (whole.labels[hidden] >= 4).all() and 20 <= hidden.sum() < 0.3 * len(hidden)
    alone = [next(samples.subset([index]).batches(1)).labels for index in range(20)]
    assert torch.equal(torch.cat(alone), whole.labels)
    assert {"perplexity", "top1"} <= set(anybit.evaluate(model, samples))


def test_image_array_is_read_as_the_head_requires(tmp_path):
    import numpy as np

    np.savez(tmp_path / "images.npz", x=np.zeros((4, 16, 16, 3), np.uint8))
    samples = load_data(str(tmp_path / "images.npz"), model=network("detection"))
    assert samples.reader is not None and samples.reader.task == "regression"


def test_saved_head_loads_whatever_the_task_is_called(tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=3))
    model.save_pretrained(tmp_path)
    assert type(load_model(f"hf:{tmp_path}", None, "classification")).__name__ == "ViTForImageClassification"
    assert (
        type(load_model(f"hf:{folder('bert', tmp_path / 'bert')}", None, "token-classification")).__name__ == "BertForTokenClassification"
    )
