"""Stands for a Python module that a fork server runs: with these streams, this folder, these
variables and this exit code. When this process ends, so does the module.

A script that starts in 10 ms, because it imports only what is built into Python:
`python -I -S fork_client.py SOCKET [--terminal] MODULE ARGUMENT...`.
"""

import _signal  # type: ignore[import-not-found]  # typeshed knows only `signal`, which is slow
import _socket
import os
import sys

# Ctrl-C ends this process without a traceback.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)
connection = _socket.socket(_socket.AF_UNIX)
connection.connect(sys.argv[1])
# pathlib would take as long to import as all the rest.
folder = os.getcwd()  # noqa: PTH109
message = repr((sys.argv[2:], folder, dict(os.environ))).encode()
message = len(message).to_bytes(4, "big") + message
streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
sent = connection.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
# Not even nothing: a short run may have ended, and the server would no longer take it.
if sent < len(message):
    connection.sendall(message[sent:])
code = int(connection.recv(16) or b"1")
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
