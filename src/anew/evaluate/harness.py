"""Run any task of EleutherAI's lm-evaluation-harness: `pip install lm-eval`.

    anew evaluate runs/mine --task harness:arc_easy
    lm_eval.simple_evaluate(model=HarnessModel(model, tokenizer), tasks=["arc_easy"])

The harness makes the requests and computes the figures; the scorer answers the requests.
Consecutive requests with the same context become one question.
"""

from collections.abc import Sequence
from typing import Any

import torch

from anew.distributed.world import ALONE, World
from anew.errors import UserError, missing_packages
from anew.evaluate.scorer import Question, score
from anew.evaluate.tasks.running_text import windows
from anew.inference.generate import stream
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise missing_packages("a task of lm-evaluation-harness", "lm-eval") from error

# Endings in one question. With more, the row becomes so long that its attention mask costs more
# than the shared context saves.
MAX_ENDINGS = 16
QUESTIONS_PER_CALL = 256
DEFAULT_NEW_TOKENS = 256  # where a task does not set max_gen_toks


class HarnessModel(TemplateLM):
    """A GPT as a language model of the harness."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, world: World = ALONE) -> None:
        super().__init__()
        self.gpt = model
        self.gpt_tokenizer = tokenizer
        self.world = world
        self._rank = world.rank
        self._world_size = world.size

    @property
    def eot_token_id(self) -> int:
        """Return the token that precedes a text without context."""
        return self.gpt_tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Return a name for the harness's cache keys."""
        return self.gpt_tokenizer.name

    @property
    def max_length(self) -> int:
        """Return the number of positions of the model."""
        return self.gpt.config.n_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self.gpt_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        """Return, for each request, the log-likelihood of its ending and whether it is greedy.

        A request is ((context text, ending text), context ids, ending ids).
        """
        questions: list[Question] = []
        for _, context, ending in requests:
            previous = questions[-1] if questions else None
            if (
                previous is not None
                and previous.context == context
                and len(previous.endings) < MAX_ENDINGS
            ):
                questions[-1] = Question(context, [*previous.endings, ending])
            else:
                questions.append(Question(context, [ending]))
        results = []
        for start in range(0, len(questions), QUESTIONS_PER_CALL):
            for answer in score(self.gpt, questions[start : start + QUESTIONS_PER_CALL]):
                results += [(ending.total, bool(ending.is_top.all())) for ending in answer]
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihoods in nats of whole texts of any length."""
        totals = []
        for request in requests:
            [text] = request.args
            ids = [self.eot_token_id, *self.tok_encode(text)]
            questions = [example.question for example in windows(ids, self.max_length)]
            totals.append(sum(window.total for [window] in score(self.gpt, questions)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each context, up to a stop string.

        Sampling is refused, because no task of a base model needs it.
        """
        texts = []
        for request in requests:
            context, settings = request.args
            if settings.get("do_sample") or settings.get("temperature", 0):
                raise UserError(
                    "the harness task asks for sampling, and only greedy generation is available; "
                    "choose a task with do_sample: false."
                )
            stops = settings.get("until") or []
            if isinstance(stops, str):
                stops = [stops]
            wanted_tokens = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            new_tokens = min(wanted_tokens, self.max_length - 1)
            ids = self.tok_encode(context) or [self.eot_token_id]
            ids = ids[-(self.max_length - new_tokens) :]
            texts.append(self._continuation(ids, new_tokens, [stop for stop in stops if stop]))
        return texts

    def _continuation(self, ids: list[int], new_tokens: int, stops: list[str]) -> str:
        """Return the greedy continuation of `ids` up to the first of `stops`, which is left out."""
        new_ids: list[int] = []
        text = ""
        for [token] in stream(self.gpt, [ids], new_tokens, temperature=0.0):
            if token == self.eot_token_id:
                break
            new_ids.append(token)
            text = self.gpt_tokenizer.decode(new_ids)
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self.world.gather(None)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return one value of each rank, on rank `dst`; None on the other ranks."""
        values = self.world.gather(obj)
        return values if self.world.rank == dst else None

    def all_gather(self, tensor: Any) -> Any:
        """Return the tensors of all ranks, stacked, on every rank."""
        return torch.stack([torch.as_tensor(value) for value in self.world.gather(tensor)])


def run_harness(
    model: GPT, tokenizer: Tokenizer, name: str, limit: int, world: World
) -> dict[str, float]:
    """Return the figures of a task or group of the harness, such as {"acc": 0.43}.

    `limit` is the number of examples; 0: all. Returns {} on ranks other than 0.
    """
    try:
        outcome = simple_evaluate(
            HarnessModel(model, tokenizer, world),
            tasks=[name],
            limit=limit or None,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"lm-evaluation-harness could not run {name} ({reason}).") from error
    if outcome is None:
        return {}
    figures = {}
    for task, values in outcome["results"].items():
        prefix = "" if task == name else f"{task}/"
        for key, value in values.items():
            figure = key.removesuffix(",none")
            if isinstance(value, float) and "stderr" not in figure:
                figures[prefix + figure] = value
    return figures
