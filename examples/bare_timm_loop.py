"""Sparse tuning in a plain timm loop with the kernels alone: Fisher by a hook, threshold, indices, AdamW on 5 %."""

import timm
import torch
from torch.nn.functional import cross_entropy

import fishertune_kernels as fk

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=4).eval()
labels = torch.randint(4, (64,))
images = torch.randn(64, 3, 32, 32) + labels.view(-1, 1, 1, 1)  # brightness tells the class
batches = list(zip(images.split(16), labels.split(16), strict=True))

# Fisher of every Linear in the blocks: its input and output gradient are all it takes, for a whole batch at once.
linears = [module for module in model.blocks.modules() if isinstance(module, torch.nn.Linear)]
fisher = {linear: torch.zeros_like(linear.weight) for linear in linears}


def accumulate_squares(linear, inputs, output):
    x_NTI = inputs[0].detach()
    output.register_hook(lambda dy_NTO: fk.per_sample_squared_grad_(fisher[linear], x_NTI, dy_NTO, 1 / len(images)))


handles = [linear.register_forward_hook(accumulate_squares) for linear in linears]
for x, y in batches:
    cross_entropy(model(x), y, reduction="sum").backward()  # a sum: the gradients are those of the samples
for handle in handles:
    handle.remove()

# The largest 5 %, exactly, over all layers together. State is kept for these elements alone.
scores = list(fisher.values())
k = round(0.05 * sum(score.numel() for score in scores))
indices = fk.compact(scores, fk.select_threshold(scores, k))
exp_avg = [torch.zeros(len(index)) for index in indices]
exp_avg_sq = [torch.zeros(len(index)) for index in indices]

weights = [linear.weight for linear in linears]
before = [weight.detach().clone() for weight in weights]
head = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
for step, (x, y) in enumerate(batches * 10, start=1):
    model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    fk.sparse_adamw_(weights, [weight.grad for weight in weights], indices, exp_avg, exp_avg_sq, step=step, **hyper)
    head.step()

accuracy = (model(images).argmax(1) == labels).float().mean()
changed = sum(int((weight != old).sum()) for weight, old in zip(weights, before, strict=True))
print(f"accuracy {accuracy:.2f}, {changed} of {k} selected elements changed")
