"""Pipeline parallelism: who computes what in which order, and how long devices stand idle. Chapter 07.

A model is cut into PP *stages*, one after another, and a batch into M *micro-batches*. Each stage does three *passes*
for each micro-batch:

    F  the forward pass
    B  backward: the gradient of the stage's input, for which the stage before is waiting
    W  backward: the gradient of the stage's weights, for which nobody is waiting

These are the names of the zero-bubble paper (arXiv:2401.10241). Table 2 of DeepSeek-V3 (arXiv:2412.19437 §3.2.1)
writes B for the *whole* backward, which here is B + W. Its F&B, a forward overlapped with a whole backward of another
micro-batch, has that name here, too.

A *slot* is what a device does in one go: (F,), (B,), (W,), the whole backward (B, W), or the pair F&B (F, B, W).
What a slot computed can be used when the slot ends. A *schedule* is a list of slots for each device, in their order;
`simulate` finds out when each of them takes place.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

Number = int | float


class Pass(NamedTuple):
    """One pass of one micro-batch through one stage. Counted from 0, micro-batches through both directions."""

    kind: str  # "F", "B" or "W"
    micro_batch: int
    stage: int
    direction: int = 0  # 0: stage s is on device s; 1: it is on device PP - 1 - s


Slot = tuple[Pass, ...]
Schedule = list[list[Slot]]


@dataclass(frozen=True)
class Durations:
    """Time of each pass, in any unit, and of the pair: `FB=None` is F + B + W, an overlap that saves nothing.

    `send` is what passes until a result arrives at the next device; the device itself goes on meanwhile.
    """

    F: Number = 1
    B: Number = 1
    W: Number = 1
    FB: Number | None = None
    send: Number = 0

    def __post_init__(self) -> None:
        for name in ("F", "B", "W"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0 and finite; use such as 1")
        if not 0 <= self.send < inf:
            raise ValueError(f"send={self.send} is not a finite time; use 0, or such as 0.5")
        longer = max(self.F, self.B + self.W)
        if not longer <= self.pair < inf:
            raise ValueError(f"FB={self.FB} is shorter than F or B + W alone; use {longer} or more")

    @property
    def pair(self) -> Number:
        return self.F + self.B + self.W if self.FB is None else self.FB

    def of(self, slot: Slot) -> Number:
        times = dict(F=self.F, B=self.B, W=self.W, BW=self.B + self.W, FBW=self.pair)
        if kinds(slot) not in times:
            raise ValueError(
                f"a slot of {kinds(slot)} has no duration; use one of {list(times)}, in this order"
            )
        return times[kinds(slot)]


def kinds(slot: Slot) -> str:
    return "".join(p.kind for p in slot)


# --- schedules


def stream(device: int, stages: int, micro_batches: Iterable[int], direction: int = 0) -> list[Pass]:
    """The forward passes of these micro-batches on a device, in their order."""
    stage = stages - 1 - device if direction else device
    return [Pass("F", m, stage, direction) for m in micro_batches]


def read(text: str, *streams: list[Pass]) -> list[Slot]:
    """A device's slots from words: "F0 F1 B1 W F0&BW1". The digit is the stream, each of which goes on by itself.

    BW is the whole backward. After B alone, the W waits in a queue, and the word W does the one that waits longest.
    """
    todo = {(kind, str(i)): iter(passes) for i, passes in enumerate(streams) for kind in "FB"}
    waiting, slots = deque(), []
    for words in text.split():
        slot = []
        for word in words.split("&"):
            kind, digit = (word, "") if word == "W" else (word[:-1], word[-1])
            try:
                forward = waiting.popleft() if kind == "W" else next(todo[kind[:1], digit])
            except (KeyError, StopIteration, IndexError):
                place = f"{word!r}, word {len(slots) + 1} of the text, finds nothing to do"
                raise ValueError(
                    f"{place}; use F0, and B0 or BW0, once a micro-batch, and W after B"
                ) from None
            slot += [forward._replace(kind=k) for k in kind]
            if kind == "B":
                waiting.append(forward)
        slots.append(tuple(slot))
    left = [p for passes in todo.values() for p in passes] + list(waiting)
    if left:
        raise ValueError(
            f"the text leaves {len(left)} passes undone; it needs F, B and W of each micro-batch"
        )
    return slots


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards. GPipe, arXiv:1811.06965."""
    return _one_way(stages, micro_batches, lambda device: "F0 " * micro_batches + "BW0 " * micro_batches)


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """1F1B: as soon as there is a backward to do, one forward, one backward. PipeDream-Flush, arXiv:2006.09503.

    A device takes in no more micro-batches than there are stages from its own to the last.
    """

    def order(device: int) -> str:
        ahead = min(stages - 1 - device, micro_batches)
        return "F0 " * ahead + "F0 BW0 " * (micro_batches - ahead) + "BW0 " * ahead

    return _one_way(stages, micro_batches, order)


def zero_bubble(stages: int, micro_batches: int) -> Schedule:
    """ZB-H1, which V3 calls ZB1P: 1F1B whose W wait, on device d until d more micro-batches have had their B.

    The gradient reaches the first device earlier, and W fills what was idle at the end. arXiv:2401.10241 §2.1.
    """
    if micro_batches < stages:
        raise ValueError(f"micro_batches={micro_batches} is fewer than stages={stages}; use {stages} or more")

    def order(device: int) -> str:
        ahead = stages - 1 - device
        steady = micro_batches - stages + 1
        return "F0 " * ahead + "F0 B0 " * device + "F0 B0 W " * steady + "B0 W " * ahead + "W " * device

    return _one_way(stages, micro_batches, order)


def _one_way(stages: int, micro_batches: int, order: Callable[[int], str]) -> Schedule:
    _check(stages, micro_batches)
    return [read(order(device), stream(device, stages, range(micro_batches))) for device in range(stages)]


def dualpipe(stages: int, micro_batches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at either end, so that each device holds two stages.

    The order is that of github.com/deepseek-ai/DualPipe in eight steps. Stream 0 enters at the end that is nearer to
    the device, stream 1 at the far one.
    """
    _check(stages, micro_batches, even=True)
    if micro_batches % 2 or micro_batches < 2 * stages:
        fix = max(2 * stages, micro_batches + micro_batches % 2)
        raise ValueError(f"micro_batches={micro_batches} is odd or fewer than 2 · {stages} stages; use {fix}")
    half = micro_batches // 2
    schedule = []
    for device in range(stages):
        outer = min(device, stages - 1 - device)  # devices between this one and its end of the pipeline
        inner = stages // 2 - 1 - outer  # and between it and the middle
        steps = [
            "F0 " * (2 * inner),
            "F0 F1 " * (outer + 1),
            "B1 W F1 " * inner,
            "F0&BW1 F1&BW0 " * (half - stages + outer + 1),
            "BW1 F1&BW0 " * inner,
            # as many again, whole or not, streams 1 and 0 in turn; the second half leave their W for the end
            "".join(f"{'BW' if i <= outer else 'B'}{1 - i % 2} " for i in range(2 * outer + 2)),
            "W B0 " * inner,
            "W " * (outer + 1),
        ]
        if inner == 0:  # apart, the first backward in the middle ends sooner, and all others wait for it
            steps[3] = steps[3].replace("F0&BW1", "F0 BW1", 1)
        first, second = (stream(device, stages, range(i * half, (i + 1) * half), direction=i) for i in (0, 1))
        near_and_far = (first, second) if device < stages // 2 else (second, first)
        schedule.append(read("".join(steps), *near_and_far))
    return schedule


def _check(stages: int, micro_batches: int, even: bool = False) -> None:
    for name, value in (("stages", stages), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1; use 1 or more")
    if even and stages % 2:
        raise ValueError(f"stages={stages} is odd, and DualPipe's devices work in pairs; use {stages + 1}")


# --- time


@dataclass(frozen=True)
class Event:
    """A slot that takes place, from `start` to `end`."""

    start: Number
    end: Number
    slot: Slot


Timeline = list[list[Event]]  # for each device


def needs(p: Pass, stages: int) -> list[Pass]:
    """What has to be done before a pass: F after F of the stage before; B after F, and B of the next; W after B."""
    if p.kind == "F":
        return [p._replace(stage=p.stage - 1)] if p.stage else []
    if p.kind == "W":
        return [p._replace(kind="B")]
    return [p._replace(kind="F")] + ([p._replace(stage=p.stage + 1)] if p.stage < stages - 1 else [])


def simulate(schedule: Schedule, durations: Durations | None = None) -> Timeline:
    """Each device does its slots in their order, each as soon as what it needs is there. Time starts at 0.

    Raises ValueError for a pass that is listed twice, or that waits for one which never comes.
    """
    for p, times in Counter(p for slots in schedule for slot in slots for p in slot).items():
        if times > 1:
            raise ValueError(
                f"{p.kind} of micro-batch {p.micro_batch} on stage {p.stage} is listed {times} times; list it once"
            )
    durations, stages = durations or Durations(), len(schedule)
    done: dict[Pass, Number] = {}
    timeline = [[] for _ in schedule]
    moved, stuck = True, None
    while moved:
        moved, stuck = False, None
        for device, (slots, events) in enumerate(zip(schedule, timeline, strict=True)):
            for slot in slots[len(events) :]:
                # in one slot, a W may follow its B; all else has to be there before
                wanted = [(p, q) for p in slot for q in needs(p, stages) if p.kind != "W" or q not in slot]
                missing = [pair for pair in wanted if pair[1] not in done]
                if missing:
                    stuck = device, *missing[0]
                    break
                arrivals = [done[q] + durations.send * (p.stage != q.stage) for p, q in wanted]
                start = max([events[-1].end if events else 0, *arrivals])
                events.append(Event(start, start + durations.of(slot), slot))
                done |= dict.fromkeys(slot, events[-1].end)
                moved = True
    if stuck:
        device, p, q = stuck
        raise ValueError(
            f"deadlock: device {device} waits with {p.kind} of micro-batch {p.micro_batch} on stage {p.stage} for "
            f"{q.kind} of micro-batch {q.micro_batch} on stage {q.stage}, which never comes; put that one earlier"
        )
    return timeline


def makespan(timeline: Timeline) -> Number:
    """Time from the start of the whole to its end."""
    return max(event.end for events in timeline for event in events)


@dataclass(frozen=True)
class Bubble:
    """What a schedule costs a device."""

    time: Number  # idle between the start of the whole and its end
    share: float  # of the whole
    parameters: int  # held, in those of a stage
    activations: int  # held at most, in those of a micro-batch in a stage


def bubble(timeline: Timeline) -> list[Bubble]:
    """Of each device. Activations count from the start of F to the end of W, though a backward gives some free."""
    whole = makespan(timeline)
    devices = []
    for events in timeline:
        idle = whole - sum(event.end - event.start for event in events)
        held = peak = 0
        for event in events:
            held += kinds(event.slot).count("F")
            peak = max(peak, held)
            held -= kinds(event.slot).count("W")
        devices.append(Bubble(idle, idle / whole, len({p.stage for e in events for p in e.slot}), peak))
    return devices


# --- what is published

METHODS = {"GPipe": gpipe, "1F1B": one_f_one_b, "ZB1P": zero_bubble, "DualPipe": dualpipe}


def published_bubble(method: str, stages: int, durations: Durations | None = None) -> Number:
    """Idle time of a device by formula, without sending: Table 2 of arXiv:2412.19437, and GPipe's, which is 1F1B's.

    With this module's names, where Table 2's B is B + W:

        GPipe, 1F1B   (PP - 1) (F + B + W)        exact for all durations and any M
        ZB1P          (PP - 1) (F + B - W)        exact if W ≤ F and W ≤ B; else more, by min(F, B, W) in W's place
        DualPipe      (PP/2 - 1) (F&B + B - 2W)   exact if F = B ≥ W, for the two devices in the middle

    In the order of its repository, and F&B up to F + B + W, DualPipe's middle idles for

        (PP/2 - 1) (F&B - W - min(B, W)) + max((PP/2 - 1) F, (PP/2 - 1) B - F)

    For F < B ≥ W that is less than published, by up to one F: the middle's first pair is not overlapped. If it were,
    the formula would be exact for all F ≤ B ≥ W. For F > B it is more than published. Where F&B saves time, devices
    further out have fewer pairs than the middle, and idle less by what each of these would have saved.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} has no formula here; use one of {list(METHODS)}")
    _check(stages, micro_batches=1, even=method == "DualPipe")
    d = durations or Durations()
    if method == "ZB1P":
        return (stages - 1) * (d.F + d.B - d.W)
    if method == "DualPipe":
        return (stages // 2 - 1) * (d.pair + d.B - 2 * d.W)
    return (stages - 1) * (d.F + d.B + d.W)
