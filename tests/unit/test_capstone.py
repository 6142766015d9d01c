"""The whole line: its parts by hand, and a line of few steps in a folder, broken off, resumed, and in two processes."""

import copy
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini import capstone, reward
from mini.budget import forward_flops
from mini.capstone import (
    STUDENT,
    V3_MINI,
    Folder,
    Plan,
    both,
    concerns,
    config,
    documents,
    flops,
    main,
    metered,
    pack,
)
from mini.critique import Judgement
from mini.fp8 import FP8Linear
from mini.model import Transformer
from mini.mtp import MTP
from mini.reward import Query, facts
from mini.tasks import is_held_out

BOSS = Query("boss", "quickly", 41, 33)
TRUE, FALSE = ("=70", "=4"), ("=70", "=5")
SHORT = dict(base_steps=2, r1_steps=1)
# a judge cannot be made from a base that has read next to nothing; chapter 15 makes all
FIRST = ["base", "r1"]
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()] + ["--until", "r1"]


def test_packing_by_hand():
    assert pack([[1, 2], [3, 4, 5], [6, 7, 8, 9], [10]], 4).tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    with pytest.raises(ValueError, match="1 documents fill no row of 4 tokens"):
        pack([[1, 2]], 4)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), max_size=20), st.integers(1, 9))
def test_packed_rows_are_full_and_begin_with_a_document(documents, length):
    if sum(map(len, documents)) < length + 7:
        return
    rows = pack(documents, length).tolist()
    assert all(len(row) == length for row in rows)
    starts = [d[:length] for d in documents]
    assert all(any(row[: len(start)] == start for start in starts) for row in rows)


def test_documents_are_of_both_kinds_and_split_by_sum():
    for held_out in (False, True):
        found = [reward.decode(row) for row in documents(40, 0, held_out)]
        assert len(found) == 80
        assert sum("critique:" in words for words in found) == 40
        for words in found:
            tens_a, ones_a, tens_b, ones_b = (int(w[1:]) for w in words[2:6])
            assert is_held_out(f"{tens_a + ones_a} + {tens_b + ones_b}") == held_out


def test_what_is_switched_off_is_replaced_by_its_forerunner():
    names = [name for name, _ in Transformer(config(Plan(mla=False, moe=False))).named_parameters()]
    assert any("wqkv.weight" in name for name in names)
    assert not any("experts" in name or "kv_a" in name for name in names)
    assert config(Plan()) == V3_MINI
    whole, dense = forward_flops(V3_MINI), forward_flops(config(Plan(moe=False)))
    router = 2 * 2 * V3_MINI.n_routed_experts * V3_MINI.dim
    assert whole - router == dense, "the same work but for the router"


def test_a_stage_depends_on_what_comes_before_it():
    assert set(concerns("base", Plan())) == {"mla", "moe", "mtp", "fp8", "seed", "base_steps"}
    assert "r1_steps" not in concerns("judge", Plan())
    assert {"r1_steps", "judge_steps", "aligned_steps"} <= set(concerns("student", Plan()))
    with pytest.raises(ValueError, match="stage='r2'; use one of base"):
        concerns("r2", Plan())


def test_no_mark_makes_up_for_a_false_sum():
    query = Query("boss", "quickly", 41, 33)
    answers = [("=70", "=4"), ("dear", "since", "1", "3", "=70", "=5", "surely")]
    opinion = both(Transformer(V3_MINI).eval())
    for _ in range(3):
        right, wrong = opinion([query, query], answers)
        assert 1 <= right <= 2
        assert 0 <= wrong <= 1
    assert opinion([query, query], answers) == [right, wrong], (
        "the same answers are judged alike, also after a resume"
    )
    assert [facts(query, answer)[0] for answer in answers] == [True, False]


def test_the_judges_mark_is_worth_a_tenth_of_a_true_sum(monkeypatch):
    """Also where the judge likes the false one best: 1 + 1/10 against 0 + 10/10."""
    monkeypatch.setattr(capstone, "opinion_of", lambda judge, k, seed: lambda queries, answers: [1.0, 10.0])
    assert both(Transformer(V3_MINI))([BOSS, BOSS], [TRUE, FALSE]) == pytest.approx([1.1, 1.0])


def test_a_stage_starts_from_a_copy():
    """Otherwise what trains r1 would change the base that the judge starts from."""
    models = {"base": Transformer(STUDENT), "r1": Transformer(STUDENT)}
    for stage, before in (("r1", "base"), ("sft", "base"), ("aligned", "r1")):
        start = capstone.start_of(stage, models.__getitem__)
        assert start is not models[before]
        assert start.embed.weight.equal(models[before].embed.weight)
        assert start.embed.weight.data_ptr() != models[before].embed.weight.data_ptr()
    assert capstone.start_of("base", models.__getitem__) is capstone.start_of("student", models.get) is None


def test_practice_holds_to_a_copy_and_asks_new_questions_each_time(monkeypatch):
    calls, model = [], Transformer(STUDENT)
    monkeypatch.setattr(capstone, "grpo", lambda *args, **options: calls.append((args, options)) or [])
    for seed in (0, 1):
        capstone.practise(model, capstone.true_sums, 3, seed)
    ((learner, asked, _, _, training), options), ((_, other, *_), _) = calls
    assert learner is model
    assert training.steps == 3
    assert options["reference"] is not model
    assert options["reference"].embed.weight.data_ptr() != model.embed.weight.data_ptr()
    assert asked(0) == asked(0)
    assert len({str(found) for found in (asked(0), asked(1), other(0), other(1))}) == 4
    assert not any(is_held_out(f"{query.a} + {query.b}") for query in asked(0))


def test_the_cold_start_shows_true_sums_with_their_steps(monkeypatch):
    shown = []
    monkeypatch.setattr(capstone, "train", lambda model, batch, *args, **options: shown.append(batch(0)))
    capstone.warm_up(Transformer(STUDENT), 0)
    for row in shown[0].tolist():
        words = reward.decode(row)
        tens_a, ones_a, tens_b, ones_b = (int(w[1:]) for w in words[2:6])
        met = facts(Query(words[0], words[1], tens_a + ones_a, tens_b + ones_b), words[7:-1])
        assert met[0]
        assert met[2]


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(mtp=False), Plan(fp8=True), Plan(moe=False, fp8=True, mtp=False)]
)
def test_a_base_is_built_as_its_plan_says(monkeypatch, plan):
    monkeypatch.setattr(capstone, "train", lambda *args, **options: [])
    monkeypatch.setattr(capstone, "reading", lambda seed, length: torch.zeros(2, length, dtype=torch.long))
    net, again, other = (
        capstone.pretrained(p, config(p))[0] for p in (plan, plan, replace(plan, seed=plan.seed + 1))
    )
    assert isinstance(net, MTP) == plan.mtp
    assert any(isinstance(module, FP8Linear) for module in net.modules()) == plan.fp8
    weight, same, unlike = (capstone.plain(n).embed.weight for n in (net, again, other))
    assert weight.equal(same)
    assert not weight.equal(unlike)


def test_writing_is_measured_on_held_out_queries(monkeypatch):
    """Of two answers one is true and one is none."""
    asked = []

    def fake(model, queries, each, generator):
        asked.extend(queries)
        return [(BOSS, TRUE), (BOSS, ("dear",))]

    monkeypatch.setattr(capstone, "answered", fake)
    found = capstone.writing(Transformer(STUDENT), n=5)
    assert len(asked) == 5
    assert all(is_held_out(f"{query.a} + {query.b}") for query in asked)
    assert (found["truth"], found["brief"], found["polite"]) == (0.5, 0.5, 0.0)
    assert (found["answers"], found["words"]) == (0.5, 1.5)
    assert found["value"] == reward.value(BOSS, TRUE) / 2
    assert reward.decode(capstone.texts_of(Transformer(STUDENT), 2, 0)[0].tolist())[7:] == [*TRUE, "<eos>"]
    assert len(capstone.texts_of(Transformer(STUDENT), 2, 0)) == 1  # no answer, no text


def test_judging_is_measured_on_held_out_cases(monkeypatch):
    asked = []

    def fake(model, cases, k, generator):
        asked.extend(cases)
        return [[Judgement((), ((),) * 4)] * k] * len(cases)

    monkeypatch.setattr(capstone, "judge", fake)
    found = capstone.judging(Transformer(STUDENT), n=5)
    assert len(asked) == 5
    assert all(is_held_out(f"{case.query.a} + {case.query.b}") for case in asked)
    assert found["right at 1"] == found["right at 16"] == found["read"] == 0.0


def test_each_query_gets_its_own_answers_in_any_part(monkeypatch):
    rng = random.Random(0)
    queries = [reward.draw_query(rng) for _ in range(501)]
    monkeypatch.setattr(
        capstone, "write", lambda model, part, each, generator: [[(q.who, str(q.a))] * each for q in part]
    )
    found = capstone.answered(Transformer(STUDENT), queries, 2, torch.Generator())
    assert found == [(q, (q.who, str(q.a))) for q in queries for _ in range(2)]


def test_tokens_are_counted_in_a_model_and_its_copies():
    model = Transformer(V3_MINI)
    with metered(model) as counts:
        copied = copy.deepcopy(model)
        model(torch.zeros(2, 5, dtype=torch.long))
        with torch.no_grad():
            copied(torch.zeros(3, 4, dtype=torch.long))
    model(torch.zeros(1, 1, dtype=torch.long))
    assert counts == dict(trained=10, drawn=12)


def test_arithmetic_by_hand():
    counts = dict(trained=100, drawn=10, other=1)
    own = forward_flops(V3_MINI, seq_len=32)
    assert flops("r1", Plan(), counts) == own * 311
    assert flops("base", Plan(mtp=False), dict(trained=1, drawn=0, other=0)) == 3 * own
    assert flops("base", Plan(), dict(trained=1, drawn=0, other=0)) == 3 * (own + capstone.mtp_flops(V3_MINI))
    assert flops("student", Plan(), counts) == 310 * forward_flops(STUDENT, seq_len=32) + own
    layer = MTP(Transformer(V3_MINI)).layers[0]
    experts = layer.block.ffn.experts
    passed = sum(p.numel() for n, p in layer.named_parameters() if "norm" not in n and "experts" not in n)
    passed += (
        (experts.w13.numel() + experts.w2.numel()) * V3_MINI.n_activated_experts // V3_MINI.n_routed_experts
    )
    assert capstone.mtp_flops(V3_MINI) == 2 * (passed + V3_MINI.vocab_size * V3_MINI.dim)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    assert main(["--folder", str(folder), *OPTIONS]) == 0
    return folder


def test_the_program_makes_stages_and_keeps_them(short, capsys):
    assert sorted(path.name for path in short.iterdir()) == [f"{name}.safetensors" for name in FIRST]
    before = {path: path.stat().st_mtime_ns for path in short.iterdir()}
    assert main(["--folder", str(short), *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == FIRST
    assert {path: path.stat().st_mtime_ns for path in short.iterdir()} == before


def test_another_plan_is_refused_by_name(short, capsys):
    assert main(["--folder", str(short), "--no-mtp", *OPTIONS]) == 1
    assert (
        "base.safetensors was made with mtp=True, this plan has mtp=False; name another --folder"
        in capsys.readouterr().err
    )


def test_a_stage_broken_off_goes_on(tmp_path, monkeypatch):
    plan = Plan(**SHORT | dict(r1_steps=3))
    whole = Folder(tmp_path / "whole", plan).stage("r1")[0].state_dict()
    drawn = capstone.true_sums
    calls = []

    def breaks(queries, answers):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 2)  # Ctrl-C: the step is finished, the run is saved
        return drawn(queries, answers)

    monkeypatch.setattr(capstone, "true_sums", breaks)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2 of 3"):
        Folder(tmp_path / "broken", plan).stage("r1")
    model, facts = Folder(tmp_path / "broken", plan).stage("r1")
    assert [row["step"] for row in facts["history"]] == [1, 2, 3]
    for name, tensor in model.state_dict().items():
        assert tensor.equal(whole[name]), name


def test_two_processes_make_one_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc-per-node=2", "-m", "mini.capstone", "--folder", str(tmp_path / "line"), *OPTIONS]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines() if " GFLOP " in line] == FIRST
    assert len(list((tmp_path / "line").iterdir())) == len(FIRST)
