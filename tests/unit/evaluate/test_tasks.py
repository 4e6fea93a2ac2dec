"""The tasks: real rows worked by hand, figures equal to lm-evaluation-harness's and to a plain computation with transformers."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from anew import GPT, GPTConfig, Tokenizer, UserError
from anew.checkpoint import huggingface as weights
from anew.config.schema import Config
from anew.data import prepare, sources
from anew.data.dataset import open_data
from anew.distributed.world import World
from anew.evaluate import published, runner
from anew.evaluate.scorer import Question
from anew.evaluate.tasks.corpora import wikitext_articles, wikitext_polish, windows
from anew.evaluate.tasks.table import TASKS, Validation, with_stride
from anew.evaluate.tasks.task import Example, Remote, Task, split_pair
from anew.utils.files import sha256_of
from tests.support import shared

TOKENIZER = Tokenizer.named("gpt2")
ROW = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he", "split": "val", "split_type": "indomain", "label": 3, "source_id": "activitynet~v_-JhWjGDPHMY",
    "endings": [
        "is using wrap to wrap a pair of skis.", "is ripping level tiles off.", "is holding a rubik's cube.",
        "starts pulling up roofing on a roof.",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    """A small model over GPT-2's vocabulary, random but lively, and its folder."""
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=128), seed=2).eval()
    for p in gpt.transformer.parameters():
        p.data.mul_(6 if p.ndim == 2 else 1)
    folder = tmp_path_factory.mktemp("model")
    weights.save_model(folder, gpt, TOKENIZER)
    return gpt, folder


def run(
    gpt: GPT, task: Task, path: Path, limit: int | None = None, **more: object
) -> runner.Report:
    return runner.run(
        gpt, task, task.examples(path, TOKENIZER, gpt.config.n_positions)[:limit], **more
    )  # type: ignore[arg-type]


def test_hellaswag_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    [raw] = TASKS["hellaswag"].examples(path, TOKENIZER, 1024)
    assert raw.question.context == [
        32,
        582,
        318,
        5586,
        319,
        257,
        9753,
        13,
        339,
    ]  # "A man is sitting on a roof. he"
    assert raw.question.endings[1] == [
        318,
        34759,
        1241,
        19867,
        572,
        13,
    ]  # " is ripping level tiles off.": its space belongs to it
    [clean] = TASKS["hellaswag_harness"].examples(path, TOKENIZER, 1024)
    assert (
        TOKENIZER.decode(clean.question.context)
        == "Roof shingle removal: A man is sitting on a roof. He"
    )
    assert [TOKENIZER.decode(ending) for ending in clean.question.endings] == [
        " " + ending for ending in ROW["endings"]
    ]  # type: ignore[attr-defined]


def test_the_processed_text_is_the_processed_json() -> None:
    raw, text = (
        shared("hellaswag/hellaswag_val_raw_1000.jsonl"),
        shared("hellaswag/hellaswag_val_full.txt.bz2"),
    )
    task = TASKS["hellaswag_harness"]
    assert len(task.rows(text)) == 10042

    def shape(
        row: dict,
    ) -> (
        tuple
    ):  # the text file has no double spaces and no capital where the context's second part begins
        return tuple(
            " ".join(part.lower().split()) for part in (row["context"], *row["endings"])
        ), row["label"]

    known = {shape(row) for row in task.rows(text)}
    assert all(shape(row) in known for row in task.rows(raw))


def test_the_wikitext_polish_is_the_harness_one() -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    for name in ("wikitext2.test.raw", "wikitext103.valid.tokens"):
        articles = wikitext_articles(shared(f"wikitext/{name}").read_text(encoding="utf-8"))
        assert len(articles) == 60
        for article in articles:
            assert wikitext_polish(article) == wikitext_detokenizer({"page": article})


def test_windows_predict_every_token_once_behind_as_much_as_fits() -> None:
    ids = list(range(100))
    for positions, stride in ((16, 0), (16, 4), (16, 1), (128, 0), (16, 99)):
        predicted = []
        for example in windows(ids, 10, 1000, positions, stride):
            [ending] = example.question.endings
            first = ending[0]
            assert (
                list(example.question.context)
                == ids[max(0, first + len(ending) - 1 - positions) : first]
            )
            predicted += ending
        assert predicted == ids[1:]
    assert sum(e.row.words for e in windows(ids, 10, 1000, 16)) == pytest.approx(10)


# --- against lm-evaluation-harness -----------------------------------------------------------------------------------------------------


def instances(rows: list[tuple[str, ...]]) -> list[object]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=row, idx=i)
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def hflm(model: tuple[GPT, Path]) -> object:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model[1]), device="cpu", dtype="float32", batch_size=16)


def test_hellaswag_and_lambada_equal_the_harness_example_by_example(
    model: tuple[GPT, Path], hflm: object
) -> None:
    from lm_eval.tasks.hellaswag.utils import preprocess

    from anew.evaluate.harness import HarnessModel

    rows = [json.loads(line) for line in shared("hellaswag/hellaswag_val_raw_1000.jsonl").open()][
        :200
    ]
    requests, labels = [], []
    for row in rows:
        query = preprocess(
            row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
        )
        requests += [(query, " " + preprocess(ending)) for ending in row["endings"]]
        labels.append(int(row["label"]))
    theirs = hflm.loglikelihood(instances(requests), disable_tqdm=True)  # type: ignore[attr-defined]
    adapter = HarnessModel(model[0], TOKENIZER).loglikelihood(
        instances(requests), disable_tqdm=True
    )
    np.testing.assert_allclose([a for a, _ in adapter], [a for a, _ in theirs], rtol=1e-5)
    assert [hit for _, hit in adapter] == [hit for _, hit in theirs]
    task = TASKS["hellaswag_harness"]
    examples = task.examples(shared("hellaswag/hellaswag_val_raw_1000.jsonl"), TOKENIZER, 128)[:200]
    report = runner.run(model[0], task, examples)
    totals = np.array([ll for ll, _ in theirs]).reshape(-1, 4)
    lengths = np.array([len(text) - 1 for _, text in requests]).reshape(-1, 4)
    assert report.figures["acc"] == np.mean(totals.argmax(1) == labels)
    assert report.figures["acc_norm"] == np.mean((totals / lengths).argmax(1) == labels)

    texts = [json.loads(line)["text"] for line in shared("lambada/lambada_test.jsonl").open()][:200]
    words = [(" ".join(t.split(" ")[:-1]), " " + t.split(" ")[-1]) for t in texts]
    theirs = hflm.loglikelihood(instances(words), disable_tqdm=True)  # type: ignore[attr-defined]
    figures = run(model[0], TASKS["lambada"], shared("lambada/lambada_test.jsonl"), 200).figures
    assert figures["perplexity"] == pytest.approx(
        math.exp(-np.mean([ll for ll, _ in theirs])), rel=1e-5
    )
    assert figures["acc"] == np.mean([hit for _, hit in theirs])


def test_rolling_likelihood_equals_the_harness(model: tuple[GPT, Path], hflm: object) -> None:
    from anew.evaluate.harness import HarnessModel

    article = wikitext_articles(shared("wikitext/wikitext2.test.raw").read_text(encoding="utf-8"))[
        4
    ]
    request = instances([(wikitext_polish(article),)])
    [theirs] = hflm.loglikelihood_rolling(request, disable_tqdm=True)  # type: ignore[attr-defined]
    [adapter] = HarnessModel(model[0], TOKENIZER).loglikelihood_rolling(request)
    assert adapter == pytest.approx(theirs, rel=1e-6)


def test_any_harness_task_runs(
    model: tuple[GPT, Path], hflm: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from anew.evaluate.harness import HarnessModel

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"{i} and", "a": str(i)}) + "\n" for i in range(6))
    )
    (tmp_path / "count.yaml").write_text(
        "task: count\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{a}}}}'\n"
        'generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}\nmetric_list:\n  - metric: exact_match\n'
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    adapter = HarnessModel(model[0], TOKENIZER)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    outcome = simple_evaluate(adapter, tasks=["count"], task_manager=manager, bootstrap_iters=0)
    assert len(outcome["samples"]["count"]) == 6
    requests = instances(
        [(f"{i} and", {"until": ["."], "max_gen_toks": 12, "do_sample": False}) for i in range(6)]
    )  # type: ignore[misc]
    theirs = hflm.generate_until(requests, disable_tqdm=True)  # type: ignore[attr-defined]
    assert adapter.generate_until(requests) == theirs
    assert any(theirs)
    word = theirs[0].split()[-1]
    stopped = instances([("0 and", {"until": [word], "max_gen_toks": 12, "do_sample": False})])  # type: ignore[misc]
    assert adapter.generate_until(stopped) == [theirs[0][: theirs[0].index(word)]]


# --- against a plain computation with transformers -------------------------------------------------------------------------------------


@torch.no_grad()
def plain_lambada(theirs: torch.nn.Module, texts: list[str]) -> tuple[float, float]:
    nats, hits = [], []
    for text in texts:
        context, _, word = text.rpartition(" ")
        n, all_ids = len(TOKENIZER.encode(context)), TOKENIZER.encode(f"{context} {word}")
        logits = theirs(torch.tensor([all_ids])).logits[0, n - 1 : -1].log_softmax(-1)
        target = torch.tensor(all_ids[n:])
        nats.append(-logits.gather(1, target[:, None]).sum().item())
        hits.append(bool((logits.argmax(1) == target).all()))
    return math.exp(sum(nats) / len(nats)), sum(hits) / len(hits)


@torch.no_grad()
def plain_perplexity(theirs: torch.nn.Module, text: str, positions: int, limit: int) -> float:
    all_ids = [TOKENIZER.end_of_text, *TOKENIZER.encode(text)]
    nats, count = 0.0, 0
    for start in list(range(0, len(all_ids) - 1, positions))[:limit]:
        end = min(start + positions, len(all_ids) - 1)
        back = max(0, end - positions)
        logits = (
            theirs(torch.tensor([all_ids[back:end]]))
            .logits[0, start - back :]
            .double()
            .log_softmax(-1)
        )
        nats -= logits.gather(1, torch.tensor(all_ids[start + 1 : end + 1])[:, None]).sum().item()
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
        weights.save_model(folder, GPT(GPTConfig(), seed=8), TOKENIZER)
    ours = weights.load_model(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    path = shared("lambada/lambada_test.jsonl")
    figures = run(ours, TASKS["lambada"], path, passages).figures
    perplexity, acc = plain_lambada(
        theirs, [json.loads(line)["text"] for line in path.open()][:passages]
    )
    assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert figures["acc"] == acc
    path = shared("wikitext/wikitext2.test.raw")
    figures = run(ours, TASKS["wikitext2"], path, n_windows).figures
    expected = plain_perplexity(
        theirs, path.read_text(encoding="utf-8"), ours.config.n_positions, n_windows
    )
    assert figures["token_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_bits_words_positions_and_calibration_add_up(model: tuple[GPT, Path]) -> None:
    path = shared("wikitext/wikitext2.test.raw")
    task = with_stride(TASKS["wikitext103"], 64)
    examples = task.examples(path, TOKENIZER, 128)[:40]
    report = runner.run(model[0], task, examples)
    figures = report.figures
    assert math.log(figures["token_perplexity"]) == pytest.approx(figures["loss"])
    assert set(figures["loss_by_position"]) >= {
        "1",
        "64",
    }  # the first tokens of an article, and those behind a half-full window
    assert sum(b["tokens"] for b in figures["calibration"]) == sum(
        len(e.question.endings[0]) for e in examples
    )
    gap = sum(b["tokens"] * abs(b["confidence"] - b["hit_rate"]) for b in figures["calibration"])
    assert figures["calibration_error"] == pytest.approx(
        gap / sum(b["tokens"] for b in figures["calibration"])
    )
    text = sum(e.row.bytes for e in examples)
    assert figures["bits_per_byte"] * text * math.log(2) == pytest.approx(
        figures["loss"] * sum(b["tokens"] for b in figures["calibration"])
    )
    finer = with_stride(task, 8).examples(path, TOKENIZER, 128)[
        : 40 * 8
    ]  # the same tokens, each behind more of those before it
    assert [t for e in finer for t in e.question.endings[0]][: 40 * 64] != []
    seen = [sum(e.row.seen for e in some) / len(some) for some in (examples[1:], finer[8:])]
    assert seen[1] > seen[0]


def test_validation_is_the_loss_that_training_reports(
    model: tuple[GPT, Path], text_file: Path, tmp_path: Path
) -> None:
    from anew.evaluate.loss import mean_loss

    prepare.prepare(sources.find(str(text_file)), prepare.Settings("gpt2"), tmp_path / "data")
    folder = open_data(str(tmp_path / "data"), "gpt2")
    task = Validation(folder, 48, 500)
    examples = task.examples(Path(), TOKENIZER, 128)
    report = runner.run(model[0], task, examples)
    expected = mean_loss(model[0], folder.splits["val"], 48, 500, torch.float32, 4)
    assert report.figures["loss"] == pytest.approx(expected, rel=1e-6)
    predicted = sum(len(e.question.endings[0]) for e in examples)
    assert predicted == 499
    assert report.figures["bits_per_byte"] == pytest.approx(
        expected * 499 / math.log(2) / sum(e.row.bytes for e in examples)
    )
    with pytest.raises(UserError, match="has no validation text"):
        Validation(folder, 48, 0)


# --- running: ranks, kills, limits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK_TOKENS", 600)


def test_one_two_and_three_processes_report_the_same(
    model: tuple[GPT, Path], small_chunks: None, tmp_path: Path
) -> None:
    task = TASKS["lambada"]
    examples = task.examples(shared("lambada/lambada_test.jsonl"), TOKENIZER, 128)[:60]
    alone = runner.run(model[0], task, examples)
    for size in (2, 3):
        shares: list[
            tuple
        ] = []  # what each rank has when it meets the others: the last to come sees all
        for rank in range(size):
            world = World(rank, size, lambda share, shares=shares: shares.append(share) or shares)  # type: ignore[misc]
            if rank < size - 1:
                with pytest.raises(KeyError):
                    runner.run(model[0], task, examples, world)
            else:
                assert runner.run(model[0], task, examples, world).figures == alone.figures
        assert sum(len(done) for done, _, _ in shares) == len(list(runner._chunks(examples)))
        assert sum(scored for _, scored, _ in shares) == 60


def test_a_killed_evaluation_goes_on(
    model: tuple[GPT, Path], small_chunks: None, tmp_path: Path
) -> None:
    task = TASKS["lambada"]
    examples = task.examples(shared("lambada/lambada_test.jsonl"), TOKENIZER, 128)[:60]
    alone = runner.run(model[0], task, examples)

    class KillError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done > 20:
            raise KillError

    with pytest.raises(KillError):
        runner.run(model[0], task, examples, store=tmp_path / "store", progress=kill)
    [kept] = (tmp_path / "store").iterdir()
    with kept.open("a") as file:
        file.write(
            '\n5\n{"chunk": 1}\n{"chunk": 999, "results": []}\n{"chunk": 6, "results": [1]}\n{"chunk": 5, "resu'
        )  # what kills may leave
    again = runner.run(model[0], task, examples, store=tmp_path / "store")
    assert again.figures == alone.figures
    assert 0 < again.scored < 60
    assert runner.run(model[0], task, examples, store=tmp_path / "store").scored == 0


def test_other_weights_or_questions_have_another_key() -> None:
    row = Example("a", Question([1], [[2]]))
    one = runner.key("lambada", "abc", "fp32", "cpu", [row])
    others = [
        ("abd", "fp32", [row]),
        ("abc", "bf16", [row]),
        ("abc", "fp32", [row, row]),
        ("abc", "fp32", [Example("b", row.question)]),
    ]
    assert one not in {
        runner.key("lambada", weights, precision, "cpu", rows)
        for weights, precision, rows in others
    }


@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.2955, "PASS"), (0.2870, "PASS"), (0.2850, "FAIL"), (0.4, "PASS")]
)
def test_verdicts_allow_two_standard_errors(ours: float, verdict: str) -> None:
    [found] = published.compare("hellaswag", {"acc_norm": ours}, "124M", 10042, whole=True)
    assert found.verdict == verdict
    [part] = published.compare("hellaswag", {"acc_norm": ours}, "124M", 300, whole=False)
    assert part.verdict == ""


def test_perplexities_pass_downwards() -> None:
    def verdict(value: float) -> str:
        return next(
            c.verdict
            for c in published.compare(
                "wikitext103", {"word_perplexity": value}, "124M", 60, whole=True
            )
        )

    assert [verdict(v) for v in (20.0, 37.5, 38.5, 38.7)] == ["PASS", "PASS", "PASS", "FAIL"]
    assert published.size_of(GPTConfig()) == "124M"
    assert published.size_of(GPTConfig(n_layer=3)) is None


@pytest.mark.parametrize(("task", "content", "words"), [
    ("hellaswag", "{}\n", "line 1 is not a JSON object"), ("hellaswag", "", "is empty"), ("hellaswag", "A man\n3\n", "is not a JSON"),
    ("hellaswag_harness", "A man\n9\na\nb\nc\nd\n", "is not HellaSwag"), ("lambada", '{"text": "word"}', "no last word"),
    ("wikitext2", " \n ", "holds no text"),
    ("hellaswag", json.dumps({**ROW, "label": ""}), "labelled"), ("hellaswag", json.dumps({**ROW, "ctx": None}), "not in the format"),
    ("hellaswag_harness", json.dumps({**ROW, "ctx_b": 5}), "not in the format"), ("lambada", '{"text": null}', "not in the format"),
])  # fmt: skip
def test_files_that_are_not_the_task_are_refused(
    task: str, content: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        TASKS[task].examples(path, TOKENIZER, 128)


def test_split_pair_moves_the_space_to_the_ending() -> None:
    assert split_pair(TOKENIZER, "Hello ", "world") == Question([15496], [[995]])
    assert split_pair(TOKENIZER, "", "Hello") == Question([TOKENIZER.end_of_text], [[15496]])


def test_scoring_tasks_while_training_changes_nothing(tiny: Config, tmp_path: Path) -> None:
    from anew.training.trainer import train

    rows = tmp_path / "cache" / "downloads" / "lambada_test.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text(
        "".join(json.dumps({"text": f"The cat sees the ship on day {i}"}) + "\n" for i in range(20))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
        patch.setattr(
            TASKS["lambada"],
            "remote",
            Remote("https://localhost/lambada_test.jsonl", sha256_of(rows)),
        )
        plain = train(tiny.override(out=str(tmp_path / "plain"), dropout=0.1))
        watched = train(
            tiny.override(
                out=str(tmp_path / "watched"),
                dropout=0.1,
                evaluate_every=3,
                evaluate_tasks="lambada",
                evaluate_limit=7,
            )
        )
    a, b = (GPT.from_pretrained(str(result.folder)) for result in (plain, watched))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    rows_written = [
        json.loads(line) for line in (watched.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert {row["step"] for row in rows_written if "eval/lambada/perplexity" in row} == {
        3,
        6,
        9,
        12,
    }
    with pytest.raises(UserError, match="no task 'nothing'"):
        train(tiny.override(out=str(tmp_path / "x"), evaluate_tasks="nothing"))


@pytest.fixture(autouse=True)
def quiet_harness() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
