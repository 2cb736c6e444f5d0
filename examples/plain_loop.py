"""A fused torchvision ResNet in a loop of plain PyTorch: ``python examples/plain_loop.py``."""

import torch
import torch.nn.functional as F
import torchvision
from shapes import shapes
from torch.utils.data import DataLoader

from fastres import fold, fuse


def main(images: int = 2000, batch: int = 50) -> list[float]:
    """Train for an epoch; the losses of its steps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.resnet18(num_classes=10)
    model = fuse(model).to(device, memory_format=torch.channels_last)  # the one line that is new
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for x, labels in DataLoader(shapes(images), batch, shuffle=True):
        with torch.autocast(device, torch.bfloat16):
            logits = model(x.to(device))
        loss = F.cross_entropy(logits.float(), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    folded = fold(model.eval())  # a copy with BatchNorm in the weights
    with torch.no_grad():
        print("classes of eight images:", folded(x[:8].to(device)).argmax(1).tolist())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()))
