"""Servers that a client has named: nothing of ours gets there but what the client has said itself.

libpq knows much that a connection string does not say: the password in PGPASSWORD or in a password
file, a client certificate, a Kerberos ticket.  It must not use them where somebody else has told us
to connect, and a client must not name files of ours, either.

PostgreSQL documentation: "libpq", chapters "Parameter Key Words" and "Environment Variables".

Needs psycopg with libpq 16 or later: ``walproto[upstream]``.
"""

from __future__ import annotations

from psycopg import pq
from psycopg.conninfo import make_conninfo

from walproto.upstream.libpq import CONNECT_TIMEOUT, settings_in

if pq.version() < 160000:
    raise ImportError("libpq is older than 16, and would use our certificates and tickets anywhere")

_NOWHERE = "/dev/null/none"
"""A file that is not there, whoever we are; libpq does not complain of that."""

_NAMED = {
    "host",
    "hostaddr",
    "port",
    "user",
    "dbname",
    "password",
    "options",
    "replication",
    "application_name",
    "fallback_application_name",
    "client_encoding",
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
    "target_session_attrs",
    "channel_binding",
    "gssencmode",
    "sslmode",
    "sslnegotiation",
    "sslsni",
    "sslrootcert",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
}
"""What a client may name; ``sslrootcert`` as ``system`` only, for else it is a file."""

_UNLESS_NAMED = {
    "user": "walproto",
    "hostaddr": "",
    "port": "5432",
    "password": "",
    "options": "",
    "application_name": "walproto",
    "connect_timeout": str(CONNECT_TIMEOUT),
    "target_session_attrs": "any",
}
"""What libpq would look for in the environment otherwise."""

_ALWAYS = {
    "replication": "",  # libpq does not send it then
    "passfile": _NOWHERE,
    "sslcert": _NOWHERE,
    "sslkey": _NOWHERE,
    "sslcertmode": "disable",
    "gssencmode": "disable",
    "gssdelegation": "0",
    "require_auth": "none,password,md5,scram-sha-256",
}


def foreign_conninfo(conninfo: str) -> str:
    """The connection string for an ordinary connection as ``conninfo`` has it, which is a client's.

    It has to name a host.  The default user is ``walproto``, and the database is called as the
    user is.  What it says of ``replication`` is passed over.  Whether TLS is used, and which
    authorities are trusted, is as libpq finds it on this machine if the client does not say.

    Raises ValueError, in whose text there is no password, if it is no connection string or not one
    for a client to name.
    """
    try:
        named = {name: value for name, value in settings_in(conninfo).items() if value}
    except ValueError as error:
        raise ValueError(f"no connection string: {error}") from None
    for name in sorted(named):
        if name not in _NAMED or (name == "sslrootcert" and named[name] != "system"):
            raise ValueError(
                f'there is "{name}" in its connection string, which is not for clients'
            )
    hosts = named.get("host") or named.get("hostaddr") or ""
    named["host"] = hosts
    for host in hosts.split(","):
        if not host or host.startswith(("/", "@")):
            what = "a Unix socket" if host else "no host"
            raise ValueError(f"its connection string names {what}: it has to name a host")
    dbname = named.get("user") or _UNLESS_NAMED["user"]
    return make_conninfo("", **({"dbname": dbname} | _UNLESS_NAMED | named | _ALWAYS))
