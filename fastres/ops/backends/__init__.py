"""Implementations of the primitives, classes of one interface: `fastres.ops.backends.protocol.Backend`.

``aten`` is PyTorch's own functions, ``cpp`` a CPU's compiled passes, ``triton`` the kernels of ``fastres.kernels`` and
the vendor's convolutions between them, ``timed`` the fastest of those on a GPU, ``fake`` results without values.
"""
