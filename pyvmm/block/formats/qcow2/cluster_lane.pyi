from typing_extensions import disjoint_base

from pyvmm.block.formats.qcow2.cluster_map import ClusterMap
from pyvmm.block.lane import Lane

@disjoint_base
class ClusterLane(Lane):
    def attach(self, map: ClusterMap, file: Lane, below: Lane | None, below_bytes: int) -> None: ...
