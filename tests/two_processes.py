"""`python -m train` as one of several CPU processes, under DDP or FSDP2 where torchrun starts them, or under ZeRO-3.

Accelerate shards weights by FSDP2 on GPUs only. Where "fsdp2" is asked for, its plugin is put in its place by hand, so
that what runs is Accelerate's own FSDP2, over gloo. What becomes of each module is printed.
"""

import sys
from typing import Any

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from train.__main__ import main

prepare, begin = Accelerator.prepare, Accelerator.__init__


def telling(self: Accelerator, *parts: Any, **options: Any) -> Any:
    prepared = prepare(self, *parts, **options)
    for part in prepared if isinstance(prepared, tuple | list) else (prepared,):
        if isinstance(part, nn.Module):
            print(f"prepared: {type(part).__name__}.", flush=True)
    return prepared


def sharding(self: Accelerator, *parts: Any, **options: Any) -> None:
    begin(self, *parts, **options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    AcceleratorState._shared_state |= {"fsdp_plugin": plugin, "distributed_type": DistributedType.FSDP}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    topology, *arguments = sys.argv[1:]
    Accelerator.prepare = telling  # type: ignore[method-assign]
    if topology == "fsdp2":
        Accelerator.__init__ = sharding  # type: ignore[method-assign]
    sys.exit(main(arguments))
