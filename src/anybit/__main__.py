"""The command `anybit`, as `python -m anybit` too: Ctrl-C ends it with status 130 from the first import on, and a name or an output that
the system does not take with one line and status 2."""

import errno
import os
import signal
import sys

NOT_TAKEN = (errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT)
"""The system's errors for names that are too long and disks that are full: no code is to blame for them."""


def main() -> None:
    interrupted = False

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is another where Ctrl-C is to be ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        from anybit.cli.app import main as command

        try:
            command()
        finally:
            sys.stdout.flush()  # a full disk shows here at the latest
    except OSError as error:
        if not interrupted:
            if error.errno not in NOT_TAKEN:
                raise
            _give_up(error)
    except Exception:
        if not interrupted:
            raise
    except KeyboardInterrupt:  # not yet, or no longer, where the command line looks out for it
        pass
    else:
        return
    print("anybit: interrupted", file=sys.stderr)
    sys.exit(130)


def _give_up(error: OSError) -> None:
    """Say what was not taken, and end."""
    what = "the output" if error.filename is None else f"{str(error.filename)[:60]!r}"
    remedy = "Choose a shorter name." if error.errno == errno.ENAMETOOLONG else "Make room, or write elsewhere."
    print(f"anybit: {what} cannot be written or read: {error.strerror}. {remedy}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer goes nowhere
    sys.exit(2)


if __name__ == "__main__":
    main()
