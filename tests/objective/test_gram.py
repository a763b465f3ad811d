import torch

from components.objective.gram import GramLoss


def test_loss_and_gradient_are_torchs_of_the_written_out_formula():
    """Mean squared error of Gram matrices of unit features; student and anchor of different widths."""
    torch.manual_seed(0)
    tokens, anchor = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 4)
    unit, fixed = (x / x.norm(dim=-1, keepdim=True) for x in (tokens, anchor))
    expected = 1.5 * torch.nn.MSELoss()(unit @ unit.transpose(1, 2), fixed @ fixed.transpose(1, 2))
    (wanted,) = torch.autograd.grad(expected, tokens)
    loss = GramLoss(anchor, 1.5)(tokens)
    (found,) = torch.autograd.grad(loss, tokens)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)
    assert float(GramLoss(tokens.detach() * 3, 1.5)(tokens).detach()) < 1e-12  # lengths do not matter
