"""Processes that belong to another process."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it went: none must write beside the next run's."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
