"""The workers that there are: processes that are started, and started again.

Each is a process group of its own, so that signals that are meant for the service do not end it
before its connections were taken back; and it ends by itself when this process is gone.  (A session
of its own would be a scheduling group of its own under Linux, where there are no cgroups: sending
then took 1.4 times the CPU time.)
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from walproto.server.lending import Outlet
from walproto.server.producer import Listener
from walproto.server.transports import bare_socket
from walproto.timeline.interfaces import IFiledTimeline, ITimeline
from walproto.timeline.replicas import Replica
from walproto.workers import control
from walproto.workers.announcements import Announcements, Worker
from walproto.workers.loans import Loan
from walproto.workers.process import NUMBER_SIZE

PAUSE = 1.0
"""Seconds before a worker is started again that has died."""

MODULE = "walproto.workers.process"


class Process(Worker):
    """One of them.  ``died`` is called when it is gone though it was not stopped, with the number
    of its clients."""

    def __init__(self, reactor: Any, died: Callable[[Process, int], None]) -> None:
        super().__init__()
        self.loans: dict[int, Loan] = {}
        self.is_ready = False
        self.is_gone = False
        self._reactor = reactor
        self._died = died
        self._channel = control.Channel(self._heard, self._lost)
        ours, theirs = socket.socketpair()
        self._handles, their_handles = socket.socketpair()
        with ours, theirs, their_handles:
            self._handles.setblocking(False)
            fds = theirs.fileno(), their_handles.fileno()
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            try:
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", MODULE, *map(str, fds)],
                    env=os.environ | {"PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    pass_fds=fds,
                    process_group=0,
                )
            except OSError:
                self._handles.close()
                raise
            ours.setblocking(False)
            reactor.adoptStreamConnection(
                ours.fileno(), socket.AF_UNIX, control.OneChannel(self._channel)
            )
        self._channel.transport.registerProducer(self, True)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def say(self, message: NamedTuple) -> None:
        if not self.is_gone:
            self._channel.say(message)

    def hand_over(self, number: int, handle: Any) -> None:
        socket.send_fds(self._handles, [number.to_bytes(NUMBER_SIZE, "big")], [handle.fileno()])

    def forget(self, number: int) -> None:
        self.loans.pop(number, None)

    def stop(self) -> Deferred[int]:
        """End it; nobody needs it any longer.  Fires when it is gone."""
        self._died = lambda process, clients: None
        self._popen.kill()
        return self.gone()

    def gone(self) -> Deferred[int]:
        """Fires with its return code when it is gone."""
        pool = self._reactor.getThreadPool()
        done: Deferred[int] = deferToThreadPool(self._reactor, pool, self._popen.wait)
        return done

    def _heard(self, message: Any) -> None:
        match message:
            case control.Sent():
                for number, lsn in message.positions.items():
                    if number in self.loans:
                        self.loans[number].sent(lsn)
            case control.Back():
                self.loans.pop(message.stream).heard(message)
            case control.Ready():
                self.is_ready = True
            case _:
                self.loans[message.stream].heard(message)

    def _lost(self) -> None:
        self.is_gone = True
        self._handles.close()
        loans, self.loans = self.loans, {}
        for loan in loans.values():
            loan.lost()
        self._died(self, len(loans))


class Workers:
    """``number`` workers from :meth:`start` to :meth:`stop`, a
    :class:`~walproto.server.lending.Lender`."""

    _log = Logger()

    def __init__(self, reactor: Any, number: int) -> None:
        self._reactor = reactor
        self._number = number
        self._processes: list[Process] = []
        self._announcements: dict[ITimeline, Announcements] = {}
        self._restarts: list[IDelayedCall] = []

    def start(self) -> None:
        for _ in range(self._number):
            self._start_one().is_ready = True  # it will be: what is said meanwhile, waits
        pids = ", ".join(str(process.pid) for process in self._processes)
        self._log.info("workers send WAL: processes {pids}", pids=pids)

    def stop(self) -> Deferred[Any]:
        """End them, when there are no connections left.  Fires when they are gone."""
        for restart in self._restarts:
            if restart.active():
                restart.cancel()
        processes, self._processes = self._processes, []
        return DeferredList([process.stop() for process in processes])

    def lend(
        self,
        transport: Any,
        outlet: Outlet,
        timeline: ITimeline,
        replica: Replica,
        listener: Listener,
    ) -> Loan | None:
        processes = [process for process in self._processes if process.is_ready]
        is_possible = bare_socket(transport) is not None and IFiledTimeline.providedBy(timeline)
        if not processes or not is_possible:
            return None
        process = min(processes, key=lambda process: len(process.loans))
        announcements = self._announcements.get(timeline)
        if announcements is None:
            announcements = Announcements(timeline, partial(self._announcements.pop, timeline))
            self._announcements[timeline] = announcements
        loan = Loan(process, transport, outlet, announcements, replica, self._reactor, listener)
        process.loans[loan.number] = loan
        return loan

    def _start_one(self) -> Process:
        process = Process(self._reactor, self._gone)
        self._processes.append(process)
        return process

    def _gone(self, process: Process, clients: int) -> None:
        self._processes.remove(process)

        def gone(code: int) -> None:
            self._log.error(
                "worker process {pid} has died ({how}): its {count} clients are disconnected, and "
                "another one is started",
                pid=process.pid,
                how=f"signal {-code}" if code < 0 else f"exit status {code}",
                count=clients,
            )

        process.gone().addCallback(gone)
        self._restarts = [each for each in self._restarts if each.active()]
        self._start_later()

    def _start_later(self) -> None:
        self._restarts.append(self._reactor.callLater(PAUSE, self._restart))

    def _restart(self) -> None:
        try:
            self._start_one()
        except OSError as error:
            self._log.error("cannot start a worker process: {error}", error=str(error))
            self._start_later()
