"""Low-rank experts in every layer, chosen for each input by how much of it they see (SMILE)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mergewell.companions.ops import LowRankCompanion

Count = Annotated[int, Field(ge=0)]


class Smile(LowRankCompanion):
    """Low-rank experts in every layer, chosen for each input by how much of it they see (SMILE).

    y = theta_0 x + sum over the `top` experts of g_k U_k S_k V_k' x, of the `rank` longest
    directions of each task vector; g is the softmax, over these experts, of the norms of x along
    their first `router_rank` right singular vectors. A router and not a merged model:
    `mergewell.routing` makes the module and says what it costs. Nothing is trained and no data are
    needed.

    Paper: Tang et al. 2024, "SMILE: zero-shot sparse mixture of low-rank experts",
    arXiv:2408.10174.
    Departures: convolutions are routed too, by their patches; biases go with the experts; what is
    no matrix is the merged model's, made by any method (the code's is the average).
    """

    paper: ClassVar[str] = "arXiv:2408.10174"

    rank: Count = 32
    """Directions of each expert that are kept; none leaves the base's matrices."""

    router_rank: Annotated[int, Field(ge=1)] = 16
    """Directions that the router looks at."""

    top: Annotated[int, Field(ge=1)] = 1
    """Experts that each input goes through."""

    weigh: Literal["softmax", "equal"] = "softmax"
    """How the chosen experts are weighed: by the softmax of their norms, or all alike."""

    per: Literal["position", "sample"] = "position"
    """What is routed: every token or place of a map by itself (paper), or a sample as one."""

    def directions(self, shortest: int, experts: int) -> int:
        """Return the rank."""
        return min(self.rank, shortest)
