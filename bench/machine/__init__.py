"""What a GPU that is not at hand would take, predicted from the kernels' own machine code: ``python -m bench.machine``.

An in-order model of one multiprocessor runs the instructions that Triton compiled: the stall counts and scoreboards
that the assembler wrote into them, the rate of each pipe, the port of the shared memory, barriers, the asynchronous
groups of cp.async and wgmma, and as many programs at once as registers and shared memory admit
(`bench.machine.multiprocessor`). A launch takes what the fullest multiprocessor takes, or its bytes at the memory's
rate where that is more. PyTorch's and Inductor's steps are put together from the same model's plain matrix products and
counted bytes (`bench.machine.peers`). `bench.machine.compare` has what a GPU took for each launch beside it.

Everything here is a prediction of a model. What it assumes stands in `bench.machine.chips`; an H100 took 1.02 to 1.05
times as long for the launches of three networks.
"""
