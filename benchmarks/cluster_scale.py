"""Do the plan and the state machine keep up with 1,000 GPUs and 10,000 tasks, with failures?

A simulation of events; no Ray, no training. Tasks of log-normal length over five bases are planned by `plan_groups`, groups
start when `Room` says so, every run's status moves by `advance`, and what comes next is `next_action`'s word. Three things
go wrong, by seed: workers die (their group goes on from its checkpoints), tasks fail for good, and the controller is killed,
just before and just after a write of each kind (its workers end with it; a new one knows what was stored and nothing else).

Correct is: every task is in one group; at the end every run is judged or failed as in an undisturbed simulation but for the
planted failures; no adapter was trained twice; `Room` let no group in without free GPUs. Ratios: seconds to plan; makespan
over what no schedule can beat, the longer of all work spread evenly and the longest task (larger is worse); events and writes a
second. `no node had room` counts the waits of groups that `Room`, which adds up the whole cluster, would have let start.

    python benchmarks/cluster_scale.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

from benchmarks.timing import Report, Row, interleave, median, read_settings
from multilora.spec import BaseSpec, ResourceSpec
from orchestrator.cluster_size import ClusterSize, Node
from orchestrator.plan import FLOPS_PER_S, START_UP_S, TaskNeed, plan_groups
from orchestrator.room import Room, TrainingGroup
from orchestrator.state import Action, Event, RunFacts, Status, advance, next_action

GIB = 2**30
SIZES = {True: [(1_000, 8)], False: [(1_000, 125), (10_000, 125)]}
"""(tasks, nodes) by `--quick`; the last one is played through."""
GPUS_PER_NODE, MAX_SLOTS = 8, 16
BASES = {"small": (2.5e8, 0.5), "middle": (8e8, 1), "large": (1e9, 1), "larger": (3e9, 1), "largest": (8e9, 2)}
"""(parameters, GPUs of a worker)."""
NUM_TRAIN, SIGMA = 20_000, 0.5
"""Median number of training examples, and its spread: the longest task is shorter than all work spread evenly."""
CHECKPOINT_S = 30.0
FAILED_SHARE, REJECTED_SHARE = 0.01, 0.05
DEATHS_PER_HOUR = 0.05
"""Of one worker."""
KILLED_AT = (Event.STARTED, Event.FINISHED, Event.REGISTERED, Event.EVALUATED, Event.PROMOTED)


class ControllerKilledError(Exception):
    """The controller is gone, with all that it had in memory."""


@dataclass
class Stored:
    """What outlives the controller: one task's status, files and alias."""

    status: Status = Status.NEW
    checkpoint_s: float = 0.0
    """Seconds of training that need not be done again."""
    has_artifact: bool = False
    is_champion: bool = False
    num_trained: int = 0


@dataclass(frozen=True)
class Failures:
    """What goes wrong, and when."""

    fails_after: dict[str, float] = field(default_factory=dict)
    """Task -> share of its training after which it fails."""
    killed_before: frozenset[tuple[Event, int]] = frozenset()
    killed_after: frozenset[tuple[Event, int]] = frozenset()
    """The controller is killed before or after the n-th write of a kind."""
    deaths_per_hour: float = 0.0


@dataclass
class Worker:
    """Trains a group's adapters one after another: slots share the worker's rate, so the last one ends at the same time."""

    group: TrainingGroup
    node: int
    members: deque[str]
    ready_s: float
    """When the first of `members` began, or will, from its checkpoint."""
    dies_s: float


@dataclass
class Simulation:
    """A cluster and what is stored; `run` submits until a controller gets to the end."""

    needs: dict[str, TaskNeed]
    size: ClusterSize
    failures: Failures
    rejected: frozenset[str]
    now_s: float = 0.0
    planning_s: float = 0.0
    num_events: int = 0
    num_killed: int = 0
    num_died: int = 0
    num_fragmented: int = 0
    num_overcommitted: int = 0

    def __post_init__(self) -> None:
        self.stored = {task: Stored() for task in self.needs}
        self.workers: dict[str, Worker] = {}
        self.room = Room(self.size)
        self.free_gpus = [node.gpus for node in self.size.nodes]
        self.writes: Counter[Event] = Counter()
        self.rng = random.Random(0)

    def run(self) -> None:
        """Submit all tasks, again after every kill."""
        while True:
            try:
                return self.submit()
            except ControllerKilledError:
                self.num_killed += 1
                for worker in list(self.workers.values()):
                    self.save(worker)
                    self.end(worker)

    def submit(self) -> None:
        """Do what the controller does: observe, plan, train, register, evaluate, judge."""
        actions = {task: self.observe(task) for task in self.needs}
        to_train = [self.needs[task] for task, action in actions.items() if action is Action.TRAIN]
        start = time.perf_counter()
        planned = plan_groups(to_train, self.size, MAX_SLOTS)
        self.planning_s += time.perf_counter() - start
        for need in to_train:
            self.move(need.task, Event.STARTED)
        self.train(planned.groups)
        for task, action in actions.items():
            if action is Action.REGISTER:
                self.register(task)
        for task in self.needs:
            if self.observe(task) is Action.EVALUATE:
                self.move(task, Event.EVALUATED)
        for task in self.needs:
            if self.observe(task) is Action.JUDGE:
                self.judge(task)

    def observe(self, task: str) -> Action:
        """Decide what comes next from what is stored."""
        stored = self.stored[task]
        return next_action(RunFacts(stored.status, stored.has_artifact, stored.is_champion, is_gate_changed=False))

    def move(self, task: str, event: Event) -> None:
        """Write a status, unless the controller is killed before it."""
        self.writes[event] += 1
        self.num_events += 1
        if (event, self.writes[event]) in self.failures.killed_before:
            raise ControllerKilledError
        self.stored[task].status = advance(self.stored[task].status, event)
        if (event, self.writes[event]) in self.failures.killed_after:
            raise ControllerKilledError

    def register(self, task: str) -> None:
        """Make a finished adapter a version."""
        if self.stored[task].status is Status.TRAINING:
            self.move(task, Event.FINISHED)
        self.move(task, Event.REGISTERED)

    def judge(self, task: str) -> None:
        """Give the verdict that this task gets; the alias moves last."""
        if self.stored[task].status is not Status.EVALUATED:
            self.move(task, Event.RECONSIDERED)
        self.move(task, Event.REJECTED if task in self.rejected else Event.PROMOTED)
        self.stored[task].is_champion = task not in self.rejected

    def train(self, groups: Sequence[TrainingGroup]) -> None:
        """Start groups in order as soon as there is room, and follow the workers to their ends."""
        waiting, events, number = deque(groups), list[tuple[float, int, Worker, Event]](), count()
        while waiting or self.workers:
            if waiting and (worker := self.start(waiting[0])):
                waiting.popleft()
            else:
                self.now_s, _, worker, event = heappop(events)
                self.num_events += 1
                self.handle(worker, event)
            if worker.members:
                at_s, event = self.next_event(worker)
                heappush(events, (at_s, next(number), worker, event))
            else:
                self.end(worker)

    def start(self, group: TrainingGroup) -> Worker | None:
        """Start a group on the fullest node that has room for it."""
        if not self.room.fits(group):
            return None
        self.num_overcommitted += group.gpus > sum(self.free_gpus)
        fitting = [(free, node) for node, free in enumerate(self.free_gpus) if free >= group.gpus]
        if not fitting:
            self.num_fragmented += 1
            return None
        _, node = min(fitting)
        self.free_gpus[node] -= group.gpus
        self.room.take(group)
        worker = Worker(group, node, deque(group.members), self.now_s + START_UP_S, self.death_s())
        self.workers[group.group_id] = worker
        return worker

    def next_event(self, worker: Worker) -> tuple[float, Event]:
        """What happens to the adapter in training, and when; a worker that dies is CANCELLED."""
        task = worker.members[0]
        all_s, done_s = seconds(self.needs[task]), self.stored[task].checkpoint_s
        end_s, event = worker.ready_s + all_s - done_s, Event.FINISHED
        if (share := self.failures.fails_after.get(task)) is not None:
            end_s, event = worker.ready_s + max(0.0, share * all_s - done_s), Event.FAILED
        return min((end_s, event), (worker.dies_s, Event.CANCELLED))

    def handle(self, worker: Worker, event: Event) -> None:
        """Let a worker write its files, then the controller hear of it."""
        self.save(worker)
        if event is Event.CANCELLED:
            self.num_died += 1
            worker.ready_s, worker.dies_s = self.now_s + START_UP_S, self.death_s()
            return
        worker.ready_s, task = self.now_s, worker.members.popleft()
        if event is Event.FAILED:
            self.move(task, Event.FAILED)
            return
        self.stored[task].has_artifact = True
        self.stored[task].num_trained += 1
        self.register(task)

    def save(self, worker: Worker) -> None:
        """What the worker's last checkpoint holds."""
        if worker.members:
            trained_s = max(0.0, self.now_s - worker.ready_s)
            self.stored[worker.members[0]].checkpoint_s += trained_s // CHECKPOINT_S * CHECKPOINT_S

    def end(self, worker: Worker) -> None:
        """Give back a worker's GPUs."""
        self.free_gpus[worker.node] += worker.group.gpus
        self.room.give_back(worker.group)
        del self.workers[worker.group.group_id]

    def death_s(self) -> float:
        """When a worker that starts now would die."""
        rate = self.failures.deaths_per_hour / 3600
        return self.now_s + self.rng.expovariate(rate) if rate else float("inf")


def main() -> int:
    """Time the plan, play it through undisturbed and disturbed, compare, and report."""
    settings = read_settings(__doc__ or "", quick_rounds=3, full_rounds=5, has_cuda=False)
    config = {"gpus_per_node": GPUS_PER_NODE, "bases": BASES, "sigma": SIGMA, "failed_share": FAILED_SHARE}
    report = Report("cluster_scale", settings, {**config, "deaths_per_hour": DEATHS_PER_HOUR, "checkpoint_s": CHECKPOINT_S})
    for num_tasks, num_nodes in SIZES[settings.is_quick]:
        size, needs = cluster_of(num_nodes), needs_of(num_tasks)
        times = interleave({"plan": lambda: plan_groups(needs, size, MAX_SLOTS)}, settings)  # noqa: B023  called at once
        planned = plan_groups(needs, size, MAX_SLOTS)
        placed = Counter(task for group in planned.groups for task in group.members)
        num_wrong = sum(placed[need.task] != 1 for need in needs)
        report.ratios[f"plan_{num_tasks}_s"] = median(times, "plan")
        note = f"{len(planned.groups)} groups for {sum(node.gpus for node in size.nodes):.0f} GPUs"
        report.add(Row(f"{num_tasks} tasks", "plan", median(times, "plan"), None, num_wrong, 0, note))
    play(report, {need.task: need for need in needs}, size)
    return report.finish()


def play(report: Report, needs: dict[str, TaskNeed], size: ClusterSize) -> None:
    """Simulate without failures and with all of them; the ends must differ by the planted failures alone."""
    rng, tasks = random.Random(1), sorted(needs)
    rejected = frozenset(rng.sample(tasks, int(REJECTED_SHARE * len(tasks))))
    failing = {task: rng.random() for task in rng.sample(tasks, int(FAILED_SHARE * len(tasks)))}
    # Nearly all tasks get there.
    before, after = (frozenset((event, rng.randint(1, len(tasks) * 9 // 10)) for event in KILLED_AT) for _ in range(2))
    undisturbed = simulate(report, "undisturbed", Simulation(needs, size, Failures(), rejected))
    failures = Failures(failing, before, after, DEATHS_PER_HOUR)
    disturbed = simulate(report, "disturbed", Simulation(needs, size, failures, rejected))
    expected = {task: Status.FAILED if task in failing else stored.status for task, stored in undisturbed.stored.items()}
    num_unlike = sum(stored.status is not expected[task] for task, stored in disturbed.stored.items())
    report.add(Row("disturbed", "ends unlike undisturbed", difference=num_unlike, tolerance=0, note=f"{len(failing)} planted"))


def simulate(report: Report, name: str, simulation: Simulation) -> Simulation:
    """Run a simulation, time it and count what must never be."""
    start = time.perf_counter()
    simulation.run()
    elapsed_s = time.perf_counter() - start - simulation.planning_s
    needs, size, failing = simulation.needs, simulation.size, simulation.failures.fails_after
    num_gpus = sum(node.gpus for node in size.nodes)
    total_s = sum(seconds(need) * (need.resources.gpus or 0.0) for need in needs.values())
    bound_s = max(total_s / num_gpus, *(seconds(need) for need in needs.values()))
    report.ratios[f"makespan_{name}"] = simulation.now_s / bound_s
    report.ratios[f"events_per_s_{name}"] = simulation.num_events / elapsed_s
    report.extra[name] = {
        "makespan_s": simulation.now_s, "bound_s": bound_s, "planning_s": simulation.planning_s, "simulating_s": elapsed_s,
        "num_events": simulation.num_events, "num_died": simulation.num_died, "num_killed": simulation.num_killed,
        "num_fragmented": simulation.num_fragmented, "statuses": Counter(str(s.status) for s in simulation.stored.values()),
    }  # fmt: skip
    note = f"{simulation.num_died} workers died, {simulation.num_killed} controllers killed, "
    note += f"{simulation.num_events / elapsed_s:,.0f} events/s, no node had room {simulation.num_fragmented} times"
    report.add(Row(name, "simulated, makespan / bound", elapsed_s, simulation.now_s / bound_s, note=note))
    ended = (Status.PROMOTED, Status.REJECTED, Status.FAILED)
    wrong = {
        "runs without an end": sum(stored.status not in ended for stored in simulation.stored.values()),
        "adapters not trained once": sum(s.num_trained != (task not in failing) for task, s in simulation.stored.items()),
        "groups let in without free GPUs": simulation.num_overcommitted,
        "promoted, not champion": sum(s.is_champion != (s.status is Status.PROMOTED) for s in simulation.stored.values()),
        "workers left": len(simulation.workers),
    }
    for what, number in wrong.items():
        report.add(Row(name, what, difference=number, tolerance=0))
    return simulation


def cluster_of(num_nodes: int) -> ClusterSize:
    """Nodes of 8 GPUs with 80 GiB each."""
    return ClusterSize((Node(128.0, float(GPUS_PER_NODE)),) * num_nodes, 1024 * GIB, 80 * GIB)


def needs_of(num_tasks: int) -> list[TaskNeed]:
    """Tasks of log-normal length over five bases."""
    rng = random.Random(0)
    return [_need(f"task-{index:05}", rng) for index in range(num_tasks)]


def _need(task: str, rng: random.Random) -> TaskNeed:
    model = rng.choice(list(BASES))
    num_parameters, gpus = BASES[model]
    num_train = int(NUM_TRAIN * rng.lognormvariate(0, SIGMA)) + 1
    return TaskNeed(
        task, BaseSpec(model=model, dtype="bfloat16"), int(num_parameters), num_quantised_parameters=0, num_layers=24,
        hidden_size=1024, num_adapter_parameters=5_000_000, num_train=num_train, epochs=5, batch_size=16,
        tokens_per_example=100.0, resources=ResourceSpec(gpus=gpus),
    )  # fmt: skip


def seconds(need: TaskNeed) -> float:
    """How long a task trains on its worker."""
    return need.num_flops / (FLOPS_PER_S["gpu"] * (need.resources.gpus or 1.0))


if __name__ == "__main__":
    raise SystemExit(main())
