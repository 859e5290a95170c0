"""Which tile and how many splits the GPU kernel takes: data and two small rules, no Triton.

Every entry is compiled by the tests without a spilled register. None has been timed yet: of the variants, the plain one
(nested loops, pointer loads) is the choice. Pass ``config=`` or ``splits=`` to the function in ``triton.py`` to force
another.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One way to run the kernel.

    Attributes:
        flat: one pipelined loop over (sample, token block), which does not drain between samples, instead of two nested
            ones.
        tma: operands come through tensor descriptors, which Hopper's copy engine reads; halves only, and where a
            descriptor cannot describe a tensor, pointers are used after all.
    """

    BLOCK_O: int
    BLOCK_I: int
    BLOCK_T: int
    num_warps: int
    num_stages: int
    flat: bool = False
    tma: bool = False

    @property
    def elements(self) -> int:
        return self.BLOCK_O * self.BLOCK_I


# By architecture and operand type. Hopper's matrix units read deep tiles from shared memory; others hold operands in
# registers beside the two accumulators. "narrow" is for weights of few rows or columns, "short" for few tokens.
TABLE: dict[tuple[str, str], dict[str, Config]] = {
    ("sm_80", "half"): {
        "wide": Config(128, 128, 32, 8, 4),
        "narrow": Config(64, 64, 32, 4, 4),
        "short": Config(128, 128, 16, 8, 3),
    },
    ("sm_90", "half"): {
        "wide": Config(128, 128, 64, 8, 3),
        "narrow": Config(64, 64, 64, 4, 4),
        "short": Config(128, 128, 32, 8, 3),
    },
    ("gfx942", "half"): {
        "wide": Config(128, 128, 32, 8, 2),
        "narrow": Config(64, 64, 32, 4, 2),
        "short": Config(128, 128, 16, 8, 2),
    },
    ("sm_80", "float"): {"wide": Config(64, 128, 16, 8, 3), "narrow": Config(64, 64, 16, 4, 3)},
    ("sm_90", "float"): {"wide": Config(64, 128, 16, 8, 3), "narrow": Config(64, 64, 16, 4, 3)},
    ("gfx942", "float"): {"wide": Config(64, 128, 16, 8, 2), "narrow": Config(64, 64, 16, 4, 2)},
    ("interpreter", "half"): {"wide": Config(32, 32, 16, 4, 2)},
    ("interpreter", "float"): {"wide": Config(32, 32, 16, 4, 2)},
}

# What benchmarks time against "wide"; compiled by the tests, too.
VARIANTS: dict[tuple[str, str], dict[str, Config]] = {
    ("sm_80", "half"): {"flat": Config(128, 128, 32, 8, 4, flat=True)},
    ("sm_90", "half"): {
        "flat": Config(128, 128, 64, 8, 3, flat=True),
        "tma": Config(128, 128, 64, 8, 4, tma=True),
        "tma flat": Config(128, 128, 64, 8, 4, flat=True, tma=True),
    },
    ("gfx942", "half"): {"flat": Config(128, 128, 32, 8, 2, flat=True)},
}

NARROW = 64
"""Weights with no more rows, or columns, than this take the small tile: more of the large one would be empty."""

SHORT = 32
"""Samples of no more tokens take the tile that is not as deep."""

FLOPS_PER_BYTE = 128
"""Matrix operations in the time of one byte of memory traffic, at 60 % of the peak of an A100 (92) or an H100 (177)."""

MAX_SPLITS = 16


def choose_config(architecture: str, operands: str, T: int, O: int, I: int) -> Config:  # noqa: E741
    """The tile for a weight of O × I and samples of T tokens."""
    configs = TABLE[architecture, operands]
    kind = "narrow" if min(O, I) <= NARROW else "short" if T <= SHORT else "wide"
    return configs.get(kind, configs["wide"])


def choose_splits(config: Config, processors: int, heads: int, N: int, T: int, O: int, I: int) -> int:  # noqa: E741
    """Into how many groups the samples are cut, each summed by programs of its own.

    Programs run in waves of one for every multiprocessor, and a wave lasts as long as its samples' products; more
    groups fill waves that a weight of few tiles leaves half empty, but their sums are written and read once more.
    """
    tiles = heads * -(-O // config.BLOCK_O) * -(-I // config.BLOCK_I)
    product = 2 * T * config.elements

    def cost(splits: int) -> int:
        waves = -(-tiles * splits // processors)
        traffic = 8 * splits * heads * O * I if splits > 1 else 0
        return waves * -(-N // splits) * product * processors + traffic * FLOPS_PER_BYTE

    return min(range(1, max(1, min(N, MAX_SPLITS)) + 1), key=cost)
