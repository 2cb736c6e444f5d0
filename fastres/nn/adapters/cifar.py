"""What `fastres.reference.cifar` is made of."""

from fastres.nn.adapters.common import reference_steps
from fastres.nn.roles import declare_shortcut
from fastres.nn.structure import register_network
from fastres.ops import Identity
from fastres.reference.cifar import CifarResNet, PaddedShortcut

declare_shortcut(PaddedShortcut, lambda shortcut: Identity(shortcut.stride, shortcut.added))
register_network(CifarResNet, reference_steps)
