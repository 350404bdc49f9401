"""Real processes on gloo for tests: forked from a server that has imported everything once, which takes a second instead of ten."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "plrd_train.engine.fsdp", "plrd_train.hub.models"])
TIMEOUT_S = 240


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(world, *arguments)` on each of `world_size` ranks, one thread each, and return what they return, in rank order.

    `function` is a module-level one. The first exception of a rank is raised here with that rank's traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = _context.Process(target=_child, args=(theirs, environment, pickle.dumps((function, arguments))), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} of {world_size} did not answer within {TIMEOUT_S} s")
            failed, value = pickle.loads(pipe.recv_bytes())
            if failed:
                raise RuntimeError(f"rank {rank} of {world_size}:\n{value}")
            results.append(value)
    finally:
        for process in processes:
            process.join(0 if len(results) < world_size else 10)
            process.kill()
    return results


def _child(pipe: Any, environment: dict[str, Any], payload: bytes) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    import torch

    from plrd_train.world import World

    torch.set_num_threads(1)
    try:
        world = World.open()
        function, arguments = pickle.loads(payload)  # by plain pickle: tensors travel as bytes, not as shared memory that ends with this process
        answer = (False, function(world, *arguments))
        world.close()
    except BaseException:
        answer = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
