"""SparseAdamW against torch.optim.AdamW on the selected elements, and bit-equality everywhere else."""

import copy
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fishertune.optim import SparseAdamW
from fishertune.selection import Growth, PaperThreshold, select

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def tolerance(steps, lr):
    """How far two fp32 AdamW runs may drift apart in parameters of size ≤ 4.

    Both round the parameter twice a step (decay, update), by ≤ 4·2⁻²⁵ each, and the update of size ≤ 2·lr about ten
    times, by ≤ 2⁻²⁴ relative. The gradients below do not depend on the parameters, so errors only add up.
    """
    return steps * 2 * (2 * 2 + 10 * 2 * lr) * 2**-24


TOLERANCE = tolerance(100, HYPER["lr"])


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (13, 7), "bias": (13,), "scale": (), "empty": (0, 3)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-3, 3).to(dtype))
        for name, shape in shapes.items()
    }


def random_scores(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(param.shape, generator=generator) for name, param in params.items()}


def set_gradients(params, step, scale=1.0):
    """Gradients that depend on the step alone, over four orders of magnitude."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params.values():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        size = 10 ** (-4 * torch.rand(param.shape, generator=generator, dtype=torch.float64))
        param.grad = (noise * size * scale).to(param.dtype)


def clones(params):
    return {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}


def bits(tensor):
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(bits(first[name]), bits(second[name])), name


def assert_unselected_unchanged(params, before, selection):
    for name, param in params.items():
        outside = ~selection.mask(name)
        assert torch.equal(bits(param)[outside], bits(before[name])[outside]), name


def assert_follows(params, reference, selection, atol):
    for name, param in params.items():
        inside = selection.mask(name)
        torch.testing.assert_close(param[inside], reference[name][inside], rtol=0, atol=atol)


@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_selected_elements_follow_torch_adamw_for_100_steps(fraction):
    params = parameters()
    before, reference = clones(params), clones(params)
    selection = select(random_scores(params), fraction=fraction)
    ours = SparseAdamW(params, selection, **HYPER)
    theirs = torch.optim.AdamW(reference.values(), foreach=False, **HYPER)
    for step in range(100):
        for members in (params, reference):
            set_gradients(members, step)
        ours.step()
        theirs.step()
    assert_follows(params, reference, selection, TOLERANCE)
    assert_unselected_unchanged(params, before, selection)
    moved = sum(int((param != before[name]).sum()) for name, param in params.items())
    assert moved == len(selection)


def test_float64_follows_torch_to_float64_rounding():
    params = parameters(dtype=torch.float64)
    reference = clones(params)
    selection = select(random_scores(params), fraction=0.5)
    ours = SparseAdamW(params, selection, growth=Growth(0.5, 0.5, 5), **HYPER)
    theirs = torch.optim.AdamW(reference.values(), foreach=False, **HYPER)
    for step in range(20):
        for members in (params, reference):
            set_gradients(members, step)
        ours.step()
        theirs.step()
    assert_follows(params, reference, selection, 1e-13)


@settings(deadline=None, max_examples=30)  # a busy machine is no failure
@given(
    k=st.integers(0, 105),
    lr=st.floats(0, 0.1),
    # m̂/√v̂ ≤ √Σwᵢ²/uᵢ ≤ √5 over five steps (w, u: weights of the two means): about the 2 of the bound on the update
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.5, 0.999)),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_any_hyper_parameters_follow_torch(k, lr, betas, eps, weight_decay, seed):
    params = parameters(seed)
    before, reference = clones(params), clones(params)
    selection = select(random_scores(params, seed), k=k)
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    ours = SparseAdamW(params, selection, **hyper)
    theirs = torch.optim.AdamW(reference.values(), foreach=False, **hyper)
    for step in range(5):
        for members in (params, reference):
            set_gradients(members, step)
        ours.step()
        theirs.step()
    assert_follows(params, reference, selection, tolerance(5, lr))
    assert_unselected_unchanged(params, before, selection)


def test_an_element_before_its_time_behaves_as_with_learning_rate_zero():
    params = parameters()
    before, reference = clones(params), clones(params)
    selection = select(random_scores(params), fraction=0.4)
    growth = Growth(0.1, 0.4, 30)
    ours = SparseAdamW(params, selection, growth=growth, **HYPER)
    theirs = torch.optim.AdamW(reference.values(), foreach=False, **HYPER)
    threshold = growth.bind(selection)
    scores = random_scores(params)
    for step in range(1, 41):
        for members in (params, reference):
            set_gradients(members, step)
        previous = clones(reference)
        ours.step()
        theirs.step()
        assert ours.active_threshold == threshold(step)
        with torch.no_grad():  # learning rate zero for everything that does not take part today
            for name, param in reference.items():
                param.copy_(torch.where(scores[name] >= threshold(step), param, previous[name]))
        waiting = {name: score < threshold(step) for name, score in scores.items()}
        for name, param in params.items():
            assert torch.equal(bits(param)[waiting[name]], bits(before[name])[waiting[name]])
    assert not any(waiting[name][selection.mask(name)].any() for name in params)
    assert_follows(params, reference, selection, TOLERANCE)


def test_the_paper_threshold_drives_the_optimizer_too():
    params = parameters()
    before = clones(params)
    selection = select(random_scores(params), k=60)
    optimizer = SparseAdamW(params, selection, growth=PaperThreshold(0.5, 0.9, 10), **HYPER)
    set_gradients(params, 0)
    optimizer.step()
    quantile = 0.5 + 0.4 * torch.tensor(-0.1).exp()
    moved = sum(int((param != before[name]).sum()) for name, param in params.items())
    assert moved == 105 - int(quantile * 105)


def test_groups_have_their_own_hyper_parameters_and_schedules():
    params = parameters()
    reference = clones(params)
    selection = select(random_scores(params), fraction=0.5)
    split = [{"params": [("weight", None)], "lr": 3e-2, "betas": (0.5, 0.9)}, {"params": [], "weight_decay": 0.0}]

    def grouped(members, named):
        rest = [(name, param) for name, param in members.items() if name != "weight"]
        groups = [{**split[0], "params": [("weight", members["weight"])]}, {**split[1], "params": rest}]
        return groups if named else [{**g, "params": [param for _, param in g["params"]]} for g in groups]

    ours = SparseAdamW(grouped(params, named=True), selection, **HYPER)
    theirs = torch.optim.AdamW(grouped(reference, named=False), foreach=False, **HYPER)
    schedulers = [torch.optim.lr_scheduler.PolynomialLR(optimizer, 20, power=0.9) for optimizer in (ours, theirs)]
    for step in range(20):
        for members in (params, reference):
            set_gradients(members, step)
        for optimizer, scheduler in zip((ours, theirs), schedulers):
            optimizer.step()
            scheduler.step()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == 0
    assert_follows(params, reference, selection, tolerance(20, 3e-2))


@pytest.mark.parametrize("fused", [True, False])
def test_dense_groups_get_exactly_torchs_adamw(fused):
    params, head = parameters(), nn.Linear(5, 3)
    reference = copy.deepcopy(head)
    ours = SparseAdamW(params, select(random_scores(params), k=5), **HYPER)
    ours.add_param_group({"params": head.named_parameters(), "lr": 5e-3, **({} if fused else {"fused": False})})
    theirs = torch.optim.AdamW(reference.parameters(), fused=fused, foreach=False if not fused else None, **HYPER)
    theirs.param_groups[0]["lr"] = 5e-3
    for step in range(10):
        for module, optimizer in ((head, ours), (reference, theirs)):
            set_gradients(dict(module.named_parameters()), step)
            optimizer.step()
    assert_same_bits(dict(head.named_parameters()), dict(reference.named_parameters()))


def test_parameters_outside_the_selection_can_be_dense():
    params = parameters()
    params["head"] = nn.Parameter(torch.ones(3))
    scores = random_scores(params)
    del scores["head"]
    optimizer = SparseAdamW(params, select(scores, k=5), **HYPER)
    optimizer.add_param_group({"params": params["head"], "weight_decay": 0.0})
    set_gradients(params, 0)
    optimizer.step()
    assert (params["head"] != 1).all()
    optimizer.zero_grad()
    assert all(param.grad is None for param in params.values())
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params["weight"]]})


def test_a_missing_gradient_leaves_parameter_state_and_bias_correction_alone():
    params = parameters()
    reference = clones(params)
    selection = select(random_scores(params), fraction=0.5)
    ours = SparseAdamW(params, selection, **HYPER)
    theirs = torch.optim.AdamW(reference.values(), foreach=False, **HYPER)
    for step in range(10):
        for members in (params, reference):
            set_gradients(members, step)
            if step % 3 == 0:
                members["weight"].grad = None
        before = params["weight"].detach().clone()
        ours.step()
        theirs.step()
        if step % 3 == 0:
            assert torch.equal(bits(params["weight"]), bits(before))
    assert ours.state[params["weight"]]["step"] == 6
    assert_follows(params, reference, selection, TOLERANCE)


def test_a_step_without_any_gradient_does_not_advance_growth():
    params = parameters()
    selection = select(random_scores(params), fraction=0.5)
    optimizer = SparseAdamW(params, selection, growth=Growth(0.1, 0.5, 10), **HYPER)
    start = optimizer.active_threshold
    optimizer.step()
    assert optimizer.active_threshold == start
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.active_threshold < start


def test_a_closure_recomputes_the_loss():
    params = {"weight": nn.Parameter(torch.ones(4))}
    optimizer = SparseAdamW(params, select({"weight": torch.arange(4.0)}, k=2), lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = params["weight"].square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[0] == 4.0 and losses == sorted(losses, reverse=True)
    assert params["weight"].tolist()[:2] == [1.0, 1.0]


def test_bf16_parameters_with_a_master_copy_follow_fp32_adamw():
    params = parameters(dtype=torch.bfloat16)
    before = clones(params)
    reference = {name: nn.Parameter(param.detach().float()) for name, param in params.items()}
    selection = select(random_scores(params), fraction=0.5)
    hyper = {**HYPER, "lr": 1e-5, "weight_decay": 0.0}  # far below a bf16 unit in the last place
    ours = SparseAdamW(params, selection, master=True, **hyper)
    theirs = torch.optim.AdamW(reference.values(), foreach=False, **hyper)
    for step in range(50):
        set_gradients(params, step)
        for name, param in reference.items():
            param.grad = params[name].grad.float()
        ours.step()
        theirs.step()
    for name, param in params.items():
        inside = selection.mask(name)
        state = ours.state[param]
        torch.testing.assert_close(state["master"], reference[name][inside].detach(), rtol=0, atol=TOLERANCE)
        assert torch.equal(bits(param[inside]), bits(state["master"].bfloat16()))
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert_unselected_unchanged(params, before, selection)


def test_weights_loaded_before_the_first_step_reach_the_master_copy():
    params = parameters(dtype=torch.bfloat16)
    selection = select(random_scores(params), fraction=0.5)
    optimizer = SparseAdamW(params, selection, lr=0.0, master=True)
    with torch.no_grad():
        for param in params.values():
            param.add_(1)
    loaded = clones(params)
    set_gradients(params, 0)
    optimizer.step()
    assert_same_bits(params, loaded)


def build(model_seed=0, *, dtype=torch.float32, growth=True, **options):
    torch.manual_seed(model_seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)
    head = nn.Linear(4, 2)
    scores = random_scores(dict(model.named_parameters()))
    selection = select(scores, fraction=0.3)
    schedule = Growth(0.1, 0.3, 8) if growth else None
    optimizer = SparseAdamW(model.named_parameters(), selection, growth=schedule, **options, **HYPER)
    optimizer.add_param_group({"params": head.parameters(), "lr": 3e-3})
    return model, head, optimizer, selection


def train(model, head, optimizer, scheduler, steps):
    for step in steps:
        set_gradients({f"m{name}": param for name, param in model.named_parameters()}, step)
        set_gradients({f"h{name}": param for name, param in head.named_parameters()}, step + 500)
        optimizer.step()
        scheduler.step()


def weights(model, head):
    return {**{f"m.{n}": p for n, p in model.named_parameters()}, **{f"h.{n}": p for n, p in head.named_parameters()}}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"master": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"rounding": "stochastic", "seed": 5, "max_norm": 1.0}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(dtype, options):
    model, head, optimizer, _ = build(dtype=dtype, **options)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 12)
    train(model, head, optimizer, scheduler, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, head, optimizer, scheduler)], file)
    train(model, head, optimizer, scheduler, range(5, 12))

    other_seed = {"seed": 6} if "seed" in options else {}  # the state brings its own
    other_model, other_head, other, _ = build(9, dtype=dtype, **{**options, **other_seed})
    other_scheduler = torch.optim.lr_scheduler.PolynomialLR(other, 12)
    file.seek(0)
    for part, state in zip((other_model, other_head, other, other_scheduler), torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    train(other_model, other_head, other, other_scheduler, range(5, 12))
    assert_same_bits(weights(model, head), weights(other_model, other_head))


def test_loaded_state_is_a_copy():
    _, _, optimizer, _ = build()
    model, head, other, _ = build()
    other.load_state_dict(optimizer.state_dict())
    train(model, head, other, torch.optim.lr_scheduler.ConstantLR(other), range(3))
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in optimizer.state.values())


def test_copies_and_pickles_of_model_and_optimizer_continue_alike():
    model, head, optimizer, _ = build()
    train(model, head, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), range(3))
    model2, head2, optimizer2 = copy.deepcopy((model, head, optimizer))
    file = io.BytesIO()
    torch.save((model, head, optimizer), file)
    file.seek(0)
    model3, head3, optimizer3 = torch.load(file, weights_only=False)
    for m, h, o in ((model, head, optimizer), (model2, head2, optimizer2), (model3, head3, optimizer3)):
        train(m, h, o, torch.optim.lr_scheduler.ConstantLR(o), range(3, 6))
    assert_same_bits(weights(model, head), weights(model2, head2))
    assert_same_bits(weights(model, head), weights(model3, head3))


def test_state_of_something_else_is_refused_and_nothing_changes():
    model, head, optimizer, _ = build()
    train(model, head, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), range(2))
    kept = copy.deepcopy(optimizer.state_dict())

    params = dict(model.named_parameters())
    other = SparseAdamW(params, select(random_scores(params, seed=77), fraction=0.3), **HYPER)
    other.add_param_group({"params": nn.Linear(4, 2).parameters()})
    with pytest.raises(ValueError, match="another selection: its group has selection"):
        optimizer.load_state_dict(other.state_dict())

    renamed = copy.deepcopy(kept)
    renamed["param_groups"][0]["names"][0] = "stem"
    with pytest.raises(ValueError, match="another selection: its group has names"):
        optimizer.load_state_dict(renamed)

    _, _, with_master, _ = build(dtype=torch.bfloat16, master=True)
    with pytest.raises(ValueError, match=r"holds .*'master'.*expected .*\(master=True keeps a copy\)"):
        optimizer.load_state_dict(with_master.state_dict())

    reshaped = copy.deepcopy(kept)
    reshaped["state"][0]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"has exp_avg of shape \(1,\)"):
        optimizer.load_state_dict(reshaped)

    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**kept, "param_groups": kept["param_groups"][:1]})

    now = optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"]
    for key, state in kept["state"].items():
        assert_same_bits(state, now["state"][key])


def test_distributed_checkpoint_reads_state_without_moving_anything_and_restores_it():
    model, head, optimizer, _ = build()
    whole = nn.ModuleDict({"model": model, "head": head})
    before = clones(weights(model, head))
    get_optimizer_state_dict(whole, optimizer)  # before any step: it would step on zero gradients if state were empty
    assert_same_bits(before, weights(model, head))
    assert all(state["step"] == 0 for state in optimizer.state.values())

    train(model, head, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(whole, optimizer))
    model2, head2, optimizer2, _ = build()
    whole2 = nn.ModuleDict({"model": model2, "head": head2})
    whole2.load_state_dict(whole.state_dict())
    set_optimizer_state_dict(whole2, optimizer2, saved)
    for m, h, o in ((model, head, optimizer), (model2, head2, optimizer2)):
        train(m, h, o, torch.optim.lr_scheduler.ConstantLR(o), range(4, 8))
    assert_same_bits(weights(model, head), weights(model2, head2))


def test_the_amp_scaler_skips_steps_with_infinite_gradients():
    model, head, optimizer, selection = build()
    before = clones(dict(model.named_parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    thresholds = []
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = head(model(x)).float().square().mean() * (float("inf") if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        optimizer.clip_selected_grad_norm_(1.0)
        held = clones(weights(model, head))
        scaler.step(optimizer)
        scaler.update()
        thresholds.append(optimizer.active_threshold)
        if step == 2:
            assert_same_bits(held, weights(model, head))
            assert all(bool(torch.isfinite(state["exp_avg"]).all()) for state in optimizer.state.values())
        else:
            assert not torch.equal(held["m.0.weight"], model[0].weight)
    assert scaler.get_scale() == 2.0**9
    assert all(state["step"] == 5 for state in optimizer.state.values())
    assert thresholds[2] == thresholds[1] > thresholds[3]
    assert_unselected_unchanged(dict(model.named_parameters()), before, selection)


def test_scaled_gradients_give_the_same_steps():
    # a power of two scales exactly, so nothing but the scaler's own work could differ
    plain, scaled = parameters(), parameters()
    selection = select(random_scores(plain), fraction=0.3)
    first, second = SparseAdamW(plain, selection, **HYPER), SparseAdamW(scaled, selection, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(5):
        set_gradients(plain, step)
        set_gradients(scaled, step, scale=256.0)
        first.step()
        scaler.scale(torch.ones(()))  # the scaler only steps after it has scaled a loss
        scaler.step(second)
        scaler.update()
    assert_same_bits(plain, scaled)


def test_clipping_measures_and_scales_what_moves_and_nothing_else():
    model, head, optimizer, selection = build()
    params = dict(model.named_parameters())
    set_gradients({f"m{name}": param for name, param in params.items()}, 0)
    set_gradients({f"h{name}": param for name, param in head.named_parameters()}, 1)
    params["0.weight"].grad = params["0.weight"].grad.t().contiguous().t()
    before = {name: param.grad.clone() for name, param in params.items()}
    head_before = [param.grad.clone() for param in head.parameters()]
    moving = torch.cat([before[name][selection.mask(name)] for name in params] + [g.flatten() for g in head_before])

    norm = optimizer.clip_selected_grad_norm_(0.1)
    torch.testing.assert_close(norm, moving.norm())
    scale = 0.1 / (moving.norm() + 1e-6)
    assert scale < 1
    for name, param in params.items():
        inside = selection.mask(name)
        torch.testing.assert_close(param.grad[inside], before[name][inside] * scale)
        assert torch.equal(bits(param.grad)[~inside], bits(before[name])[~inside])
    for param, gradient in zip(head.parameters(), head_before):
        torch.testing.assert_close(param.grad, gradient * scale)
    torch.testing.assert_close(optimizer.clip_selected_grad_norm_(1e9), torch.tensor(0.1), rtol=1e-4, atol=0)

    with pytest.raises(ValueError, match=r"at least 0, got -1"):
        optimizer.clip_selected_grad_norm_(-1.0)
    head.weight.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_selected_grad_norm_(1.0, error_if_nonfinite=True)
    optimizer.zero_grad()
    assert optimizer.clip_selected_grad_norm_(1.0) == 0


@pytest.mark.parametrize("scale", [100.0, 1e-3])
def test_clipping_within_the_step_moves_as_clipping_before_it_and_leaves_gradients_alone(scale):
    within, before = build(max_norm=0.1), build()
    for step in range(4):
        for model, head, _, _ in (within, before):
            set_gradients({f"m{name}": param for name, param in model.named_parameters()}, step, scale)
            set_gradients({f"h{name}": param for name, param in head.named_parameters()}, step + 500, scale)
        held = {name: param.grad.clone() for name, param in within[0].named_parameters()}
        norm = before[2].clip_selected_grad_norm_(0.1)
        within[2].step()
        before[2].step()
        torch.testing.assert_close(within[2].grad_norm, norm)
        assert (norm > 0.1) == (scale > 1)
        assert_same_bits(held, {name: param.grad for name, param in within[0].named_parameters()})
    # The norms may differ in their last bit, gathered or not; AdamW hardly sees the gradient's size.
    for name, weight in weights(*within[:2]).items():
        torch.testing.assert_close(weight, weights(*before[:2])[name], rtol=1e-6, atol=1e-7)


def half_steps(optimizer, params, steps):
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()


def test_stochastic_rounding_moves_where_rounding_to_nearest_is_stuck():
    start = {"weight": nn.Parameter(torch.ones(200, 100, dtype=torch.bfloat16))}
    selection = select(random_scores(start), fraction=0.5)
    inside = selection.mask("weight")
    moved = {}
    for rounding in ("nearest", "stochastic"):
        params = clones(start)
        optimizer = SparseAdamW(params, selection, lr=2.0**-12, weight_decay=0.0, rounding=rounding)
        for _ in range(32):
            params["weight"].grad = torch.ones_like(params["weight"])
            optimizer.step()
        assert_unselected_unchanged(params, start, selection)
        moved[rounding] = float((1 - params["weight"].detach()[inside].double()).mean())
        assert "master" not in optimizer.state[params["weight"]]
    assert moved["nearest"] == 0
    # AdamW steps by lr under a constant gradient. 10,000 elements times 32 roundings, each off by less than 2⁻⁸:
    # by Azuma's bound the mean is off by more than this with probability 1e-9.
    assert abs(moved["stochastic"] - 32 * 2.0**-12) < 2.0**-8 * (2 * 21.5 * 32 / 10_000) ** 0.5


def test_stochastic_bits_do_not_depend_on_param_groups_and_do_on_the_seed():
    start = parameters(dtype=torch.bfloat16)
    selection = select(random_scores(start), fraction=0.5)
    results = []
    for split, seed in ((False, 1), (True, 1), (False, 2)):
        params = clones(start)
        named = list(params.items())
        groups = [{"params": [named[1], named[3]]}, {"params": [named[0], named[2]]}] if split else named
        half_steps(SparseAdamW(groups, selection, rounding="stochastic", seed=seed, **HYPER), params, 5)
        results.append(params)
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0]["weight"], results[2]["weight"])


def test_parameters_with_equal_values_draw_different_bits():
    params = {name: nn.Parameter(torch.ones(300, dtype=torch.bfloat16)) for name in ("first", "second")}
    selection = select({name: torch.ones(300) for name in params}, fraction=1.0)
    half_steps(SparseAdamW(params, selection, lr=0.0, weight_decay=0.0, rounding="stochastic"), params, 1)
    assert torch.equal(params["first"], params["second"])  # nothing is dropped, nothing is random
    for param in params.values():
        param.grad = torch.ones_like(param)
    SparseAdamW(params, selection, lr=2.0**-9, weight_decay=0.0, rounding="stochastic").step()
    # Half of each round down; unrelated draws agree on about half of the elements.
    assert 100 < int((params["first"] == params["second"]).sum()) < 200


def test_float32_parameters_beside_stochastic_ones_step_as_ever():
    params = parameters()
    params["weight"] = nn.Parameter(params["weight"].detach().bfloat16())
    plain = clones(params)
    selection = select(random_scores(params), fraction=0.5)
    half_steps(SparseAdamW(params, selection, rounding="stochastic", **HYPER), params, 5)
    half_steps(SparseAdamW(plain, selection, **HYPER), plain, 5)
    assert torch.equal(params["bias"], plain["bias"])
    assert not torch.equal(params["weight"], plain["weight"])


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float32, {}, r"for bfloat16 parameters; these are torch.float32.*Set rounding='nearest'"),
        (torch.float16, {}, r"'weight' is float16.*Set master=True instead"),
        (torch.bfloat16, {"master": True}, "not both"),
        (torch.bfloat16, {"seed": -1}, "seed must be at least 0 and below 2.*got -1"),
        (torch.bfloat16, {"rounding": "up"}, "rounding must be 'nearest' or 'stochastic', got 'up'"),
        (torch.bfloat16, {"max_norm": -1.0}, "max_norm must be at least 0, got -1.0"),
    ],
)
def test_rounding_that_means_nothing_is_refused(dtype, options, message):
    params = parameters(dtype=dtype)
    with pytest.raises(ValueError, match=message):
        SparseAdamW(
            params, select(random_scores(params), fraction=0.5), **{"rounding": "stochastic", **options}, **HYPER
        )


def test_torchs_own_clipping_works_on_the_gradients_as_usual():
    params = parameters()
    before = clones(params)
    selection = select(random_scores(params), fraction=0.3)
    optimizer = SparseAdamW(params, selection, growth=Growth(0.1, 0.3, 3), **HYPER)
    for step in range(5):
        set_gradients(params, step, scale=100.0)
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
    assert_unselected_unchanged(params, before, selection)


def test_state_is_for_selected_elements_alone():
    params = {"weight": nn.Parameter(torch.zeros(100, 200)), "bias": nn.Parameter(torch.zeros(400))}
    numel = sum(param.numel() for param in params.values())
    selection = select(random_scores(params), fraction=0.05)
    k = len(selection)
    plain = SparseAdamW(params, selection, **HYPER)
    assert plain.state_bytes() == 12 * k <= 0.6 * numel
    tensors = itertools.chain.from_iterable(state.values() for state in plain.state.values())
    assert sum(tensor.numel() for tensor in tensors) == 2 * k + len(params)  # moments, and a step counter a parameter
    assert SparseAdamW(params, selection, growth=Growth(0.05, 0.05, 9), **HYPER).state_bytes() == 16 * k
    half = {name: nn.Parameter(param.detach().bfloat16()) for name, param in params.items()}
    assert SparseAdamW(half, selection, master=True, **HYPER).state_bytes() == 16 * k
    assert SparseAdamW(params, selection, master=True, **HYPER).state_bytes() == 12 * k  # fp32 is its own master


def test_a_selection_that_does_not_fit_is_refused():
    params = parameters()
    selection = select(random_scores(params), fraction=0.5)
    with pytest.raises(ValueError, match=r"'weight'.*not among the 4 named parameters. The nearest name is 'weights'"):
        SparseAdamW({("weights" if name == "weight" else name): p for name, p in params.items()}, selection, **HYPER)
    with pytest.raises(ValueError, match=r"'weight' has the shape \(7, 13\).*made for \(13, 7\)"):
        SparseAdamW({**params, "weight": nn.Parameter(torch.zeros(7, 13))}, selection, **HYPER)
    with pytest.raises(ValueError, match="not contiguous"):
        SparseAdamW({**params, "weight": nn.Parameter(torch.zeros(7, 13).t())}, selection, **HYPER)
    with pytest.raises(ValueError, match="'bias' is given twice"):
        SparseAdamW([*params.items(), ("bias", params["bias"])], selection, **HYPER)
    with pytest.raises(ValueError, match="None of the named parameters was scored"):
        SparseAdamW({"other": params["bias"]}, select(random_scores(params), k=0), **HYPER)
    with pytest.raises(TypeError, match=r"Pass model.named_parameters\(\)"):
        SparseAdamW(list(params.values()), selection, **HYPER)
    with pytest.raises(TypeError, match="growth must be a schedule"):
        SparseAdamW(params, selection, growth=0.05, **HYPER)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [({"lr": -1.0}, "lr must be"), ({"betas": (0.9, 1.0)}, "betas must"), ({"weight_decay": float("nan")}, "weight_d")],
)
def test_hyper_parameters_out_of_range_are_refused(hyper, message):
    params = parameters()
    selection = select(random_scores(params), fraction=0.5)
    with pytest.raises(ValueError, match=message):
        SparseAdamW(params, selection, **{**HYPER, **hyper})
    optimizer = SparseAdamW(params, selection, **HYPER)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **hyper})


def _reshape(model):
    model[0].weight.data = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model.bfloat16(), id="dtype"),
        pytest.param(_reshape, id="shape"),
        pytest.param(
            lambda model: model.cuda(),
            id="device",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_a_model_converted_after_construction_is_refused_before_anything_moves(change):
    model, head, optimizer, _ = build()
    change(model)
    held = clones(dict(head.named_parameters()))
    for param in itertools.chain(model.parameters(), head.parameters()):
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"'0\.weight' is torch.* now and was torch.float32 of shape \(10, 6\) on"):
        optimizer.step()
    assert_same_bits(held, dict(head.named_parameters()))


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SparseAdamW(embedding.named_parameters(), select({"weight": torch.rand(5, 3)}, k=3), **HYPER)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="dense gradients"):
        optimizer.step()
