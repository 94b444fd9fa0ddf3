"""The optimiser of the world's models."""

import pytest

pytestmark = pytest.mark.engine


def fit(dtype):
    import torch
    from torch import nn

    from vpo_ray.world.muon import Budget, Muon

    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=dtype)
    wanted = torch.sin(x @ torch.randn(8, 4, dtype=dtype))
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4)).to(dtype)
    optimiser = Muon([model], rate=2e-2, adam_rate=1e-2)
    losses = []
    for share in Budget(200).rates():
        loss = (model(x) - wanted).float().square().mean()
        loss.backward()
        optimiser.step(share)
        losses.append(loss.item())
    return losses, model, optimiser


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_fits(dtype):
    import torch

    losses, _, _ = fit(getattr(torch, dtype))
    assert losses[-1] < 0.5 * losses[0]


def test_averages_are_lent_or_left():
    import torch

    _, model, optimiser = fit(torch.float32)
    trained = model[0].weight.clone()
    with optimiser.averaged():
        average = model[0].weight.clone()
    assert not torch.equal(average, trained)
    assert torch.equal(model[0].weight, trained)
    optimiser.end()
    assert torch.equal(model[0].weight, average)


def test_a_rate_rises_and_falls_to_nothing():
    from vpo_ray.world.muon import Budget

    rates = list(Budget(100, warm_up=10).rates())
    assert len(rates) == 100
    assert rates[0] < 0.2
    assert max(rates) > 0.9
    assert rates[-1] < 0.01
