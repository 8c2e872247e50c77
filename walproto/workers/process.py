"""A worker: a process that sends WAL on connections that are lent to it, and decides nothing.

``python -m walproto.workers.process CHANNEL SOCKETS``, with the file descriptors of the two socket
pairs, is how the main process starts it.  It ends when the main process is gone, and only then:
what ends a service, signals, is for the main process, which takes its connections back in order.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import traceback
from typing import Any, cast

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall

from walproto.errors import ReportedError
from walproto.server.lent_socket import LentSocket
from walproto.server.producer import WalProducer
from walproto.server.turns import Turns
from walproto.timeline.replicas import Replica
from walproto.wal.segments import OpenFiles
from walproto.workers import control
from walproto.workers.view import StreamView, View

NUMBER_SIZE = 8
"""Bytes of a stream's number, beside its socket."""

REPORT_PERIOD = 0.1
"""Seconds between two reports of how far the streams are, at least."""

REMOVAL_PERIOD = 1.0
"""Seconds between two looks whether open files were removed."""


class LentStream:
    """Sends WAL to one client, and is told what comes of it
    (:class:`~walproto.server.producer.Listener`)."""

    def __init__(
        self, worker: Worker, lend: control.Lend, view: View, handle: socket.socket
    ) -> None:
        self._worker = worker
        self._number = lend.stream
        self._replica = Replica(lend.stream, "", "", "", lend.tli, lend.lsn)
        self._transport = LentSocket(worker.reactor, handle)
        self.timeline = StreamView(
            view,
            ask=lambda lsn: worker.say(control.Ask(lend.stream, lsn)),
            waits=lambda lsn: worker.report(lend.stream, lsn),
        )
        self.producer = WalProducer(
            cast(Any, self._transport),
            self.timeline,
            self._replica,
            view.piece,
            worker.turns,
            worker.reactor,
            self,
        )
        self.producer.start(in_copy_mode=True)

    def give_back(self) -> None:
        """Send nothing more, and say what is left to send of a message that was begun."""
        self.producer.stop()
        unsent = self._transport.close()
        self._worker.say(control.Back(self._number, self._replica.sent_lsn, unsent))

    def timeline_ended(self) -> None:
        self._worker.say(control.Ended(self._number, self._replica.sent_lsn))

    def failed(self, error: ReportedError) -> None:
        self._worker.say(control.Failed(self._number, error))

    def broken(self) -> None:
        self._worker.say(control.Broken(self._number, traceback.format_exc()))

    def caught_up(self) -> None:
        self._worker.say(control.CaughtUp(self._number, self._replica.sent_lsn))


class Worker:
    """All that is lent to this process.  ``handles`` is where the clients' sockets come from."""

    def __init__(self, reactor: Any, handles: socket.socket) -> None:
        self.reactor = reactor
        self.turns = Turns(reactor)
        self._handles = handles
        self._files = OpenFiles()
        self._views: dict[int, View] = {}
        self._streams: dict[int, LentStream] = {}
        self._positions: dict[int, int] = {}
        self._report: IDelayedCall | None = None
        self._removals = LoopingCall(self._close_removed)
        self._removals.clock = reactor
        self.channel = control.Channel(self._heard, self._lost)
        self.say = self.channel.say

    def report(self, stream: int, lsn: int) -> None:
        """A stream has sent all that may be sent, up to ``lsn``: say so soon."""
        self._positions[stream] = lsn
        if self._report is None:
            self._report = self.reactor.callLater(REPORT_PERIOD, self._say_positions)

    def _say_positions(self) -> None:
        self._report = None
        positions, self._positions = self._positions, {}
        self.say(control.Sent(positions))

    def _heard(self, message: Any) -> None:
        match message:
            case control.News():
                self._views[message.timeline].tell(message)
            case control.Grant():
                self._streams[message.stream].timeline.grant(message.lsn)
            case control.SendKeepalive():
                self._streams[message.stream].producer.send_keepalive(message.reply_requested)
            case control.Lend():
                view, handle = self._views[message.timeline], self._take(message.stream)
                self._streams[message.stream] = LentStream(self, message, view, handle)
            case control.Recall():
                self._streams.pop(message.stream).give_back()
                self._positions.pop(message.stream, None)
            case control.Finish():
                self._streams[message.stream].producer.finish()
            case control.Open():
                self._views[message.timeline] = View(
                    message.directory, message.identity, self._files, self.reactor
                )
                if not self._removals.running:
                    self._removals.start(REMOVAL_PERIOD)
            case control.Close():
                self._views.pop(message.timeline).close()
                if not self._views:
                    self._removals.stop()

    def _take(self, number: int) -> socket.socket:
        """The socket of a stream."""
        data, handles, _, _ = socket.recv_fds(self._handles, NUMBER_SIZE, 1)
        assert int.from_bytes(data, "big") == number
        return socket.socket(fileno=handles[0])

    def _close_removed(self) -> None:
        for view in self._views.values():
            view.close_removed()

    def _lost(self) -> None:
        """The main process is gone, and with it all that was to be done; or there was an
        exception, which was told, and nobody knows what was to be done."""
        sys.stderr.flush()
        os._exit(1)


def main(channel: int, sockets: int) -> None:
    """Work until the main process is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the main process bounds the clients
    from twisted.internet import reactor as running_reactor

    reactor: Any = running_reactor
    worker = Worker(reactor, socket.socket(fileno=sockets))
    reactor.adoptStreamConnection(channel, socket.AF_UNIX, control.OneChannel(worker.channel))
    os.close(channel)  # the reactor has a copy
    worker.say(control.Ready())
    reactor.run(installSignalHandlers=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
