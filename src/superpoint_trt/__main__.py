"""Starts the command `superpoint`, also as `python -m superpoint_trt`, and the guide's scripts.

Importing what the commands need takes most of a short command's time, and may take more memory than there is. Neither
an interrupt nor a lack of memory ends in a traceback meanwhile.
"""

# Not the module signal, which makes enumerations first: that takes long enough to be interrupted meanwhile.
import _signal as signal  # type: ignore[import-not-found, unused-ignore]
import os
import sys


def main(module: str = "superpoint_trt.cli.main", command: str = "cli") -> None:
    """Runs the command line of this process, and ends the process with its exit code.

    Args:
        module: holds the command; it is imported here, so that an interrupt meanwhile shows no traceback.
        command: its name there.
    """
    # Otherwise whoever started this process has interrupts ignored.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _take_closed_streams()
    from superpoint_trt.core.memory import OUT_OF_MEMORY, ran_out_of_memory, reached_limit

    try:
        import logging
        from importlib import import_module

        silent = logging.NullHandler()  # hashlib logs tracebacks if there is too little memory for its library
        logging.root.addHandler(silent)
        from superpoint_trt.cli.terminal import INTERRUPTED, run

        chosen = getattr(import_module(module), command)
        logging.root.removeHandler(silent)
    except Exception as error:
        if not ran_out_of_memory(error) and not reached_limit():
            raise
        os.write(2, f"error: {OUT_OF_MEMORY}\n".encode())
        os._exit(2)  # without memory, Python's own end may fail, too
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run(chosen)
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if code == INTERRUPTED:
        # Libraries whose import was interrupted crash when Python takes them down; `run` has flushed the streams.
        os._exit(code)
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
