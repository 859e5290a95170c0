"""Deltas: exact application and undoing, fingerprints, merging, files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fishertune.delta import Delta
from fishertune.files import load_tensors, save_tensors
from fishertune.selection import select

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.detach().contiguous().view(INTEGER[tensor.element_size()])


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(bits(first[name]), bits(second[name])), name


def copied(weights):
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def base_weights(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"stem.weight": (7, 5), "stem.bias": (7,), "block.weight": (3, 7)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def selection_of(weights, k=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return select({name: torch.rand(tensor.shape, generator=generator) for name, tensor in weights.items()}, k=k)


def tuned_from(weights, selection, amount=0.1):
    tuned = copied(weights)
    for name, tensor in tuned.items():
        tensor[selection.mask(name)] += amount
    return tuned


def example(dtype=torch.float32):
    base = base_weights(dtype)
    selection = selection_of(base)
    tuned = tuned_from(base, selection)
    return base, tuned, selection, Delta.between(base, tuned, selection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_gives_the_tuned_weights_and_undo_the_base(dtype, tmp_path):
    base, tuned, _, delta = example(dtype)
    delta.save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    weights = copied(base)
    memory = {name: tensor.data_ptr() for name, tensor in weights.items()}
    delta.apply_(weights)
    assert_same_bits(weights, tuned)
    delta.undo_(weights)
    assert_same_bits(weights, base)
    assert memory == {name: tensor.data_ptr() for name, tensor in weights.items()}


# bit patterns of fp32, so that −0, denormals, infinities and every NaN payload (signalling ones too) occur
PATTERNS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0x0, 0x80000000, 0x1, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFC12345, 0x7FA00000]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(PATTERNS, PATTERNS, st.booleans()), min_size=1, max_size=30))
def test_every_bit_pattern_survives(rows):
    before, after, chosen = zip(*rows)
    after = [new if pick else old for old, new, pick in rows]
    base = {"w": torch.from_numpy(np.array(before, dtype=np.uint32).view(np.float32))}
    tuned = {"w": torch.from_numpy(np.array(after, dtype=np.uint32).view(np.float32))}
    scores = {"w": torch.tensor([1.0 if pick else -math.inf for pick in chosen])}
    delta = Delta.between(base, tuned, select(scores, k=sum(chosen)))
    assert len(delta) == sum(old != new for old, new in zip(before, after))
    weights = copied(base)
    delta.apply_(weights)
    assert_same_bits(weights, tuned)
    delta.undo_(weights)
    assert_same_bits(weights, base)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_file_in_a_narrower_dtype_is_widened_and_returned_bit_for_bit(narrow):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # all values of the narrow dtype
    base = {"w": every.view(narrow), "untouched": torch.ones(3, dtype=narrow)}
    widened = base["w"].float()
    selection = select({"w": torch.rand(every.shape), "untouched": torch.zeros(3)}, k=3000)
    tuned = {"w": widened.clone(), "untouched": torch.ones(3)}
    tuned["w"][selection.mask("w")] += 1
    # an fp32 model loaded from this file: conversion in hardware may quiet NaN, widening bits does not
    nan = widened.isnan()
    shift, mantissa = (13, 0x3FF) if narrow == torch.float16 else (16, 0x7F)
    pattern = every.long()[nan]
    exact = ((pattern & 0x8000) << 16) | 0x7F800000 | ((pattern & mantissa) << shift)
    tuned["w"].view(torch.int32)[nan] = torch.where(exact >= 2**31, exact - 2**32, exact).int()
    delta = Delta.between(base, tuned, selection)
    assert delta.tensors["w"].dtype == torch.float32 and delta.tensors["w"].base_dtype == narrow

    weights = copied(base)
    delta.apply_(weights)
    assert_same_bits({"w": weights["w"]}, {"w": tuned["w"]})
    assert weights["untouched"].dtype == narrow
    applied = copied(weights)
    delta.undo_(weights)
    assert_same_bits(weights, base)

    delta.undo_(applied, dtype=torch.float32)
    assert applied["w"].dtype == torch.float32
    assert torch.equal(applied["w"][~nan], widened[~nan])


def test_undo_can_return_to_a_dtype_that_holds_the_base_exactly():
    base, _, selection, _ = example(torch.float16)
    wide = {name: tensor.float() for name, tensor in base.items()}
    delta = Delta.between(wide, tuned_from(wide, selection), selection)  # the model's own copy as base: fp32 recorded
    weights = copied(base)
    delta.apply_(weights)
    applied = copied(weights)
    with pytest.raises(ValueError, match=r"undo the delta to torch.bfloat16: it does not hold the base values"):
        delta.undo_(weights, dtype=torch.bfloat16)
    assert_same_bits(weights, applied)
    delta.undo_(weights, dtype=torch.float16)
    assert_same_bits(weights, base)


def build_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_a_module_is_changed_in_place():
    model, other = build_model(), build_model()
    scores = {name: torch.rand(param.shape) for name, param in model.named_parameters()}
    selection = select(scores, k=20)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param[selection.mask(name)] *= 1.5
    delta = Delta.between(other, model, selection)
    base = copied(dict(other.named_parameters()))
    pointers = [param.data_ptr() for param in other.parameters()]
    x = torch.randn(4, 6)
    delta.apply_(other)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert pointers == [param.data_ptr() for param in other.parameters()]
    assert all(param.requires_grad for param in other.parameters())
    delta.undo_(other)
    assert_same_bits(base, dict(other.named_parameters()))


def test_a_module_in_another_dtype_is_refused():
    base, _, _, delta = example()
    module = nn.Module()
    for name in ("stem", "block"):
        module.add_module(name, nn.Module())
        getattr(module, name).weight = nn.Parameter(base[f"{name}.weight"].half())
    module.stem.bias = nn.Parameter(base["stem.bias"].half())
    with pytest.raises(ValueError, match=r"is torch.float16.*Convert the module with .to\(torch.float32\)"):
        delta.apply_(module)


def test_non_contiguous_tensors_are_changed_by_logical_position():
    base, tuned, _, delta = example()
    weights = copied(base)
    weights["stem.weight"] = weights["stem.weight"].t().contiguous().t()
    assert not weights["stem.weight"].is_contiguous()
    delta.apply_(weights)
    assert_same_bits(weights, tuned)


def test_only_changed_elements_are_kept():
    base, tuned, selection, _ = example()
    tuned["stem.bias"] = base["stem.bias"].clone()
    row = selection.indices["stem.weight"][0].long()
    tuned["stem.weight"].view(-1)[row] = base["stem.weight"].view(-1)[row]
    delta = Delta.between(base, tuned, selection)
    assert "stem.bias" not in delta.tensors
    assert row not in delta.tensors["stem.weight"].indices
    assert len(delta) == len(selection) - selection.indices["stem.bias"].numel() - 1
    assert len(Delta.between(base, base, selection)) == 0


@pytest.mark.parametrize(("dtype", "per_element"), [(torch.float32, 8), (torch.bfloat16, 6)])
def test_size_on_disk(tmp_path, dtype, per_element):
    base = {f"w{i}": torch.randn(200, 200).to(dtype) for i in range(3)}
    selection = selection_of(base, k=6000)
    delta = Delta.between(base, tuned_from(base, selection, amount=8.0), selection)
    assert len(delta) == 6000
    path = tmp_path / "delta.safetensors"
    delta.save(path)
    assert delta.nbytes == per_element * 6000
    assert delta.nbytes < path.stat().st_size < delta.nbytes + 3 * 700


def refusals(delta, base, tuned):
    """(weights, message when applied) of everything that is not the base."""
    other = copied(base)
    other["block.weight"][0, 0] += 1
    without = {name: tensor for name, tensor in base.items() if name != "stem.bias"}
    reshaped = {**base, "stem.weight": base["stem.weight"].t()}
    doubled = {name: tensor.double() for name, tensor in base.items()}
    prefixed = {f"backbone.{name}": tensor for name, tensor in base.items()}
    tied = {**base, "stem.bias": base["stem.weight"].view(-1)[:7]}
    return {
        "other values": (other, r"1 of 3 tensors differ, first 'block.weight'"),
        "applied": (tuned, "already applied"),
        "missing": (without, r"1 of its 3 tensors are missing in the weights, first 'stem.bias'"),
        "prefix": (prefixed, r"It has 'backbone.stem.weight': pass that part"),
        "shape": (reshaped, r"'stem.weight' has the shape \(5, 7\), the delta is for \(7, 5\)"),
        "dtype": (doubled, r"is torch.float64, the delta is for torch.float32"),
        "tied": (tied, "share memory"),
    }


@pytest.mark.parametrize("case", ["other values", "applied", "missing", "prefix", "shape", "dtype", "tied"])
def test_other_weights_are_refused_and_left_alone(case):
    base, tuned, _, delta = example()
    weights, message = refusals(delta, base, tuned)[case]
    held = copied(weights)
    with pytest.raises(ValueError, match=message) as error:
        delta.apply_(weights)
    assert str(error.value).endswith("Nothing was changed.")
    assert_same_bits(weights, held)


def test_undoing_what_is_not_applied_is_refused_and_left_alone():
    base, tuned, _, delta = example()
    with pytest.raises(ValueError, match="not applied to these weights"):
        delta.undo_(base)
    tuned["stem.weight"][0, 0] += 1
    held = copied(tuned)
    with pytest.raises(ValueError, match=r"not the weights the delta was applied to: 1 of 3 tensors differ"):
        delta.undo_(tuned)
    assert_same_bits(tuned, held)


def test_a_tensor_that_cannot_be_written_leaves_all_unchanged():
    base = base_weights()
    base["block.weight"] = torch.ones(3, 7)
    selection = selection_of(base)
    delta = Delta.between(base, tuned_from(base, selection), selection)
    assert list(delta.tensors)[-1] == "block.weight"
    weights = {**copied(base), "block.weight": torch.ones(()).expand(3, 7)}  # one number seen 21 times
    held = copied(weights)
    with pytest.raises(RuntimeError, match="single memory location"):
        delta.apply_(weights)
    assert_same_bits(weights, held)


def test_changes_outside_the_selection_are_refused():
    base, tuned, selection, _ = example()
    outside = (~selection.mask("block.weight")).nonzero()[0]
    tuned["block.weight"][tuple(outside)] += 1
    with pytest.raises(ValueError, match=r"1 elements of 'block.weight' outside the selection differ"):
        Delta.between(base, tuned, selection)


def test_weights_that_do_not_fit_the_selection_are_refused():
    base, tuned, selection, _ = example()
    with pytest.raises(ValueError, match=r"The tuned weights have no 'stem.bias'"):
        Delta.between(base, {name: t for name, t in tuned.items() if name != "stem.bias"}, selection)
    with pytest.raises(ValueError, match=r"shape \(5, 7\) in the base weights"):
        Delta.between({**base, "stem.weight": base["stem.weight"].t()}, tuned, selection)
    with pytest.raises(ValueError, match=r"torch.float32 in the base weights and torch.bfloat16 in the tuned"):
        Delta.between(base, {name: t.bfloat16() for name, t in tuned.items()}, selection)
    with pytest.raises(TypeError, match="a module or a dict"):
        Delta.between([base], tuned, selection)


def disjoint(base):
    first = selection_of(base, k=20)
    free = {n: torch.rand(t.shape).masked_fill(first.mask(n), -math.inf) for n, t in base.items()}
    return first, select(free, k=15)


def test_disjoint_deltas_of_one_base_unite():
    base = base_weights()
    one, two = disjoint(base)
    a = Delta.between(base, tuned_from(base, one), one, metadata={"a": 1, "both": "a"})
    b = Delta.between(base, tuned_from(base, two, 0.5), two, metadata={"both": "b"})
    weights = copied(base)
    merged = a.merge(b)
    merged.apply_(weights)
    assert_same_bits(weights, tuned_from(tuned_from(base, one), two, 0.5))
    merged.undo_(weights)
    assert_same_bits(weights, base)
    assert len(merged) == len(a) + len(b)
    assert merged.metadata == {"a": 1, "both": "b"}


def test_overlapping_deltas_of_one_base_are_refused_with_their_number():
    base = base_weights()
    one, two = selection_of(base, seed=1), selection_of(base, seed=2)
    common = sum(int((one.mask(name) & two.mask(name)).sum()) for name in base)
    assert common > 0
    a, b = (Delta.between(base, tuned_from(base, chosen), chosen) for chosen in (one, two))
    with pytest.raises(ValueError, match=rf"change {common} elements in \d tensors"):
        a.merge(b)


@pytest.mark.parametrize("swap", [False, True])
def test_a_delta_on_top_of_another_composes(swap, tmp_path):
    base = base_weights()
    one, two = selection_of(base, k=30, seed=1), selection_of(base, k=30, seed=2)
    middle = tuned_from(base, one)
    final = tuned_from(middle, two, 0.5)
    back = (one.mask("stem.weight") & two.mask("stem.weight")).nonzero()[0]  # returns to its base value
    final["stem.weight"][tuple(back)] = base["stem.weight"][tuple(back)]
    a, b = Delta.between(base, middle, one), Delta.between(middle, final, two)
    b.save(tmp_path / "b.safetensors")
    b = Delta.load(tmp_path / "b.safetensors")
    merged = b.merge(a) if swap else a.merge(b)
    weights = copied(base)
    merged.apply_(weights)
    assert_same_bits(weights, final)
    assert len(merged) == sum(int((bits(base[name]) != bits(final[name])).sum()) for name in base)
    merged.undo_(weights)
    assert_same_bits(weights, base)
    assert merged.merge(Delta.between(final, final, one)).fingerprint == merged.fingerprint


def test_a_tuning_undone_by_the_next_leaves_an_empty_delta():
    base, tuned, selection, delta = example()
    assert len(delta.merge(Delta.between(tuned, base, selection))) == 0


def test_deltas_of_different_weights_do_not_merge():
    base, other = base_weights(seed=0), base_weights(seed=5)
    one, two = disjoint(base)
    a, b = (Delta.between(w, tuned_from(w, chosen), chosen) for w, chosen in ((base, one), (other, two)))
    with pytest.raises(ValueError, match=r"made for different weights: 'stem.weight'"):
        a.merge(b)


def _edit(name, change):
    return lambda tensors, metadata: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, metadata: metadata.update(format="other"), "holds no delta"),
        (lambda tensors, metadata: metadata.update(version=99), "version 99"),
        (lambda tensors, metadata: metadata.pop("fingerprint"), "'fingerprint' is missing"),
        (lambda tensors, metadata: metadata.update(fingerprint="0"), "fingerprint does not match"),
        (lambda tensors, metadata: metadata["tensors"]["stem.bias"].update(dtype="float"), "'float' is missing"),
        (lambda tensors, metadata: tensors.pop("bits/stem.bias"), "'bits/stem.bias' is missing"),
        (lambda tensors, metadata: tensors.update(extra=torch.ones(1)), "unexpected tensor 'extra'"),
        (_edit("indices/stem.weight", lambda index: index.flip(0)), "not ascending"),
        (_edit("indices/stem.weight", lambda index: index + 35), "not ascending"),
        (_edit("indices/stem.weight", lambda index: index[1:]), "bit patterns"),
        (_edit("bits/stem.weight", lambda value: value.short()), r"bit patterns torch.int16 for torch.float32"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "delta.safetensors"
    example()[-1].save(path)
    tensors, metadata = load_tensors(path)
    damage(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=message):
        Delta.load(path)


def test_the_file_keeps_metadata_and_fingerprint(tmp_path):
    base, tuned, selection, _ = example()
    delta = Delta.between(base, tuned, selection, metadata={"backbone": "vit", "fraction": 0.05})
    delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert loaded.metadata == {"backbone": "vit", "fraction": 0.05}
    assert loaded.fingerprint == delta.fingerprint
    assert loaded.fingerprint != Delta.between(tuned, base, selection).fingerprint
