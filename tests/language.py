"""Tiny random transformers, a tokenizer of a few words, and sentences of these, also as Hugging Face folders."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from anybit.data.batches import Batch
from anybit.sources.huggingface.attention import adapted

WORDS = [f"word{number}" for number in range(60)]
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 64}
MARKS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def make(kind: str, seed: int = 0, layers: int = 2) -> nn.Module:
    """A network of this family in evaluation mode, with varied biases and norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _FAMILIES[kind](layers).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * (1 if parameter.dim() > 1 else 0.3))
    return model


_FAMILIES = {
    "bert": lambda layers: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, num_hidden_layers=layers, max_position_embeddings=40)
    ),
    "bert embedding": lambda layers: transformers.BertModel(
        transformers.BertConfig(**SMALL, num_hidden_layers=layers, max_position_embeddings=40)
    ),
    "bert answers": lambda layers: transformers.BertForQuestionAnswering(
        transformers.BertConfig(**SMALL, num_hidden_layers=layers, max_position_embeddings=40)
    ),
    "gpt2": lambda layers: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=layers, n_head=4, n_inner=24, vocab_size=64, n_positions=40, **MARKS)
    ),
    "llama": lambda layers: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL, num_hidden_layers=layers, num_key_value_heads=2, max_position_embeddings=40, tie_word_embeddings=True, **MARKS
        )
    ),
    "vit": lambda layers: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "vocab_size": None}, num_hidden_layers=layers, image_size=16, patch_size=8, num_labels=5)
    ),
}
FAMILIES = ("bert", "gpt2", "llama", "vit")


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A tokenizer with one token per word of WORDS, between start and end tokens."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **marks)


def folder(kind: str, path: Path, seed: int = 0, layers: int = 2) -> Path:
    """Save the network and its tokenizer."""
    make(kind, seed, layers).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def sentences(count: int, seed: int = 1, most: int = 12) -> list[str]:
    """Sentences of 1 to `most` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths]


def write_tsv(path: Path, count: int, seed: int = 1) -> Path:
    """Write labelled sentences."""
    rows = [f"{number % 2}\t{sentence}" for number, sentence in enumerate(sentences(count, seed))]
    path.write_text("\n".join(["label\tsentence", *rows]) + "\n", encoding="utf8")
    return path


def inputs(kind: str, count: int = 6, padding: int = 0) -> Batch:
    """A batch for `make(kind)`: images, or sentences padded by `padding` beyond the longest with arbitrary tokens."""
    if kind == "vit":
        return Batch(torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    tokens = dict(tokenizer()(sentences(count), padding=True, return_tensors="pt", return_token_type_ids=kind.startswith("bert")))
    mask = tokens["attention_mask"]
    arbitrary = torch.randint(4, 64, (count, mask.shape[1] + padding), generator=torch.Generator().manual_seed(2))
    return Batch({name: _padded(name, tensor, mask, arbitrary, padding) for name, tensor in tokens.items()})


def _padded(name: str, tensor: Tensor, mask: Tensor, arbitrary: Tensor, padding: int) -> Tensor:
    longer = nn.functional.pad(tensor, (0, padding))
    return torch.where(nn.functional.pad(mask, (0, padding)).bool(), longer, arbitrary) if name == "input_ids" else longer


def covered(kind: str, layers: int = 2) -> nn.Module:
    """The network as adapted by anybit."""
    return adapted(make(kind, layers=layers))
