"""Imported by every Python that starts with this folder on PYTHONPATH: all seeds become others."""

import random

import torch

OFFSET = 7000  # is added to the seeds of PyTorch; those of random.Random are often texts, and get words added
manual_seed = torch.manual_seed


class Generator(torch.Generator):
    def manual_seed(self, seed: int) -> "Generator":
        return super().manual_seed(int(seed) + OFFSET)


class Random(random.Random):
    def __init__(self, seed: object = None) -> None:
        super().__init__(None if seed is None else f"{seed} at other seeds")


torch.manual_seed = lambda seed: manual_seed(int(seed) + OFFSET)
torch.Generator = Generator
random.Random = Random
