"""Does a model generate what d1 (arXiv 2504.12216) published for it? For whoever has the weights and a GPU.

The published files hold the questions and LLaDA-8B-Instruct's answers under the paper's protocol (length 128, 64 steps,
blocks of 32, temperature 0, `<reasoning>` put in the model's mouth). Here the same rows are generated again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import Plan
from d1lit.app.task_evaluator import described, versions
from d1lit.data import EncodedRow, prompt_batch
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.evaluation import append_records, read_records
from d1lit.models import Policy, encode_prompt
from d1lit.quiet import quiet_libraries
from d1lit.rewards.extract import END_OF_TEXT
from d1lit.rewards.stored import published_row
from d1lit.statistics import wilson_interval
from d1lit.tasks.prompting import load_template, prompt_protocol, render

PAPER = {"gsm8k": 68.7, "math500": 26.0, "countdown": 20.7, "sudoku": 11.7}
"""Table 1, LLaDA-8B-Instruct at length 128, in per cent; GSM8K's published files lack 189 rows."""
OWN_ROWS_UNUSED = (
    *("task.train_data=builtin", "task.test_data=builtin", "task.demonstration_data=task", "task.val_rows=0"),
    *("task.num_builtin.train=8", "task.num_builtin.test=1"),
    *("task.max_prompt_length=1000000", "task.max_test_prompt_length=1000000"),
)
"""A task wants rows of its own; here the rows come from elsewhere."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Agreement:
    """How far regenerated answers follow the published ones."""

    rows: int
    identical: int
    """Rows equal up to the first end mark."""
    identical_interval: tuple[float, float]
    shared: float
    """Mean share of a published answer's characters before the first one that differs."""


@dataclass(frozen=True)
class TaskReport:
    """What verifying one task found."""

    task: str
    agreement: Agreement
    accuracy: float
    """Of the regenerated rows by d1's grader, in per cent."""
    interval: tuple[float, float]
    """Wilson 95 % interval, in per cent."""
    published_accuracy: float
    """Of the published answers to the same rows by the same grader, in per cent."""
    paper: float | None
    """The paper's figure, where all published rows were regenerated."""
    prompt: Mapping[str, str]

    def lines(self) -> list[str]:
        """For the console."""
        low, high = self.interval
        paper = (
            "" if self.paper is None else f"; paper {self.paper} ({'inside' if self.holds else 'OUTSIDE'} the interval)"
        )
        return [
            f"{self.task}: {self.agreement.identical} of {self.agreement.rows} answers identical, "
            f"{100 * self.agreement.shared:.1f} % of the text before the first difference",
            f"{self.task}: accuracy {self.accuracy:.2f} % (95 % interval {low:.2f} to {high:.2f}), "
            f"published answers {self.published_accuracy:.2f} %{paper}",
        ]

    @property
    def holds(self) -> bool:
        """Whether the paper's figure lies in the interval."""
        return self.paper is not None and self.interval[0] <= self.paper <= self.interval[1]


def before_end(text: str) -> str:
    """The text up to its first end mark."""
    return text[: min((at for mark in END_OF_TEXT if (at := text.find(mark)) >= 0), default=len(text))]


def shared_prefix(published: str, ours: str) -> float:
    """Share of the published text that ours repeats before it first differs."""
    published, ours = before_end(published), before_end(ours)
    if not published:
        return float(not ours)
    same = next(
        (n for n, (a, b) in enumerate(zip(published, ours, strict=False)) if a != b), min(len(published), len(ours))
    )
    return same / len(published)


def agreement(published: Sequence[str], ours: Sequence[str]) -> Agreement:
    """Of two lists of answers, row by row.

    Raises:
        ValueError: no rows, or lists of different lengths.
    """
    if not published or len(published) != len(ours):
        raise ValueError(f"verify: {len(ours)} answers for {len(published)} published ones. Try: the same rows")
    equal = sum(before_end(a) == before_end(b) for a, b in zip(published, ours, strict=True))
    interval = wilson_interval(equal, len(ours))
    shared = sum(shared_prefix(a, b) for a, b in zip(published, ours, strict=True)) / len(ours)
    return Agreement(len(ours), equal, (interval.low, interval.high), shared)


def read_published(folder: Path, task: str) -> list[dict[str, Any]]:
    """Rows of TASK_128.jsonl: question, generation, ground_truth, and the protocol they were made with.

    Raises:
        ValueError: naming file and line.
    """
    file = folder / f"{task}_128.jsonl"
    if not file.is_file():
        raise ValueError(
            f"--published: no file {file}. Try: the folder that holds d1's generations as JSON lines [E507]"
        )
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                published_row(row)
                rows.append({**row, "steps": int(row["diffusion_steps"]), "block": int(row["block_length"])})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--published: {file}:{number}: {error!r}. Try: d1's files as they are [E507]"
                ) from None
    if not rows:
        raise ValueError(f"--published: {file} is empty. Try: d1's files as they are [E507]")
    return rows


def verify_task(
    plan: Plan,
    policy: Policy,
    tokenizer: Any,
    published: Sequence[Mapping[str, Any]],
    file: Path,
    prompt: str,
    batch_size: int,
    all_rows: bool,
) -> TaskReport:
    """Generate the rows again, one record a row into `file` (an interrupted run goes on), and compare.

    Args:
        plan: names the task and the device.
        policy: the model.
        tokenizer: its tokenizer.
        published: rows of one task and one protocol.
        file: JSON lines of what was generated.
        prompt: template name or file.
        batch_size: rows at a time; d1's results hang on it, because its pads were attended.
        all_rows: whether these are all published rows, so that the paper's figure may be set beside them.

    Raises:
        ValueError: if the file holds rows that were made otherwise.
    """
    template = load_template(prompt)
    row = published[0]
    sampler = replace(
        plan.sampler,
        completion_length=int(row["gen_length"]),
        num_steps=row["steps"],
        block_length=row["block"],
        temperature=0.0,
        guidance=0.0,
        stop_at_eos=False,  # d1 always denoises to the end
        record_trace=False,
        record_predictions=False,
        tree=None,
    )
    examples = [published_row(dict(row))[1] for row in published]
    model = {key: plan.config.model[key] for key in ("path", "revision", "dtype", "attend_padding")}
    settings = [prompt_protocol(template), described(sampler), batch_size, model]
    made_with = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    records = read_records(file)
    if any(record.get("made_with") != made_with for record in records):
        cause = f"{file} holds rows of another prompt, model or setting"
        raise ValueError(f"--output: {cause}. Try: another folder [E110]")
    known = {record["index"]: record["completion"] for record in records}
    waiting = [n for n in range(len(published)) if n not in known]
    for start in range(0, len(waiting), batch_size):
        numbers = waiting[start : start + batch_size]
        rows = [EncodedRow(encode_prompt(tokenizer, *render(template, examples[n])), examples[n]) for n in numbers]
        prompts = prompt_batch(rows, numbers, policy.pad_token_id).to(plan.device)
        rollout = sampler(policy, prompts, 1, CounterDraws(0))
        texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in rollout.completion_ids.cpu()]
        made = [{"index": n, "completion": t, "made_with": made_with} for n, t in zip(numbers, texts, strict=True)]
        append_records(file, made)
        known |= dict(zip(numbers, texts, strict=True))
    ours = [known[n] for n in range(len(published))]
    theirs = [row["generation"] for row in published]
    mine, base = (plan.task.judges.grade(texts, examples) for texts in (ours, theirs))
    correct, total = (round(sum(getattr(grade.d1, key) for grade in mine)) for key in ("value", "out_of"))
    share = wilson_interval(correct, total)
    return TaskReport(
        task=plan.task.name,
        agreement=agreement(theirs, ours),
        accuracy=100 * correct / total,
        interval=(100 * share.low, 100 * share.high),
        published_accuracy=100 * sum(g.d1.value for g in base) / sum(g.d1.out_of for g in base),
        paper=PAPER.get(plan.task.name) if all_rows else None,
        prompt=prompt_protocol(template),
    )


def run_verify(
    words: Sequence[str],
    *,
    published: Path,
    tasks: Sequence[str],
    rows: int | None,
    prompts: Mapping[str, str],
    official_revision: str | None,
    output: Path,
) -> Path:
    """`d1lit verify`: regenerate, compare, write verify.json.

    Args:
        words: KEY=VALUE (model=llada_8b, model.path=FOLDER, evaluation.batch_size=1, ...).
        published: folder of TASK_128.jsonl.
        tasks: which of them.
        rows: first rows only.
        prompts: template of a task in place of our TASK_eval, whose wording is not the paper's.
        official_revision: commit of the hub's model repository whose own code is RUN to compare logits; None for no.
            A local folder is refused, for nothing pins its code.
        output: folder of the results.

    Raises:
        ValueError: one line, for what cannot be verified.
    """
    quiet_libraries()
    if official_revision is not None and not _COMMIT.fullmatch(official_revision):
        raise ValueError(
            f"--run-official-code: {official_revision!r} is no full commit, and code that is run must not change. "
            "Try: the 40 hexadecimal digits of the commit you have read [E804]"
        )
    if not tasks:
        raise ValueError("--tasks: none named. Try: --tasks countdown math500 [E110]")
    output.mkdir(parents=True, exist_ok=True)
    rows_of = {task: read_published(published, task) for task in tasks}
    plans = {task: _plan(task, words) for task in tasks}
    plan = plans[tasks[0]]
    if official_revision is not None and Path(plan.config.model.path).expanduser().is_dir():
        # transformers takes a folder's code as it is and ignores both revisions: the pin would not hold.
        raise ValueError(
            f"--run-official-code: {plan.config.model.path} is a folder, whose code no commit pins. "
            "Try: model.path=OWNER/NAME, the repository on the hub [E804]"
        )
    policy, tokenizer = plan.make_policy()
    policy.eval()
    reports = []
    for task in tasks:
        found, chosen = rows_of[task], rows_of[task][:rows]
        prompt = prompts.get(task, f"{task}_eval")
        file, size = output / f"{task}.jsonl", plans[task].config.evaluation.batch_size
        report = verify_task(plans[task], policy, tokenizer, chosen, file, prompt, size, len(chosen) == len(found))
        print("\n".join(report.lines()), flush=True)
        reports.append({**asdict(report), "paper_in_interval": report.holds if report.paper is not None else None})
    logits = None
    if official_revision is not None:
        logits = compare_with_official(plan, policy, tokenizer, official_revision)
        print(f"logits: largest difference {logits['largest_difference']:.4g}, same first choice at "
              f"{100 * logits['same_choice']:.2f} % of the positions", flush=True)  # fmt: skip
    target = output / "verify.json"
    target.write_text(json.dumps({**_made_by(plan), "tasks": reports, "logits": logits}, indent=2), encoding="utf-8")
    return target


def _plan(task: str, words: Sequence[str]) -> Plan:
    """The evaluation of a task by the given words, of a model that is read from somewhere."""
    (config,) = compose_jobs("evaluate", ["model=llada_8b", f"task={task}", *OWN_ROWS_UNUSED, *words]).configs
    if config.model.path is None:
        raise ConfigError("model.path", "the built-in model was never published", "model.path=FOLDER of LLaDA", "E406")
    return plan_run(config, trains=False)


def _made_by(plan: Plan) -> dict[str, Any]:
    """What the generations hang on."""
    return {
        "model": plan.config.model.path,
        "revision": plan.config.model.revision,
        "dtype": plan.config.model.dtype,
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else "cpu",
        "batch_size": plan.config.evaluation.batch_size,
        "attend_padding": plan.config.model.attend_padding,
        "packages": versions("d1lit", "torch", "transformers", "tokenizers"),
    }


# --------------------------------------------------------------------------------------------------------------- logits


def masked_probe(policy: Policy, tokenizer: Any, length: int = 64) -> Tensor:
    """A short chat prompt followed by masks: the input at the first denoising step."""
    prompt = encode_prompt(tokenizer, None, "What is 7 times 8? Explain.", "<reasoning>")
    return torch.tensor([[*prompt, *[policy.mask_token_id] * length]])


def logit_difference(ours: Tensor, official: Tensor) -> dict[str, float]:
    """Largest and mean difference, and the share of positions with the same first choice."""
    difference = (ours.float() - official.float()).abs()
    same = (ours.argmax(-1) == official.argmax(-1)).float().mean()
    return {
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "same_choice": float(same),
    }


def compare_with_official(plan: Plan, policy: Policy, tokenizer: Any, revision: str) -> dict[str, Any]:
    """Our logits beside those of the model repository's own code, which is downloaded at `revision` and RUN."""
    from transformers import AutoModel

    ids = masked_probe(policy, tokenizer).to(plan.device)
    with torch.inference_mode():
        ours = policy.head(policy.hidden(ids)).cpu()
        official = AutoModel.from_pretrained(
            plan.config.model.path,
            revision=revision,
            code_revision=revision,
            trust_remote_code=True,
            dtype=policy.dtype,
        )
        theirs = official.to(plan.device).eval()(ids).logits.float().cpu()
    return {"revision": revision, "positions": ids.shape[1], **logit_difference(ours, theirs)}
