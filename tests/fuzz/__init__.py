"""Fuzzing: what comes from outside, made up by a program that watches which branches it takes.

libFuzzer, by way of atheris, changes inputs at random and keeps those that take a new branch in
walproto.  A :class:`~tests.fuzz.target.Target` takes an input, gives it to a decoder or to a whole
server in memory, and fails if anything happens but what is allowed: a value that is right, or an
error of ours.  Where there is an inverse, the value is written and read again and must be the same.

- :mod:`tests.fuzz.target`: what a target is
- :mod:`tests.fuzz.backend`: reads what a server sends, strictly
- :mod:`tests.fuzz.seeds`: inputs to begin with, from recorded conversations
- :mod:`tests.fuzz.wire`, :mod:`tests.fuzz.texts`, :mod:`tests.fuzz.files`, :mod:`tests.fuzz.wal`,
  :mod:`tests.fuzz.upstream`, :mod:`tests.fuzz.access`, :mod:`tests.fuzz.proofs`: a target for each
  decoder
- :mod:`tests.fuzz.clients`, :mod:`tests.fuzz.session`: those for the whole session
- :mod:`tests.fuzz.planted`: the one that is wrong, to see that this is found
- :mod:`tests.fuzz.targets`: all of them
- :mod:`tests.fuzz.process`: runs each in a process of its own, for libFuzzer does not return
- :mod:`tests.fuzz.running`: starts that, and reads what was found

By hand::

    python -m tests.fuzz [TARGET ...] [--seconds 60] [--seed 1] [--corpus DIRECTORY]

runs the targets named, or all, one after the other, each for so many seconds.  It prints how many
inputs each was given; an input that fails is printed as a literal, with the traceback, and the exit
status is 1.  Put the literal into ``FOUND`` in ``tests/test_fuzz.py``, where it is tried from then
on wherever the tests run.  With a directory for the corpus, the inputs that took a new branch are
kept there, and the next run goes on from them.
"""
