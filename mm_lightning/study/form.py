"""The form of a reproduction study's results, as they stand in ``metrics.json`` and as the report shows them.

Numbers are in raw units (an accuracy is a fraction); a :class:`Measure` says how they are displayed. A value that does
not exist or is not finite is None, ``null`` in the file. Files are relative to the study's folder.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from mm_lightning.study.statistics import Better, Outcome


class Method(TypedDict):
    """One way to train; a table has a column for each. The first of an experiment is what the others are held against.

    Attributes:
        name: What runs, cells and verdicts call it, as in ``manifold``.
        title: What the reader sees, as in ``manifold mixup``.
    """

    name: str
    title: str


class Schedule(TypedDict):
    """How long and at which learning rate is trained. The first of an experiment is the one that verdicts are about.

    Attributes:
        name: What runs and cells call it, as in ``default`` or ``reference``.
        text: Epochs, learning rate, batch size, in words.
        seconds_per_run: Mean wall time of a run; None if unknown.
    """

    name: str
    text: str
    seconds_per_run: float | None


class Measure(TypedDict):
    """A quantity and how it is shown.

    Attributes:
        key: What metrics, cells and verdicts call it, as in ``test/acc``.
        title: What the reader sees, as in ``test accuracy``.
        unit: Of the displayed number, as in ``%``; empty for a number without one.
        factor: Displayed number / raw number: 100 for a fraction shown in percent.
        digits: After the decimal point, as displayed.
        better: The direction of improvement; None if neither direction is one.
        meaning: One sentence.
        margin: The largest difference that does not matter, raw; None if that is not known.
    """

    key: str
    title: str
    unit: str
    factor: float
    digits: int
    better: Better | None
    meaning: str
    margin: float | None


class Run(TypedDict):
    """One training.

    Attributes:
        method: Name of its method.
        schedule: Name of its schedule.
        seed: Its seed.
        command: The exact command that repeats it.
        seconds: Wall time.
        epochs: Epochs trained.
        metrics: Raw value of each measure, by key.
    """

    method: str
    schedule: str
    seed: int
    command: str
    seconds: float
    epochs: int
    metrics: dict[str, float | None]


class Cell(TypedDict):
    """One measure of one method and schedule, over its seeds.

    Attributes:
        schedule: Name of the schedule.
        method: Name of the method.
        key: Key of the measure.
        mean: Over the seeds; None if no seed has a value.
        sd: Sample standard deviation (n - 1); None for fewer than two values.
        values: One for each run, in the order of the experiment's runs.
    """

    schedule: str
    method: str
    key: str
    mean: float | None
    sd: float | None
    values: list[float | None]


class Verdict(TypedDict):
    """What the seeds of the first schedule say about the claim that ``method`` is better than ``against``.

    Attributes:
        key: Key of the measure, which has a direction.
        method: Name of the method that is claimed to be better.
        against: Name of the method that it is compared with.
        seeds: Number of seeds compared: those in which both have a value.
        left_out: The seeds that only one of both was trained with.
        difference: Mean over the seeds of method - against, raw; None if no seed has both.
        half_width: Half the 95 % interval of the difference; None if there is none.
        seeds_needed: How many seeds it takes to see a difference of this size; None if more than 1,000, or unknown.
        margin: That of the measure.
        reference_agrees: Whether the reference schedule's difference has the same sign; None if it was not run, or if
            the verdict is neither better nor worse.
        verdict: The outcome, see :class:`.PairedComparison`.
    """

    key: str
    method: str
    against: str
    seeds: int
    left_out: list[int]
    difference: float | None
    half_width: float | None
    seeds_needed: int | None
    margin: float | None
    reference_agrees: bool | None
    verdict: Outcome


class Picture(TypedDict):
    """A still picture.

    Attributes:
        file: A png, gif, webp or jpeg file.
        title: Heading.
        caption: How to read it.
        alt: What it shows, for those who cannot see it.
        commands: Those of the runs behind it.
    """

    file: str
    title: str
    caption: str
    alt: str
    commands: list[str]


class Player(TypedDict):
    """Pictures of the same thing at several times, shown one at a time.

    Attributes:
        title: Heading.
        caption: How to read it.
        alt: What it shows, for those who cannot see it.
        labels: The time of each frame, as in ``epoch 1``.
        files: A picture for each label, of one size, in the order of time.
        commands: Those of the runs behind them.
    """

    title: str
    caption: str
    alt: str
    labels: list[str]
    files: list[str]
    commands: list[str]


class Experiment(TypedDict):
    """One experiment of the paper.

    Attributes:
        name: Short, unique, as in ``spiral``; the address of its section on the page.
        title: Heading, as in ``A smoother decision boundary``.
        text: A paragraph: data, network, where is mixed, source.
        methods: Columns of its tables, at most seven fit the page.
        schedules: The first one is judged, any other is shown beside it.
        measures: Rows of its tables.
        runs: All of them.
        cells: One for each schedule, method and measure; one that is missing is shown as a dash.
        verdicts: In the order of the summary.
        pictures: In the order of the page.
        players: After the pictures.
    """

    name: str
    title: str
    text: str
    methods: list[Method]
    schedules: list[Schedule]
    measures: list[Measure]
    runs: list[Run]
    cells: list[Cell]
    verdicts: list[Verdict]
    pictures: list[Picture]
    players: list[Player]


class _Study(TypedDict):
    format: Literal[2]
    quick: bool
    command: str
    finished: str
    seconds: float
    jobs: int | None
    threads_per_job: int | None
    environment: dict[str, Any]
    experiments: list[Experiment]


class Study(_Study, total=False):
    """Everything.

    Attributes:
        format: Version of this form.
        quick: True if the runs were cut so short that they say nothing about the claims; the page says so.
        command: What was called.
        finished: ISO 8601 with the offset from UTC.
        seconds: Wall time of all runs, summed.
        jobs: Runs at a time; None if unknown.
        threads_per_job: CPU threads of each run; None if unknown.
        environment: What :func:`.run_folder.environment` returned in the runs; where they differ, all of it.
        experiments: In the order of the page.
        rule: Optional: how numbers become a verdict, a sentence or two for the reader.
        title: Optional: heading of the page.
        answer: Optional: sentences below the heading, in the place of a summary.
        winner: Optional: the command of what the answer advises.
    """

    rule: str
    title: str
    answer: list[str]
    winner: str
