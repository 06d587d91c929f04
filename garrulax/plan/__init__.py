"""Plans of training runs on chips that are not there."""

from garrulax.plan.chips import CHIPS, Chip
from garrulax.plan.planning import Memory, Plan, plan
from garrulax.plan.search import Candidate, search
from garrulax.plan.topology import Topology, read_topology

__all__ = ["CHIPS", "Candidate", "Chip", "Memory", "Plan", "Topology", "plan", "read_topology", "search"]
