"""Any task of EleutherAI's lm-evaluation-harness on our models: `pip install -e '.[eval]'`.

    anew evaluate runs/mine --task harness:arc_easy
    lm_eval.simple_evaluate(model=HarnessModel(model, tokenizer), tasks=["arc_easy"])

The harness asks and judges; the scorer answers. Requests that share a context become one question.
"""

from collections.abc import Sequence
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    from anew.errors import UserError

    raise UserError("tasks of lm-evaluation-harness need it: pip install -e '.[eval]'.") from error

from anew.distributed.world import ALONE, World
from anew.errors import UserError
from anew.evaluate.scorer import Question, score
from anew.evaluate.tasks.corpora import windows
from anew.inference.generate import stream
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer

MOST_ENDINGS = 16  # in one question: more of them make a row so long that its mask costs more than the shared context saves
BATCH_QUESTIONS = 256


class HarnessModel(TemplateLM):
    """What the harness calls a language model."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, world: World = ALONE) -> None:
        super().__init__()
        self.gpt, self.gpt_tokenizer = model, tokenizer
        self._rank, self._world_size = world.rank, world.size
        self.world = world

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.gpt_tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return self.gpt_tokenizer.name

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.gpt.config.n_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.gpt_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        groups: list[list[int]] = []  # neighbours with the same context
        for i, (_, context, _) in enumerate(requests):
            if groups and len(groups[-1]) < MOST_ENDINGS and requests[groups[-1][0]][1] == context:
                groups[-1].append(i)
            else:
                groups.append([i])
        questions = [
            Question(requests[group[0]][1], [requests[i][2] for i in group]) for group in groups
        ]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(groups), BATCH_QUESTIONS):
            part = slice(start, start + BATCH_QUESTIONS)
            for group, scored in zip(groups[part], score(self.gpt, questions[part]), strict=True):
                for i, ending in zip(group, scored, strict=True):
                    answers[i] = (ending.total, bool(ending.hit.all()))
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood in nats of whole texts of any length."""
        totals = []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            questions = [example.question for example in windows(ids, 0, 0, self.max_length)]
            totals.append(sum(scored.total for [scored] in score(self.gpt, questions)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string; other sampling settings are refused, as no task of a base model needs them."""
        texts = []
        for request in requests:
            context, rules = request.args
            if rules.get("do_sample") or rules.get("temperature", 0):
                raise UserError(
                    "the harness asks for sampling; only greedy generation is answered."
                )
            stops = rules.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            most = min(int(rules.get("max_gen_toks", 256)), self.max_length - 1)
            ids = (self.tok_encode(context) or [self.eot_token_id])[-(self.max_length - most) :]
            texts.append(self._until(ids, most, [stop for stop in stops if stop]))
        return texts

    def _until(self, ids: list[int], most: int, stops: list[str]) -> str:
        """The likeliest continuation of `ids` up to the first of `stops`, which is left out."""
        new: list[int] = []
        text = ""
        for [token] in stream(self.gpt, [ids], most, temperature=0.0):
            if token == self.eot_token_id:
                break
            new.append(token)
            text = self.gpt_tokenizer.decode(new)
            if found := [text.index(stop) for stop in stops if stop in text]:
                return text[: min(found)]
        return text

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.world.gather(None)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """One value of each process, on process `dst`."""
        values = self.world.gather(obj)
        return values if self.world.rank == dst else None

    def all_gather(self, tensor: Any) -> Any:
        """One tensor of each process, on all."""
        import torch

        return torch.stack([torch.as_tensor(value) for value in self.world.gather(tensor)])


def run_harness(
    model: GPT, tokenizer: Tokenizer, name: str, limit: int, world: World
) -> dict[str, float]:
    """The figures of one of the harness's tasks: {"acc": 0.43, ...}; empty on other ranks than 0."""
    from lm_eval import simple_evaluate

    try:
        outcome = simple_evaluate(
            HarnessModel(model, tokenizer, world),
            tasks=[name],
            limit=limit or None,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"lm-evaluation-harness could not run {name} ({str(error).splitlines()[0]})."
        ) from error
    if outcome is None:
        return {}
    figures = {}
    for task, values in outcome["results"].items():
        for key, value in values.items():
            figure = key.removesuffix(",none")
            if isinstance(value, float) and "stderr" not in figure:
                figures[figure if task == name else f"{task}/{figure}"] = value
    return figures
