"""Kar3 by hand: two steps in numbers, the order of step and averages, the bound of a move."""

import pytest
import torch

from convince.errors import Mistake
from convince.optim.kar3 import Kar3, kar3


def test_two_steps_by_hand():
    w, fast, slow = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    kar3([w], [torch.tensor([4.0])], [fast], [slow], lr=0.1, betas=(0.5, 0.95))
    assert w.item() == pytest.approx(0.9)  # both averages are still 0
    assert (fast.item(), slow.item()) == pytest.approx((2.0, 0.2))
    kar3([w], [torch.tensor([-3.0])], [fast], [slow], lr=0.1, betas=(0.5, 0.95))
    assert w.item() == pytest.approx(0.8)  # -1 + 1 + 1: the averages outvote the gradient
    assert (fast.item(), slow.item()) == pytest.approx((-0.5, 0.04))
    kar3([w], [torch.tensor([0.0])], [fast], [slow], lr=0.1, betas=(0.5, 0.95))
    assert w.item() == pytest.approx(0.8)  # 0 - 1 + 1


def test_the_optimiser_is_the_function_and_moves_by_at_most_three_lr():
    gen = torch.Generator().manual_seed(0)
    start, grads = torch.randn(5, 3, generator=gen), torch.randn(4, 5, 3, generator=gen)
    w = torch.nn.Parameter(start.clone())
    optimizer = Kar3([w], lr=0.01)
    plain, fast, slow = start.clone(), torch.zeros(5, 3), torch.zeros(5, 3)
    for grad in grads:
        before = w.detach().clone()
        w.grad = grad.clone()
        optimizer.step()
        kar3([plain], [grad], [fast], [slow], lr=0.01, betas=(0.5, 0.95))
        assert torch.equal(w.detach(), plain)
        assert float((w.detach() - before).abs().max()) <= 0.03 + 1e-6


def test_size_of_the_gradient_does_not_matter():
    ends = []
    for scale in (1.0, 1000.0):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = Kar3([w], lr=0.01)
        for _ in range(5):
            w.grad = scale * torch.tensor([0.5, -0.1])
            optimizer.step()
        ends.append(w.detach().clone())
    assert torch.equal(*ends)


def test_a_closure_is_called_and_weights_without_gradient_rest():
    w, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Kar3([w, idle], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 2
    assert w.detach().tolist() == pytest.approx([0.9, 0.9])
    assert idle.detach().tolist() == [1, 1]


def test_wrong_settings_are_refused():
    w = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(Mistake, match=r"kar3: lr=-1"):
        Kar3(w, lr=-1)
    with pytest.raises(Mistake, match=r"kar3: betas=\(0.5, 1.0\)"):
        Kar3(w, betas=(0.5, 1.0))
