"""lm-evaluation-harness through our sampler: requests by hand, and a local task end to end where it is installed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.harness import Generator, harness_model, run_harness, until
from d1lit.app.plan import evaluation_sampler
from d1lit.models import Policy, build_tiny_tokenizer, export_model
from d1lit.models.presets import fresh_network, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model and its tokenizer."""
    tokenizer = build_tiny_tokenizer()
    ids = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = tiny_config(len(tokenizer), *ids, width=16, num_layers=2, num_heads=2, mlp_width=32, rope_theta=100.0,
                         max_length=1024, init_std=0.5)  # type: ignore[arg-type]  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    export_model(fresh_network(config, 0), path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    words = ["task=gsm8k", f"model.path={folder}", "sampler.completion_length=24", "sampler.block_length=12"]
    (config,) = compose_jobs("evaluate", words).configs
    plan = plan_run(config)
    policy, tokenizer = plan.make_policy()
    assert isinstance(policy, Policy)
    return Generator(policy.eval(), tokenizer, evaluation_sampler(plan, None), 0, 3, torch.device("cpu"))


def test_answers_keep_the_order_and_hang_on_nothing_but_the_request(generator: Generator) -> None:
    requests = [("a long question " * (5 - n), {}) for n in range(5)]
    texts = generator.texts(requests)
    assert len(texts) == 5 and len(set(texts)) > 1
    alone = Generator(generator.policy, generator.tokenizer, generator.sampler, 0, 1, generator.device)
    assert alone.texts(requests) == texts
    assert generator.texts(requests[:1]) == texts[:1]


def test_stop_words_cut_and_sampling_is_the_tasks(generator: Generator) -> None:
    assert until("abcSTOPd", {"until": ["STOP", "c"]}) == "ab"
    assert until("abc", {"until": "b"}) == "a" and until("abc", {}) == "abc" and until("abc", {"until": [""]}) == "abc"
    greedy, also, warm = generator.texts(
        [("q", {"do_sample": False, "temperature": 5.0}), ("q", {}), ("q", {"do_sample": True, "temperature": 5.0})]
    )
    assert greedy == also != warm


def test_an_empty_request_is_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="request 1 is empty"):
        generator.texts([("a", {}), ("", {})])


def test_without_the_harness_one_line_says_how_to_get_it(generator: Generator) -> None:
    try:
        import lm_eval  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'd1lit\[harness\]'"):
            harness_model(generator)
    else:
        pytest.skip("lm-eval is installed")


# ---------------------------------------------------------------------------------------------- with the harness itself


@dataclass
class Request:
    args: tuple[Any, ...]


def test_likelihoods_are_refused_in_one_line(generator: Generator) -> None:
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    model = harness_model(generator)
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(ValueError, match="harness: this task asks for likelihoods"):
            ask([Request(("a", "b"))])
    assert model.generate_until([Request(("q", {"until": []}))]) == generator.texts([("q", {})])


def test_a_local_task_runs_from_yaml_to_score(generator: Generator, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    questions = [f"question {n}" for n in range(6)]
    chat = [
        generator.tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False
        )
        for q in questions
    ]
    texts = generator.texts([(context, {}) for context in chat])
    # Four rows whose gold answer is what this model says, two whose answer is not.
    golds = [text.strip() for text in texts[:4]] + ["never", "never"]
    rows = [{"question": q, "answer": gold} for q, gold in zip(questions, golds, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d1lit_local.yaml").write_text(
        "task: d1lit_local\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['<|never|>'], do_sample: false}\n"
        "filter_list: [{name: plain, filter: [{function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "metadata: {version: 1}\n"
    )
    words = ["task=gsm8k", f"model.path={folder}", "sampler.completion_length=24", "sampler.block_length=12"]
    file = run_harness(
        ["d1lit_local"], words, run=None, include=tmp_path, limit=None, chat=True, output=tmp_path / "out"
    )
    results = json.loads(file.read_text())
    scores = results["harness"]["d1lit_local"]
    print(scores)
    (score,) = [value for key, value in scores.items() if key.startswith("exact_match,")]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples-d1lit_local.jsonl").read_text().splitlines()]
    replies = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    assert [replies[n] for n in range(6)] == texts
    assert score == pytest.approx(sum(gold == text for gold, text in zip(golds, texts, strict=True)) / 6)
    assert results["n"] == {"d1lit_local": 6}
    assert results["protocol"]["completion_length"] == 24 and results["protocol"]["packages"]["lm_eval"]
    with pytest.raises(ValueError, match="no task 'nothing_of_the_kind'"):
        run_harness(["nothing_of_the_kind"], words, run=None, include=tmp_path, limit=1, chat=True, output=tmp_path)
