"""A fused torchvision ResNet in PyTorch Lightning: ``python examples/with_lightning.py``."""

import lightning
import torch
import torch.nn.functional as F
import torchvision
from shapes import shapes
from torch import Tensor
from torch.utils.data import DataLoader

from fastres import fuse


class Classifier(lightning.LightningModule):
    """A network that learns the classes of images."""

    def __init__(self):
        super().__init__()
        self.model = fuse(torchvision.models.resnet18(num_classes=10)).to(memory_format=torch.channels_last)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch of images [N, 3, H, W] and their classes [N]."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at one rate."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(images: int = 2000, batch: int = 50, precision: str = "bf16-mixed") -> list[float]:
    """Train for an epoch; the losses of its steps."""
    lightning.seed_everything(0)
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1,
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(classifier, DataLoader(shapes(images), batch, shuffle=True))
    return classifier.losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()))
