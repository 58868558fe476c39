"""Where the time of a network's call goes on the CPU: each layer's share, rate, and what the machine could do."""

from fastdiff.profiling.machine import Machine
from fastdiff.profiling.measure import Profile, Row, profile
from fastdiff.profiling.networks import NETWORKS, Step, find

__all__ = ["NETWORKS", "Machine", "Profile", "Row", "Step", "find", "profile"]
