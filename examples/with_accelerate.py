"""A fused torchvision ResNet with Hugging Face accelerate: ``accelerate launch examples/with_accelerate.py``."""

import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from accelerate.utils import set_seed
from shapes import shapes
from torch.utils.data import DataLoader

from fastres import fuse


def main(images: int = 2000, batch: int = 50) -> list[float]:
    """Train for an epoch; the losses of its steps, of this process."""
    set_seed(0)
    accelerator = Accelerator(mixed_precision="bf16")
    model = fuse(torchvision.models.resnet18(num_classes=10)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(shapes(images), batch, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for x, labels in loader:
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()))
