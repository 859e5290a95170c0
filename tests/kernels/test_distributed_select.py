"""Selection over shards: two processes must choose what one process chooses from the whole, ties included."""

import datetime
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import fishertune_kernels as fk
from fishertune_kernels.select_threshold import search

WORLD_SIZE = 2
TIMEOUT = datetime.timedelta(seconds=60)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


def cases() -> dict[str, tuple[list[torch.Tensor], list[int]]]:
    """Whole tensors, and how many rows of each the first rank holds."""
    g = torch.Generator().manual_seed(5)
    return {
        "continuous": ([torch.randn(40, 7, generator=g), torch.randn(13, generator=g)], [20, 7]),
        "many ties": ([torch.randint(0, 3, (30, 5), generator=g).float(), torch.ones(9), torch.ones(6, 2)], [11, 9, 0]),
        "all equal": ([torch.zeros(5, 2), -torch.zeros(7)], [2, 4]),
        "a rank without any": ([torch.randn(6, generator=g), torch.empty(0), torch.ones(3)], [0, 0, 0]),
        "half types": ([torch.randn(50, generator=g).bfloat16(), torch.randn(20, generator=g).half()], [10, 19]),
        "float64": ([torch.randn(30, generator=g, dtype=torch.float64).round(decimals=1)], [17]),
        "infinities": ([torch.tensor([math.inf, -math.inf, 0.0, math.inf]), torch.full((4,), -math.inf)], [1, 3]),
        "skewed": ([torch.randn(3000, generator=g), torch.rand(40, 50, generator=g) * 3], [3000, 0]),
    }


def check_every_case(rank: int, group: dist.ProcessGroup) -> None:
    for name, (whole, rows) in cases().items():
        n = sum(tensor.numel() for tensor in whole)
        shards = [tensor[:count] if rank == 0 else tensor[count:] for tensor, count in zip(whole, rows, strict=True)]
        firsts = [0 if rank == 0 else tensor[:count].numel() for tensor, count in zip(whole, rows, strict=True)]
        starts = np.cumsum([0, *(tensor.numel() for tensor in whole)])[:-1]
        flat = np.concatenate([tensor.double().numpy().reshape(-1) for tensor in whole])
        order = np.argsort(-flat, kind="stable")
        for k in sorted({0, 1, n // 7, n // 3, n // 2, n - 1, n}):
            threshold = fk.select_threshold(shards, k, group=group)
            assert threshold.value == fk.select_threshold(whole, k).value, (name, k)
            indices = fk.compact(shards, threshold)
            ours = np.concatenate(
                [start + first + index.numpy() for start, first, index in zip(starts, firsts, indices, strict=True)]
            ).tolist()
            assert len(ours) == threshold.n_greater + threshold.n_ties_kept
            gathered: list[list[int]] = [[] for _ in range(WORLD_SIZE)]
            dist.all_gather_object(gathered, ours)
            assert sorted(itertools.chain(*gathered)) == np.sort(order[:k]).tolist(), (name, k)


def check_sampling(rank: int, group: dist.ProcessGroup) -> None:
    """Every rank tries the same brackets, as many as one process would; also where a rank holds most of the top."""
    search.SMALL, search.LARGEST_SHARE = 1, 1.0
    check_every_case(rank, group)

    tried: list[search.Bracket] = []
    original = search.sampled_bracket
    search.sampled_bracket = lambda *arguments: tried.append(original(*arguments)) or tried[-1]
    reads = []
    collect, settled = torch.ops.fishertune.collect_bracket.default, search.settled
    search.settled = lambda *arguments: reads.append(collect) or settled(*arguments)
    g = torch.Generator().manual_seed(8)
    whole = [torch.randn(20_000, generator=g), torch.rand(100, 50, generator=g)]
    mine = [tensor[: len(tensor) // 5] if rank == 0 else tensor[len(tensor) // 5 :] for tensor in whole]
    scores = [torch.empty_like(tensor) for tensor in mine]
    for k in (1, 1250, 12_000):
        tried.clear()
        reads.clear()
        threshold = fk.select_threshold(mine, k, group=group)
        assert threshold.value == torch.cat([tensor.flatten() for tensor in whole]).topk(k).values[-1]
        assert len(tried) == len(reads) == 1
        brackets: list[search.Bracket] = [tried[0]] * WORLD_SIZE
        dist.all_gather_object(brackets, tried[0])
        assert brackets[0] == brackets[1]
        assert fk.dr_fim_threshold_(scores, mine, None, k, count=1, kind="f", c=0.0, group=group) == threshold
        assert len(reads) == 2

    # Rank 0 has more candidates than the room, rank 1 has not: both must go on to the exact key.
    search.sampled_bracket = lambda *_: search.Bracket(0x80000000, search.LAST_KEY, 5)
    lone = torch.rand(50) if rank == 0 else torch.full((3,), -1.0)
    reads.clear()
    assert fk.select_threshold(lone, 50, group=group).n_greater == (49 if rank == 0 else 0)
    assert len(reads) == 2


def rank_main(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE, timeout=TIMEOUT)
    group = dist.group.WORLD
    check_every_case(rank, group)

    # What one rank alone has wrong must fail on both, not hang.
    bad = torch.tensor([1.0, math.nan]) if rank == 1 else torch.ones(2)
    with pytest.raises(ValueError, match="1 of 4 scores are NaN"):
        fk.select_threshold(bad, 1, group=group)
    with pytest.raises(ValueError, match="k=5, but there are only 4 scores"):
        fk.select_threshold(torch.ones(2), 5, group=group)
    with pytest.raises(ValueError, match="k between 3 and 4"):
        fk.select_threshold(torch.ones(8), 3 + rank, group=group)
    with pytest.raises(ValueError, match="number of tensors between 1 and 2"):
        fk.select_threshold([torch.ones(8)] * (1 + rank), 3, group=group)
    with pytest.raises(ValueError, match="key bits between 32 and 64"):
        fk.select_threshold(torch.ones(8, dtype=(torch.float32, torch.float64)[rank]), 3, group=group)

    # A group of one rank sees its own shards only.
    alone = [dist.new_group([member], timeout=TIMEOUT) for member in range(WORLD_SIZE)][rank]
    scores = torch.arange(5.0) + 10 * rank
    assert fk.select_threshold(scores, 2, group=alone) == fk.select_threshold(scores, 2)
    check_sampling(rank, group)
    dist.destroy_process_group()


def test_two_ranks_choose_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD_SIZE)
