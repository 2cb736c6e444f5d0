"""What networks are made of: a file for each network, or library, whose classes the fused forwards know.

Every file here is imported, and registers its classes: blocks and networks with `fastres.nn.structure`, layers that
compute something of their own with `fastres.nn.roles`. Classes of libraries that need not be there are known by name.
"""

from importlib import import_module
from pkgutil import iter_modules

from fastres.nn import blocks, networks  # noqa: F401  the fused forms
from fastres.nn.adapters.layers import ConvBNReLU, Stem
from fastres.nn.adapters.preact import PreActBottleneck
from fastres.nn.adapters.resnet import BasicBlock, Bottleneck

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["BasicBlock", "Bottleneck", "ConvBNReLU", "PreActBottleneck", "Stem"]
