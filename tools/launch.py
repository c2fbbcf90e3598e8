"""Starts the training processes of one machine through torchrun and ends with the training's own exit code.

    python tools/launch.py --standalone --nproc_per_node 2 train_gpt.py NAME=value ...

The words are torchrun's. torchrun by itself turns every failure of a process into exit code 1 and a page of
its own traceback; here the codes of train_gpt.py (2: a user's mistake, 3: a failed check) come through, and
the only text is what the processes wrote.
"""

import logging
import os
import signal
import sys


def pick_exit_code(codes: list[int]) -> int:
    """Returns the shell's exit code for the codes of the processes that failed (-n: ended by signal n).

    When one process stops, the others lose their peer and fail as well within moments, or torchrun ends them
    with SIGTERM. What is most telling wins: a code that the training chose, then a signal (out of memory,
    mostly), then 1, a plain traceback.
    """
    code = max(codes, key=lambda code: (code > 1, code < 0 and code != -signal.SIGTERM, code > 0))
    return code if code > 0 else 128 - code


def main(argv: list[str]) -> int:
    """Runs torchrun on its own words `argv`; returns the exit code, 128 + n where signal n ended the run."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size, parse_args, run

    args = parse_args(argv)
    # torchrun would give each process one thread; together they may use what a single process would.
    threads = max(1, torch.get_num_threads() // determine_local_world_size(args.nproc_per_node))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for name in ("multiprocessing.api", "agent.server.api"):  # they announce what is reported below
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run(args)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                print(f"rank {rank}: ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return pick_exit_code([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before torchrun has put its own handlers in place
        sys.exit(128 + signal.SIGINT)
