"""Passwords on the command line, which everybody on the machine can read in the process list."""

from __future__ import annotations

import re
import sys

from twisted.logger import Logger

from walproto.secrets import blanked

_OPTION = re.compile(r"--[\w-]+=|-[A-Za-z]")

_log = Logger()


def hide_in_process_title() -> None:
    """Blank the passwords in this process's title, if it was given any; the operator is told that
    they are better kept elsewhere.

    They could be read from when the program was started, and where commands are recorded they
    still can.  Uses setproctitle, which is in ``walproto[upstream]``.
    """
    title = [_shown(argument) for argument in sys.orig_argv]
    if title == sys.orig_argv:
        return
    try:
        from setproctitle import setproctitle
    except ImportError:
        hidden = "is to be seen in the process list, for want of setproctitle: it takes pip install"
        hidden += " 'walproto[upstream]'"
    else:
        setproctitle(" ".join(title))
        hidden = "is blanked in the process list, but was to be seen there at first"
    _log.warn(
        "the password on the command line {hidden}; keep it in a password file (passfile=...)",
        hidden=hidden,
    )


def _shown(argument: str) -> str:
    """A word of the command line, without a password that is in it."""
    option = _OPTION.match(argument)
    name, value = ("", argument) if option is None else (option[0], argument[option.end() :])
    return name + blanked(value) if "=" in value or "://" in value else argument
