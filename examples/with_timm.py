"""A fused ResNet of timm, with timm's optimizer and moving average of weights: ``python examples/with_timm.py``."""

import timm
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from shapes import shapes
from torch.utils.data import DataLoader

from fastres import fuse
from fastres.nn import report


def main(images: int = 2000, batch: int = 50, name: str = "resnet18d") -> list[float]:
    """Train for an epoch; the losses of its steps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fuse(timm.create_model(name, num_classes=10)).to(device, memory_format=torch.channels_last)
    print(report(model))
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    average = timm.utils.ModelEmaV3(model, decay=0.9)

    losses = []
    for x, labels in DataLoader(shapes(images), batch, shuffle=True):
        loss = F.cross_entropy(model(x.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        losses.append(loss.item())

    with torch.no_grad():
        print("classes of eight images:", average.module.eval()(x[:8].to(device)).argmax(1).tolist())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()))
