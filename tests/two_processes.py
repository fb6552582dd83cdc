"""`python -m train` as one of several CPU processes that torchrun starts, under DDP or FSDP2.

Accelerate shards weights on GPUs only. Where "fsdp2" is asked for, its plugin is put in its place by hand, so that what
runs is Accelerate's own FSDP2, over gloo. What becomes of each module is printed.
"""

import sys
from typing import Any

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

from train.__main__ import main

prepare = Accelerator.prepare


def telling(self: Accelerator, *parts: Any) -> Any:
    prepared = prepare(self, *parts)
    print(f"prepared: {type(prepared[0]).__name__}.", flush=True)
    return prepared


if __name__ == "__main__":
    topology, *arguments = sys.argv[1:]
    Accelerator.prepare = telling  # type: ignore[method-assign]
    if topology == "fsdp2":
        Accelerator(cpu=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        AcceleratorState._shared_state |= {"fsdp_plugin": plugin, "distributed_type": DistributedType.FSDP}
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    sys.exit(main(arguments))
