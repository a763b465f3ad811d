import torch

from components.objective.gram import GramLoss, to_grid


def test_loss_and_gradient_are_torchs_of_the_written_out_formula():
    """Mean squared error of Gram matrices of unit features; student and anchor of different widths."""
    torch.manual_seed(0)
    tokens, teacher = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 4)
    unit, fixed = (x / x.norm(dim=-1, keepdim=True) for x in (tokens, teacher))
    expected = 1.5 * torch.nn.MSELoss()(unit @ unit.transpose(1, 2), fixed @ fixed.transpose(1, 2))
    (wanted,) = torch.autograd.grad(expected, tokens)
    loss = GramLoss(teacher, 1.5)(tokens)
    (found,) = torch.autograd.grad(loss, tokens)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)
    assert float(GramLoss(tokens.detach() * 3, 1.5)(tokens).detach()) < 1e-12  # lengths do not matter


def test_half_the_grid_is_keys_bicubic_kernel_of_each_axis():
    """By hand, a = -0.75: between two points the four nearest weigh -3/32, 19/32, 19/32, -3/32; edges repeat."""
    tokens = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(4, 8)
    for row in range(4):
        for offset, weight in zip((-1, 0, 1, 2), (-3, 19, 19, -3), strict=True):
            weights[row, min(max(2 * row + offset, 0), 7)] += weight / 32
    expected = torch.einsum("ih,jw,nhwd->nijd", weights, weights, tokens.unflatten(1, (8, 8))).flatten(1, 2)
    torch.testing.assert_close(to_grid(tokens, 16), expected)
