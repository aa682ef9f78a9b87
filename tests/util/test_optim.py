"""EMA, learning rate and optimizer: util/optim.py."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from denoiser import Denoiser
from model_jit import JiT
from util.config import TrainConfig
from util.optim import EMA, build_optimizer, learning_rate, peak_lr


def module(seed=0):
    """Parameters of several shapes, and buffers of both kinds."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    net.register_buffer("fixed", torch.arange(3.0))
    return net


def shake(net, seed):
    """New values for all parameters."""
    g = np.random.default_rng(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.from_numpy(g.standard_normal(tuple(p.shape))))


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# EMA.


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.3, 0.0])
@pytest.mark.parametrize("skip", [None, 0.0])
def test_ema_against_a_loop_in_float64(decay, skip):
    net = module()
    ema = EMA(net, decay)
    expected = {name: p.double().numpy() for name, p in values(net).items()}
    for step in range(20):
        shake(net, step)
        ema.update(None if skip is None else torch.tensor(skip))
        for name, p in values(net).items():
            expected[name] = decay * expected[name] + (1 - decay) * p.double().numpy()
    for name, average in ema.shadow.items():
        np.testing.assert_allclose(average.numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_ema_starts_as_a_copy_and_leaves_the_module_alone():
    net = module()
    ema, start = EMA(net, 0.5), values(net)
    assert same(ema.shadow, start)
    shake(net, 1)
    assert same(ema.shadow, start)
    shaken = values(net)
    ema.update()
    assert same(values(net), shaken) and not same(ema.shadow, start)
    assert not any(average.requires_grad for average in ema.shadow.values())


def test_skipped_update_leaves_the_ema_exactly_as_it_was():
    net = module()
    ema = EMA(net, 0.9)
    for step in range(3):
        shake(net, step)
        ema.update()
    before = {name: average.clone() for name, average in ema.shadow.items()}
    shake(net, 9)
    ema.update(torch.ones(()))
    assert same(ema.shadow, before)
    ema.update(torch.zeros(()))
    assert not same(ema.shadow, before)


def test_ema_is_applied_and_taken_back():
    net = module()
    ema = EMA(net, 0.5)
    shake(net, 1)
    identities = [id(p) for p in net.parameters()]
    average, own = {k: v.clone() for k, v in ema.shadow.items()}, values(net)
    with ema.applied():
        assert same(values(net), average)
        assert [id(p) for p in net.parameters()] == identities  # those that an optimizer holds
    assert same(values(net), own) and same(ema.shadow, average)
    with pytest.raises(KeyError, match="inside"), ema.applied():
        assert same(values(net), average)
        raise KeyError("inside")
    assert same(values(net), own) and same(ema.shadow, average)
    ema.update()  # and it goes on from there
    for name, p in own.items():
        torch.testing.assert_close(ema.shadow[name], (average[name] + p) / 2)


def test_state_dict_has_ema_weights_and_the_modules_buffers():
    net = module()
    ema = EMA(net, 0.5)
    shake(net, 1)
    net[1].running_mean.fill_(7.0)
    net.fixed.fill_(8.0)
    state = ema.state_dict()
    assert list(state) == list(net.state_dict())
    assert all(state[name].equal(average) for name, average in ema.shadow.items())
    assert state["1.running_mean"].eq(7).all() and state["fixed"].eq(8).all()


def test_copy_from_a_state_dict():
    net = module()
    ema, other = EMA(net, 0.5), module(seed=1)
    ema.load(other.state_dict())
    assert same(ema.shadow, values(other))
    shake(other, 3)
    assert not same(ema.shadow, values(other))  # a copy
    assert same(values(net), values(module()))


# Learning rate: 10 steps per epoch, 20 epochs, 4 of them warm-up, peak 1e-3, minimum 1e-5.


def rate(step, schedule="constant", epochs=20, warmup=4.0, min_lr=1e-5, **other):
    config = TrainConfig(lr=1e-3, epochs=epochs, warmup_epochs=warmup, min_lr=min_lr, lr_schedule=schedule, **other)
    return learning_rate(config, step, 10)


@pytest.mark.parametrize(
    ("step", "constant", "cosine"),
    [
        (0, 0.0, 0.0),
        (1, 2.5e-5, 2.5e-5),
        (20, 5e-4, 5e-4),
        (39, 9.75e-4, 9.75e-4),
        (40, 1e-3, 1e-3),
        (80, 1e-3, 1e-5 + 9.9e-4 * (1 + math.sqrt(0.5)) / 2),
        (120, 1e-3, 5.05e-4),
        (160, 1e-3, 1e-5 + 9.9e-4 * (1 - math.sqrt(0.5)) / 2),
        (200, 1e-3, 1e-5),
        (250, 1e-3, 1e-5),
    ],
)
def test_learning_rate_at_points_computed_by_hand(step, constant, cosine):
    assert rate(step) == pytest.approx(constant, rel=1e-12)
    assert rate(step, "cosine") == pytest.approx(cosine, rel=1e-12)
    assert rate(step, "cosine", warmup=7.0, warmup_steps=40) == pytest.approx(cosine, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate_without_warm_up(schedule):
    assert rate(0, schedule, warmup=0) == pytest.approx(1e-3, rel=1e-12)


def test_warm_up_of_half_an_epoch_and_of_the_whole_run():
    assert rate(2, warmup=0.5) == pytest.approx(4e-4)
    assert rate(5, warmup=0.5) == 1e-3
    assert rate(50, "cosine", epochs=10, warmup=10) == pytest.approx(5e-4)
    assert math.isfinite(rate(100, "cosine", epochs=10, warmup=10))


def test_peak_learning_rate():
    assert peak_lr(TrainConfig(global_batch=1024)) == pytest.approx(2e-4)
    assert peak_lr(TrainConfig(global_batch=128)) == pytest.approx(2.5e-5)
    assert peak_lr(TrainConfig(lr=3e-4, global_batch=1024)) == 3e-4
    assert peak_lr(TrainConfig(lr=0.0, global_batch=1024)) == 0


# Optimizer.

TINY = {
    "input_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
    "bottleneck_dim": 4,
    "in_context_len": 2,
    "in_context_start": 1,
}


def tiny(weight_decay=0.1):
    torch.manual_seed(0)
    denoiser = Denoiser(JiT(**TINY))
    return denoiser, build_optimizer(denoiser, weight_decay, (0.9, 0.95))


def test_groups_of_the_optimizer():
    """Group 0 has biases and vectors and no decay, group 1 the rest; both in the order of named_parameters."""
    denoiser, optimizer = tiny()
    names = {id(p): name for name, p in denoiser.named_parameters()}
    no_decay, decay = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    in_order = list(names.values())
    assert no_decay == [n for n in in_order if n.endswith(".bias") or "norm" in n]
    assert decay == [n for n in in_order if n not in no_decay]
    assert {"net.in_context_posemb", "net.y_embedder.embedding_table.weight"} <= set(decay)
    assert sorted(no_decay + decay) == sorted(in_order)


def gradients(optimizer, seed):
    g = np.random.default_rng(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.from_numpy(g.standard_normal(tuple(p.shape)).astype(np.float32))


def test_optimizer_against_adamw_by_numpy():
    """Three steps of AdamW with betas (0.9, 0.95), epsilon 1e-8 and decoupled decay, in float64."""
    denoiser, optimizer = tiny()
    lr, decay = 1e-2, 0.1
    expected = {name: p.double().numpy() for name, p in values(denoiser).items()}
    m = dict.fromkeys(expected, 0.0)
    s = dict.fromkeys(expected, 0.0)
    for step in range(1, 4):
        gradients(optimizer, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in denoiser.named_parameters():
            g = p.grad.double().numpy()
            m[name], s[name] = 0.9 * m[name] + 0.1 * g, 0.95 * s[name] + 0.05 * g**2
            if p.dim() > 1:
                expected[name] = expected[name] * (1 - lr * decay)
            update = m[name] / (1 - 0.9**step) / (np.sqrt(s[name] / (1 - 0.95**step)) + 1e-8)
            expected[name] = expected[name] - lr * update
        optimizer.step()
    for name, p in values(denoiser).items():
        np.testing.assert_allclose(p.numpy(), expected[name], atol=2e-6)


def snapshot(denoiser, optimizer):
    state = {f"{i}.{k}": v.clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    return {**values(denoiser), **state}


@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_found_inf_skips_the_update(good_steps, bad):
    """found_inf = 1 leaves weights, both moments and the step counter as they were, also in the very first step."""
    denoiser, optimizer = tiny()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(good_steps):
        gradients(optimizer, step)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    before = snapshot(denoiser, optimizer)
    for p in denoiser.parameters():
        p.grad = torch.full_like(p, bad)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = snapshot(denoiser, optimizer)
    assert all(after[name].equal(value) for name, value in before.items())
    assert all(not value.any() for name, value in after.items() if name not in before)  # moments and counters at 0

    gradients(optimizer, 9)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert all(state["step"] == good_steps + 1 for state in optimizer.state.values())
    assert not any(p.equal(before[name]) for name, p in values(denoiser).items())
    assert all(p.isfinite().all() for p in values(denoiser).values())
