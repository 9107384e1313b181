"""Law 8: each task in exactly one group or refused with the reason, no group over budget, same input -> same plan."""

import random
from dataclasses import replace

import pytest

from multilora.spec import BaseSpec, ResourceSpec
from orchestrator.cluster_size import ClusterSize, Node
from orchestrator.plan import START_UP_S, Plan, TaskNeed, plan_groups
from orchestrator.room import Room

GIB = 2**30
SMALL = BaseSpec(model="small")
NEED = TaskNeed(
    task="task", base=SMALL, num_base_parameters=20_000_000, num_quantised_parameters=16_000_000, num_layers=6, hidden_size=384,
    num_adapter_parameters=332_000, num_train=100, epochs=10, batch_size=16, tokens_per_example=40.0, resources=ResourceSpec(),
)  # fmt: skip
TWO_CPUS = ClusterSize((Node(2.0, 0.0),), 8 * GIB, 24 * GIB)
THREE_GPUS = ClusterSize((Node(16.0, 2.0), Node(16.0, 1.0)), 64 * GIB, 24 * GIB, is_named=False)


def has_room(group, busy, size):
    return Room(size, busy).fits(group)


def need(task="task", **changes):
    return replace(NEED, task=task, **changes)


def needs(count, **changes):
    return [need(f"task-{index:04}", **changes) for index in range(count)]


def random_case(seed):
    """A cluster and up to 40 tasks over three bases, some of which cannot run there."""
    rng = random.Random(seed)
    num_cpus, num_gpus, num_nodes = rng.choice([2, 4, 16]), rng.choice([0, 0, 1, 4]), rng.choice([1, 2, 5])
    memory, gpu_memory = rng.choice([2, 3, 8, 64]) * GIB, rng.choice([4, 24, 80]) * GIB
    zones = [(("zone", f"eu-{1 + index % 2}"),) for index in range(num_nodes)]
    cluster = ClusterSize(tuple(Node(float(num_cpus), float(num_gpus), None, zone) for zone in zones), memory, gpu_memory)
    tasks = []
    for index in range(rng.randint(0, 40)):
        model, *sizes = rng.choice([("small", 20_000_000, 6, 384), ("middle", 250_000_000, 12, 768), ("large", 10**9, 24, 2048)])
        base = BaseSpec(model=model, dtype=rng.choice(["float32", "bfloat16"]), quantization=rng.choice(["none", "none", "4bit"]))
        gpus, cpus = rng.choice([None, None, 0, 0.1, 0.5, 1, 2]), rng.choice([None, None, 1, 3, 32])
        workers = 1 if gpus in (0.1, 0.5) else rng.choice([1, 1, 1, 2, 3])
        labels = {"zone": rng.choice(["eu-1", "!eu-1", "in(eu-1, eu-2)", "us"])} if rng.random() < 0.3 else {}
        resources = ResourceSpec(gpus=gpus, cpus=cpus, workers=workers, node_labels=labels)
        num_layers, hidden_size = sizes[1:]
        rank, num_train, epochs = rng.choice([1, 8, 256]), rng.randint(1, 5000), rng.randint(1, 20)
        batch_size, num_tokens = rng.choice([1, 16, 256]), rng.uniform(2, 512)
        # A transformer's linear layers have 18 in and out features per hidden unit and layer.
        sizes.insert(1, sizes[0] * 3 // 4)
        num_adapter = 18 * hidden_size * rank * num_layers
        tasks.append(TaskNeed(f"task-{index}", base, *sizes, num_adapter, num_train, epochs, batch_size, num_tokens, resources))
    return tasks, cluster, rng.choice([1, 2, 16])


@pytest.mark.parametrize("seed", range(100))
def test_each_task_is_in_one_group_within_budget_or_refused(seed):
    tasks, cluster, max_slots = random_case(seed)
    plan = plan_groups(tasks, cluster, max_slots)
    placed = [task for group in plan.groups for task in group.members]
    assert sorted([*placed, *(task for task, _ in plan.refused)]) == sorted(need.task for need in tasks)
    base_of = {need.task: need.base for need in tasks}
    for group in plan.groups:
        assert {base_of[task] for task in group.members} == {group.base}
        assert 1 <= group.num_slots <= min(max_slots, len(group.members))
        assert group.memory_bytes <= (group.gpus * cluster.memory_bytes_per_gpu if group.gpus else cluster.memory_bytes_per_node)
        nodes = cluster.nodes_for(group.accelerator, group.node_labels).values()
        assert sum(node.num_workers(group.gpus, group.cpus) for node in nodes) >= group.workers
        assert has_room(group, [], cluster)
    assert len({group.group_id for group in plan.groups}) == len(plan.groups)
    # A task is refused for what it needs itself, never for its company.
    refused_alone = [refusal for task in tasks for refusal in plan_groups([task], cluster, max_slots).refused]
    assert sorted(refused_alone) == list(plan.refused)


def test_a_search_fills_slots_with_its_candidates_and_counts_their_memory_and_time():
    alone, searched = need("a"), need("a", num_candidates=12, epochs=10 * 12)
    (group,), (one,) = (plan_groups([task], TWO_CPUS, 16).groups for task in (searched, alone))
    assert (group.members, group.num_slots, group.num_steps) == (("a",), 12, 12 * one.num_steps)
    assert group.seconds - START_UP_S == pytest.approx(12 * (one.seconds - START_UP_S))
    together = plan_groups(needs(12), TWO_CPUS, 16).groups[0]
    assert group.memory_bytes == together.memory_bytes
    # Four slots at most, and where memory is short fewer.
    assert plan_groups([searched, need("b")], TWO_CPUS, 4).groups[0].num_slots == 4
    (tight,) = plan_groups([searched], replace(TWO_CPUS, memory_bytes_per_node=one.memory_bytes), 16).groups
    assert (tight.num_slots, tight.members) == (1, ("a",))


@pytest.mark.parametrize("seed", range(50))
def test_same_input_in_any_order_gives_the_same_plan(seed):
    tasks, cluster, max_slots = random_case(seed)
    plan = plan_groups(tasks, cluster, max_slots)
    random.Random(seed).shuffle(tasks)
    assert plan_groups(tasks, cluster, max_slots) == plan


def test_a_thousand_tasks_are_planned():
    plan = plan_groups(needs(1000), THREE_GPUS, 16)
    assert sorted(task for group in plan.groups for task in group.members) == [need.task for need in needs(1000)]
    assert [(len(group.members), group.num_slots) for group in plan.groups] == [(334, 16), (333, 16), (333, 16)]
    tight = plan_groups([*needs(1000), *mismatched_pair()], TIGHT, 16)
    assert not tight.refused
    assert sum(len(group.members) for group in tight.groups) == 1002


def test_no_tasks_no_groups():
    assert plan_groups([], TWO_CPUS, 16) == Plan((), ())
    assert plan_groups([], TWO_CPUS, 16).makespan_s == 0.0


def test_one_machine_without_gpu_trains_all_adapters_of_a_base_together():
    (group,) = plan_groups(needs(5), TWO_CPUS, 16).groups
    assert group.members == tuple(f"task-{index:04}" for index in range(5))
    assert (group.num_slots, group.gpus, group.cpus, group.num_steps) == (5, 0.0, 2.0, 5 * 7 * 10)
    # 4 x parameters x tokens of 5 tasks, at 4e10 a second on each of 2 cores.
    assert group.seconds == pytest.approx(START_UP_S + 5 * 4 * 20e6 * (100 * 10 * 40) / 8e10)


def test_bases_never_share_a_group():
    other_kinds = [BaseSpec(model="small", dtype="bfloat16"), BaseSpec(model="small", quantization="8bit")]
    bases = [SMALL, *other_kinds, BaseSpec(model="other")]
    plan = plan_groups([need(f"task-{index}", base=base) for index, base in enumerate(bases)], TWO_CPUS, 16)
    assert sorted(group.members for group in plan.groups) == [("task-0",), ("task-1",), ("task-2",), ("task-3",)]


def test_longest_work_is_placed_first_on_the_least_loaded_worker():
    lengths = {"a": 70, "b": 60, "c": 50, "d": 40, "e": 30}
    plan = plan_groups([need(name, epochs=epochs) for name, epochs in lengths.items()], THREE_GPUS, 16)
    assert {group.members for group in plan.groups} == {("a",), ("b", "e"), ("c", "d")}
    assert [group.seconds for group in plan.groups] == sorted((group.seconds for group in plan.groups), reverse=True)
    assert plan.makespan_s == plan.groups[0].seconds


@pytest.mark.parametrize(
    ("gpus", "num_groups", "on_gpus"),
    [
        (None, 3, 1.0),  # one GPU each where the cluster has any
        (0.5, 6, 0.5),
        (0.1, 26, 0.1),  # 1.0 // 0.1 is 9, and the node of two GPUs has 16 cores
        (0.6, 3, 0.6),  # two of these do not fit on one GPU
        (2, 1, 2.0),
        (0, 2, 0.0),  # 32 cores in workers that take a node of 16
    ],
)
def test_gpu_lanes(gpus, num_groups, on_gpus):
    plan = plan_groups(needs(60, resources=ResourceSpec(gpus=gpus)), THREE_GPUS, 16)
    assert len(plan.groups) == num_groups
    assert {group.gpus for group in plan.groups} == {on_gpus}
    assert {group.cpus for group in plan.groups} == {1.0 if on_gpus else 16.0}


MIXED_GPUS = replace(THREE_GPUS, nodes=(Node(16.0, 2.0, "A100"), Node(16.0, 1.0, "L4")), is_named=True)


def test_a_wanted_kind_of_gpu_has_lanes_of_its_own():
    on_l4 = [need(f"l4-{i}", resources=ResourceSpec(accelerator="L4")) for i in range(4)]
    on_a100 = [need(f"a100-{i}", resources=ResourceSpec(accelerator="A100")) for i in range(4)]
    plan = plan_groups([*on_l4, *on_a100], MIXED_GPUS, 16)
    assert sorted((group.accelerator, len(group.members)) for group in plan.groups) == [("A100", 2), ("A100", 2), ("L4", 4)]
    # Where Ray has not been asked yet, any kind may be there.
    assert not plan_groups(on_l4, THREE_GPUS, 16).refused


def test_a_kind_of_gpu_that_is_not_there_is_refused():
    plan = plan_groups([need("wish", resources=ResourceSpec(accelerator="H100")), need("any")], MIXED_GPUS, 16)
    reason = "needs 1 GPUs of kind H100, the cluster has 2 A100, 1 L4; change resources.accelerator"
    assert plan.refused == (("wish", reason),)
    assert [group.members for group in plan.groups] == [("any",)]


def test_a_group_waits_for_its_kind_of_gpu():
    l4 = plan_groups([need(resources=ResourceSpec(accelerator="L4"))], MIXED_GPUS, 16).groups[0]
    a100, anywhere = replace(l4, accelerator="A100"), replace(l4, accelerator=None)
    assert has_room(l4, [a100, a100], MIXED_GPUS)
    assert not has_room(l4, [l4], MIXED_GPUS)
    # Two that run anywhere may both be on the A100s; a third must be on the L4.
    assert has_room(l4, [anywhere, anywhere], MIXED_GPUS)
    assert has_room(a100, [anywhere, a100], MIXED_GPUS)
    assert not has_room(a100, [anywhere, anywhere, anywhere], MIXED_GPUS)


def test_workers_train_a_group_in_less_time_and_take_their_room_together():
    pair = ResourceSpec(workers=2, gpus=1, cpus=4)
    tasks = [need("a", resources=pair), need("b", resources=pair), need("c", resources=ResourceSpec(gpus=1, cpus=4))]
    plan = plan_groups(tasks, THREE_GPUS, 16)
    assert {(group.members, group.workers, group.gpus, group.cpus) for group in plan.groups} == {
        (("a", "b"), 2, 1.0, 4.0),
        (("c",), 1, 1.0, 4.0),
    }
    both, alone = sorted(plan.groups, key=lambda group: -group.workers)
    # Two tasks by two workers take as long as one by one, each with half the rows of a step in its memory.
    assert both.seconds == alone.seconds
    assert both.memory_bytes - alone.memory_bytes == 332_000 * 20
    assert plan.gpu_hours == pytest.approx(3 * alone.seconds / 3600)
    assert has_room(both, [alone], THREE_GPUS)
    assert not has_room(both, [both], THREE_GPUS)
    assert not has_room(alone, [both, alone], THREE_GPUS)
    assert plan.makespan_s == alone.seconds


def test_workers_lie_on_one_node_each():
    # Three GPUs are there, but on no two nodes are there two.
    plan = plan_groups([need(resources=ResourceSpec(workers=2, gpus=2))], THREE_GPUS, 16)
    ((_, reason),) = plan.refused
    assert reason.startswith("needs 2 workers of 2 GPUs and 1 CPUs each, the cluster has room for 1; lower")


ZONES = replace(
    THREE_GPUS,
    nodes=(
        Node(8.0, 2.0, "A100", (("market", "spot"), ("ray.io/node-id", "0a"), ("zone", "eu-1"))),
        Node(4.0, 1.0, "L4", (("ray.io/node-id", "0b"), ("zone", "eu-2"))),
        Node(2.0, 0.0, None, (("ray.io/node-id", "0c"),)),
    ),
    is_named=True,
)


@pytest.mark.parametrize(
    ("rule", "nodes"),
    [
        ({"zone": "eu-1"}, {0}),
        ({"zone": "!eu-1"}, {1, 2}),  # so does Ray: a node without the label has another one
        ({"zone": "in(eu-1, eu-2)"}, {0, 1}),
        ({"zone": "!in(eu-1,eu-2)"}, {2}),
        ({"zone": "in(eu-1,eu-2)", "market": "!spot"}, {1}),
        ({"zone": "eu"}, set()),
        ({}, {0, 1, 2}),
    ],
)
def test_labels_select_nodes_as_ray_does(rule, nodes):
    assert set(ZONES.nodes_for(None, tuple(rule.items()))) == nodes


def test_labels_have_groups_lanes_and_sizes_of_their_own():
    rules = [{"zone": "eu-1"}, {"zone": "eu-2"}, {"zone": "!in(eu-1, eu-2)"}]
    tasks = [need(f"{i}{j}", resources=ResourceSpec(node_labels=rule)) for i, rule in enumerate(rules) for j in range(3)]
    plan = plan_groups(tasks, ZONES, 16)
    assert sorted((dict(group.node_labels)["zone"], group.gpus, group.cpus, len(group.members)) for group in plan.groups) == [
        ("!in(eu-1, eu-2)", 0.0, 2.0, 3),
        ("eu-1", 1.0, 1.0, 1),
        ("eu-1", 1.0, 1.0, 2),
        ("eu-2", 1.0, 1.0, 3),
    ]
    # Where Ray has not been asked yet, any label may be there.
    assert not plan_groups(tasks, THREE_GPUS, 16).refused


def test_labels_that_no_node_has_are_refused():
    elsewhere = need("elsewhere", resources=ResourceSpec(node_labels={"zone": "us-1", "market": "spot"}))
    other_kind = need("kind", resources=ResourceSpec(node_labels={"zone": "eu-1"}, accelerator="L4"))
    plan = plan_groups([elsewhere, other_kind, need("any")], ZONES, 16)
    assert dict(plan.refused) == {
        "elsewhere": "needs nodes with labels market=spot, zone=us-1, the cluster has market=spot, zone=eu-1, zone=eu-2; "
        "change resources.node_labels",
        "kind": "needs 1 GPUs of kind L4, the cluster with zone=eu-1 has 2 A100; change resources.accelerator",
    }
    assert [group.members for group in plan.groups] == [("any",)]


def test_a_group_waits_for_nodes_with_its_labels():
    (here,) = plan_groups([need(resources=ResourceSpec(node_labels={"zone": "eu-2"}))], ZONES, 16).groups
    anywhere, there = replace(here, node_labels=()), replace(here, node_labels=(("zone", "eu-1"),))
    assert has_room(here, [there, there], ZONES)
    assert not has_room(here, [here], ZONES)
    assert has_room(here, [anywhere, anywhere], ZONES)
    assert not has_room(here, [anywhere, anywhere, anywhere], ZONES)


def test_higher_priority_goes_first_whatever_its_length():
    urgent, later = (need(name, resources=ResourceSpec(priority=priority)) for name, priority in (("urgent", 5), ("later", -1)))
    plan = plan_groups([need("long", epochs=50), later, urgent], TWO_CPUS, 16)
    assert [group.members for group in plan.groups] == [("urgent",), ("long",), ("later",)]


def test_cpu_lanes():
    plan = plan_groups(needs(7, resources=ResourceSpec(gpus=0, cpus=8)), THREE_GPUS, 16)
    assert sorted(len(group.members) for group in plan.groups) == [1, 2, 2, 2]
    assert plan_groups(needs(7, resources=ResourceSpec(cpus=0.5)), TWO_CPUS, 16).groups[0].cpus == 0.5


@pytest.mark.parametrize("gpus", [None, 0, 0.1, 0.5, 2])
def test_groups_start_until_the_cluster_is_full(gpus):
    cluster = replace(THREE_GPUS, nodes=(Node(32.0, 2.0), Node(32.0, 1.0)))
    plan = plan_groups(needs(60, resources=ResourceSpec(gpus=gpus)), cluster, 16)
    busy = []
    for group in plan.groups:
        assert has_room(group, busy, cluster)
        busy.append(group)
    assert not has_room(plan.groups[0], busy, cluster)
    assert has_room(plan.groups[0], busy[1:], cluster)


def test_a_group_waits_for_cpus_and_for_gpus():
    one_gpu = plan_groups(needs(1), THREE_GPUS, 16).groups[0]
    all_cpus = replace(one_gpu, gpus=0.0, cpus=32.0)
    assert has_room(all_cpus, [], THREE_GPUS)
    assert not has_room(all_cpus, [one_gpu], THREE_GPUS)
    assert not has_room(one_gpu, [all_cpus], THREE_GPUS)
    assert not has_room(one_gpu, [replace(one_gpu, gpus=2.5)], THREE_GPUS)


def test_groups_that_must_wait_count_for_the_makespan():
    bases = [BaseSpec(model=f"base-{index}") for index in range(3)]
    plan = plan_groups([need(f"task-{index}", base=base) for index, base in enumerate(bases)], TWO_CPUS, 16)
    assert plan.makespan_s == pytest.approx(sum(group.seconds for group in plan.groups))
    side_by_side = plan_groups([need(f"task-{i}", base=base) for i, base in enumerate(bases)], THREE_GPUS, 16)
    assert side_by_side.makespan_s == max(group.seconds for group in side_by_side.groups)
    assert side_by_side.gpu_hours == pytest.approx(sum(group.seconds for group in side_by_side.groups) / 3600)
    assert plan.gpu_hours == 0.0


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_bases", [1, 5])
def test_sixty_four_gpus_are_kept_busy(sigma, num_bases):
    """A thousand tasks of log-normal length: within 10 % of what no schedule can beat."""
    rng = random.Random(sigma)
    cluster = ClusterSize((Node(128.0, 8.0),) * 8, 512 * GIB, 80 * GIB)
    bases = [BaseSpec(model=f"base-{index}") for index in range(num_bases)]
    large = {"num_base_parameters": 10**9, "num_quantised_parameters": 0}
    tasks = [
        need(f"task-{i:04}", base=rng.choice(bases), num_train=int(20_000 * rng.lognormvariate(0, sigma)) + 1, **large)
        for i in range(1000)
    ]
    plan = plan_groups(tasks, cluster, 16)
    seconds = [need.num_flops / 4e13 for need in tasks]
    assert not plan.refused
    assert plan.makespan_s <= 1.1 * max(sum(seconds) / 64, max(seconds))


def test_a_plan_never_has_more_groups_than_tasks():
    assert len(plan_groups(needs(2), THREE_GPUS, 16).groups) == 2


def test_max_slots_bounds_what_trains_at_once():
    (group,) = plan_groups(needs(5), TWO_CPUS, 2).groups
    assert (len(group.members), group.num_slots) == (5, 2)


def test_tight_memory_reduces_slots_but_keeps_the_group():
    # Worker 1 GiB + base 0.08 GB + per slot: adapter 18 x 384 x 8 x 6 x 16 bytes and step 16 x 40 x 136 x 6 x 384 bytes.
    per_slot = 332_000 * 20 + 16 * 40 * 136 * 6 * 384
    fixed = GIB + 20_000_000 * 4
    for num_slots in (1, 3):
        cluster = replace(TWO_CPUS, memory_bytes_per_node=fixed + num_slots * per_slot)
        (group,) = plan_groups(needs(5), cluster, 16).groups
        assert (len(group.members), group.num_slots) == (5, num_slots)
        assert group.memory_bytes == fixed + num_slots * per_slot
    assert len(plan_groups(needs(5), replace(TWO_CPUS, memory_bytes_per_node=fixed + per_slot - 1), 16).refused) == 5


TIGHT = replace(TWO_CPUS, memory_bytes_per_node=3 * GIB)


def mismatched_pair():
    """Each fits into 3 GiB alone; the first one's rank with the other one's batch does not."""
    high_rank = need("high-rank", num_adapter_parameters=68_000_000, num_train=9)
    return [high_rank, need("long-steps", batch_size=64, tokens_per_example=100.0, num_train=9)]


def test_tasks_that_fit_alone_but_not_even_in_turn_get_groups_of_their_own():
    plan = plan_groups([*mismatched_pair(), need("easy")], TIGHT, 16)
    assert not plan.refused
    assert len(plan.groups) == 2
    assert all(group.memory_bytes <= 3 * GIB for group in plan.groups)
    together = {task for group in plan.groups for task in group.members if "high-rank" in group.members}
    assert "long-steps" not in together


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"resources": ResourceSpec(workers=3, cpus=1)},
            "needs 3 workers of 0 GPUs and 1 CPUs each, the cluster has room for 2; lower resources.workers, gpus or cpus",
        ),
        (
            {"resources": ResourceSpec(node_labels={"zone": "eu-1"})},
            "needs nodes with labels zone=eu-1, the cluster has none; change resources.node_labels",
        ),
        (
            {"resources": ResourceSpec(gpus=1)},
            "needs 1 GPUs on one node, the largest node has 0; lower resources.gpus",
        ),
        (
            {"resources": ResourceSpec(cpus=3)},
            "needs 3 CPUs on one node, the largest node has 2; lower resources.cpus",
        ),
        (
            {"num_base_parameters": 11_000_000_000},
            "needs about 42.2 GiB, one worker has 8.0 GiB; "
            "use resources.gradient_checkpointing: true, base.quantization 8bit or 4bit, a smaller batch_size or max_length, "
            "or a larger machine",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason_and_the_rest_goes_on(changes, reason):
    plan = plan_groups([need("impossible", **changes), need("possible")], TWO_CPUS, 16)
    assert [group.members for group in plan.groups] == [("possible",)]
    assert plan.refused == (("impossible", reason),)


def test_quantization_lets_a_large_base_in():
    eleven = {"num_base_parameters": 11_000_000_000, "num_quantised_parameters": 9_000_000_000}
    eleven |= {"num_layers": 24, "hidden_size": 4096, "tokens_per_example": 20.0}
    cluster = replace(THREE_GPUS, memory_bytes_per_gpu=32 * GIB)
    tasks = [need(kind, base=BaseSpec(model="xxl", quantization=kind), **eleven) for kind in ("none", "8bit", "4bit")]
    plan = plan_groups(tasks, cluster, 16)
    assert [task for task, _ in plan.refused] == ["none"]
    assert {group.members for group in plan.groups} == {("8bit",), ("4bit",)}


def test_quantisation_leaves_what_it_does_not_shrink_in_its_dtype():
    sizes = {"num_base_parameters": 1_000_000_000, "num_quantised_parameters": 750_000_000}
    plain, small = (plan_groups([need(base=BaseSpec(model="b", dtype="bfloat16", quantization=kind), **sizes)], THREE_GPUS, 1)
                    for kind in ("none", "4bit"))  # fmt: skip
    assert plain.groups[0].memory_bytes - small.groups[0].memory_bytes == pytest.approx(750_000_000 * (2 - 0.52), abs=2)


def test_gradient_checkpointing_takes_less_memory_more_time_and_a_group_of_its_own():
    checkpointed = ResourceSpec(gradient_checkpointing=True)
    tasks = [need("a"), need("b", resources=checkpointed), need("c", resources=checkpointed)]
    fixed, adapter = GIB + 20_000_000 * 4, 332_000 * 20
    # 16 x 40 tokens: the insides of one layer and the inputs of six, against the insides of six.
    step = 16 * 40 * (136 + 4 * 6) * 384
    plan = plan_groups(tasks, TWO_CPUS, 16)
    assert {group.members: group.memory_bytes for group in plan.groups} == {
        ("a",): fixed + adapter + 16 * 40 * 136 * 6 * 384,
        ("b", "c"): fixed + 2 * (adapter + step),
    }
    alone, pair = sorted(plan.groups, key=lambda group: len(group.members))
    assert pair.seconds - 25 == pytest.approx(2 * 1.5 * (alone.seconds - 25))
