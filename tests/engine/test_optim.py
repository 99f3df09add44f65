"""Parameter groups, schedules and the moving average, compared with formulas and with PyTorch's own."""

import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.engine.optim import MovingAverage, learning_rates, make_optimizer, schedule_factor


def test_every_trainable_parameter_is_optimized_once():
    model = conddetr.build("conditional-detr-r50", hidden_dim=32, encoder_layers=1, decoder_layers=1)
    groups = make_optimizer(model, TrainConfig()).param_groups
    counted = [id(p) for group in groups for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]
    assert sum(p.numel() for p in groups[1]["params"]) == 23232512


def test_step_schedule_equals_pytorchs():
    config = TrainConfig(epochs=9, lr_drop=4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_drop)
    for epoch in range(9):
        for step in range(3):
            assert learning_rates(config, 3 * epoch + step, 3)[0] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_warmup_and_cosine_schedule():
    config = TrainConfig(epochs=10, schedule="cosine", warmup_steps=5)
    factors = [schedule_factor(config, step, 4) for step in range(40)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    middle = 5 + 35 / 2
    assert (factors[math.floor(middle)] + factors[math.ceil(middle)]) / 2 == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01
    assert schedule_factor(config, 40, 4) == pytest.approx(0.0, abs=1e-12)


def test_moving_average_equals_pytorchs():
    """After the ramp; buffers are copied."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    average = MovingAverage(model, decay=0.9, ramp=1)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)
    for step in range(100, 105):
        with torch.no_grad():
            model[0].weight.normal_()
        model(torch.randn(4, 3))
        average.update(model, average.weight(step), torch.tensor(0.0))
        reference.update_parameters(model)
    torch.testing.assert_close(average.model[0].weight, reference.module[0].weight)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    before = average.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(model, average.weight(0), torch.tensor(1.0))
    assert torch.equal(average.model[0].weight, before)
    average.update(model, average.weight(0), torch.tensor(0.0))
    moved = (1 - 0.9 * (1 - math.exp(-1))) * (model[0].weight - before)
    torch.testing.assert_close(average.model[0].weight - before, moved)
