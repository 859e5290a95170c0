"""The rules by which the per-sample product is cut: no GPU and no Triton needed."""

import pytest

from fishertune_kernels.per_sample_squared_grad.tiles import (
    NARROW,
    SHORT,
    TABLE,
    VARIANTS,
    choose_config,
    choose_splits,
)


def test_a_weight_of_few_tiles_is_split_until_the_card_is_full() -> None:
    """1024 × 1024 has 64 tiles of 128 × 128: half of an H100's 132 multiprocessors would have nothing to do."""
    config = TABLE["sm_90", "half"]["wide"]
    assert choose_splits(config, 132, 1, N=8, T=1369, O=1024, I=1024) == 2
    assert choose_splits(config, 132, 4, N=8, T=1369, O=1024, I=1024) == 1  # four heads fill it
    assert choose_splits(config, 132, 1, N=1, T=1369, O=1024, I=1024) == 1  # one sample has nothing to split
    assert choose_splits(config, 132, 1, N=8, T=1, O=1024, I=1024) == 1  # writing the parts would cost more


@pytest.mark.parametrize("tokens", [196, 1369, 4096])
@pytest.mark.parametrize("shape", [(1024, 1024), (3072, 1024), (4096, 1024), (1280, 1280), (5120, 1280), (64, 64)])
def test_a_split_never_makes_the_longest_program_longer(tokens: int, shape: tuple[int, int]) -> None:
    config = choose_config("sm_90", "half", tokens, *shape)
    for processors in (108, 132):
        splits = choose_splits(config, processors, 1, 8, tokens, *shape)
        tiles = -(-shape[0] // config.BLOCK_O) * -(-shape[1] // config.BLOCK_I)

        def busy(splits: int, tiles: int = tiles, processors: int = processors) -> int:
            return -(-tiles * splits // processors) * -(-8 // splits)

        assert 1 <= splits <= 8 and busy(splits) <= busy(1)


def test_narrow_weights_and_short_samples_take_smaller_tiles() -> None:
    for architecture, operands in TABLE:
        wide, narrow = (choose_config(architecture, operands, 999, size, 1024) for size in (NARROW + 1, NARROW))
        assert narrow.elements <= wide.elements
        short = choose_config(architecture, operands, SHORT, 1024, 1024)
        assert short.elements == wide.elements and short.BLOCK_T <= wide.BLOCK_T
    assert choose_config("sm_90", "half", 999, 1024, 19).BLOCK_I == 64
    assert choose_config("sm_90", "half", 1, 1024, 1024).BLOCK_T == 32


def test_descriptors_are_for_hopper_alone() -> None:
    """Elsewhere the compiler emulates them, badly."""
    for (architecture, operands), configs in TABLE.items():
        variants = VARIANTS.get((architecture, operands), {}).values()
        assert architecture == "sm_90" or not any(config.tma for config in [*configs.values(), *variants])
