"""`python -m plrd_train.runtime.torchrun …`: torchrun with other exit statuses and signals.

- It ends with the exit status of the rank that failed first, and without a report of its own: where a rank has said in
  one line what the user must mend, torchrun's traceback under it would bury that line. A rank that a signal killed
  counts as 128 and the signal, as in shells.
- TERM, INT, HUP and USR1 ask the run to stop: it is passed on to the workers of this host as TERM, and all ranks agree
  on a step, write a checkpoint and end with status 75. They take the time that they need, where torchrun kills them
  after thirty seconds, and dies of USR1 itself. A worker that has not come as far as to listen, in its first seconds,
  just ends. A second INT (Ctrl-C) kills the workers at once, and ends with status 130.
- QUIT is left to torchrun: the workers have thirty seconds.
- It needs no name of this machine that others know: the addresses come from the routes (plrd_train.runtime.network).
"""

import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from plrd_train.runtime.heartbeat import say
from plrd_train.runtime.network import route_to, route_to_peers

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class _Agent(LocalElasticAgent):
    """torchrun's agent, which hands a request to stop on, and goes on waiting for its workers.

    While they run, and after one has failed, it asks nothing of the rendezvous, whose host may be the one that is lost:
    it would wait for minutes.
    """

    _asked = False

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        result = super().run(role)
        if result.is_failed():
            _, failure = ChildFailedError(role, result.failures).get_first_failure()
            os._exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        worker_group.spec.rdzv_handler.num_nodes_waiting = lambda: 0  # type: ignore[method-assign]  # a run never takes in more hosts
        started = super()._start_workers(worker_group)
        for number in _REQUESTS:  # not before: an agent without workers just ends
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores the end of the terminal
                signal.signal(number, self._on_request)
        return started

    def _on_request(self, number: int, frame: FrameType | None) -> None:
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        workers = [handler.proc for handler in context.subprocess_handlers.values()]
        if self._asked and number == signal.SIGINT:
            for worker in workers:
                worker.kill()
            os._exit(128 + number)
        if all(worker.poll() is not None for worker in workers):
            sys.exit(128 + number)  # it waits for other hosts alone
        self._asked = True
        self._remaining_restarts = 0
        for worker in workers:
            worker.send_signal(signal.SIGTERM)


def _choose_addresses(given: Namespace) -> None:
    """Tell torchrun what it would otherwise look up by this machine's own name: whether it hosts the rendezvous, and
    where others find it."""
    # For its events, again and again, and it waits for name servers that are gone.
    socket.getfqdn = lambda name="": socket.gethostname()
    if given.standalone:
        given.local_addr = given.local_addr or "localhost"
    elif given.rdzv_backend == "c10d" and given.rdzv_endpoint:
        host, port = parse_rendezvous_endpoint(given.rdzv_endpoint, default_port=29400)
        route, peers = route_to(host), route_to_peers(host)
        if route is not None and route.is_home:
            given.rdzv_endpoint = f"localhost:{port}"
        elif route is not None:
            given.rdzv_conf = f"is_host=0,{given.rdzv_conf}".rstrip(",")
        if peers is not None:
            given.local_addr = given.local_addr or peers.address


def main(arguments: list[str]) -> None:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    api.LocalElasticAgent = _Agent  # type: ignore[misc]  # the launcher takes no agent of one's own
    given = parse_args(arguments)
    given.signals_to_handle = "SIGQUIT"
    endpoint = given.rdzv_endpoint
    _choose_addresses(given)
    try:
        run(given)
    except RendezvousError as error:
        say(
            f"{given.nnodes} hosts do not meet at {endpoint} ({error}); start the same command on each of them, with "
            "a host and port that all reach"
        )
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
