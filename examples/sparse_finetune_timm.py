"""Tune the 5 % of a timm classifier that matter most to a task: Fisher, selection, sparse AdamW, delta."""

import sys

import torch
from torch.nn.functional import cross_entropy

from fishertune import _torchvision  # noqa: F401 (lets timm import beside a CPU build of torch)
from fishertune.delta import Delta
from fishertune.fisher import per_sample_fisher
from fishertune.optim import SparseAdamW
from fishertune.selection import Growth, select

import timm  # isort: skip

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=4)
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # the "public checkpoint"
labels = torch.randint(4, (64,))
images = torch.randn(64, 3, 32, 32) + labels.view(-1, 1, 1, 1)  # brightness tells the class
batches = list(zip(images.split(16), labels.split(16), strict=True))


def losses(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")  # one per sample


backbone = [name for name, _ in model.named_parameters() if not name.startswith("head.")]
selection = select(per_sample_fisher(model, losses, batches, params=backbone), fraction=0.05)
optimizer = SparseAdamW(model.named_parameters(), selection, lr=1e-3, growth=Growth(0.01, 0.05, steps=40))
optimizer.add_param_group({"params": model.head.parameters()})
for batch in batches * 10:
    optimizer.zero_grad()
    losses(model, batch).mean().backward()
    optimizer.step()

accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
delta = Delta.between(base, model, selection)
delta.save(sys.argv[1] if len(sys.argv) > 1 else "delta.safetensors")
print(f"accuracy {accuracy:.2f}, {len(delta)} of {selection.numel()} backbone parameters changed")
