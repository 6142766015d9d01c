"""Pipelines: rules that every schedule keeps, orders by hand, times against closed formulas."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini.pipeline import (
    METHODS,
    Durations,
    Pass,
    bubble,
    dualpipe,
    gpipe,
    kinds,
    makespan,
    needs,
    one_f_one_b,
    published_bubble,
    read,
    simulate,
    stream,
    zero_bubble,
)

ALL = pytest.mark.parametrize("method", METHODS)
GRID = pytest.mark.parametrize("stages", [2, 4, 6, 16])
MANY = settings(max_examples=40, deadline=None)
time = st.integers(1, 20)


@st.composite
def sizes(draw):
    """Stages and micro-batches that every method accepts."""
    stages = 2 * draw(st.integers(1, 4))
    return stages, 2 * stages + 2 * draw(st.integers(0, 5))


@st.composite
def durations(draw, saves=True):
    f, b, w = draw(time), draw(time), draw(time)
    return Durations(f, b, w, draw(st.integers(max(f, b + w), f + b + w)) if saves else None)


def simulated(method, stages, micro_batches, durations=None):
    return simulate(METHODS[method](stages, micro_batches), durations)


def idle(timeline):
    return [device.time for device in bubble(timeline)]


# --- what every schedule keeps


@ALL
@MANY
@given(sizes())
def test_each_pass_is_done_once_on_a_device_that_holds_its_stage(method, size):
    stages, micro_batches = size
    schedule = METHODS[method](*size)
    passes = [p for slots in schedule for slot in slots for p in slot]
    seen = [(p.kind, p.micro_batch, p.stage) for p in passes]
    assert len(seen) == len(set(seen))
    assert set(seen) == {(k, m, s) for k in "FBW" for m in range(micro_batches) for s in range(stages)}
    for device, slots in enumerate(schedule):
        assert all(p.stage == (stages - 1 - device if p.direction else device) for s in slots for p in s)
        for slot in slots:
            assert kinds(slot) in ("F", "B", "W", "BW", "FBW")
            backward = [(p.micro_batch, p.stage) for p in slot if p.kind != "F"]
            assert len(set(backward)) <= 1  # a whole backward is of one micro-batch
    reverse = {p.micro_batch for p in passes if p.direction == 1}
    assert reverse == (set(range(micro_batches // 2, micro_batches)) if method == "DualPipe" else set())


@ALL
@MANY
@given(sizes(), durations(), st.integers(0, 5))
def test_nothing_comes_too_early_or_later_than_it_must(method, size, times, send):
    times = Durations(times.F, times.B, times.W, times.FB, send)
    timeline = simulated(method, *size, times)
    starts, ends, place = {}, {}, {}
    for device, events in enumerate(timeline):
        assert all(a.end <= b.start for a, b in pairwise(events))
        for event in events:
            assert event.end - event.start == times.of(event.slot)
            for p in event.slot:
                starts[p], ends[p], place[p] = event.start, event.end, device
    for events in timeline:
        free = 0
        for event in events:
            ready = [free]
            for p in event.slot:
                for q in needs(p, size[0]):
                    if not (p.kind == "W" and q in event.slot):
                        ready.append(ends[q] + send * (place[p] != place[q]))
            assert event.start == max(ready)
            free = event.end


def test_needs():
    assert needs(Pass("F", 3, 0), 4) == []
    assert needs(Pass("F", 3, 2, 1), 4) == [Pass("F", 3, 1, 1)]
    assert needs(Pass("B", 3, 2), 4) == [Pass("F", 3, 2), Pass("B", 3, 3)]
    assert needs(Pass("B", 3, 3), 4) == [Pass("F", 3, 3)]
    assert needs(Pass("W", 3, 3), 4) == [Pass("B", 3, 3)]


@MANY
@given(sizes(), durations(saves=False))
def test_all_work_alike_and_none_beats_the_lower_bounds(size, times):
    stages, micro_batches = size
    work = micro_batches * (times.F + times.B + times.W)
    for method in METHODS:
        timeline = simulated(method, *size, times)
        whole = makespan(timeline)
        assert [whole - each for each in idle(timeline)] == [work] * stages
        # a device's work; one micro-batch's way
        assert whole >= max(work, stages * (times.F + times.B) + times.W)


@MANY
@given(sizes(), durations())
def test_order_of_merit(size, times):
    """ZB-H1 never loses to 1F1B. No such thing holds for DualPipe against ZB-H1 at all durations."""
    whole = {method: makespan(simulated(method, *size, times)) for method in METHODS}
    assert whole["GPipe"] == whole["1F1B"] >= whole["ZB1P"]


# --- by hand


def words(slots):
    return " ".join("/".join(f"{p.kind}{p.micro_batch}" for p in slot) for slot in slots)


def test_orders_by_hand():
    assert words(gpipe(2, 2)[0]) == "F0 F1 B0/W0 B1/W1"
    assert words(one_f_one_b(3, 4)[0]) == "F0 F1 F2 B0/W0 F3 B1/W1 B2/W2 B3/W3"
    assert words(one_f_one_b(3, 4)[2]) == "F0 B0/W0 F1 B1/W1 F2 B2/W2 F3 B3/W3"
    assert words(one_f_one_b(4, 2)[0]) == "F0 F1 B0/W0 B1/W1"
    assert words(zero_bubble(3, 4)[0]) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert words(zero_bubble(3, 4)[1]) == "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3"
    assert words(zero_bubble(3, 4)[2]) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


def test_the_published_picture_of_dualpipe():
    """Figure 5 of arXiv:2412.19437, also in the repository: 8 devices, 20 micro-batches, here 10-19 in reverse."""
    schedule = dualpipe(8, 20)
    first = words(schedule[0])
    assert first.startswith(
        "F0 F1 F2 F3 F4 F5 F6 F10 B10 W10 F11 B11 W11 F12 B12 W12 F13 F7/B13/W13 F14/B0/W0 F8/"
    )
    assert first.endswith("B18/W18 F19/B5/W5 B19/W19 B6 W6 B7 W7 B8 W8 B9 W9")
    middle = words(schedule[3])
    assert middle.startswith("F0 F10 F1 F11 F2 F12 F3 F13 F4 B10/W10 F14/B0/W0 F5/B11/W11 F15/B1/W1")
    assert middle.endswith("B16/W16 B6/W6 B17/W17 B7/W7 B18 B8 B19 B9 W18 W8 W19 W9")
    for device in range(8):  # the other half mirrors this one
        swap = [[(p.kind, (p.micro_batch + 10) % 20, p.stage) for p in s] for s in schedule[7 - device]]
        assert [[(p.kind, p.micro_batch, p.stage) for p in s] for s in schedule[device]] == swap


def test_times_by_hand():
    timeline = simulate(one_f_one_b(2, 2), Durations(F=2, B=3, W=1, send=0.5))
    assert [(e.start, e.end) for e in timeline[0]] == [(0, 2), (2, 4), (9, 13), (15, 19)]
    assert [(e.start, e.end) for e in timeline[1]] == [(2.5, 4.5), (4.5, 8.5), (8.5, 10.5), (10.5, 14.5)]
    assert makespan(timeline) == 19
    first, second = bubble(timeline)
    assert (first.time, first.share) == (second.time, second.share) == (7, 7 / 19)


@GRID
@pytest.mark.parametrize("more", [0, 6])
def test_equal_passes_idle_as_published(stages, more):
    """F = B = W, and F&B their sum: every device of every method, to the letter."""
    for method in METHODS:
        timeline = simulated(method, stages, 2 * stages + more)
        assert idle(timeline) == [published_bubble(method, stages)] * stages


def test_published_numbers():
    """PP=16 in units of F = B = W: 45, 15, 14; and at 8 stages with an F&B of 2.5 in place of 3."""
    assert [published_bubble(m, 16) for m in METHODS] == [45, 45, 15, 14]
    assert published_bubble("DualPipe", 8, Durations(FB=2.5)) == 3 * (2.5 + 2 - 3)  # Table 2's B is 2


@MANY
@given(st.integers(1, 6), st.integers(1, 12), durations())
def test_gpipe_and_1f1b_always_idle_as_published(stages, micro_batches, times):
    for method in ("GPipe", "1F1B"):
        found = idle(simulated(method, stages, micro_batches, times))
        assert found == [published_bubble(method, stages, times)] * stages


@MANY
@given(st.integers(1, 6), st.integers(0, 6), durations())
def test_zb1p_idles_as_published_while_w_is_shortest(stages, more, times):
    found = idle(simulated("ZB1P", stages, stages + more, times))
    assert found == [(stages - 1) * (times.F + times.B - min(times.F, times.B, times.W))] * stages
    if min(times.F, times.B) >= times.W:
        assert found[0] == published_bubble("ZB1P", stages, times)


@settings(max_examples=80, deadline=None)
@given(sizes(), durations())
def test_where_dualpipe_idles_as_published(size, times):
    stages, half = size[0], size[0] // 2
    timeline = simulated("DualPipe", *size, times)
    found = idle(timeline)
    f, b, w = times.F, times.B, times.W
    middle = (half - 1) * (times.pair - w - min(b, w)) + max((half - 1) * f, (half - 1) * b - f)
    assert found[half - 1] == found[half] == middle
    published = published_bubble("DualPipe", stages, times)
    if b >= w:
        assert (f <= b and published - f <= middle <= published) or (f > b and middle >= published)
    pairs = [sum(len(e.slot) == 3 for e in events) for events in timeline]
    saved = f + b + w - times.pair
    assert found == [middle - saved * (pairs[half] - n) for n in pairs]
    assert pairs == sorted(pairs[:half]) + sorted(pairs[half:], reverse=True)


@settings(max_examples=40, deadline=None)
@given(sizes(), durations())
def test_dualpipe_with_all_pairs_overlapped_is_the_formula(size, times):
    """Why repository and formula differ: the middle's first pair, put together again."""
    stages, half = size[0], size[0] // 2
    schedule = dualpipe(*size)
    for slots in (schedule[half - 1], schedule[half]):
        assert [kinds(s) for s in slots[stages : stages + 2]] == ["F", "BW"]
        slots[stages : stages + 2] = [slots[stages] + slots[stages + 1]]
    f, b, w = times.F, times.B, times.W
    found = idle(simulate(schedule, times))[half]
    assert found == (half - 1) * (times.pair + max(f, b) - w - min(b, w))
    if f <= b >= w:
        assert found == published_bubble("DualPipe", stages, times)


@GRID
@pytest.mark.parametrize("more", [0, 6])
def test_memory_is_as_published(stages, more):
    """Table 2: parameters 1, 1, 2; activations PP, PP, PP + 1 at their peak. GPipe keeps all micro-batches."""
    m = 2 * stages + more
    table = {method: bubble(simulated(method, stages, m)) for method in METHODS}
    assert [d.activations for d in table["GPipe"]] == [m] * stages
    assert [d.activations for d in table["1F1B"]] == list(range(stages, 0, -1))
    assert [d.activations for d in table["ZB1P"]] == [stages] * stages
    assert [d.activations for d in table["DualPipe"]] == [stages + 1] * stages
    assert {method: {d.parameters for d in devices} for method, devices in table.items()} == {
        "GPipe": {1},
        "1F1B": {1},
        "ZB1P": {1},
        "DualPipe": {2},
    }


# --- what goes wrong


@pytest.mark.parametrize(
    ("make", "stages", "micro_batches", "words"),
    [
        (gpipe, 0, 4, "stages=0 .* 1 or more"),
        (one_f_one_b, 4, 0, "micro_batches=0 .* 1 or more"),
        (zero_bubble, 4, 3, "micro_batches=3 .* use 4 or more"),
        (zero_bubble, 0, 3, "stages=0"),
        (dualpipe, 5, 20, "stages=5 is odd.* use 6"),
        (dualpipe, 4, 6, "micro_batches=6 .* use 8"),
        (dualpipe, 4, 9, "micro_batches=9 .* use 10"),
        (dualpipe, 4, 3, "micro_batches=3 .* use 8"),
        (dualpipe, 0, 2, "stages=0"),
    ],
)
def test_sizes_that_do_not_fit(make, stages, micro_batches, words):
    with pytest.raises(ValueError, match=words):
        make(stages, micro_batches)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(F=0), "F=0"),
        (dict(B=-1), "B=-1"),
        (dict(W=float("nan")), "W=nan"),
        (dict(F=float("inf")), "F=inf"),
        (dict(send=-1), "send=-1"),
        (dict(send=float("nan")), "send=nan"),
        (dict(FB=1.5), "FB=1.5 .* use 2 or more"),
        (dict(F=4, FB=3), "FB=3 .* use 4 or more"),
        (dict(FB=float("inf")), "FB=inf"),
    ],
)
def test_durations_that_are_none(wrong, words):
    with pytest.raises(ValueError, match=words):
        Durations(**wrong)


def test_a_pass_listed_twice_is_named():
    slots = read("F0 BW0", stream(0, 1, range(1)))
    with pytest.raises(ValueError, match="F of micro-batch 0 on stage 0 is listed 2 times"):
        simulate([[slots[0], *slots]])


def test_deadlock_is_named():
    """The second device wants to do a backward before the forward it belongs to."""
    passes = [stream(device, 2, range(1)) for device in (0, 1)]
    good = [read("F0 BW0", passes[0]), read("F0 BW0", passes[1])]
    assert makespan(simulate(good)) == 6
    with pytest.raises(
        ValueError, match=r"deadlock: device 1 waits with B of .* for F of micro-batch 0 on stage 1"
    ):
        simulate([good[0], good[1][::-1]])
    with pytest.raises(ValueError, match=r"deadlock: device 1 .* for F of micro-batch 0 on stage 0"):
        simulate([[], good[1]])
    with pytest.raises(ValueError, match="deadlock"):  # a pair is of two micro-batches
        simulate([read("F0&BW0", stream(0, 1, range(1)))])


def test_a_slot_without_duration():
    with pytest.raises(ValueError, match="a slot of FF has no duration"):
        simulate([read("F0&F0 BW0 BW0", stream(0, 1, range(2)))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F0 F0 BW0", "'F0', word 2"),
        ("F0 W", "'W', word 2"),
        ("F0 X0", "'X0', word 2"),
        ("F0 B", "'B', word 2"),
        ("F1", "'F1', word 1"),
        ("F0 B0", "1 passes undone"),
        ("", "2 passes undone"),
    ],
)
def test_texts_that_are_no_order(text, words):
    with pytest.raises(ValueError, match=words):
        read(text, stream(0, 1, range(1)))


def test_a_formula_that_is_not_there():
    with pytest.raises(ValueError, match="method='Chimera'"):
        published_bubble("Chimera", 4)
    with pytest.raises(ValueError, match="stages=5 is odd"):
        published_bubble("DualPipe", 5)
