"""The tasks against lm-evaluation-harness and transformers, and while a model trains."""

import json
import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from anew import GPT, GPTConfig, UserError
from anew.checkpoint.huggingface import load_model, save_model
from anew.config.config import Config
from anew.evaluate.tasks.registry import TASKS
from anew.evaluate.tasks.task import Remote
from anew.evaluate.tasks.wikitext import articles, detokenize
from anew.utils.files import sha256_of
from tests.support import shared
from tests.support.data_folders import read_documents
from tests.support.evaluation import TOKENIZER, run_on_file, task_model

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM


@pytest.fixture(scope="module")
def model() -> GPT:
    return task_model()


@pytest.fixture(autouse=True)
def quiet_harness() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def test_cleaned_hellaswag_file_equals_the_cleaned_json_lines() -> None:
    json_lines = shared("hellaswag/hellaswag_val_raw_1000.jsonl")
    cleaned_text = shared("hellaswag/hellaswag_val_full.txt.bz2")
    task = TASKS["hellaswag_harness"]

    def shape(row: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        # The text file has no double spaces, and no capital letter where the second part begins.
        texts = (row["context"], *row["endings"])
        return tuple(" ".join(text.lower().split()) for text in texts), row["label"]

    rows = task.rows(cleaned_text)
    assert len(rows) == 10042
    known = {shape(row) for row in rows}
    assert all(shape(row) in known for row in task.rows(json_lines))


# --- against lm-evaluation-harness


def instances(rows: Sequence[tuple[Any, ...]]) -> list["Instance"]:
    """Return requests of the harness."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=row, idx=i)
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def hflm(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> "HFLM":
    """The same weights as a model of transformers, in the harness's own class."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model, TOKENIZER)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16)


def test_detokenized_wikitext_equals_the_harness() -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    for name in ("wikitext2.test.raw", "wikitext103.valid.tokens"):
        found = articles(shared(f"wikitext/{name}").read_text(encoding="utf-8"))
        assert len(found) == 60
        for article in found:
            assert detokenize(article) == wikitext_detokenizer({"page": article})


@pytest.mark.guarantee("evidence")
def test_hellaswag_equals_the_harness_example_by_example(model: GPT, hflm: "HFLM") -> None:
    from lm_eval.tasks.hellaswag.utils import preprocess

    from anew.evaluate.harness import HarnessModel

    path = shared("hellaswag/hellaswag_val_raw_1000.jsonl")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 200)]
    requests, labels = [], []
    for row in rows:
        query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        requests += [(query, " " + preprocess(ending)) for ending in row["endings"]]
        labels.append(int(row["label"]))
    theirs = hflm.loglikelihood(instances(requests), disable_tqdm=True)
    ours = HarnessModel(model, TOKENIZER).loglikelihood(instances(requests), disable_tqdm=True)
    np.testing.assert_allclose([nats for nats, _ in ours], [nats for nats, _ in theirs], rtol=1e-5)
    assert [hit for _, hit in ours] == [hit for _, hit in theirs]
    figures = run_on_file(model, TASKS["hellaswag_harness"], path, 200).figures
    totals = np.array([nats for nats, _ in theirs]).reshape(-1, 4)
    lengths = np.array([len(text) - 1 for _, text in requests]).reshape(-1, 4)
    assert figures["acc"] == np.mean(totals.argmax(1) == labels)
    assert figures["acc_norm"] == np.mean((totals / lengths).argmax(1) == labels)


@pytest.mark.guarantee("evidence")
def test_lambada_equals_the_harness_example_by_example(model: GPT, hflm: "HFLM") -> None:
    path = shared("lambada/lambada_test.jsonl")
    texts = read_documents(path)[:200]
    words = [(" ".join(text.split(" ")[:-1]), " " + text.split(" ")[-1]) for text in texts]
    theirs = hflm.loglikelihood(instances(words), disable_tqdm=True)
    figures = run_on_file(model, TASKS["lambada"], path, 200).figures
    perplexity = math.exp(-np.mean([nats for nats, _ in theirs]))
    assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert figures["acc"] == np.mean([hit for _, hit in theirs])


def test_rolling_likelihood_equals_the_harness(model: GPT, hflm: "HFLM") -> None:
    from anew.evaluate.harness import HarnessModel

    article = articles(shared("wikitext/wikitext2.test.raw").read_text(encoding="utf-8"))[4]
    request = instances([(detokenize(article),)])
    [theirs] = hflm.loglikelihood_rolling(request, disable_tqdm=True)
    [ours] = HarnessModel(model, TOKENIZER).loglikelihood_rolling(request)
    assert ours == pytest.approx(theirs, rel=1e-6)


GENERATION_TASK = """
task: count
dataset_path: json
output_type: generate_until
test_split: test
dataset_kwargs: {{data_files: {{test: {rows}}}}}
doc_to_text: '{{{{q}}}}'
doc_to_target: '{{{{a}}}}'
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list:
  - metric: exact_match
"""


def test_generation_task_runs_in_the_harness(
    model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from anew.evaluate.harness import HarnessModel

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{i} and", "a": str(i)}) + "\n" for i in range(6)))
    (tmp_path / "count.yaml").write_text(GENERATION_TASK.format(rows=rows))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    outcome = simple_evaluate(
        HarnessModel(model, TOKENIZER),
        tasks=["count"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert len(outcome["samples"]["count"]) == 6


def test_generation_equals_the_harness_and_ends_at_a_stop_string(model: GPT, hflm: "HFLM") -> None:
    from anew.evaluate.harness import HarnessModel

    adapter = HarnessModel(model, TOKENIZER)
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    requests = instances([(f"{i} and", settings) for i in range(6)])
    theirs = hflm.generate_until(requests, disable_tqdm=True)
    assert adapter.generate_until(requests) == theirs
    assert any(theirs)
    word = theirs[0].split()[-1]
    stopped = instances([("0 and", {**settings, "until": [word]})])
    assert adapter.generate_until(stopped) == [theirs[0][: theirs[0].index(word)]]


# --- against a loop over transformers


@torch.no_grad()
def lambada_by_loop(theirs: torch.nn.Module, texts: list[str]) -> tuple[float, float]:
    """Return perplexity and accuracy of the last word."""
    nats, hits = [], []
    for text in texts:
        context, _, word = text.rpartition(" ")
        n_context = len(TOKENIZER.encode(context))
        ids = TOKENIZER.encode(f"{context} {word}")
        log_probs = theirs(torch.tensor([ids])).logits[0, n_context - 1 : -1].log_softmax(-1)
        target = torch.tensor(ids[n_context:])
        nats.append(-log_probs.gather(1, target[:, None]).sum().item())
        hits.append(bool((log_probs.argmax(1) == target).all()))
    return math.exp(sum(nats) / len(nats)), sum(hits) / len(hits)


@torch.no_grad()
def perplexity_by_loop(theirs: torch.nn.Module, text: str, positions: int, limit: int) -> float:
    """Return the perplexity per token over the first `limit` windows."""
    ids = [TOKENIZER.end_of_text, *TOKENIZER.encode(text)]
    nats = 0.0
    count = 0
    for start in list(range(0, len(ids) - 1, positions))[:limit]:
        end = min(start + positions, len(ids) - 1)
        back = max(0, end - positions)
        logits = theirs(torch.tensor([ids[back:end]])).logits[0, start - back :]
        targets = torch.tensor(ids[start + 1 : end + 1])[:, None]
        nats -= logits.double().log_softmax(-1).gather(1, targets).sum().item()
        count += end - start
    return math.exp(nats / count)


@pytest.mark.parametrize(
    ("which", "passages", "n_windows"), [("tiny_gpt2", 400, 40), ("124M", 12, 2)]
)
def test_lambada_and_wikitext_equal_transformers(
    which: str, passages: int, n_windows: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path
    if which == "tiny_gpt2":
        folder = shared("tiny_gpt2")
    else:
        save_model(folder, GPT(GPTConfig(), seed=8), TOKENIZER)
    ours = load_model(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    path = shared("lambada/lambada_test.jsonl")
    figures = run_on_file(ours, TASKS["lambada"], path, passages).figures
    texts = read_documents(path)[:passages]
    perplexity, acc = lambada_by_loop(theirs, texts)
    assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert figures["acc"] == acc
    path = shared("wikitext/wikitext2.test.raw")
    figures = run_on_file(ours, TASKS["wikitext2"], path, n_windows).figures
    text = path.read_text(encoding="utf-8")
    expected = perplexity_by_loop(theirs, text, ours.config.n_positions, n_windows)
    assert figures["token_perplexity"] == pytest.approx(expected, rel=1e-4)


# --- while a model trains


def test_scoring_tasks_while_training_changes_no_weight(tiny: Config, tmp_path: Path) -> None:
    from anew.training.trainer import train

    passages = tmp_path / "cache" / "downloads" / "lambada_test.jsonl"
    passages.parent.mkdir(parents=True)
    rows = [json.dumps({"text": f"The cat sees the ship on day {i}"}) for i in range(20)]
    passages.write_text("".join(row + "\n" for row in rows))
    remote = Remote("https://localhost/lambada_test.jsonl", sha256_of(passages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
        patch.setattr(TASKS["lambada"], "remote", remote)
        plain = train(tiny.override(out=str(tmp_path / "plain"), dropout=0.1))
        watched_config = tiny.override(
            out=str(tmp_path / "watched"),
            dropout=0.1,
            evaluate_every=3,
            evaluate_tasks="lambada",
            evaluate_limit=7,
        )
        watched = train(watched_config)
    a, b = (GPT.from_pretrained(str(result.folder)) for result in (plain, watched))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    metrics = (watched.folder / "metrics.jsonl").read_text().splitlines()
    evaluated = [row for row in map(json.loads, metrics) if "eval/lambada/perplexity" in row]
    assert {row["step"] for row in evaluated} == {3, 6, 9, 12}


def test_unknown_task_is_refused_before_training(tiny: Config, tmp_path: Path) -> None:
    from anew.training.trainer import train

    with pytest.raises(UserError, match="no task 'nothing'"):
        train(tiny.override(out=str(tmp_path / "x"), evaluate_tasks="nothing"))
