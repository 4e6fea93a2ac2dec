"""Writes checkpoints in a thread while training continues.

    checkpoints.save(state)     # returns when the state is copied; a thread writes the copy
    checkpoints.wait()          # returns when the checkpoint is on the disk, or raises its error

A second save waits for the one before. Only rank 0 writes; every rank must call `save`, because
sharded weights are gathered. A save that meets an error that may pass is written again from the
copy, while training continues.
"""

import threading
import time
from pathlib import Path

from anew.checkpoint import folder as checkpoint
from anew.config.config import Config
from anew.tokenizer.bpe import Tokenizer
from anew.training.run_log import RunState
from anew.training.silent_errors import refuse_different_ranks
from anew.training.train_state import Snapshot, TrainState
from anew.utils.disk_errors import with_retries


class CheckpointWriter:
    """Writes the checkpoints of one run."""

    def __init__(
        self,
        run: Path,
        config: Config,
        tokenizer: Tokenizer,
        run_state: RunState,
        resumed_step: int,
    ) -> None:
        """`resumed_step` is the step of the checkpoint that the run was resumed from;

        0 if there is none.
        """
        self.run = run
        self.config = config
        self.tokenizer = tokenizer
        self.run_state = run_state
        self.last_step = resumed_step  # of the newest checkpoint that was begun
        self.last_time = time.monotonic()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def is_due(self) -> bool:
        """Return whether the newest checkpoint is older than `save_minutes`."""
        minutes = self.config.run.save_minutes
        return minutes > 0 and time.monotonic() - self.last_time > 60 * minutes

    def save(self, state: TrainState) -> None:
        """Begin to write the checkpoint of this step, unless it exists or no step was taken yet.

        Raises ComputedWrongly, and writes nothing, if --check-every is set and the ranks differ.
        """
        if state.step in (0, self.last_step):
            return
        if self.config.run.check_every:
            refuse_different_ranks(state)
        self.wait()
        snapshot = state.snapshot()
        self.last_step = state.step
        self.last_time = time.monotonic()
        if snapshot is not None:
            self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
            self.thread.start()

    def join(self) -> None:
        """Wait until no checkpoint is being written, without raising its error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """Wait until no checkpoint is being written, and raise the error of the last one."""
        self.join()
        if self.error is not None:
            error = self.error
            self.error = None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            path = checkpoint.checkpoint_folder(self.run, snapshot.step)
            with_retries(lambda: self._write_files(snapshot), path)
            self.run_state.update(saved_step=snapshot.step, step=snapshot.step)
            checkpoint.prune(self.run, self.config.run.keep, self.config.run.keep_every)
        except BaseException as error:  # noqa: BLE001 (`wait` raises it in the training thread)
            self.error = error

    def _write_files(self, snapshot: Snapshot) -> None:
        with checkpoint.write_checkpoint(self.run, snapshot.step) as folder:
            snapshot.write(folder, self.config, self.tokenizer)
