"""The command `anybit`, also as `python -m anybit`: Ctrl-C exits with status 130 from the first import on; a name or an output that the
system rejects exits with one line and status 2."""

import errno
import os
import signal
import sys

NOT_TAKEN = (errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT)
"""The system's errors for names that are too long and disks that are full, for which no code is to blame."""


def main() -> None:
    interrupted = False
    _open_standard_streams()

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it differs if Ctrl-C is ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        from anybit.cli.app import main as command

        try:
            command()
        finally:
            sys.stdout.flush()  # a full disk raises here at the latest
    except OSError as error:
        if not interrupted:
            _give_up(error)
    except Exception:
        if not interrupted:
            raise
    except KeyboardInterrupt:  # before or after the command line handles it
        pass
    else:
        return
    print("anybit: interrupted", file=sys.stderr)
    sys.exit(130)


def _give_up(error: OSError) -> None:
    """Print what the system rejected, and exit; raise any other error."""
    if error.errno == errno.EPIPE:  # a broken pipe: nobody would read a message
        _drop_output()
        sys.exit(1)
    if error.errno not in NOT_TAKEN:
        raise error
    what = "the output" if error.filename is None else f"{str(error.filename)[:60]!r}"
    remedy = "Choose a shorter name." if error.errno == errno.ENAMETOOLONG else "Make room, or write elsewhere."
    print(f"anybit: {what} cannot be written or read: {error.strerror}. {remedy}", file=sys.stderr)
    _drop_output()
    sys.exit(2)


def _drop_output() -> None:
    """Discard the buffer of stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Open os.devnull for closed standard streams, whose descriptors the next opened files would get."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
