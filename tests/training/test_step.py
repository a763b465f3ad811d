import numpy as np
import pytest
import torch

from components.data.batch import Batch
from components.data.config import MaskingConfig
from components.data.masking import sample_masks
from components.model.config import HeadConfig, ViTConfig
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.training.config import TrainingConfig
from components.training.networks import Network, distillation, self_distillation
from components.training.schedules import StepValues
from components.training.step import DivergedError, TrainingStep, split_images
from tests.benchmarks.ibot_baseline import PlainStep

CPU = torch.device("cpu")
VALUES = StepValues(lr=1e-2, last_layer_lr=0.0, weight_decay=0.1, ema_momentum=0.5, teacher_temp=0.05)
SHAPE = ViTConfig(patch_size=8, dim=16, depth=2, num_heads=2, num_registers=1, image_size=32, layer_scale_init=1.0)


def network(seed: int, **shape) -> Network:
    torch.manual_seed(seed)
    backbone = VisionTransformer(SHAPE.model_copy(update=shape))
    head = HeadConfig(num_prototypes=24, hidden_dim=16, bottleneck_dim=8)
    return Network(backbone, {name: ProjectionHead(SHAPE.dim, head) for name in ("dino", "ibot")})


def make_batch(*, masked: bool = True) -> Batch:
    torch.manual_seed(0)
    masks = torch.from_numpy(sample_masks(8, (4, 4), MaskingConfig(), np.random.default_rng(0)))
    return Batch(torch.randn(8, 3, 32, 32), torch.randn(12, 3, 16, 16), masks if masked else None, [])


def config(**changes) -> TrainingConfig:
    return TrainingConfig.model_validate({"precision": "float32", "batch_size": 4} | changes)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}


def test_updates_student_and_average_but_not_the_frozen_last_layer():
    networks = self_distillation(network(1))
    student, ema = snapshot(networks.student), snapshot(networks.ema)
    training = TrainingStep(networks, config(), seed=0, device=CPU)
    output = training(make_batch(), 0, VALUES)
    unchanged = same(student, networks.student)
    assert {f"{h}_head.last_layer.{w}" for h in ("dino", "ibot") for w in ("weight_g", "weight_v")} <= unchanged
    assert not {"backbone.pos_embed", "backbone.mask_token", "dino_head.mlp.0.weight"} & unchanged
    for name, tensor in networks.ema.state_dict().items():
        torch.testing.assert_close(tensor, 0.5 * ema[name] + 0.5 * networks.student.state_dict()[name])
    terms = [float(output.losses[name]) for name in ("dino_local", "dino_global", "ibot", "koleo")]
    assert float(output.losses["total"]) == pytest.approx(sum(terms), rel=1e-6)
    assert set(output.grad_norms) == {"backbone", "dino_head", "ibot_head"}
    assert not output.cls_tokens.requires_grad


def test_first_adamw_update_by_hand():
    """Without momentum yet, AdamW moves each weight by lr * (sign of its gradient + weight decay * weight)."""
    networks = self_distillation(network(1))
    weight = networks.student.backbone.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    gradients = []
    weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    TrainingStep(networks, config(), seed=0, device=CPU)(make_batch(), 0, VALUES)
    gradient = gradients[0]
    clear = gradient.abs() > 1e-5  # so that epsilon is nothing beside it
    expected = before - 1e-2 * (0.1 * before + gradient.sign())
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(weight.detach()[clear], expected[clear], rtol=1e-3, atol=2e-5)


def test_distillation_hides_nothing_and_leaves_the_teacher():
    networks = distillation(network(1), network(2))
    teacher, average = snapshot(networks.teacher), snapshot(networks.ema)
    seen = []
    packed = networks.student.backbone.forward_packed
    networks.student.backbone.forward_packed = lambda batches: seen.extend(m for _, m in batches) or packed(batches)
    counted = []
    for head in (networks.teacher.ibot_head, networks.student.ibot_head):
        head.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    TrainingStep(networks, config(), seed=0, device=CPU)(make_batch(masked=False), 0, VALUES)
    assert seen == [None, None]  # neither the global nor the local crops are masked
    assert counted == [8 * 16, 8 * 16]  # teacher and student: the patch loss is taken on every patch of both crops
    assert len(same(teacher, networks.teacher)) == len(teacher)
    assert "backbone.pos_embed" not in same(average, networks.ema)
    assert "backbone.mask_token" in same(snapshot(networks.student), networks.student)


def test_stochastic_depth_depends_on_seed_step_rank_and_part_only(monkeypatch):
    def loss(batch: Batch, seed: int, step: int, number: int, noise: int = 0, parts: int = 1) -> float:
        monkeypatch.setattr("components.training.step.rank", lambda: number)
        monkeypatch.setattr("components.training.step.world_size", lambda: 2)
        networks = self_distillation(network(1, drop_path=0.5))
        training = TrainingStep(networks, config(accumulation_steps=parts), seed, CPU)
        torch.manual_seed(noise)  # what came before leaves no trace
        return float(training(batch, step, VALUES).losses["total"])

    whole = make_batch()
    assert loss(whole, 0, 3, 0) == loss(whole, 0, 3, 0, noise=99)
    assert len({loss(whole, *drawn_by) for drawn_by in ((0, 3, 0), (0, 4, 0), (1, 3, 0), (0, 3, 1))}) == 4
    half = split_images(whole, 2)[0]
    crops = (half.global_crops, half.local_crops, half.masks)
    twice = Batch(*(torch.cat([rows.unflatten(0, (-1, 2))] * 2, dim=1).flatten(0, 1) for rows in crops), [])
    assert loss(twice, 0, 3, 0, parts=2) != loss(half, 0, 3, 0)  # equal images, other draws


def test_bfloat16_is_close_to_float32():
    losses, dtypes = [], []
    for precision in ("float32", "bfloat16"):
        networks = self_distillation(network(1))
        networks.student.dino_head.mlp.register_forward_hook(lambda _, args, features: dtypes.append(features.dtype))
        losses.append(
            TrainingStep(networks, config(precision=precision), 0, CPU)(make_batch(), 0, VALUES).losses["total"]
        )
    assert dtypes == [torch.float32, torch.bfloat16]
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.02)


@pytest.mark.parametrize(("where", "term"), [("dino_head", "dino_global"), ("ibot_head", "ibot")])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(where, term):
    networks = self_distillation(network(1))
    with torch.no_grad():
        getattr(networks.student, where).mlp[0].bias[0] = float("inf")
    student, average = snapshot(networks.student), snapshot(networks.ema)
    training = TrainingStep(networks, config(), 0, CPU)
    with pytest.raises(DivergedError, match=rf"step 7: loss is not finite \(terms: .*{term}.*; ranks: \[0\]\)"):
        training(make_batch(), 7, VALUES)
    assert len(same(student, networks.student)) == len(student)
    assert len(same(average, networks.ema)) == len(average)


def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes():
    networks = self_distillation(network(1))
    student = snapshot(networks.student)
    networks.student.backbone.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergedError, match="step 7: gradient of backbone is not finite although the loss is"):
        TrainingStep(networks, config(), 0, CPU)(make_batch(), 7, VALUES)
    assert len(same(student, networks.student)) == len(student)


def gradients_of(batch: Batch, **changes) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the first step, unclipped, and its losses and cosine."""
    networks = self_distillation(network(1, drop_path=changes.pop("drop_path", 0.0)))
    training = TrainingStep(networks, config(optimizer={"clip_grad_norm": None}, **changes), 0, CPU)
    kept = {}
    training.optimizer.step = lambda: kept.update(
        {name: p.grad.clone() for name, p in networks.student.named_parameters()}
    )
    output = training(batch, 0, VALUES)
    return kept, output.losses | {"cls_patch_cosine": output.cls_patch_cosine}


def test_accumulated_parts_are_batches_of_their_own():
    """Two parts of two images: the mean of the gradients, and of the losses, that each alone has."""
    whole = make_batch()
    halves = split_images(whole, 2)
    assert torch.equal(halves[1].global_crops, whole.global_crops[[2, 3, 6, 7]])
    assert torch.equal(halves[0].local_crops, whole.local_crops[[0, 1, 4, 5, 8, 9]])
    assert torch.equal(halves[1].masks, whole.masks[[2, 3, 6, 7]])
    together, losses = gradients_of(whole, accumulation_steps=2)
    (one, one_losses), (other, other_losses) = (gradients_of(half) for half in halves)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, (one[name] + other[name]) / 2, rtol=1e-4, atol=1e-7)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, (one_losses[name] + other_losses[name]) / 2)


def test_accumulation_needs_whole_parts_with_neighbors():
    with pytest.raises(ValueError, match=r"batch_size 4 is not a multiple of num_processes \* accumulation_steps 3"):
        config(accumulation_steps=3)
    with pytest.raises(ValueError, match="KoLeo needs a neighbor: use 8 or a larger multiple of 4"):
        config(accumulation_steps=4)


def test_compiled_blocks_equal_eager_ones(monkeypatch):
    """Blocks as torch.compile traces and differentiates them; its C++ code, two minutes of g++, is left out."""
    plain = torch.nn.Module.compile
    traced = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: traced.append(self) or plain(self, backend="aot_eager", fullgraph=True)
    )
    (eager, losses), (compiled, compiled_losses) = (
        gradients_of(make_batch(), drop_path=0.5, compile=value) for value in (False, True)
    )
    assert len(traced) == 4  # two blocks of the student and of the teacher
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-5, atol=1e-6)
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_steps_equal_others(mode):
    batch = make_batch()
    plain, _ = gradients_of(batch, drop_path=0.5)
    again, _ = gradients_of(batch, drop_path=0.5, activation_checkpointing=mode)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_losses_and_gradients_are_those_of_a_plainly_written_step():
    """The other side of benchmark `step`: a pass for each size, plain formulas, all logits, softmax centering."""
    batch = make_batch()
    gradients, losses = gradients_of(batch, objective={"centering": "softmax"})
    networks = self_distillation(network(1))
    plain = PlainStep(networks, config())._loss(batch, VALUES.teacher_temp)
    plain.backward()
    torch.testing.assert_close(losses["total"], plain.detach(), rtol=1e-5, atol=0)
    for name, parameter in networks.student.named_parameters():
        assert parameter.grad is not None
        # Of the tensor, not of each entry: which of its small ones rounding reaches depends on the processor.
        assert (gradients[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name
