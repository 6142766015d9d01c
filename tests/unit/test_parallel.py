"""Several processes against one: the same gradients, outputs and losses. The processes are real, two of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from mini import parallel
from mini.lab.processes import launch
from mini.model import Config, Transformer, cross_entropy
from mini.moe import Experts, Gate, balanced, choose_experts
from mini.train import Settings, load, optimizers, train

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the processes cannot import this file

SMALL = dict(vocab_size=64, dim=32, n_layers=2, n_heads=2, inter_dim=64, max_seq_len=32)
EXPERTS = dict(
    n_routed_experts=8, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=16, n_dense_layers=1
)


def model(seed=0, **more):
    torch.manual_seed(seed)
    return Transformer(Config(**SMALL, **more))


def rows(n=4, seed=1):
    return torch.randint(64, (n, 33), generator=torch.Generator().manual_seed(seed))


def gradients_of(net):
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def worst(a, b):
    """The largest relative difference between two dicts of tensors."""
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-12)).item() for k in b)


def data_parallel():
    """The gradients of shares, averaged, beside those of the whole batch."""
    alone, shared = model(**EXPERTS), model(**EXPERTS)
    cross_entropy(alone, rows()).backward()
    value = cross_entropy(shared, parallel.my_rows(rows()))
    value.backward()
    own = worst(gradients_of(shared), gradients_of(alone))
    parallel.average_gradients(shared)
    loss = abs(parallel.average(value) - cross_entropy(alone, rows())).item()
    return {"before": own, "after": worst(gradients_of(shared), gradients_of(alone)), "loss": loss}


def expert_parallel():
    """A model with its experts spread: outputs, and gradients of the whole batch."""
    alone, spread = model(**EXPERTS), parallel.spread_experts(model(**EXPERTS))
    with torch.no_grad():
        for net in (alone, spread):
            for gate in (m for m in net.modules() if isinstance(m, Gate)):
                gate.bias.copy_(torch.linspace(-0.2, 0.2, 8))
    mine = parallel.my_rows(rows())[:, :-1]
    logits = (spread(mine) - alone(mine)).abs().max().item()
    cross_entropy(alone, rows()).backward()
    cross_entropy(spread, parallel.my_rows(rows())).backward()
    parallel.average_gradients(spread)
    got, expected = gradients_of(spread), gradients_of(alone)
    half = slice(4 * parallel.rank(), 4 * parallel.rank() + 4)
    expected = {k: g[half] if ".experts." in k else g for k, g in expected.items()}
    return {"logits": logits, "gradients": worst(got, expected)}


def empty_process():
    """All tokens go to the experts of process 0, and process 1 has no token of its own."""
    torch.manual_seed(0)
    experts = Experts(8, 32, 16)
    spread = parallel.ParallelExperts(experts)
    n = 5 * (1 - parallel.rank())
    x = torch.randn(n, 32, requires_grad=True)
    indices, weights = torch.tensor([[0, 3]]).expand(n, 2), torch.full((n, 2), 0.5)
    y = spread(x, indices, weights)
    y.sum().backward()
    return {"y": (y - experts(x, indices, weights)).abs().sum().item(), "grad": list(spread.w2.grad.shape)}


def trained(with_experts):
    """The losses and the router's bias after five steps of the training loop."""
    # `train` starts all from process 0's
    net = model(seed=parallel.rank(), **(EXPERTS if with_experts else {}))
    loss = balanced(cross_entropy, bias_speed=0.01) if with_experts else cross_entropy
    history = train(net, lambda step: rows(seed=step), Settings(steps=5), loss=loss, progress=False)
    bias = [m.bias.tolist() for m in net.modules() if isinstance(m, Gate)]
    return {"loss": [row["loss"] for row in history], "tokens": history[-1]["tokens"], "bias": bias}


def sharded():
    """Losses of a sharded model, how much of it this process holds, and a saved state read back."""
    net = parallel.shard(model())
    settings = Settings(steps=5, matrix_lr=0)
    history = train(net, lambda step: rows(seed=step), settings, progress=False)
    held = sum(p.to_local().numel() for p in net.parameters())
    p = net.embed.weight
    again = parallel.sliced(parallel.whole(p), p)
    return {
        "loss": [row["loss"] for row in history],
        "held": held / sum(p.numel() for p in net.parameters()),
        "same": torch.equal(again.to_local(), p.to_local()),
    }


def refusals():
    def said(call):
        try:
            call()
        except ValueError as error:
            return str(error)

    spread = parallel.spread_experts(model(**EXPERTS))
    ahead = parallel.rank() * 3
    return [
        said(lambda: parallel.my_rows(rows(3))),
        said(lambda: parallel.ParallelExperts(Experts(3, 32, 16))),
        said(lambda: parallel.same_start(spread, 0)),
        said(lambda: parallel.same_start(model(), ahead)),
        said(lambda: optimizers(parallel.shard(model()), Settings(steps=1))),
    ]


def all_of_it():
    flags = [parallel.anywhere(False), parallel.anywhere(parallel.rank() == 1)]
    return {
        "flags": flags,
        "rows": parallel.all_rows(parallel.my_rows(torch.arange(4))).tolist(),
        "data": data_parallel(),
        "experts": expert_parallel(),
        "empty": empty_process(),
        "dense": trained(False),
        "moe": trained(True),
        "sharded": sharded(),
        "refusals": refusals(),
        "backend": dist.get_backend(),
    }


@pytest.fixture(scope="module")
def two():
    """What two processes found, and what one finds."""
    return launch(all_of_it, processes=2)


def test_gradients_of_shares_average_to_those_of_the_batch(two):
    for found in two:
        assert found["data"]["before"] > 0.01
        assert found["data"]["after"] < 1e-6
        assert found["data"]["loss"] < 1e-6


def test_spread_experts_give_the_same_outputs_and_gradients(two):
    for found in two:
        assert found["experts"]["logits"] < 1e-6
        assert found["experts"]["gradients"] < 1e-6


def test_a_process_without_tokens_takes_part(two):
    for found in two:
        assert found["empty"] == {"y": pytest.approx(0, abs=1e-5), "grad": [4, 32, 16]}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_training_with_two_processes_is_training_with_one(two, kind):
    alone = trained(kind == "moe")
    for found in two:
        assert found[kind]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert found[kind]["tokens"] == alone["tokens"]
        assert found[kind]["bias"] == [pytest.approx(bias) for bias in alone["bias"]]


def test_sharding_changes_where_weights_are_and_not_what_is_learned(two):
    history = train(model(), lambda step: rows(seed=step), Settings(steps=5, matrix_lr=0), progress=False)
    for found in two:
        assert found["sharded"]["loss"] == pytest.approx([row["loss"] for row in history], rel=1e-5)
        assert found["sharded"]["held"] == pytest.approx(0.5, abs=0.01)
        assert found["sharded"]["same"]


def test_all_decide_together_and_refuse_together(two):
    for found in two:
        assert found["backend"] == "gloo"
        assert found["flags"] == [False, True]
        assert found["rows"] == [0, 2, 1, 3]  # those of process 0 first
        uneven, experts, unsaved, behind, muon = found["refusals"]
        assert "3 rows cannot be shared evenly by 2" in uneven
        assert "use 4 rows" in uneven
        assert "n_routed_experts=3" in experts
        assert "ParallelExperts" in unsaved
        assert "process 0 one of 0" in behind
        assert "matrix_lr=0.02" in muon


def test_one_process_is_left_as_it_is():
    net, batch = model(), rows(3)
    cross_entropy(net, batch).backward()
    before = gradients_of(net)
    parallel.average_gradients(net)
    parallel.same_start(net, 0)
    assert worst(gradients_of(net), before) == 0
    assert torch.equal(parallel.my_rows(batch), batch)
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    assert parallel.anywhere(True)
    assert not parallel.anywhere(False)


def test_the_loss_of_another_process_is_told_from_a_fault_of_ones_own():
    gone = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6471"
    assert parallel.lost_another(RuntimeError(gone))
    assert parallel.lost_another(RuntimeError("NCCL communicator was aborted on rank 1"))
    assert not parallel.lost_another(RuntimeError("shape '[2, 3]' is invalid for input of size 7"))
    assert not parallel.lost_another(ValueError(gone))


def failing(how):
    if parallel.rank() == 1:
        if how == "error":
            raise ValueError("seven is wrong")
        os._exit(7)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "words"), [("error", "ValueError: seven is wrong"), ("death", "ended with exit code 7")]
)
def test_the_process_that_failed_is_named(how, words):
    with pytest.raises(RuntimeError, match=f"process 1 of 2 failed: .*{words}"):
        launch(failing, how=how)


def waiting():
    print("waiting", flush=True)
    time.sleep(600)


HOST = """
import cloudpickle, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without
from mini.lab.processes import launch
launch(cloudpickle.loads(sys.stdin.buffer.read()))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running(how):
    command = [sys.executable, "-u", "-c", HOST]
    host = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    host.stdin.write(cloudpickle.dumps(waiting))
    host.stdin.close()
    assert host.stdout.readline() == b"waiting\n"
    family = psutil.Process(host.pid).children(recursive=True)
    assert len(family) >= 3  # torchrun and two processes
    host.send_signal(how)
    host.wait(60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []


# The program


def command(*options, processes=2):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    shape = (
        "--dim 32 --n-layers 1 --inter-dim 64 --max-seq-len 32 --vocab-size 128 --batch-size 8 --save-every 5"
    )
    return [*start, "mini.train", *shape.split(), *options]


def run_program(folder, name, *options, processes=2):
    """The history that the program kept, and what it said."""
    path = folder / name
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command("--checkpoint", str(path), *options, processes=processes),
        capture_output=True, text=True, env=env, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return load(path)[1]["history"], done.stdout


def losses(history):
    return [row["loss"] for row in history]


def test_the_program_with_two_processes_learns_what_one_learns(tmp_path):
    alone, _ = run_program(tmp_path, "one", "--steps", "12", processes=1)
    both, said = run_program(tmp_path, "two", "--steps", "12")
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    assert both[-1]["bits"] == pytest.approx(alone[-1]["bits"], rel=1e-4)
    assert both[-1]["tokens"] == alone[-1]["tokens"]
    assert said.count("bits per character") == 1
    assert "2 processes" in said


def test_the_program_sharded_stops_at_a_signal_and_goes_on(tmp_path):
    alone, _ = run_program(tmp_path, "one", "--steps", "40", "--matrix-lr", "0", processes=1)
    stopped = start_until_saved(tmp_path / "two", "--steps", "40", "--shard")
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=120)[1]
    assert stopped.returncode != 0
    kept = load(tmp_path / "two")[1]["history"]
    assert 5 <= len(kept) < 40
    assert f"stopped after step {len(kept)} of 40: saved" in said
    both, _ = run_program(tmp_path, "two", "--steps", "40", "--shard")
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)


def start_until_saved(path: Path, *options):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command("--checkpoint", str(path), *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    while not path.exists():
        assert run.poll() is None, run.communicate()[1][-2000:]
        time.sleep(0.01)
    return run


def test_a_worker_that_dies_ends_the_run_which_then_goes_on(tmp_path):
    path = tmp_path / "run"
    run = start_until_saved(path, "--steps", "2000")
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if "mini.train" in p.cmdline()]
    assert len(workers) == 2
    workers[-1].kill()
    said = run.communicate(timeout=60)[1]
    assert run.returncode != 0
    assert "lost another one" in said or "SIGKILL" in said
    kept = load(path)[1]["history"]
    assert len(kept) % 5 == 0
    run = subprocess.Popen(
        command("--checkpoint", str(path), "--steps", "2000"), stderr=subprocess.PIPE, text=True
    )
    time.sleep(0.1)
    grown = time.monotonic() + 120
    while len(load(path)[1]["history"]) <= len(kept):
        assert run.poll() is None, run.communicate()[1][-2000:]
        assert time.monotonic() < grown
        time.sleep(0.2)
    run.terminate()
    run.communicate(timeout=60)
    assert losses(load(path)[1]["history"])[: len(kept)] == losses(kept)


def test_the_program_says_what_is_wrong(tmp_path):
    options = ["--steps", "2", "--checkpoint", str(tmp_path / "x"), "--n-heads", "5"]
    done = subprocess.run(command(*options, processes=1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "n_heads=5" in done.stderr
    assert "Traceback" not in done.stderr


# Where experts lie


def test_destinations_by_hand():
    indices = torch.tensor([[0, 1, 7], [0, 2, 4], [6, 7, 5]])
    assert parallel.destinations(indices, n_experts=8, n_nodes=4).tolist() == [2, 3, 2]
    with pytest.raises(ValueError, match="n_nodes=3 does not divide n_experts=8"):
        parallel.destinations(indices, 8, 3)


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_limited_routing_limits_the_destinations(limit, seed):
    scores = torch.rand(50, 32, generator=torch.Generator().manual_seed(seed))
    indices = choose_experts(scores, 8, n_groups=4, n_limited_groups=limit)
    there = parallel.destinations(indices, 32, 4)
    assert there.max() <= limit
    assert there.min() >= 1


def test_the_published_example_of_eplb():
    """github.com/deepseek-ai/EPLB, README: two layers, 12 experts in 4 groups, 16 slots, 2 nodes of 4 GPUs."""
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for load_, slots in zip(loads, published, strict=True):
        placed = parallel.place_experts(load_, n_slots=16, n_gpus=8, n_groups=4, n_nodes=2)
        theirs = [slots[i : i + 2] for i in range(0, 16, 2)]
        assert sorted(parallel.gpu_loads(placed, load_)) == pytest.approx(
            sorted(parallel.gpu_loads(theirs, load_))
        )
        nodes = [
            {frozenset(e // 3 for gpu in p[i : i + 4] for e in gpu) for i in (0, 4)} for p in (placed, theirs)
        ]
        assert nodes[0] == nodes[1]  # the same groups of experts on each machine


@given(st.lists(st.floats(0, 1000), min_size=8, max_size=8), st.sampled_from([8, 12, 16, 24]))
def test_placing_keeps_every_expert_and_the_whole_load(loads, n_slots):
    placed = parallel.place_experts(loads, n_slots, n_gpus=4)
    assert {e for gpu in placed for e in gpu} == set(range(8))
    assert [len(gpu) for gpu in placed] == [n_slots // 4] * 4
    assert sum(parallel.gpu_loads(placed, loads)) == pytest.approx(sum(loads), abs=1e-6)


def test_a_copy_goes_to_the_busiest():
    assert parallel.replicate([10, 50, 20], 6)[3:] == [1, 1, 2]  # 50, 25 / 25 / 20 … then 16.7 and 20
    assert parallel.pack([5, 1, 4, 2], 2) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parallel.pack([1, 2, 3], 2), "3 items do not fill 2 bins"),
        (lambda: parallel.replicate([1, 2, 3], 2), "n_slots=2 cannot hold 3 experts"),
        (lambda: parallel.place_experts([1] * 8, 8, 3), "n_gpus=3 does not divide n_slots, 8"),
        (
            lambda: parallel.place_experts([1] * 8, 8, 4, n_groups=3),
            "n_groups=3 does not divide the experts, 8",
        ),
        (
            lambda: parallel.place_experts([1] * 8, 9, 3, n_groups=2, n_nodes=2),
            "n_nodes=2 does not divide n_gpus, 3",
        ),
        (lambda: launch(waiting, processes=0), "processes=0"),
    ],
)
def test_what_cannot_be_placed_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_results_have_to_be_plain():
    with pytest.raises(RuntimeError, match="not JSON serializable"):
        launch(lambda: torch.zeros(1), processes=1)
