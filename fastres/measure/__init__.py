"""Speed and memory of training steps: `fastres bench` and the scripts of ``bench/`` measure through these."""

from fastres.measure.peers import PEERS, Peer, supported
from fastres.measure.step import Step, Workload
from fastres.measure.timing import Timing, all_of, interleaved, synchronize

__all__ = [
    "PEERS",
    "Peer",
    "Step",
    "Timing",
    "Workload",
    "all_of",
    "interleaved",
    "supported",
    "synchronize",
]
