"""Train a model and keep the page of its run up to date: the function `anew.train`.

result = train(anew.recipe("shakespeare"))      # also writes RUN/report.html
"""

import logging

from anew.config.config import Config
from anew.errors import UserError
from anew.report import html
from anew.training import trainer
from anew.training.run_log import Row
from anew.training.trainer import ProgressCallback, TrainResult
from anew.utils.ranks import is_rank_0

log = logging.getLogger("anew")


def train(config: Config, progress: ProgressCallback | None = None) -> TrainResult:
    """Train as `trainer.train` does; write the page at each validation and at the end.

    The page is also written when the training ends with an error.
    """

    def after_step(row: Row) -> None:
        every = config.run.evaluate_every
        # The validation of a step is in metrics.jsonl when the next step has ended.
        follows_validation = every > 0 and row["step"] > 1 and row["step"] % every == 1
        if follows_validation:
            _write_page(config)
        if progress is not None:
            progress(row)

    try:
        result = trainer.train(config, after_step)
    except BaseException:
        if isinstance(config, Config) and (config.folder / "metrics.jsonl").is_file():
            _write_page(config)
        raise
    _write_page(config)
    return result


def _write_page(config: Config) -> None:
    """Write RUN/report.html. A failure is logged, because it must not end the training."""
    if not is_rank_0():
        return
    try:
        html.write([config.folder], config.folder / "report.html")
    except UserError:  # the run has no steps yet
        pass
    except Exception as error:  # noqa: BLE001
        log.info(f"no report.html was written: {error}")
