"""Processes that each hold an object of their own and do what they are asked, alone or side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch.multiprocessing


def serve(pipe: Any, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Make the object, then call its methods as they are asked for."""
    target = make(*arguments)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        method, *given = asked
        pipe.send(getattr(target, method)(*given))


class Workers:
    """``count`` processes with an object ``make(*arguments)`` each."""

    def __init__(self, count: int, make: Callable[..., Any], *arguments: Any):
        context = torch.multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process ends the wait for its answer
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def ask(self, worker: int, method: str, *given: Any) -> Any:
        """What the method returns in one process, while the others wait."""
        self.pipes[worker].send((method, *given))
        return self.pipes[worker].recv()

    def spread(self, method: str, all_given: Sequence[Any]) -> None:
        """Call a method for many arguments, in all processes at the same time: argument i in process i, and so on."""
        count = len(self.pipes)
        for i, given in enumerate(all_given):
            self.pipes[i % count].send((method, given))
        for i, _ in enumerate(all_given):
            print(self.pipes[i % count].recv(), file=sys.stderr, flush=True)

    def stop(self, *which: int) -> None:
        for i in which:
            if self.processes[i].is_alive():
                self.pipes[i].send(None)
                self.processes[i].join()
