"""fastres: ResNets whose blocks are fused Triton kernels, with their eager PyTorch reference and a training loop."""

import os as _os

__version__ = "0.1.0"

# A plain checkout keeps the kernels in ./kernels; an installed package has them in fastres/kernels.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(__path__[0], "kernels")) and _os.path.isfile(
    _os.path.join(_root, "kernels", "__init__.py")
):
    __path__.append(_root)
