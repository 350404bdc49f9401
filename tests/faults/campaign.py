"""A campaign of faults: small families, each struck again and again until it is done, against the same families left in
peace."""

import itertools
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from integration.test_restart import records, same_members
from tiny_family import write_corpus, write_parent

from faults.damage import FILES, damage, whole_checkpoints
from faults.kinds import DAMAGES, DECK, HOST, LAUNCHER, WANDB, Fault, complaint, draw
from faults.starting import Start, start
from faults.striking import mend
from faults.table import Met

STEPS = 9  # a stage
LOST = 6  # steps at most behind what was begun: a checkpoint every two, written while the next ones are trained
MANY = 20  # problems, which need no more
LONGEST = 15  # faults of one family, which then may finish
EACH = 8  # about as many as a family meets: the next one begins so much further in the deck


@dataclass(frozen=True)
class Setting:
    ranks: int
    engine: str
    branch: bool
    factorizer: str

    @property
    def overrides(self) -> list[str]:
        engine = [f"engine={self.engine}", "engine.dtype=fp32", "engine.activation_checkpointing=false"]
        branch = ["schedule.branch=0.34"] if self.branch else []  # three steps of the nine
        calibrated = (
            [f"factorizer={self.factorizer}", "factorizer.calibration_tokens=700"] if self.factorizer != "svd" else []
        )
        return [*engine, *branch, *calibrated]

    def __str__(self) -> str:
        return f"{self.engine}, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.factorizer}{', branch' * self.branch}"


SETTINGS = [
    Setting(2, "fsdp", True, "whitened"),
    Setting(2, "zero3", True, "svd"),
    Setting(2, "fsdp", True, "svd"),
    Setting(2, "zero3", False, "whitened"),
    Setting(1, "fsdp", True, "whitened"),
    Setting(2, "fsdp", False, "refined"),
]


class Campaign:
    """`problems` says what was not as it must be, by family and fault; `met` holds the faults that ended a start, in
    order."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], object] = print):
        """Work in `folder`; where that lies on a small file system a full disk is one, elsewhere a limit on the size of
        files."""
        self._folder, self._seed, self._say = folder, seed, say
        self._deck = random.Random(seed).sample(DECK, len(DECK))
        self.met: list[Met] = []
        self.problems: list[str] = []
        self.starts = self.families = 0
        self._corpus = folder / "corpus"
        write_parent(folder / "parent")
        write_corpus(self._corpus, shards=24, documents=12)  # small ones, so that streams go on to others in mid-stage

    def run(self, count: int) -> None:
        """Strike until `count` faults are met, or MANY problems; the last family finishes in peace."""
        while len(self.met) < count and len(self.problems) < MANY:
            self.family(self.families, count - len(self.met))

    def family(self, number: int, most: int = LONGEST, only: int | None = None) -> None:
        """Make the family `number` of this campaign, which follows from it and the seed alone, with at most `most`
        faults, and compare it. `only`: no fault but the one of that number."""
        self.families += 1
        setting = SETTINGS[number % len(SETTINGS)]
        run_dir = self._folder / f"family-{number}"
        chain = _Chain(self, setting, run_dir, number)
        faults = self._faults(setting, number)
        if only is not None:
            faults = (one for one in itertools.takewhile(lambda one: one[0] <= only, faults) if one[0] == only)
        peace = itertools.repeat((-1, None))
        for place, fault in itertools.chain(faults, peace):
            chain.strike(place, fault if chain.met < min(most, LONGEST) else None)
            if chain.done or chain.hopeless:
                break
        if chain.hopeless:
            return
        expected = self._undisturbed(setting)
        for what, found, wanted in zip(
            ("family.json", "metrics.jsonl", "events.jsonl"), records(run_dir), records(expected), strict=True
        ):
            if found != wanted:
                self.problem(number, f"{what} is not that of the undisturbed family:\n{found}\n{wanted}")
        if not same_members(run_dir, expected):
            self.problem(number, "members are not those of the undisturbed family")
        left = [path for pattern in (".*", "**/*.part", "**/*.tmp", "factors") for path in run_dir.glob(pattern)]
        if left:
            self.problem(number, f"left behind: {left}")
        if not any(problem.startswith(f"family {number},") for problem in self.problems):
            shutil.rmtree(run_dir)

    def problem(self, family: int, what: str) -> None:
        self.problems.append(f"family {family}, {what}")
        self._say(f"PROBLEM: family {family}, {what}")

    def arguments(self, setting: Setting, run_dir: Path) -> list[str]:
        return [
            "experiment=tinystories",
            f"parent.path={self._folder / 'parent'}",
            f"data.train={self._corpus}",
            f"data.validation={self._corpus}",
            f"run_dir={run_dir}",
            "data.seq_len=16",
            "data.streams=6",
            "stages.ratios=[1.25,1.6]",
            f"stages.tokens={STEPS * 128}",
            "recover.global_batch_tokens=128",
            "recover.micro_batch=4",
            "recover.lr=4e-3",
            "evaluation.tokens=400",
            "checkpoint.tokens=128",
            "checkpoint.keep=3",
            *setting.overrides,
        ]

    def start(self, setting: Setting, run_dir: Path, fault: Fault | None) -> Start:
        self.starts += 1
        mode = "online" if fault and fault.kind == WANDB else "disabled"
        arguments = [*self.arguments(setting, run_dir), f"tracking.wandb.mode={mode}"]
        try:
            return start(setting.ranks, arguments, fault, run_dir, self._corpus, bool(fault) and fault.kind == LAUNCHER)
        finally:
            mend(run_dir, self._corpus)

    def record(self, met: Met) -> None:
        self.met.append(met)
        gone = f"{met.went_on_from}" if met.went_on_from >= 0 else "the start"
        damaged = f"; damaged: {met.damaged}" if met.damaged else ""
        place = f"family {met.family}.{met.number} ({met.setting})"
        self._say(f"{len(self.met):4d}  {place}: {met.fault}; {met.statuses} {met.said}{damaged}; goes on from {gone}")

    def _faults(self, setting: Setting, family: int) -> Iterator[tuple[int, Fault]]:
        """What strikes that family, by number: it goes through the deck from a place of its own."""
        for number in itertools.count():
            kind, phase = self._deck[(EACH * family + number) % len(self._deck)]
            if (phase != "annealing" or setting.branch) and (
                setting.ranks > 1 or kind not in ("kill -9 of all ranks", LAUNCHER)
            ):
                yield number, draw(kind, phase, setting.ranks, random.Random(f"{self._seed}/{family}/{number}"))

    def _undisturbed(self, setting: Setting) -> Path:
        run_dir = self._folder / f"undisturbed-{SETTINGS.index(setting)}"
        if not run_dir.exists():
            ended = self.start(setting, run_dir, None)
            assert ended.done and not ended.err, ended
            assert ended.steps == list(range(2 * STEPS))
        return run_dir


class _Chain:
    """One family from fault to fault."""

    def __init__(self, campaign: Campaign, setting: Setting, run_dir: Path, number: int):
        self._campaign, self._setting, self._run_dir, self._number = campaign, setting, run_dir, number
        self.met = 0
        self.done = self.hopeless = False
        self._begun = 0  # steps
        self._damaged = ""  # what the next start must name

    def strike(self, number: int, fault: Fault | None) -> None:
        """Start once more, with the fault of that number."""
        whole = whole_checkpoints(self._run_dir)
        newest = _steps(whole[0]) if whole else 0
        before = f"{number} ({fault or 'none'})"
        ended = self._campaign.start(self._setting, self._run_dir, fault)
        self._look_where_it_went_on(ended, newest, before)
        if ended.done:
            self.done = True
            return
        if fault is None or not ended.struck:
            self._problem(
                f"{before}: ended by itself with {ended.statuses}, hung: {ended.hung}:\n{ended.out}\n{ended.err}"
            )
            self.hopeless = True
            return
        if wrong := complaint(fault, ended, self._run_dir):
            self._problem(f"{before}: {wrong}")
            self.hopeless = ended.hung
        damaged = self._damage(fault) if fault.kind in DAMAGES else ""
        if fault.kind in DAMAGES and not damaged:
            return  # it was a mere kill: there is nothing to damage yet
        whole = whole_checkpoints(self._run_dir)
        went_on_from = _steps(whole[0]) if whole else -1
        if damaged:
            self._begun = max(went_on_from, 0)
        elif self._begun - went_on_from > LOST:
            self._problem(
                f"{before}: {self._begun} steps were begun, and the newest whole checkpoint is of {went_on_from}"
            )
        self.met += 1
        words = [line for line in ended.out.splitlines() if "stopped as asked" in line or "W&B is off" in line]
        said = self._plain(
            "\n".join(
                line
                for line in (*words, *ended.err.splitlines())
                if "; trying again in " not in line and not line.startswith("wandb: ")
            )
        )
        self._campaign.record(
            Met(
                self._number,
                number,
                str(self._setting),
                fault,
                ended.statuses,
                said,
                damaged,
                went_on_from,
                self._begun,
                ended.seconds,
            )
        )

    def _look_where_it_went_on(self, ended: Start, newest: int, before: str) -> None:
        """It went on from the newest whole checkpoint, and each step followed the one before; and it named what is
        damaged."""
        if ended.steps and ended.steps != list(range(newest, newest + len(ended.steps))):
            self._problem(
                f"{before}: the newest whole checkpoint was of step {newest}, and these steps were begun: {ended.steps}"
            )
        self._begun = max([self._begun, *(step + 1 for step in ended.steps)])
        if self._damaged:
            if any(self._damaged in line and "damaged and passed over" in line for line in ended.out.splitlines()):
                self._damaged = ""
            elif ended.steps or ended.done:
                self._problem(f"{before}: {self._damaged} was not named:\n{ended.out}")
                self._damaged = ""

    def _damage(self, fault: Fault) -> str:
        """Damage what the next start goes on from, and return its name. Where nothing else is left, that start refuses,
        and it is put back."""
        factors = self._run_dir / "factors"
        if (
            fault.phase == "factoring"
            and factors.is_dir()
            and (done := damage(fault.kind, factors, ("*.safetensors",), fault.seed))
        ):
            return f"factors/{done[0].name}"
        whole = whole_checkpoints(self._run_dir)
        done = damage(fault.kind, whole[0], FILES, fault.seed) if whole else None
        if done is None:
            return ""
        file, content = done
        if len(whole) > 1:
            self._damaged = file.parent.name if file.name == "sha256sums" else f"{file.parent.name}/{file.name}"
            return f"{file.parent.name}/{file.name}"
        ended = self._campaign.start(self._setting, self._run_dir, None)
        if (
            set(ended.statuses) != {2}
            or ended.err.count("\n") != 1
            or "every checkpoint here is damaged" not in ended.err
        ):
            self._problem(
                f"({fault}): the only checkpoint was damaged ({file.name}):\n{ended.statuses} {ended.out}\n{ended.err}"
            )
        file.write_bytes(content)
        return f"{file.parent.name}/{file.name}, the only one, restored after the refusal"

    def _problem(self, what: str) -> None:
        self._campaign.problem(self._number, f"fault {what}")

    def _plain(self, text: str) -> str:
        """The line without what is of this run alone."""
        for pattern, word in (
            (re.escape(str(self._run_dir)), "RUN_DIR"),
            (re.escape(str(self._run_dir.parent)), "FOLDER"),
            (re.escape(HOST), "HOST"),
            (r"pid \d+", "pid N"),
            (r"step-\d+", "step-N"),
            (r"_\d+\.jsonl", "_N.jsonl"),
            (r"(run|after) [0-9a-f]{8}\b", r"\1 ID"),
            (r"after \d+ steps", "after N steps"),
        ):
            text = re.sub(pattern, word, text)
        return text.strip()


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
