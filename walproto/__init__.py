"""A PostgreSQL WAL sender without a database.

Data goes one way, and so does the reading order: bytes, messages, session, timeline, segments,
producer, bytes.  A module imports only from those above it in this list:

- :mod:`walproto.secrets`: what may not be logged
- :mod:`walproto.errors`: every error that a peer can be told of
- :mod:`walproto.lsn`: positions in the WAL, names of its files
- :mod:`walproto.wire.messages`: the frontend/backend messages, declared
- :mod:`walproto.wire.replication`: what travels inside CopyData
- :mod:`walproto.wire.framing`: bytes into messages
- :mod:`walproto.wire.commands`: replication commands, parsed
- :mod:`walproto.wire.startup`: how a connection begins
- :mod:`walproto.access.peer`: who is at the other end
- :mod:`walproto.access.grant`: what one that is let in may see
- :mod:`walproto.access.authentication`: how it proves who it is
- :mod:`walproto.access.saslprep`: passwords, made comparable
- :mod:`walproto.access.scram_messages`: what is said in a SCRAM exchange
- :mod:`walproto.access.scram`: SCRAM-SHA-256
- :mod:`walproto.access.files`: files of the operator's, read without a risk
- :mod:`walproto.access.userlist`: users and their secrets, in a file
- :mod:`walproto.access.tokens`: JSON web tokens as passwords
- :mod:`walproto.access.hba_tokens`: the lines of pg_hba.conf, taken apart
- :mod:`walproto.access.hba`: who may connect from where
- :mod:`walproto.access.hba_file`: the same, in a file
- :mod:`walproto.access.policy`: what the files say together
- :mod:`walproto.access.guard`: who may connect, all told
- :mod:`walproto.access.limits`: how many may be connected that are not known yet
- :mod:`walproto.access.certificates`: certificates and keys, read from files
- :mod:`walproto.access.tls`: the server's side of TLS
- :mod:`walproto.wal.pages`: WAL pages and records, declared
- :mod:`walproto.wal.headers`: what a page must say of itself
- :mod:`walproto.wal.plain`: many records, checked at once
- :mod:`walproto.wal.scan`: walks records, finds the end of WAL
- :mod:`walproto.wal.cold`: reads that wait for a disk, elsewhere
- :mod:`walproto.wal.segments`: the files, read
- :mod:`walproto.wal.incoming`: pages checked as they come in
- :mod:`walproto.wal.writer`: the files, written
- :mod:`walproto.timeline.history`: which timeline follows which
- :mod:`walproto.timeline.replicas`: who streams, and how far they are
- :mod:`walproto.timeline.threads`: where the waiting for a disk is done
- :mod:`walproto.timeline.slot_file`: replication slots, as they lie on disk
- :mod:`walproto.timeline.slots`: replication slots, and who uses them
- :mod:`walproto.timeline.observers`: who is told that there is more WAL
- :mod:`walproto.timeline.interfaces`: what a session needs of a timeline
- :mod:`walproto.timeline.survey`: a first look at a directory
- :mod:`walproto.timeline.tail`: the end of WAL, followed
- :mod:`walproto.timeline.proofs`: older WAL, proven before it is sent
- :mod:`walproto.timeline.succession`: the timeline that comes next
- :mod:`walproto.timeline.received`: what is being received, as far as it may be seen
- :mod:`walproto.timeline.holding`: where receiving is to go on
- :mod:`walproto.timeline.watch`: tells when a directory changes
- :mod:`walproto.timeline.directory`: a timeline that lives in a directory
- :mod:`walproto.timeline.retention`: which WAL is kept, and the removal of the rest
- :mod:`walproto.server.settings`: configuration parameters
- :mod:`walproto.server.lent_socket`: the sending half of a connection
- :mod:`walproto.server.transports`: what a transport tells of its connection
- :mod:`walproto.server.channels`: past a transport, as far as that is in order
- :mod:`walproto.server.configuration`: how it is served
- :mod:`walproto.server.results`: what answers are made of
- :mod:`walproto.server.encryption`: TLS on a connection
- :mod:`walproto.server.refusal`: no place for a connection
- :mod:`walproto.server.turns`: who may send a burst
- :mod:`walproto.server.producer`: sends WAL
- :mod:`walproto.server.lending`: lets another process send it
- :mod:`walproto.server.service`: what a connection is served, by which rules
- :mod:`walproto.server.slot_commands`: what a session does with replication slots
- :mod:`walproto.server.answers`: what commands are answered
- :mod:`walproto.server.events`: what a session deals with
- :mod:`walproto.server.outputs`: what a session does
- :mod:`walproto.server.session`: the state machine
- :mod:`walproto.server.heartbeat`: wal_sender_timeout, and other timers
- :mod:`walproto.server.reader`: lets a client have its say
- :mod:`walproto.server.protocol`: the connection
- :mod:`walproto.server.factory`: all connections
- :mod:`walproto.workers.control`: what the main process and a worker say to each other
- :mod:`walproto.workers.view`: a timeline as a worker sees it
- :mod:`walproto.workers.process`: a worker, which sends WAL
- :mod:`walproto.workers.announcements`: how far timelines go, as workers are told
- :mod:`walproto.workers.loans`: connections that are lent to workers
- :mod:`walproto.workers.pool`: the workers that there are
- :mod:`walproto.upstream.connection`: what is needed of a connection to a server
- :mod:`walproto.upstream.libpq`: such a connection
- :mod:`walproto.upstream.foreign`: one to a server that a client has named
- :mod:`walproto.upstream.process_title`: the command line, for others to read
- :mod:`walproto.upstream.server`: what a server is asked
- :mod:`walproto.upstream.store`: makes durable what comes
- :mod:`walproto.upstream.receiver`: WAL in, feedback out
- :mod:`walproto.upstream.conversation`: what is said to a server
- :mod:`walproto.upstream.lock`: a directory of one's own
- :mod:`walproto.upstream.fence`: WAL that is served to nobody
- :mod:`walproto.upstream.relay`: a timeline that is received from a live server
- :mod:`walproto.neon.ids`: tenants and timelines, and how a client names them
- :mod:`walproto.neon.control_file`: what a safekeeper keeps of a timeline
- :mod:`walproto.neon.directory_id`: tells a directory from one that takes its place
- :mod:`walproto.neon.contents`: what there is of a timeline
- :mod:`walproto.neon.timeline`: a timeline as a safekeeper keeps it
- :mod:`walproto.neon.data_directory`: many of them
- :mod:`walproto.neon.callback`: a pageserver is asked to connect
- :mod:`walproto.neon.callmemaybe`: which pageservers are asked, and when
- :mod:`walproto.neon.pageservers`: which pageserver a timeline belongs to
- :mod:`walproto.neon.streams`: how a safekeeper streams
- :mod:`walproto.neon.walsender`: serves many timelines
- :mod:`walproto.options`: what ``twist walsender`` is told
- :mod:`walproto.running`: what runs while that does, and how it ends
- :mod:`walproto.tap`: ``twist walsender``

To embed it, this much is needed: :class:`WalDirectory` and :class:`WalSenderFactory`; to bring a
timeline or an authentication method of one's own, :class:`ITimeline` and :class:`IAuthenticator`;
to bring many timelines, :class:`IServices`, or a safekeeper's, :mod:`walproto.neon.walsender`.
"""

from walproto.access.authentication import IAuthenticator
from walproto.server.factory import WalSenderFactory
from walproto.server.service import IServices
from walproto.timeline.directory import WalDirectory
from walproto.timeline.interfaces import ITimeline

__all__ = ["IAuthenticator", "IServices", "ITimeline", "WalDirectory", "WalSenderFactory"]
