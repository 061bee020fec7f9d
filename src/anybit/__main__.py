"""The command `anybit`, as `python -m anybit` too: Ctrl-C ends it with status 130 from the first import on."""

import signal
import sys


def main() -> None:
    interrupted = False

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is another where Ctrl-C is to be ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        from anybit.cli import main as command

        command()
    except Exception:
        if not interrupted:
            raise
    except KeyboardInterrupt:  # not yet, or no longer, where the command line looks out for it
        pass
    else:
        return
    print("anybit: interrupted", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    main()
