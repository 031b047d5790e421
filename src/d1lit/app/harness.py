"""Any generation task of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) through our sampler.

The harness is an extra: `pip install 'd1lit[harness]'`. It brings prompts, stop words and scores; the completion
length, the steps and the blocks are the sampler's, because they are part of what a diffusion model's number means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.open_run import open_run
from d1lit.app.plan import decode, evaluation_sampler
from d1lit.app.task_evaluator import versions
from d1lit.data import EncodedRow, prompt_batch
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.models import Policy, encode_text
from d1lit.quiet import quiet_libraries
from d1lit.sampling import BlockSampler

OWN_ROWS_UNUSED = (
    *("task.train_data=builtin", "task.test_data=builtin", "task.demonstration_data=task", "task.val_rows=0"),
    *("task.num_builtin.train=8", "task.num_builtin.test=1"),
    *("task.max_prompt_length=1000000", "task.max_test_prompt_length=1000000"),
)
"""A task wants rows of its own; here they come from the harness."""


@dataclass(frozen=True)
class Generator:
    """Answers the harness's requests with a policy and a sampler."""

    policy: Policy
    tokenizer: Any
    sampler: BlockSampler
    seed: int
    batch_size: int
    device: torch.device

    def texts(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """A completion of each (context, settings), cut at the first stop word.

        Of the settings `until`, and, where `do_sample` is true, `temperature` hold. A request's draws hang on its
        place alone, so batches change nothing.

        Raises:
            ValueError: an empty context.
        """
        temperatures = [float(s.get("temperature", 1.0)) if s.get("do_sample") else 0.0 for _, s in requests]
        ids = [encode_text(self.tokenizer, context) for context, _ in requests]
        if not all(ids):
            raise ValueError(
                f"harness: request {next(n for n, i in enumerate(ids) if not i)} is empty. Try: a prompt [E803]"
            )
        order = sorted(range(len(requests)), key=lambda n: (temperatures[n], len(ids[n]), n))
        found = [""] * len(requests)
        while order:
            temperature = temperatures[order[0]]
            batch = [n for n in order[: self.batch_size] if temperatures[n] == temperature]
            order = order[len(batch) :]
            rows = [EncodedRow(ids[n], {}) for n in batch]
            prompts = prompt_batch(rows, batch, self.policy.pad_token_id).to(self.device)
            sampler = replace(self.sampler, temperature=temperature)
            rollout = sampler(self.policy, prompts, 1, CounterDraws(self.seed))
            for n, completion in zip(batch, rollout.completion_ids.cpu(), strict=True):
                found[n] = until(decode(self.tokenizer, self.policy.eos_token_id, completion), requests[n][1])
        return found


def until(text: str, settings: Mapping[str, Any]) -> str:
    """The text before the first of its stop words."""
    words = settings.get("until") or []
    stops = [text.find(word) for word in ([words] if isinstance(words, str) else words) if word]
    return text[: min((at for at in stops if at >= 0), default=len(text))]


def harness_model(generator: Generator) -> Any:
    """The generator as the model class that the harness knows.

    Raises:
        ValueError: where the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            f"harness: lm-eval cannot be imported ({error}). Try: pip install 'd1lit[harness]' [E802]"
        ) from None

    class DiffusionLM(LM):
        """The harness's view of a diffusion model: it generates, and has no exact likelihood."""

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Completions in the order of the requests."""
            texts = generator.texts([request.args for request in requests])
            for request, text in zip(requests, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return texts

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Refused.

            Raises:
                ValueError: always.
            """
            raise ValueError(
                "harness: this task asks for likelihoods, of which a masked diffusion model only has bounds. "
                "Try: a task with output_type generate_until [E803]"
            )

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Refused, as above."""
            self.loglikelihood(requests)
            return []

        @property
        def tokenizer_name(self) -> str:
            """Names the chat template in the harness's caches."""
            return str(generator.tokenizer.name_or_path)

        def chat_template(self, chat_template: bool | str = False) -> str:
            """The template's text, for the harness's records."""
            return str(generator.tokenizer.chat_template) if chat_template else ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """The chat as the model reads it."""
            return generator.tokenizer.apply_chat_template(
                chat_history, add_generation_prompt=add_generation_prompt, tokenize=False
            )

    return DiffusionLM()


def run_harness(
    tasks: Sequence[str],
    words: Sequence[str],
    *,
    run: Path | None,
    include: Path | None,
    limit: int | None,
    chat: bool,
    output: Path,
) -> Path:
    """Evaluate a run or a model on tasks of the harness, and write results.json and one file of samples a task.

    Args:
        tasks: names the harness knows, or finds in `include`.
        words: KEY=VALUE of the evaluation (sampler.num_steps=64, model=llada_8b, model.path=FOLDER, ...).
        run: folder of a finished run; None for the model that `words` name.
        include: folder with task YAMLs of one's own.
        limit: first rows of each task only.
        chat: put prompts through the chat template.
        output: folder of the results.

    Raises:
        ValueError: a model, task or setting that cannot be used.
    """
    quiet_libraries()
    if run is not None:
        opened = open_run(run, words)
        plan, policy, tokenizer = opened.plan, opened.policy, opened.tokenizer
    else:
        (config,) = compose_jobs("evaluate", [*OWN_ROWS_UNUSED, *words]).configs
        if config.model.path is None:
            raise ConfigError("model.path", "the built-in model has no weights of its own", "--run FOLDER", "E406")
        plan = plan_run(config, trains=False)
        policy, tokenizer = plan.make_policy()
    sampler = evaluation_sampler(plan, None)
    settings = plan.config.evaluation
    generator = Generator(policy.eval(), tokenizer, sampler, settings.seed, settings.batch_size, plan.device)
    model = harness_model(generator)
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"harness: no task {unknown[0]!r}. Try: --include FOLDER with its YAML, or lm_eval --tasks list [E803]"
        )
    found = simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=True
    )
    assert found is not None
    return _write(output, found, sampler, plan.config, chat)


def _write(output: Path, found: Mapping[str, Any], sampler: BlockSampler, config: Any, chat: bool) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    for task, rows in found["samples"].items():
        lines = [json.dumps(row, default=str) for row in rows]
        (output / f"samples-{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    protocol = {
        "completion_length": sampler.completion_length,
        "num_steps": sampler.num_steps,
        "block_length": sampler.block_length,
        "temperature": sampler.temperature,
        "guidance": sampler.guidance,
        "dtype": config.model.dtype,
        "model": config.model.path or config.model.name,
        "seed": config.evaluation.seed,
        "chat_template": chat,
        "packages": versions("d1lit", "lm_eval", "torch", "transformers"),
    }
    counts = {task: len({row["doc_id"] for row in rows}) for task, rows in found["samples"].items()}
    results = {"harness": found["results"], "n": counts, "versions": found["versions"], "protocol": protocol}
    file = output / "results.json"
    file.write_text(json.dumps(results, indent=2, default=str), encoding="utf-8")
    return file
