"""Tune 5 % of a Hugging Face model with its Trainer: Fisher, selection, SparseAdamW, checkpoints, delta.

``python hf_trainer_sparse.py FOLDER`` continues from the last checkpoint in FOLDER if there is one.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from fishertune import _torchvision  # noqa: F401 (lets transformers import beside a CPU build of torch)
from fishertune.delta import Delta
from fishertune.fisher import per_sample_fisher
from fishertune.optim import SparseAdamW
from fishertune.selection import Selection, select

from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification  # isort: skip
from transformers.trainer_utils import get_last_checkpoint  # isort: skip

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "hf_run")
folder.mkdir(parents=True, exist_ok=True)

torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=4, **size))
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # the "public checkpoint"
labels = torch.randint(4, (64,))
images = torch.randn(64, 3, 32, 32) + labels.view(-1, 1, 1, 1)  # brightness tells the class
dataset = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def losses(model, batch):
    images, labels = batch
    return cross_entropy(model(pixel_values=images).logits, labels, reduction="none")  # one per sample


# A resumed run takes the selection it began with.
if (folder / "selection.safetensors").exists():
    selection = Selection.load(folder / "selection.safetensors")
else:
    backbone = [name for name, _ in model.named_parameters() if not name.startswith("classifier.")]
    batches = zip(images.split(16), labels.split(16), strict=True)
    selection = select(per_sample_fisher(model, losses, batches, params=backbone), fraction=0.05)
    selection.save(folder / "selection.safetensors")

# The Trainer's own loading passes over layers whose names differ in the file, as those of most vision transformers do
# (https://github.com/huggingface/transformers/issues/43701); from_pretrained does not. The optimizer comes after it.
checkpoint = get_last_checkpoint(folder)
if checkpoint is not None:
    model = ViTForImageClassification.from_pretrained(checkpoint)

optimizer = SparseAdamW(model.named_parameters(), selection, lr=3e-3)
optimizer.add_param_group({"params": model.classifier.parameters()})
arguments = TrainingArguments(
    folder,
    max_steps=60,
    per_device_train_batch_size=16,
    save_steps=20,
    max_grad_norm=0.0,  # the Trainer's clipping measures whole tensors; SparseAdamW has its own for what moves
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
# The optimizer is ours; the schedule, warm-up included, is the Trainer's.
trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, None))
trainer.train(resume_from_checkpoint=checkpoint)

model.eval()
with torch.no_grad():
    accuracy = (model(pixel_values=images.to(model.device)).logits.argmax(1).cpu() == labels).float().mean()
delta = Delta.between(base, model.cpu(), selection)
delta.save(folder / "delta.safetensors")
print(f"accuracy {accuracy:.2f}, {len(delta)} of {selection.numel()} backbone parameters changed")
