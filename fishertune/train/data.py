"""From the configuration's data section to data sets, and from data sets to batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fishertune.segmentation.datasets.base import Sample, SegmentationDataset
from fishertune.segmentation.transforms import AugmentConfig, augment
from fishertune.train.seeds import generator

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RunData:
    """The data sets of one run. Only ``train`` and ``validation`` may steer anything."""

    train: SegmentationDataset
    validation: SegmentationDataset
    unseen: dict[str, SegmentationDataset]
    classes: tuple[str, ...]


class BatchStream:
    """Endless shuffled batches; batch ``step`` is a pure function of (data set, seed, stage, step).

    Args:
        dataset: labelled images.
        batch_size: images a batch. Larger than the data set is fine: epochs follow one another without a gap.
        seed, stage: name the random stream, so that stages and seeds differ.
        config: the augmentation.
    """

    def __init__(
        self, dataset: SegmentationDataset, batch_size: int, *, seed: int, stage: str, config: AugmentConfig
    ) -> None:
        self._dataset, self._batch_size = dataset, batch_size
        self._seed, self._stage, self._config = seed, stage, config

    def batch(self, step: int) -> tuple[Batch, list[str]]:
        """Images (N, 3, H, W) uint8, labels (N, H, W) int64, and the images' names."""
        first = step * self._batch_size
        samples = [self._sample(position) for position in range(first, first + self._batch_size)]
        images = torch.stack([image for image, _, _ in samples])
        labels = torch.stack([label for _, label, _ in samples])
        return (images, labels.long()), [name for _, _, name in samples]

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, Batch, list[str]]]:
        """Batches ``start`` to ``stop`` - 1; the next one is prepared while the caller works on this one."""
        if start >= stop:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = pool.submit(self.batch, start)
            for step in range(start, stop):
                batch, names = ahead.result()
                if step + 1 < stop:
                    ahead = pool.submit(self.batch, step + 1)
                yield step, batch, names

    def _sample(self, position: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        epoch, place = divmod(position, len(self._dataset))
        order = self._order(epoch)
        sample = self._dataset[int(order[place])]
        draw = generator(self._seed, self._stage, "augment", position)
        image, label = augment(sample.image, sample.label, self._config, draw)
        return image, label, sample.name

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(len(self._dataset), generator=generator(self._seed, self._stage, "order", epoch))


class InMemory:
    """Keeps samples once they were read, as many as ``budget`` bytes hold; the others are read anew each time."""

    def __init__(self, dataset: SegmentationDataset, budget: int = 1 << 30) -> None:
        self._dataset = dataset
        self._samples: dict[int, Sample] = {}
        self._left = budget

    @property
    def classes(self) -> tuple[str, ...]:
        return self._dataset.classes

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> Sample:
        if index in self._samples:
            return self._samples[index]
        sample = self._dataset[index]
        size = sample.image.nbytes + sample.label.nbytes
        if size <= self._left:
            self._samples[index] = sample
            self._left -= size
        return sample
