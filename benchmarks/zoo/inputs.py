"""Inputs of the zoo, as a DataLoader gives them: real images and clips, token sequences of different lengths, sounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from anybit.sources.images import ImageFolder
from anybit.sources.preprocessing import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """Source of inputs: a folder of images (None: scikit-learn's digits, upsampled), and a random seed."""

    images: Path | None = None
    seed: int = 0

    def normalized_images(self, count: int, size: int) -> Tensor:
        """Return real images, normalized: float [count, 3, size, size]."""
        if self.images is None:
            return _digits(count, size)
        folder = ImageFolder(self.images, Preprocessing(MEAN, STD, size=size, resize=size))
        indices = torch.linspace(0, len(folder) - 1, count).long().tolist()
        items = [folder[index] for index in indices]
        return torch.stack([item[0] if folder.labelled else item for item in items])

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _digits(count: int, size: int) -> Tensor:
    from sklearn.datasets import load_digits

    scans = torch.from_numpy(load_digits().images[: 3 * count]).float().reshape(count, 3, 8, 8) / 16  # one per colour channel
    images = interpolate(scans, (size, size), mode="bilinear")
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@dataclass(frozen=True)
class Inputs:
    """Describe the inputs of a network.

    keyword    name of the images' argument; None: images are a positional argument
    second     name of a second image's argument: the same image, shifted by two pixels
    size       side of an image in pixels; 0: no images
    frames     number of frames of a clip [3, frames, size, size] (with `frames_first`, [frames, 3, size, size]); 0: a single image
    channels   channels of an image
    vocabulary number of tokens; those from 5 on are drawn; 0: no text;   padding  the padding token
    shortest, longest  length of a text in tokens; padded on the right, with a mask
    decoder    length of a decoder's input in tokens; 0: none
    sounds     greatest length of a waveform; 0: none;   masked  whether lengths differ and come with a mask
    spectrum   shape of a spectrogram (bins, frames)
    more       other arguments: name -> a tensor, the same for every sample
    """

    keyword: str | None = None
    second: str | None = None
    size: int = 0
    frames: int = 0
    frames_first: bool = False
    channels: int = 3
    vocabulary: int = 0
    padding: int = 0
    shortest: int = 5
    longest: int = 24
    decoder: int = 0
    sounds: int = 0
    masked: bool = True
    spectrum: Sequence[int] = ()
    spectrum_keyword: str = "input_features"
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def loader(self, source: Source, count: int = 16) -> DataLoader:
        """Draw `count` samples and load them as the libraries' own examples do: sequences are padded to the longest of a batch."""
        items = self._items(source, count)
        if not isinstance(items[0], dict):
            return DataLoader(items, batch_size=8)
        return DataLoader(items, batch_size=8, collate_fn=self.padded)

    def padded(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Collate items into a batch, padding sequences to the longest."""
        fill = {"input_ids": self.padding}
        return {
            key: torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True, padding_value=fill.get(key, 0))
            for key in items[0]
        }

    def _items(self, source: Source, count: int) -> list[Any]:
        if self.keyword is None and self.size:
            return list(self._views(source, count))
        generator = source.generator()
        columns = {**self._images(source, count), **self._texts(generator, count), **self._sounds(generator, count)}
        columns |= {name: [value] * count for name, value in self.more.items()}
        return [{name: values[index] for name, values in columns.items()} for index in range(count)]

    def _images(self, source: Source, count: int) -> dict[str, Any]:
        if not self.size:
            return {}
        views = self._views(source, count)
        return {str(self.keyword): views} | ({self.second: views.roll((2, 2), (-2, -1))} if self.second else {})

    def _views(self, source: Source, count: int) -> Tensor:
        images = source.normalized_images(count, self.size)
        images = images.mean(1, keepdim=True) if self.channels == 1 else images
        if not self.frames:
            return images
        return torch.stack([images.roll(2 * shift, -1) for shift in range(self.frames)], 1 if self.frames_first else 2)

    def _texts(self, generator: torch.Generator, count: int) -> dict[str, Any]:
        """Draw tokens distributed like words: the probability of a token falls with its rank."""
        texts: dict[str, Any] = {}
        weights = 1 / torch.arange(1.0, max(self.vocabulary - 5, 0) + 1)
        if self.vocabulary:
            lengths = torch.randint(self.shortest, self.longest + 1, (count,), generator=generator).tolist()
            tokens = [5 + torch.multinomial(weights, length, True, generator=generator) for length in lengths]
            texts["input_ids"] = [torch.cat([torch.tensor([3]), one, torch.tensor([2])]) for one in tokens]
            texts["attention_mask"] = [torch.ones_like(one) for one in texts["input_ids"]]
        if self.decoder:
            vocabulary = weights if self.vocabulary else torch.ones(50)
            texts["decoder_input_ids"] = [5 + torch.multinomial(vocabulary, self.decoder, True, generator=generator) for _ in range(count)]
        return texts

    def _sounds(self, generator: torch.Generator, count: int) -> dict[str, Any]:
        """Draw fading chords with noise, as waveforms or as their spectrograms."""
        sounds: dict[str, Any] = {}
        if self.sounds:
            shortest = self.sounds // 2 if self.masked else self.sounds
            lengths = torch.randint(shortest, self.sounds + 1, (count,), generator=generator).tolist()
            sounds["input_values"] = [_chord(length, generator) for length in lengths]
            if self.masked:
                sounds["attention_mask"] = [torch.ones(length, dtype=torch.int64) for length in lengths]
        if self.spectrum:
            bins, frames = self.spectrum
            waves = torch.stack([_chord(160 * (frames + 1), generator) for _ in range(count)])
            power = torch.stft(waves, 400, 160, window=torch.hann_window(400), return_complex=True).abs().square()[..., :frames]
            levels = interpolate(power[:, None], (bins, frames), mode="area")[:, 0].clamp_min(1e-8).log10()
            sounds[self.spectrum_keyword] = list((levels.clamp_min(float(levels.max()) - 8) + 4) / 4)
        return sounds


def _chord(length: int, generator: torch.Generator) -> Tensor:
    seconds = torch.arange(length) / 16000
    tones = 100 * 2 ** (5 * torch.rand(4, 1, generator=generator))
    wave = (torch.sin(2 * torch.pi * tones * seconds) * torch.exp(-20 * torch.rand(4, 1, generator=generator) * seconds)).sum(0)
    wave = wave + 0.05 * torch.randn(length, generator=generator)
    return (wave - wave.mean()) / wave.std()


def images(size: int, **more: Any) -> Inputs:
    """Describe inputs that are images of this size, given by position."""
    return Inputs(size=size, **more)
