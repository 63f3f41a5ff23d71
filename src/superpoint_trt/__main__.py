"""Starts the command `superpoint`, also as `python -m superpoint_trt`.

Importing what the commands need takes most of a short command's time, and may take more memory than there is: neither
an interrupt nor a lack of memory shall end in a traceback meanwhile.
"""

import os
import signal
import sys

from superpoint_trt.core.memory import OUT_OF_MEMORY, ran_out_of_memory


def main() -> None:
    """Runs the command line of this process, and ends the process with its exit code."""
    _take_closed_streams()
    handler = signal.getsignal(signal.SIGINT)
    catches = handler is signal.default_int_handler  # otherwise whoever started this process has interrupts ignored
    if catches:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from superpoint_trt.cli.main import cli, run
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        os.write(2, f"error: {OUT_OF_MEMORY}\n".encode())
        sys.exit(2)
    if catches:
        signal.signal(signal.SIGINT, handler)
    code = run(cli)
    if catches:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _take_closed_streams() -> None:
    """Opens the standard streams that are closed (`superpoint ... >&-`), so that no file gets their numbers.

    A library that writes to a stream by its number would write into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
