"""Checkpoints beside training: the state is copied, and a thread writes, flushes, verifies and prunes while training goes on.

    saver.save(state)           # returns once the copy is taken; what is written is this step, whatever training does meanwhile
    saver.wait()                # the last save is on the disk, or its error is raised here

One save at a time: the next waits for the one before. Only rank 0 writes; copying is everybody's where weights are sharded.
"""

import logging
import threading
import time
from pathlib import Path

from anew.checkpoint import folder as checkpoint
from anew.config.schema import Config
from anew.tokenizer.bpe import Tokenizer
from anew.training.run_log import RunState
from anew.training.train_state import Snapshot, State

log = logging.getLogger("anew")


class Saver:
    """Writes the checkpoints of one run."""

    def __init__(
        self, run: Path, config: Config, tokenizer: Tokenizer, run_state: RunState, saved_step: int
    ) -> None:
        """`saved_step`: the step of the checkpoint that the run was taken up from, else -1."""
        self.run, self.config, self.tokenizer, self.run_state = run, config, tokenizer, run_state
        self.saved_step = self.taken_step = saved_step
        self.taken_at = time.monotonic()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def is_due(self) -> bool:
        """Is the newest checkpoint older than `save_minutes`?"""
        minutes = self.config.run.save_minutes
        return minutes > 0 and time.monotonic() - self.taken_at > 60 * minutes

    def save(self, state: State) -> None:
        """Begin to write the checkpoint of this step, unless there is one, or nothing was done yet."""
        if state.step in (0, self.taken_step):
            return
        self.wait()
        snapshot = state.snapshot()
        self.taken_step, self.taken_at = state.step, time.monotonic()
        if snapshot is None:  # another rank writes
            self.saved_step = state.step
            return
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
        self.thread.start()

    def finish(self) -> None:
        """Until no save is under way, whatever became of it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """Until the save that is under way is on the disk; raises what went wrong with it."""
        self.finish()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            with checkpoint.writing(self.run, snapshot.step) as folder:
                snapshot.write(folder, self.config, self.tokenizer)
            self.saved_step = snapshot.step
            self.run_state.update(saved_step=snapshot.step, step=snapshot.step)
            checkpoint.prune(self.run, self.config.run.keep, self.config.run.keep_every)
        except BaseException as error:  # noqa: BLE001 (the training thread raises it)
            self.error = error
