"""Which experts of a layer lie on which expert-parallel (EP) rank, when the counts differ.

Made of an expert map by ``moe_layer.set_layer_counts``; the layer builds its experts by it, the token
dispatchers send tokens by it, ``sharding`` finds an expert's place in the checkpoint by it.

Megatron gives every rank the same number of *slots* and computes expert = rank * slots + local slot.
Uneven counts keep that arithmetic: every rank has as many slots as the fullest one, and those that no
expert lies in are never used. An empty slot has no parameters and gets no token; it costs a zero in a
table of token counts.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class SlotTable:
    """The blocks of one layer.

    Attributes:
        experts_per_rank: number of experts on each EP rank, at least one of them not 0; rank r holds
            the block of (new) expert ids after those of ranks 0 to r - 1.
        min_slots: of a rank; more than the fullest rank's experts where layers share buffers that are
            sized by the slots.
    """

    experts_per_rank: tuple[int, ...]
    min_slots: int = 0

    @property
    def full(self) -> bool:
        """Whether an expert lies in every slot, which is what Megatron does by itself."""
        return self.num_experts == self.num_slots

    @property
    def slots_per_rank(self) -> int:
        """Slots on each rank: the experts of the fullest rank, or more."""
        return max(*self.experts_per_rank, self.min_slots)

    @property
    def num_experts(self) -> int:
        return sum(self.experts_per_rank)

    @property
    def num_slots(self) -> int:
        """Slots on all ranks together."""
        return self.slots_per_rank * len(self.experts_per_rank)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.experts_per_rank))

    def experts_on(self, rank: int) -> range:
        """The expert ids on a rank."""
        end = self._ends[rank]
        return range(end - self.experts_per_rank[rank], end)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The slot of each expert, counted over all ranks: rank * slots_per_rank + local slot."""
        return tuple(
            rank * self.slots_per_rank + local_slot
            for rank, count in enumerate(self.experts_per_rank)
            for local_slot in range(count)
        )
