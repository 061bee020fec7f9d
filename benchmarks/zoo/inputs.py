"""Inputs of the zoo: real images and clips, token sequences of different lengths, sounds; in the form that a loader gives."""

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

    def pictures(self, count: int, size: int) -> Tensor:
        """Return real pictures, normalized: float [count, 3, size, size]."""
        if self.images is None:
            return _digits(count, size)
        folder = ImageFolder(self.images, Preprocessing(MEAN, STD, size=size, resize=size))
        places = torch.linspace(0, len(folder) - 1, count).long().tolist()
        items = [folder[place] for place in places]
        return torch.stack([item[0] if folder.labelled else item for item in items])

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _digits(count: int, size: int) -> Tensor:
    from sklearn.datasets import load_digits

    scans = torch.from_numpy(load_digits().images[: 3 * count]).float().reshape(count, 3, 8, 8) / 16  # one per colour
    pictures = interpolate(scans, (size, size), mode="bilinear")
    return (pictures - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@dataclass(frozen=True)
class Inputs:
    """Describe the inputs of a network.

    keyword    name of the pictures' argument; None: they are given by place
    second     name of another picture's argument: the same, moved by two pixels
    size       pixels of a picture's side; 0: no pictures
    frames     of a clip [3, frames, size, size] (or, with `frames_first`, [frames, 3, size, size]); 0: a still picture
    channels   of a picture, where not 3
    vocabulary tokens from 5 on are drawn below it; 0: no text;   padding  the padding's token
    shortest, longest  tokens of a text; padded on the right, with a mask of what is real
    decoder    tokens of a decoder's input, 0: none
    sounds     numbers of a waveform at most, with a mask; 0: none
    spectrum   (bins, frames) of a spectrogram's shape
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
        """Draw `count` samples, loaded as the libraries' own examples load them: sequences are padded to a batch's longest."""
        items = self._items(source, count)
        if not isinstance(items[0], dict):
            return DataLoader(items, batch_size=8)
        return DataLoader(items, batch_size=8, collate_fn=self.padded)

    def padded(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Make a batch of items, padding sequences to the longest."""
        fill = {"input_ids": self.padding}
        return {
            key: torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True, padding_value=fill.get(key, 0))
            for key in items[0]
        }

    def _items(self, source: Source, count: int) -> list[Any]:
        if self.keyword is None and self.size:
            return list(self._views(source, count))
        generator = source.generator()
        columns = {**self._pictures(source, count), **self._texts(generator, count), **self._sounds(generator, count)}
        columns |= {name: [value] * count for name, value in self.more.items()}
        return [{name: values[index] for name, values in columns.items()} for index in range(count)]

    def _pictures(self, source: Source, count: int) -> dict[str, Any]:
        if not self.size:
            return {}
        views = self._views(source, count)
        return {str(self.keyword): views} | ({self.second: views.roll((2, 2), (-2, -1))} if self.second else {})

    def _views(self, source: Source, count: int) -> Tensor:
        pictures = source.pictures(count, self.size)
        pictures = pictures.mean(1, keepdim=True) if self.channels == 1 else pictures
        if not self.frames:
            return pictures
        return torch.stack([pictures.roll(2 * shift, -1) for shift in range(self.frames)], 1 if self.frames_first else 2)

    def _texts(self, generator: torch.Generator, count: int) -> dict[str, Any]:
        """Tokens distributed like words: the probability of a token falls with its rank."""
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
        """Fading chords with noise."""
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
    places = torch.arange(length) / 16000
    tones = 100 * 2 ** (5 * torch.rand(4, 1, generator=generator))
    wave = (torch.sin(2 * torch.pi * tones * places) * torch.exp(-20 * torch.rand(4, 1, generator=generator) * places)).sum(0)
    wave = wave + 0.05 * torch.randn(length, generator=generator)
    return (wave - wave.mean()) / wave.std()


def pictures(size: int, **more: Any) -> Inputs:
    """Return real images, normalized: float [count, 3, size, size]."""
    return Inputs(size=size, **more)
