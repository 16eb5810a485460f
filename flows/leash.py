"""Runs a module as `python -m` would, in a process that ends when the run that wants it is gone.

    python -P flows/leash.py DESCRIPTOR MODULE ARGUMENTS ...

DESCRIPTOR is the reading end of a pipe whose other end the run alone holds. The guard ends the
process too, but the guard itself can be killed, together with the run.

Nothing of ours is imported: it runs from a file path.
"""

import os
import runpy
import sys
import threading


def follow(descriptor: int) -> None:
    """Wait until nobody holds the other end of the pipe, then end this process."""
    while os.read(descriptor, 1):
        pass
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Run the module named in `arguments`."""
    descriptor, module, *_ = arguments
    threading.Thread(target=follow, args=(int(descriptor),), daemon=True).start()
    sys.argv = arguments[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
