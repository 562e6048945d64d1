"""Tasks of `prepare` in processes of their own, each a shard to write, to index or to hash."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
from collections.abc import Callable, Sequence

from concentration import preemption
from concentration.errors import ConfigError
from concentration.processes import check_semaphores, count_cores, end_with_parent
from concentration.progress import Progress


def run_tasks(
    tasks: Sequence[Callable[[], None]], sizes: Sequence[int], num_processes: int | None, progress: Progress
) -> None:
    """Runs tasks in processes, or here where one is enough; the first error ends all.

    Args:
        tasks: in any order; they travel to other processes.
        sizes: of each, what `progress` counts.
        num_processes: None is one per core.

    Raises:
        ConfigError: there are no semaphores; or a process was killed; what others have done is kept.
        DataError: what a task raises.
    """
    num_processes = min(num_processes or count_cores(), len(tasks))
    if num_processes <= 1:
        for task, size in zip(tasks, sizes, strict=True):
            task()
            progress.advance(size)
        return
    check_semaphores()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["concentration.stages.prepare"])  # torch is imported once, not by every worker
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context, initializer=end_with_parent) as pool:
        with preemption.left_to_parent():
            size_of = {pool.submit(task): size for task, size in zip(tasks, sizes, strict=True)}
        try:
            for future in concurrent.futures.as_completed(size_of):
                future.result()
                progress.advance(size_of[future])
        except concurrent.futures.process.BrokenProcessPool:
            raise ConfigError(
                "a process that read images ended abruptly, probably killed for want of memory; "
                f"give fewer than num_processes={num_processes}, and run the same command again: it continues"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
