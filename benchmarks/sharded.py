"""Weights sharded by FSDP2: the collectives of a step, ours and by gathering each weight.

Both are checked to give the same gradients first. Times are wall times, of processes that talk by gloo on one machine.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.harness import ROUNDS, Call, Row, in_turn, ratio, record, same
from spectreg import SpectralNormRegularizer

NAME = "sharded"
GATHER = "gathering the weights"
COUNT, SIZE = 8, 1024


def acts() -> tuple[dict[str, Call], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(COUNT)])
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    regularizer = SpectralNormRegularizer(model, 1e-9, warmup=15)
    regularizer.sigma()
    saved = regularizer.state_dict()["vectors"]
    vectors = [saved[weight.name]["v"].flatten().clone() for weight in regularizer.weights]

    @torch.no_grad()
    def gathering() -> None:
        """Each weight whole on each rank, a power step there, and this rank's rows of the rank-one gradient."""
        for parameter, v in zip(model.parameters(), vectors, strict=True):
            W = parameter.full_tensor()
            u = nn.functional.normalize(torch.mv(W, v), dim=0)
            w = torch.mv(W.t(), u)
            v.copy_(w / w.norm())
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            rows = u.chunk(dist.get_world_size())[dist.get_rank()]
            parameter.grad.to_local().addr_(rows, w, alpha=1e-9)

    return {"add_gradient": regularizer.add_gradient, GATHER: gathering}, model


def on_rank(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    calls, model = acts()
    gradients, found = {}, {}
    for name, call in calls.items():
        model.zero_grad()
        call()
        gradients[name] = torch.cat([p.grad.to_local().flatten() for p in model.parameters()])
        with CommDebugMode() as traffic:
            call()
        found[name] = {"collectives": traffic.get_total_counts()}
    error = same("the gradients", *gradients.values(), 1e-3)
    times = in_turn(calls, ROUNDS, 2, dist.barrier, time.perf_counter)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps({"counts": found, "error": error, "times": times}))
    dist.destroy_process_group()


def main() -> None:
    for count in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(on_rank, (count, folder), nprocs=count)
            found = json.loads(Path(folder, "found.json").read_text())
        case = f"{COUNT} × {SIZE}² on {count} processes"
        for name, counts in found["counts"].items():
            limit = 1 if name == "add_gradient" else None
            record(Row(NAME, case, name, "a step", "collectives", counts["collectives"], at_most=limit))
        note = f"wall time on {os.cpu_count()} cores"
        record(ratio(NAME, case, "add_gradient", GATHER, found["times"], note=note, error=found["error"]))
