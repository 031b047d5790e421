"""The guards taken away one by one: a test has to notice each."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """A piece of the source that is replaced, and the tests that have to fail then."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def source(self) -> str:
        """The mutated file.

        Raises:
            ValueError: if the piece is not there exactly once, so that this list has to follow the code.
        """
        text = (ROOT / "src" / "d1lit" / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} is there {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


STORE, GUARDS, ALARMS = "tests/test_checkpoint.py", "tests/test_guards.py", "tests/test_alarms.py"
SHARDS, FULL = "tests/test_shards.py", "tests/test_full_disk.py"
SIGNALS, SECURITY = "tests/test_signals.py", "tests/test_security.py"
RECIPES, GOING_ON, REFUSED = "tests/test_recipes.py", "tests/test_going_on.py", "tests/contracts/test_bad_input.py"
QUEUED = "test_what_ends_outside_a_trainer_is_queued_again_too"
LISTED, EDITED = "test_every_changed_key_is_listed", "test_an_edited_base_or_row_is_refused_and_named"
LOOKED_AT = "look_at(folder, stage, starts_over)"
MUTANTS = (
    # checkpoints
    Mutant("checkpoint/folder.py", 'if digest != entry["sha256"]:', "if False:", (STORE,)),
    Mutant("checkpoint/folder.py", " and _manifest_bytes(body) == raw else", " else", (STORE,)),
    Mutant("checkpoint/folder.py", 'if body["schema"] != SCHEMA:', "if False:", (STORE,)),
    Mutant(
        "checkpoint/folder.py", 'if name != os.path.basename(name) or name in ("", ".", "..")', "if False", (STORE,)
    ),
    Mutant("checkpoint/folder.py", "if free < _FREE_SPACE_FACTOR * estimate:", "if False:", (STORE,)),
    Mutant("checkpoint/folder.py", " and verify(path) is None:", ":", (STORE,)),
    Mutant("checkpoint/folder.py", "        os.rename(folder, aside)", "        shutil.rmtree(folder)", (STORE,)),
    Mutant("checkpoint/folder.py", "shutil.rmtree(staging, ignore_errors=True)\n        raise", "raise", (STORE,)),
    Mutant("checkpoint/lightning_io.py", "if reason is not None:", "if False:", (STORE,)),
    Mutant("checkpoint/lightning_io.py", "shutil.rmtree(pieces_folder(path), ignore_errors=True)", "pass", (SHARDS,)),
    Mutant("checkpoint/shards.py", "        _on_all(make_room)", "        make_room()", (SHARDS,)),
    Mutant("checkpoint/shards.py", "    if errors:", "    if False:", (SHARDS,)),
    Mutant(
        "checkpoint/run_folder.py",
        "except Timeout:\n            raise",
        "except Timeout:\n            break\n            raise",
        (STORE,),
    ),
    # resume and signals
    Mutant(
        "callbacks/saving.py",
        'checkpoint["loops"]["fit_loop"] = copy.deepcopy(self._loops)',
        "pass",
        (f"{SIGNALS}::test_asked_twice_at_a_chosen_moment",),
    ),
    Mutant(
        "callbacks/saving.py",
        " or (self._step == trainer.max_steps and not self._is_over)",
        "",
        (f"{SIGNALS}::test_asked_twice_at_a_chosen_moment",),
    ),
    Mutant(
        "callbacks/signals.py",
        "            self.flag.raise_if_stopped()",
        "            pass",
        (f"{SIGNALS}::test_within_a_rollout_the_pass_after_a_signal_is_the_last",),
    ),
    Mutant(
        "callbacks/validation.py",
        "        self.looked_at = step",
        "        pass",
        (f"{SIGNALS}::test_the_undisturbed_run_has_every_scalar_once",),
    ),
    Mutant("report/events.py", "if event.step < step", "if event.step <= step", ("tests/test_events.py",)),
    Mutant(
        "strategies.py",
        "_cut_state(part, parameters[start:stop]), stop",
        "part, stop",
        ("tests/end_to_end/test_distributed.py::test_muon_goes_on_in_shards[float32]",),
    ),
    Mutant("callbacks/saving.py", "first_decides(partial(self._check_room, pl_module))", "pass", (FULL,)),
    Mutant("callbacks/saving.py", 'rank_zero_warn(f"the log up to', 'raise OSError(f"', (FULL,)),
    Mutant("report/loggers.py", "failed_at = time.monotonic()", "raise", ("tests/test_events.py",)),
    Mutant("report/loggers.py", "    os.replace(aside, file)", "    pass", ("tests/test_events.py",)),
    Mutant("stopping.py", "if end.signum == signal.SIGUSR1 and is_first():", "if False:", (f"{SIGNALS}::{QUEUED}",)),
    Mutant("recipes.py", "if refused and checkpoint is None and not starts_over:", "if False:", (RECIPES,)),
    Mutant("recipes.py", "first_decides(partial(look_at, folder, stage, starts_over))", LOOKED_AT, (RECIPES,)),
    Mutant(
        "recipes.py", "broken(folder.weights) if folder.weights.exists() and not is_old else None", "None", (RECIPES,)
    ),
    Mutant(
        "app/running.py",
        "with held_by_first(folder), removed_if_refused(folder):",
        "with removed_if_refused(folder), held_by_first(folder):",
        (f"{REFUSED}::test_of_two_runs_started_at_once_the_refused_one_leaves_the_other_its_folder",),
    ),
    Mutant(
        "app/running.py",
        "is_new = is_first() and all(",
        "is_new = True or all(",
        (f"{REFUSED}::test_a_changed_configuration_is_refused_and_its_keys_listed",),
    ),
    Mutant(
        "app/running.py",
        "    if not changed:\n        return False\n",
        "    return False\n",
        (f"{GOING_ON}::{LISTED}",),
    ),
    Mutant(
        "app/running.py",
        "    changed = [] if before is None else differing_keys(before, now)\n",
        "    changed = []\n",
        (f"{GOING_ON}::{EDITED}",),
    ),
    # numbers that are not finite, collapse
    Mutant("callbacks/saving.py", " and guard.in_a_row for", " and False for", (GUARDS,)),
    Mutant("callbacks/guards.py", "parameter.grad = None", "pass", (GUARDS,)),
    Mutant("callbacks/guards.py", "bad = bad | loss_is_bad.to(bad.device)", "pass", (GUARDS,)),
    Mutant("callbacks/guards.py", "if self.in_a_row >= self.max_in_a_row:", "if False:", (GUARDS,)),
    Mutant(
        "callbacks/guards.py",
        'trainer.strategy.reduce(bad.float(), reduce_op="max")',
        "bad",
        (f"{GUARDS}::test_two_ranks_decide_alike",),
    ),
    Mutant(
        "callbacks/guards.py",
        "if bad] or",
        "if False] or",
        (f"{GUARDS}::test_rows_of_sft_are_named_as_the_data_names_them",),
    ),
    Mutant("callbacks/alarms.py", "        if rest:", "        if False:", (GUARDS,)),
    Mutant("callbacks/alarms.py", "self._inner > 0 and", "False and", (ALARMS,)),
    Mutant("callbacks/alarms.py", r'int(re.sub(r"\D", "", path.name)) <= step', "True", (ALARMS,)),
    Mutant("callbacks/alarms.py", "store.hold = {", "_ = {", (ALARMS,)),
    Mutant("callbacks/alarms.py", "trainer.strategy.load_optimizer_state_dict(checkpoint)", "pass", (ALARMS,)),
    Mutant("callbacks/alarms.py", 'group["lr"] = rate', "pass", (ALARMS,)),
    Mutant("modules/grpo.py", " & (inputs.num_units > 0)", "", (ALARMS,)),
    Mutant(
        "modules/sft.py",
        "if not num_scored > 0:",
        "if False:",
        (f"{GUARDS}::test_an_update_that_hides_no_token_is_no_step",),
    ),
    Mutant("modules/experience.py", "(inputs.logprobs, inputs.old, inputs.ref)", "(inputs.logprobs,)", (ALARMS,)),
    Mutant(
        "losses/terms.py",
        "difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)",
        "difference",
        ("tests/test_losses.py::test_huge_log_ratios_stay_finite_and_equal_float64",),
    ),
    Mutant(
        "losses/terms.py",
        "torch.where(new.weight > 0, new.value - other_value.detach(), 0.0)",
        "(new.value - other_value.detach())",
        ("tests/test_losses.py::test_what_stands_at_masked_positions_does_not_matter",),
    ),
    # what comes from elsewhere
    Mutant(
        "security.py", "if not (identity in components() or _inside(identity, packages)):", "if False:", (SECURITY,)
    ),
    Mutant("security.py", "(identity in components() or", "(_inside(identity, ['d1lit']) or", (SECURITY,)),
    Mutant("security.py", "is not found:", "is None:", (SECURITY,)),
    Mutant("app/foreign.py", 'and not word.startswith("-")]', "]", (SECURITY,)),
    Mutant("app/foreign.py", "resolve=False", "resolve=True", (SECURITY,)),
    Mutant("security.py", "_SECRET_VALUES.sub(REDACTED, text)", "text", (SECURITY,)),
    Mutant(
        "app/running.py",
        "redact(OmegaConf.to_container(config, resolve=True))",
        "OmegaConf.to_container(config, resolve=True)",
        (SECURITY,),
    ),
    Mutant("tasks/reading.py", "if len(line) > MAX_LINE_BYTES:", "if False:", ("tests/test_tasks_reading.py",)),
    Mutant("tasks/reading.py", "if len(str(values)) > MAX_LINE_BYTES:", "if False:", ("tests/test_tasks_reading.py",)),
    Mutant("tasks/reading.py", "and not found.startswith(asked):", "and False:", ("tests/test_tasks_reading.py",)),
    Mutant(
        "rewards/arithmetic.py", "if len(text) > LONGEST_EXPRESSION:", "if False:", ("tests/test_rewards_parts.py",)
    ),
)


LONGEST = 600
"""Seconds that the tests of a mutant may take."""


def run_tests(source: Path, tests: tuple[str, ...]) -> bool:
    """Whether tests pass on a copy of the source, in a process forked from this one, which has not imported it.

    Tests that hang, for `LONGEST` seconds, do not.
    """
    assert "d1lit" not in sys.modules
    child = os.fork()
    if child == 0:
        import pytest

        os.setsid()
        sys.path.insert(0, str(source))
        os.environ["PYTHONPATH"] = str(source)
        os.chdir(ROOT)
        words = ["-x", "-q", "-n", "0", "-m", "not nightly", "-p", "no:cacheprovider", "--no-header", *tests]
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            with contextlib.redirect_stdout(io.StringIO()):
                status = pytest.main(words)
        os._exit(int(status))
    end = time.monotonic() + LONGEST
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)  # with what its tests have started
            os.waitpid(child, 0)
            return False
        time.sleep(0.05)
    status = os.waitstatus_to_exitcode(ended[1])
    assert status in (0, 1), f"pytest ended with status {status} on {tests}"
    return status == 0


def survivors(mutants: Sequence[Mutant]) -> list[str]:
    """The mutants that no test has noticed; the unchanged source passes all of the tests.

    Args:
        mutants: which ones are tried.

    Raises:
        AssertionError: if it does not.
    """
    import hypothesis  # noqa: F401 (what the children share)
    import lightning.pytorch  # noqa: F401
    import transformers  # noqa: F401

    alive = []
    with tempfile.TemporaryDirectory(prefix="d1lit-mutants-") as name:
        copy = Path(name) / "src"
        shutil.copytree(ROOT / "src", copy)
        for beside in ("conf", "docs"):  # what the source finds from where it stands
            (Path(name) / beside).symlink_to(ROOT / beside)
        for mutant in mutants:
            file = copy / "d1lit" / mutant.file
            whole = file.read_text()
            file.write_text(mutant.source())
            passed = run_tests(copy, mutant.tests)
            file.write_text(whole)
            print(f"{'NOT NOTICED' if passed else 'noticed'}: {mutant.file}: {mutant.old.strip()}", flush=True)
            alive += [f"{mutant.file}: {mutant.old.strip()}"] if passed else []
        everything = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
        assert run_tests(copy, everything), "the tests fail on the unchanged source"
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants of the guards were noticed")
    return alive
